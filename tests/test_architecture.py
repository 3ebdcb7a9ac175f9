"""The house as drawn in the design, read from the sources: who imports whom, how long things are, what is told."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loraloom
from loraloom.registry import Registry

ROOT = Path(loraloom.__file__).parent

# Level of a module: that of the longest name below that it equals or lies in. A module imports only lower levels, its
# own package, and what ALLOWED names.
LEVELS = {
    "loraloom": 6,  # the facade: the public names; nobody inside imports it
    "loraloom.__main__": 5,
    "loraloom.adapter": 0,
    "loraloom.registry": 0,
    "loraloom.packages": 0,
    "loraloom.untrusted": 0,
    "loraloom.folders": 0,
    "loraloom.safefile": 0,
    "loraloom.stream": 0,
    "loraloom.fused": 0,
    "loraloom.intervals": 0,
    "loraloom.starts": 0,
    "loraloom.experts": 1,
    "loraloom.modalities": 1,
    "loraloom.layout": 1,
    "loraloom.store": 1,
    "loraloom.checkpoint": 1,
    "loraloom.masks": 1,
    "loraloom.measured": 1,
    "loraloom.contents": 1,
    "loraloom.ops": 1,
    "loraloom.strategies": 1,
    "loraloom.tasks": 1,
    "loraloom.models": 1,
    "loraloom.overview": 2,
    "loraloom.folding": 2,
    "loraloom.extraction": 2,
    "loraloom.serving": 2,
    "loraloom.probes": 2,
    "loraloom.report": 2,
    "loraloom.integrations": 3,
    "loraloom.listing": 4,
    "loraloom.recipe": 4,
    "loraloom.calibration": 4,
    "loraloom.probing": 4,
    "loraloom.planning": 4,
    "loraloom.run": 4,
    "loraloom.demo": 4,
    "loraloom.sweep": 4,
    "loraloom.cli": 5,
}
# Sideways imports at the same level: (importer, imported), each a prefix, with the reason.
ALLOWED = {
    ("loraloom.ops", "loraloom.strategies.units"): "pruning keeps and drops the same units that CoTo switches",
    ("loraloom.strategies.sparse", "loraloom.ops"): "a mask is chosen as pruning chooses entries",
    ("loraloom.strategies.sparse", "loraloom.masks"): "LoRI trains what a mask keeps",
    ("loraloom.strategies.sparse", "loraloom.experts"): "a mask is over B as PEFT stores it",
    ("loraloom.masks", "loraloom.experts"): "the same",
    ("loraloom.safefile", "loraloom.untrusted"): "a safetensors file begins with JSON",
    ("loraloom.modalities", "loraloom.strategies.modality"): "a MokA adapter's configuration holds its plan",
    ("loraloom.experts", "loraloom.modalities"): "the other kind of modules that PEFT stores as one",
    ("loraloom.layout", "loraloom.modalities"): "the same",
    ("loraloom.ops", "loraloom.modalities"): "the plan of a merged MokA adapter",
    ("loraloom.ops", "loraloom.experts"): "which parameters the adapters of a merge adapt",
    ("loraloom.layout", "loraloom.experts"): "how PEFT packs the experts of one parameter",
    ("loraloom.store", "loraloom.experts"): "the same",
    ("loraloom.store", "loraloom.layout"): "reading a folder is files (store) plus what PEFT's names mean (layout)",
    ("loraloom.run", "loraloom.recipe"): "a recipe, run",
    ("loraloom.planning", "loraloom.recipe"): "a recipe, reckoned up",
    ("loraloom.run", "loraloom.calibration"): "the LoRI part of a run",
    ("loraloom.calibration", "loraloom.recipe"): "a recipe, run",
    ("loraloom.demo", "loraloom.recipe"): "the demo is a few recipes, run",
    ("loraloom.demo", "loraloom.run"): "the demo is a few recipes, run",
    ("loraloom.sweep", "loraloom.recipe"): "a sweep is many recipes, run",
    ("loraloom.sweep", "loraloom.run"): "a sweep is many recipes, run",
    ("loraloom.__main__", "loraloom.cli"): "python -m loraloom",
}
FACTS_OF_THE_FACADE = {"__version__"}  # what anybody may import from `loraloom` itself

# Where a framework may be named: at module level or inside functions; "functions" means inside functions only.
FRAMEWORKS = {
    "peft": {"loraloom.integrations": "anywhere"},
    "accelerate": {"loraloom.integrations": "anywhere"},
    "lightning": {"loraloom.integrations": "anywhere"},
    "pytorch_lightning": {"loraloom.integrations": "anywhere"},
    "trl": {"loraloom.integrations": "anywhere"},
    "lm_eval": {"loraloom.integrations": "functions"},
    "diffusers": {"loraloom.integrations": "functions"},
    "transformers": {"loraloom.integrations": "anywhere", "loraloom.models": "functions"},
}
HEAVY = ("transformers", "peft", "plotly", "datasets", "sklearn", "accelerate")
VAGUE = {"utils", "util", "common", "misc", "helpers", "helper", "base", "tools"}
MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def dotted(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(path): path for path in sorted(ROOT.rglob("*.py"))}


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def level(name):
    """Level of a module, or None where the design has no place for it."""
    homes = [home for home in LEVELS if within(name, home) and (home != "loraloom" or name == "loraloom")]
    return LEVELS[max(homes, key=len)] if homes else None


def home(name):
    """Top package of a module: loraloom.ops for loraloom.ops.merge_methods.ties."""
    return ".".join(name.split(".")[:2])


def imports(source, name, is_package):
    """(what is imported, line, whether inside a function) of a source; names that are modules count as such."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            keep = len(parts) - node.level + is_package
            start = ".".join([*parts[:keep], *([node.module] if node.module else [])]) if node.level else node.module
            for alias in node.names:
                deeper = f"{start}.{alias.name}"
                is_name_of_facade = start == "loraloom" and deeper not in FILES
                found.append((deeper if deeper in FILES or is_name_of_facade else start, node.lineno, inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(source), False)
    return found


def wrong_directions(name, source, is_package=False):
    """Imports of a module that go up or sideways, as sentences."""
    faults = []
    for imported, line, _ in imports(source, name, is_package):
        if not within(imported, "loraloom") or name == "loraloom":
            continue
        if imported.removeprefix("loraloom.") in FACTS_OF_THE_FACADE:
            continue
        target = imported if imported in FILES else "loraloom"  # a public name is the facade's
        if level(target) is not None and level(name) is not None and level(target) < level(name):
            continue
        if home(target) == home(name) != "loraloom" or any(
            within(name, here) and within(target, there) for here, there in ALLOWED
        ):
            continue
        # The command line and the demo speak the public language on purpose: they use what users use.
        if target == "loraloom" and level(name) in (4, 5):
            continue
        faults.append(f"{name}:{line} (level {level(name)}) imports {target} (level {level(target)})")
    return faults


def framework_faults(name, source, is_package=False):
    """Imports of frameworks in places that must not know them, as sentences."""
    faults = []
    for target, line, inside in imports(source, name, is_package):
        for framework, places in FRAMEWORKS.items():
            if within(target, framework):
                allowed = [how for place, how in places.items() if within(name, place)]
                if not allowed or (allowed == ["functions"] and not inside):
                    faults.append(f"{name}:{line} imports {target}")
    return faults


def each_source():
    return [(name, path.read_text(encoding="utf-8"), path.name == "__init__.py") for name, path in FILES.items()]


def test_every_module_has_a_place():
    assert [name for name in FILES if level(name) is None] == []


def test_modules_import_only_lower_levels():
    assert [fault for source in each_source() for fault in wrong_directions(*source)] == []


def test_frameworks_stay_at_the_edge():
    assert [fault for source in each_source() for fault in framework_faults(*source)] == []


@pytest.mark.parametrize(
    ("name", "source", "faulty"),
    [
        ("loraloom.store", "from loraloom.integrations import gates", True),
        ("loraloom.store", "def f():\n    import loraloom.cli", True),
        ("loraloom.store", "if TYPE_CHECKING:\n    from loraloom.probes.connectivity import Connectivity", True),
        ("loraloom.store", "from loraloom import cli", True),
        ("loraloom.store", "from loraloom import Adapter", True),
        ("loraloom.store", "from . import cli", True),
        ("loraloom.ops.merge", "from ..tasks import load_task", True),
        ("loraloom.strategies.progressive", "from loraloom.ops.merge import merge", True),
        ("loraloom.adapter", "from loraloom.registry import Registry", True),
        ("loraloom.integrations.peft", "from loraloom.recipe import read", True),
        ("loraloom.store", "from loraloom import __version__, adapter", False),
        ("loraloom.store", "from .adapter import Adapter\nimport torch", False),
        (
            "loraloom.ops.merge",
            "from .merge_methods import merge_methods\nfrom loraloom.strategies.units import group",
            False,
        ),
        ("loraloom.recipe", "from loraloom.integrations.trainer import fit", False),
    ],
)
def test_the_instrument_sees_wrong_directions(name, source, faulty):
    assert bool(wrong_directions(name, source)) is faulty


@pytest.mark.parametrize(
    ("name", "source", "faulty"),
    [
        ("loraloom.store", "def f():\n    from peft import PeftConfig", True),
        ("loraloom.tasks", "import transformers", True),
        ("loraloom.models.minilm", "from transformers import AutoModel", True),
        ("loraloom.recipe", "def f():\n    from transformers import Trainer", True),
        ("loraloom.models.minilm", "def f():\n    from transformers.models.bert import BertModel", False),
        ("loraloom.integrations.trainer", "from transformers import Trainer\nimport peft.tuners", False),
        ("loraloom.store", "import peftlike", False),
    ],
)
def test_the_instrument_sees_frameworks(name, source, faulty):
    assert bool(framework_faults(name, source)) is faulty


# Importing is light --------------------------------------------------------------------------------------------------


def test_import_is_light_and_leaves_chance_alone():
    script = (
        "import sys, random, numpy, torch\n"
        "def chance():\n"
        "    states = torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()\n"
        "    return *states, torch.get_num_threads()\n"
        "before = chance()\n"
        "import loraloom\n"
        "assert chance() == before\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
    assert done.stderr == ""


# Sizes and names -----------------------------------------------------------------------------------------------------


def test_files_are_short():
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: size for name, size in sizes.items() if size > MOST_LINES} == {}


def test_functions_are_short():
    """From ``def`` to the last line, less the docstring: what it says of itself may be as long as it needs."""
    long = {}
    for name, source, _ in each_source():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
                if (size := node.end_lineno - node.lineno + 1 - told) > MOST_FUNCTION_LINES:
                    long[f"{name}.{node.name}"] = size
    assert long == {}


def test_only_a_process_without_threads_is_forked():
    """pytest's own has some: what a test starts comes from tests/processes.py."""
    here = Path(__file__).parent
    forks = ("os." + "fork(", 'get_context("' + 'fork")')
    found = [path.name for path in here.rglob("*.py") if any(word in path.read_text() for word in forks)]
    assert found == ["child.py"]


def test_no_module_has_a_vague_name():
    assert [name for name in FILES if name.rsplit(".", 1)[-1].strip("_") in VAGUE] == []


# Documentation -------------------------------------------------------------------------------------------------------

EVIDENCE = re.compile(
    r">>>|Example:|Source:|https?://|arXiv|et al\.|\b(19|20)\d\d\b|,\s+(section|sec\.|eq\.|appendix)", re.IGNORECASE
)


def undocumented(things):
    """Names of public functions and classes whose docstring is missing, or has neither an example nor a source."""
    faults = []
    for name, thing in things.items():
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        own = thing.__doc__ or ""
        if inspect.isclass(thing) and issubclass(thing, Exception):
            if not own:
                faults.append(name)  # an error says what it means; it needs no example
            continue
        if not EVIDENCE.search(own):
            faults.append(name)
    return faults


def test_public_names_are_documented_with_an_example_or_a_source():
    public = getattr(loraloom, "__all__", ())
    assert public, "loraloom has no __all__"
    assert undocumented({name: getattr(loraloom, name) for name in public}) == []


def test_the_instrument_sees_missing_documentation():
    def bare():
        """Do it."""

    def silent():
        pass

    def good():
        """Do it (Yadav et al. 2023, section 3)."""

    assert undocumented({"bare": bare, "silent": silent, "good": good}) == ["bare", "silent"]


def registries():
    """Every Registry that a package folder of the house holds, by that package's name."""
    found = {}
    for name, path in FILES.items():
        if path.name == "__init__.py" and name != "loraloom":
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, Registry) and value.package == name:
                    found[name] = value
    return found


