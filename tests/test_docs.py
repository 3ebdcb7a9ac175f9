"""The generated pages: complete, the same every time, and as the code says now."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraloom.listing import KINDS, registry

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "generate.py"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate_docs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_as_the_code_says(generate):
    assert generate.stale(ROOT / "docs") == [], "run `make docs`"


def test_pages_do_not_depend_on_the_process(generate, tmp_path):
    """Another process with another hash seed writes the same bytes."""
    subprocess.run(
        [sys.executable, str(SCRIPT), "--folder", str(tmp_path)],
        check=True,
        capture_output=True,
        env={"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "40"},
    )
    written = {str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.*")}
    assert written == generate.documents()


def test_every_technique_is_in_its_page(generate):
    pages = generate.documents()
    for kind in KINDS:
        for name, technique in registry(kind).items():
            assert re.search(rf"^\| \[?{re.escape(name)}\b", pages[f"{kind}.md"], re.MULTILINE)
            if "\n" in (technique.function.__doc__ or "").strip():
                assert f"\n## {name}\n" in pages[f"{kind}.md"]
            assert generate.cell(technique.summary) in pages[f"{kind}.md"]
            assert technique.paper in pages[f"{kind}.md"]


def test_every_command_and_option_is_in_its_page(generate):
    """What `--help` of each command shows is what the page shows."""
    from typer.testing import CliRunner

    from loraloom.cli import app

    page = generate.documents()["cli.md"]
    commands = [command.name for command in app.registered_commands]
    for group in app.registered_groups:
        inner = group.typer_instance
        commands += [f"{inner.info.name} {command.name}" for command in inner.registered_commands]
    assert {"merge", "probe forgetting", "probe shapley"} <= set(commands)
    assert re.findall(r"^## loraloom (.+)$", page, re.MULTILINE) == commands
    for name in commands:
        shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown)) - {"--help"}
        part = page.split(f"\n## loraloom {name}\n")[1].split("\n## ")[0]
        assert {option for option in options if f"`{option}`" not in part} == set()


def test_tables_are_whole_and_links_lead_somewhere(generate):
    pages = generate.documents()
    for name, text in pages.items():
        if not name.endswith(".md"):
            assert text.startswith("<svg ")
            continue
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
        anchors = {
            re.sub(r"[^\w\- ]", "", line[3:]).replace(" ", "-") for line in text.splitlines() if line[:3] == "## "
        }
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert target[1:] in anchors if target.startswith("#") else target in pages


def _anchor(heading: str) -> str:
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(" ", "-")


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_and_headings_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_anchor, headings), target


def test_tables_of_results_are_as_their_pages_say(capsys):
    tables = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "results" / "tables.py")
    module = importlib.util.module_from_spec(tables)
    sys.modules["tables"] = module  # dataclasses look their module up
    tables.loader.exec_module(module)
    assert module.main(["--check"]) == 0, capsys.readouterr().out
    figure = {"LoRA": module.Figure(0.5, None, (None, None), (None, None))}
    found = {("alone",): {**figure, "CoTo": module.Figure(0.6, 0.1, (0.04, 0.16), (-0.1, 0.3))}}
    module.figures = {"here": found}.__getitem__
    assert module.table("gaps", "here").splitlines()[-1] == "| alone | .500 | **+.100 [+.040, +.160]** |"
    assert module.table("means", "here").splitlines()[-1] == "| alone | .500 | .600 ▲ |"
    assert module.table("both", "here").splitlines()[-1].endswith("| **+.100 [+.040, +.160]** | [-.100, +.300] |")
    with pytest.raises(ValueError, match="compares its arms with LoRA"):
        module.table("gaps", "here", "CoTo", "LoRA")


def test_check_fails_on_what_is_stale_and_writing_mends_it(generate, tmp_path, capsys):
    assert generate.main(["--check", "--folder", str(tmp_path)]) == 1
    assert generate.main(["--folder", str(tmp_path)]) == 0
    assert generate.main(["--check", "--folder", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "cli.md").write_text("by hand", encoding="utf-8")
    (tmp_path / "schedules" / "gone.svg").write_text("<svg/>", encoding="utf-8")
    (tmp_path / "tasks.md").unlink()
    assert generate.main(["--check", "--folder", str(tmp_path)]) == 1
    complaints = capsys.readouterr().err
    assert [line.split()[0] for line in complaints.splitlines()] == [
        "docs/tasks.md",
        "docs/cli.md",
        "docs/schedules/gone.svg",
    ]
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == "by hand"  # a check writes nothing
    assert generate.main(["--folder", str(tmp_path)]) == 0
    assert generate.stale(tmp_path) == []
    assert not (tmp_path / "schedules" / "gone.svg").exists()
