"""PEFT folder <-> Adapter: the only code that knows the file format. Safetensors only, lazy, streamed, atomic.

``load`` reads the configuration and the header of the weight file; factors are read, checked and cloned when asked for,
through a mapping that stays on the file that was opened, even if the folder is replaced later. ``save`` streams module
by module into a folder that appears whole or not at all (``folders.py``).

Provenance. A loaded adapter's ``provenance`` is what its ``loraloom.json`` says, plus where it was read from (``path``,
``name``, ``stamp``, ``targets``). Operators read no files; they nest what they were given::

    provenance = {"operation": "merge", "arguments": {...}, "seed": 0, "inputs": [a.provenance, b.provenance]}

and may add a free ``record``. ``save`` walks that tree and writes it to ``loraloom.json``: every input read from a
folder gets the sha256 of its weight file, and its local path is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

from loraloom.adapter import Adapter, Factors, UnsupportedKind
from loraloom.experts import as_stored
from loraloom.folders import UNFINISHED, refuse_taken, whole_folder, write_text
from loraloom.layout import (
    Source,
    assembled,
    check_config,
    digest,
    extra_key,
    matched,
    module_tensors,
    paths_of,
    rank_of,
    scale_of,
    settled,
)
from loraloom.safefile import PICKLES, SafeFile, Writer, sha256
from loraloom.stream import ahead
from loraloom.untrusted import read_json, short

CONFIG, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "loraloom.json", "README.md"
_LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_LOCAL = ("path", "stamp", "targets")  # of provenance: what only this run can use
_FORM: dict[tuple[str, ...], type] = {  # of provenance, outer ones first
    **{("arguments",): dict, ("record",): dict, ("inputs",): list, ("arguments", "data"): dict},
    **{("record", key): dict for key in ("lori", "error", "norm")},
}
_MULTIMODAL = {"CAUSAL_LM": "AutoModelForMultimodalLM"}


def load(path: str | Path) -> Adapter:
    """Open a PEFT folder (LoRA, rsLoRA, DoRA, HiRA, MokA) lazily: only the configuration and the header are read now.

    A convolution's A is held as r x (in * kernel), with ``kernel``. An embedding's delta is embedding_dim x
    num_embeddings, the transpose of its weight. ``fan_in_fan_out`` changes nothing: delta is always out x in.

    Raises:
        FileNotFoundError: no such folder, configuration or weight file.
        UnsupportedKind: another PEFT type, a variant that factors cannot express, or a pickle.
        ValueError: the folder is damaged; also on reading a module with NaN or infinite entries.

    Example:
        >>> load("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: nowhere is not a folder with an adapter (adapter_config.json and adapter_model.safetensors)
    """
    folder = Path(path)
    if folder.name.endswith(UNFINISHED):
        raise ValueError(f"{folder} is an unfinished write of a process that was killed; remove it")
    if not folder.is_dir():
        kind = ValueError if folder.exists() else FileNotFoundError
        raise kind(f"{folder} is not a folder with an adapter ({CONFIG} and {WEIGHTS})")
    config = read_json(folder / CONFIG)
    where = folder / WEIGHTS
    if not where.is_file():
        pickles = sorted(file.name for file in folder.glob("*.*") if file.suffix in PICKLES)
        if pickles:
            raise UnsupportedKind(f"{folder / pickles[0]} is a pickle, which can run code; allowed: {WEIGHTS}")
        raise FileNotFoundError(f"{where} is not there")
    opened = SafeFile(where)
    check_config(config, str(folder / CONFIG))
    past = _past(read_json(folder / RECORD), str(folder / RECORD)) if (folder / RECORD).exists() else {}
    name = folder.absolute().name if folder.is_absolute() else folder.as_posix()
    provenance = {**past, "path": str(folder.resolve()), "name": name, "stamp": _stamp(where)}
    return assembled(config, Source(str(where), opened.shapes, opened.read), provenance)


# --- provenance -------------------------------------------------------------------------------------------------------
def _past(node: Any, where: str) -> dict[str, Any]:
    """Provenance that others wrote, of the form that we rely on; without what only the run that read it can know."""
    if not isinstance(node, dict):
        raise ValueError(f"{where}: expected a JSON object, got {short(node)}")
    for path, kind in _FORM.items():
        held = reduce(lambda value, key: value.get(key, {}), path[:-1], node).get(path[-1], kind())
        if not isinstance(held, kind):
            what = "an object" if kind is dict else "a list"
            raise ValueError(f"{where}: {'.'.join(path)} must be {what}, got {short(held)}")
    kept = {key: value for key, value in node.items() if key not in _LOCAL}
    return kept | ({"inputs": [_past(one, where) for one in node["inputs"]]} if "inputs" in node else {})


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def fingerprint(source: Adapter | str | Path) -> str:
    """sha256 of the weight file of a folder, or of the folder from which an adapter was loaded.

    Raises:
        ValueError: the adapter was not loaded from a folder, or its file has changed since.
        FileNotFoundError: the weight file is not there.
    """
    if not isinstance(source, Adapter):
        return sha256(Path(source) / WEIGHTS)
    path, stamp = source.provenance.get("path"), source.provenance.get("stamp")
    if path is None:
        raise ValueError(f"{source!r} was not loaded from a folder; only a weight file has a fingerprint")
    if _stamp(Path(path) / WEIGHTS) != stamp:
        raise ValueError(f"{Path(path) / WEIGHTS} has changed since it was loaded")
    return fingerprint(path)


Hashes = Mapping[str, "Future[str | None]"]


def _sources(node: Any) -> dict[str, list[int]]:
    """Path and stamp of every folder that a provenance was read from."""
    if isinstance(node, Mapping):
        found = {str(node["path"]): list(node["stamp"])} if "stamp" in node else {}
        node = list(node.values())
    else:
        found = {}
    for value in node if isinstance(node, list | tuple) else ():
        found |= _sources(value)
    return found


def _hash(path: str, stamp: list[int]) -> str | None:
    """sha256 of an input; None where it was replaced or removed since it was loaded: its name remains."""
    file = Path(path) / WEIGHTS
    return fingerprint(path) if file.is_file() and _stamp(file) == stamp else None


def _recorded(node: Any, hashes: Hashes) -> Any:
    """Provenance as it is written: folders get their hash, what only this run can use is left out."""
    if isinstance(node, Mapping):
        kept = {str(key): _recorded(value, hashes) for key, value in node.items() if key not in _LOCAL}
        if "stamp" in node and str(node["path"]) in hashes:
            kept["sha256"] = hashes[str(node["path"])].result()
        return kept
    return [_recorded(value, hashes) for value in node] if isinstance(node, list | tuple) else node


@contextlib.contextmanager
def hashing(*adapters: Adapter) -> Iterator[Hashes]:
    """Hashes of all folders that the adapters came from, made in another thread meanwhile."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="loraloom-hash")
    try:
        sources = {path: stamp for adapter in adapters for path, stamp in _sources(adapter.provenance).items()}
        yield {path: pool.submit(_hash, path, stamp) for path, stamp in sources.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def written_as(adapter: Adapter, command: str, hashes: Hashes) -> dict[str, Any]:
    """The provenance of an adapter as it is written.

    Raises:
        ValueError: it holds values that are not plain JSON.
    """
    from loraloom import __version__

    past = adapter.provenance
    made = {"operation": "copy", "inputs": [past]} if "stamp" in past else past
    record = {**_recorded(made, hashes), "loraloom": __version__, "command": command}
    try:
        json.dumps(record)
    except TypeError as error:
        raise ValueError(f"provenance must be plain JSON values: {error}") from error
    return record


def knows_targets(adapter: Adapter) -> bool:
    """Whether the configuration selects just the modules that are there: they are those of one of the inputs."""
    mark = digest(adapter.config, adapter.modules)

    def found(node: Any) -> bool:
        if isinstance(node, Mapping):
            return node.get("targets") == mark or any(found(value) for value in node.values())
        return isinstance(node, list | tuple) and any(found(value) for value in node)

    return found(adapter.provenance)


# --- saving -----------------------------------------------------------------------------------------------------------
def as_configured(config: Mapping[str, Any], name: str, factors: Factors) -> bool:
    """Whether the configuration already gives this module its rank and, exactly, its scale."""
    rank = factors.rank // factors.experts
    asked = [(matched(config.get("rank_pattern"), path, rank), path) for path in paths_of(config, name)]
    return all((r, rank_of(config, path), scale_of(config, path)) == (rank, rank, factors.scale) for r, path in asked)


def _fill(adapter: Adapter, writer: Writer) -> tuple[dict[str, int], bool]:
    """Write every tensor, module by module, the next made meanwhile; the ranks, and whether scales are baked.

    Whether the configuration says every scale is known only after the last module. Until then a module that it does
    describe keeps its scale, and is multiplied in place if it turns out that scales are baked after all.
    """
    ranks: dict[str, int] = {}
    later: dict[str, float] = {}
    bake = False

    def made(name: str) -> tuple[Factors, bool, dict[str, Any]]:
        factors = adapter.modules[name]
        kept = as_configured(adapter.config, name, factors)
        return factors, kept, module_tensors(adapter.config, name, factors if kept else factors.baked())

    stream = ((name, made(name)) for name in adapter.modules) if adapter.heavy else ahead(made, adapter.modules)
    with contextlib.closing(stream):
        for name, (factors, kept, tensors) in stream:
            ranks[name] = factors.rank // factors.experts
            bake = bake or not kept
            for part, (key, tensor) in tensors.items():
                writer.add(key, tensor)
                if kept and part in ("B", "bias") and factors.scale != 1.0:
                    later[key] = factors.scale
    for path in adapter.extras:
        writer.add(extra_key(adapter, path), adapter.extras[path])
    if bake:
        for key, scale in later.items():
            writer.rescale(key, scale)
    return ranks, bake


def _room(adapter: Adapter) -> int:
    """Bytes that the header of the weight file takes, at most, if names are what they usually are."""
    return (
        1024 + sum(4 * (len(name) + 150) for name in adapter.modules) + sum(len(name) + 150 for name in adapter.extras)
    )


def _card(config: Mapping[str, Any], record: Mapping[str, Any], name: str, modules: int) -> str:
    """README.md: front matter that the Hub and PEFT users expect, what it is, how it was made, how to load it."""
    base = str(config.get("base_model_name_or_path") or "")
    kind = str(config["peft_type"]).lower()
    tags = [*([f"base_model:adapter:{base}"] if base else []), kind, *(["dora"] if config.get("use_dora") else [])]
    front = [f"base_model: {json.dumps(base)}"] if base else []
    front += [
        f"library_name: {'loraloom' if kind == 'moka' else 'peft'}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in [*tags, "loraloom"]),
    ]
    inputs = [f"- `{node.get('name')}`, sha256 `{node.get('sha256')}`" for node in record.get("inputs", [])]
    made = [f"Operation: `{record['operation']}`", ""] if record.get("operation") else []
    made += [f"Command: `{record['command']}`", ""] if record["command"] else []
    loader = _LOADERS.get(str(config.get("task_type")), "AutoModel")
    attached = f"PeftModel.from_pretrained(model, {json.dumps(name)})"
    needed = "from peft import PeftModel"
    if kind == "moka":  # PEFT alone does not know it
        loader = _MULTIMODAL.get(str(config.get("task_type")), "AutoModelForSpeechSeq2Seq")
        attached, needed = f"ll.attach(model, {json.dumps(name)})", "import loraloom as ll"
    load_it = [
        "```python",
        needed,
        f"from transformers import {loader}",
        "",
        f"model = {loader}.from_pretrained({json.dumps(base or 'BASE MODEL')})",
        f"model = {attached}",
        "```",
    ]
    what = f"{'DoRA' if config.get('use_dora') else kind.upper()} adapter of {modules} modules"
    lines = ["---", *front, "---", "", f"# {name}", "", what + (f" for `{base}`." if base else "."), ""]
    lines += ["## How it was made", "", f"Written by loraloom {record['loraloom']}; `{RECORD}` has every detail.", ""]
    lines += [*made, *(["Inputs:", "", *inputs, ""] if inputs else []), "## How to load it", "", *load_it]
    return "\n".join(lines) + "\n"


def save(
    adapter: Adapter,
    path: str | Path,
    *,
    overwrite: bool = False,
    command: str = "",
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write an ordinary PEFT folder with provenance and a model card; peak memory is that of one module.

    Where the configuration does not say the modules' scales, they are multiplied into B and alpha becomes the rank.
    Where it does not select the modules that are there, it names them one by one.

    Args:
        adapter: what to write; its modules are read once, in order.
        path: the new folder; its parents are made.
        overwrite: replace an adapter folder that is there.
        command: the command line, for the record.
        beside: writes further files into the folder before it appears.

    Raises:
        FileExistsError: ``path`` is there, or holds more than an adapter, or another process was faster.
        AdapterMismatch, ValueError: the adapter is not whole (no modules, NaN, a magnitude without DoRA).

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> a = Adapter({"peft_type": "LORA"}, {"layers.0.q": Factors(torch.ones(3, 1), torch.ones(1, 2), scale=0.5)})
        >>> with TemporaryDirectory() as folder:
        ...     again = load(save(a, f"{folder}/a"))
        ...     again.modules["layers.0.q"].delta().sum()
        tensor(3.)
    """
    adapter = as_stored(adapter)
    target = Path(os.path.realpath(path))  # unlike resolve, no trouble with links in a circle
    kind: Any = {"overwrite": overwrite, "mark": CONFIG, "what": "an adapter folder"}
    refuse_taken(target, **kind)
    check_config(adapter.config, "configuration")
    if not adapter.modules:
        raise ValueError(f"{adapter!r} has no modules; PEFT cannot load such an adapter")
    written_as(adapter, command, {})  # a record that cannot be written is refused before the work, not after
    with whole_folder(target, **kind) as work, hashing(adapter) as hashes:
        with contextlib.closing(Writer(work / WEIGHTS, _room(adapter))) as writer:
            ranks, bake = _fill(adapter, writer)
            writer.finish({"format": "pt"})
        record = written_as(adapter, command, hashes)  # now: operators note what they saw while modules were read
        config = settled(adapter.config, ranks, bake=bake, retarget=not knows_targets(adapter))
        write_text(work / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
        write_text(work / CARD, _card(config, record, target.name, len(ranks)))
        write_text(work / CONFIG, json.dumps(dict(sorted(config.items())), indent=2) + "\n")  # patterns in order
        if beside is not None:
            beside(work)
    return target