def test_the_registries_of_the_design_are_there():
    expected = {"strategies.schedules", "ops.merge_methods", "tasks", "models", "probes"}
    assert {f"loraloom.{name}" for name in expected} <= set(registries())


def test_every_file_of_a_registry_folder_registers_something_or_serves_those_that_do():
    """A file with a forgotten decorator is found: nobody imports it."""
    idle = []
    used = {target for name, source, is_package in each_source() for target, _, _ in imports(source, name, is_package)}
    for package, registry in registries().items():
        homes = {technique.function.__module__ for technique in registry.values()}
        files = [
            name for name, path in FILES.items() if name.rsplit(".", 1)[0] == package and path.name != "__init__.py"
        ]
        idle += [name for name in files if name not in homes and name not in used]
    assert idle == []


def test_every_technique_has_a_summary_and_a_paper():
    bare = [
        f"{registry.what} {name}"
        for registry in registries().values()
        for name, technique in registry.items()
        if not technique.summary or not technique.paper.startswith("https://")
    ]
    assert bare == []


def test_the_tables_above_name_what_is_there():
    """Levels, permissions and exceptions must not outlive the modules they are about."""
    assert [name for name in LEVELS if name not in FILES] == []
    used = [
        (here, there)
        for name, source, is_package in each_source()
        for target, _, _ in imports(source, name, is_package)
        for here, there in ALLOWED
        if within(name, here) and within(target, there)
    ]
    assert [pair for pair in ALLOWED if pair not in used] == []
