"""PEFT folder <-> Adapter: the only code that knows the file format. Safetensors only, lazy, streamed, atomic.

``load`` reads the configuration and the header of the weight file; factors are read, checked and cloned when asked for,
through a mapping that stays on the file that was opened, even if the folder is replaced later. ``save`` streams module
by module into a temporary sibling folder and renames it, so a folder appears whole or not at all. A killed ``save``
leaves ``.NAME.XXXX.loraloom-tmp`` behind (``load`` refuses it; remove it), and, killed in the instant between the two
renames of an overwrite, the old adapter as ``.NAME.XXXX.loraloom-old``.

Provenance. A loaded adapter's ``provenance`` is what its ``loraloom.json`` says, plus where it was read from (``path``,
``name``, ``stamp``, ``targets``). Operators read no files; they nest what they were given::

    provenance = {"operation": "merge", "arguments": {...}, "seed": 0, "inputs": [a.provenance, b.provenance]}

and may add a free ``record``. ``save`` walks that tree and writes it to ``loraloom.json``: every input read from a
folder gets the sha256 of its weight file, and its local path is left out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraloom.adapter import Adapter, UnsupportedKind
from loraloom.layout import (
    Source,
    as_configured,
    assembled,
    check_config,
    extra_key,
    knows_targets,
    module_tensors,
    settled,
)

CONFIG, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "loraloom.json", "README.md"
UNFINISHED, REPLACED = ".loraloom-tmp", ".loraloom-old"
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
_LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def load(path: str | Path) -> Adapter:
    """Open a PEFT folder (LoRA, rsLoRA, DoRA, HiRA) lazily: only the configuration and the header are read now.

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
    config = _json(folder / CONFIG)
    where = folder / WEIGHTS
    if not where.is_file():
        pickles = sorted(file.name for file in folder.glob("*.*") if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickles:
            raise UnsupportedKind(f"{folder / pickles[0]} is a pickle, which can run code; allowed: {WEIGHTS}")
        raise FileNotFoundError(f"{where} is not there")
    try:
        opened = safe_open(where, framework="pt")
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{where} is not a whole safetensors file: {str(error).splitlines()[0]}") from error
    check_config(config, str(folder / CONFIG))
    past = _json(folder / RECORD) if (folder / RECORD).exists() else {}
    if not isinstance(past, dict):
        raise ValueError(f"{folder / RECORD}: expected a JSON object, got {type(past).__name__}")
    name = folder.absolute().name if folder.is_absolute() else folder.as_posix()
    provenance = {**past, "path": str(folder.resolve()), "name": name, "stamp": _stamp(where)}
    # Cloned: the tensors of one open file share their memory, and a caller may write to what it was given.
    return assembled(config, Source(str(where), shapes, lambda key: opened.get_tensor(key).clone()), provenance)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {str(error).splitlines()[0]}") from error


# --- provenance -------------------------------------------------------------------------------------------------------
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
        with (Path(source) / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    path, stamp = source.provenance.get("path"), source.provenance.get("stamp")
    if path is None:
        raise ValueError(f"{source!r} was not loaded from a folder; only a weight file has a fingerprint")
    if _stamp(Path(path) / WEIGHTS) != stamp:
        raise ValueError(f"{Path(path) / WEIGHTS} has changed since it was loaded")
    return fingerprint(path)


def _recorded(node: Any, *, hashed: bool) -> Any:
    """Provenance as it is written: folders get their hash, what only this run can use is left out."""
    if isinstance(node, Mapping):
        local = ("path", "stamp", "targets")
        kept = {str(key): _recorded(value, hashed=hashed) for key, value in node.items() if key not in local}
        if "stamp" in node and hashed:
            file = Path(node["path"]) / WEIGHTS
            same = file.is_file() and _stamp(file) == list(node["stamp"])
            # An input that was replaced or removed since it was loaded can no longer be hashed; its name remains.
            kept["sha256"] = fingerprint(node["path"]) if same else None
        return kept
    return [_recorded(value, hashed=hashed) for value in node] if isinstance(node, list | tuple) else node


def _record(adapter: Adapter, command: str, *, hashed: bool = True) -> dict[str, Any]:
    from loraloom import __version__

    past = adapter.provenance
    made = {"operation": "copy", "inputs": [past]} if "stamp" in past else past
    record = {**_recorded(made, hashed=hashed), "loraloom": __version__, "command": command}
    try:
        json.dumps(record)
    except TypeError as error:
        raise ValueError(f"provenance must be plain JSON values: {error}") from error
    return record


# --- saving -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Piece:
    """Where one tensor lies in the spool, and what to multiply it with if scales are baked after all."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    scale: float = 1.0


def _put(spool: BinaryIO, tensor: Tensor, what: str, scale: float = 1.0) -> _Piece:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{what} has type {tensor.dtype}; allowed: {', '.join(map(str, _DTYPES))}")
    start = spool.tell()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        spool.write(flat.view(torch.uint8).numpy().data)
    return _Piece(tensor.dtype, tuple(tensor.shape), start, spool.tell() - start, scale)


def _fill(adapter: Adapter, spool: BinaryIO) -> tuple[dict[str, _Piece], dict[str, int], bool]:
    """Write every tensor to the spool, module by module; what was written, the ranks, and whether scales are baked.

    Whether the configuration says every scale is known only after the last module. Until then a module that it does
    describe keeps its scale, and remembers it.
    """
    pieces: dict[str, _Piece] = {}
    ranks: dict[str, int] = {}
    bake = False
    for name in adapter.modules:
        factors = adapter.modules[name]
        ranks[name] = factors.rank
        kept = as_configured(adapter.config, name, factors)
        bake = bake or not kept
        for part, (key, tensor) in module_tensors(adapter.config, name, factors if kept else factors.baked()).items():
            later = factors.scale if kept and part in ("B", "bias") else 1.0
            pieces[key] = _put(spool, tensor, f"module {name}", later)
    for path in adapter.extras:
        pieces[extra_key(adapter, path)] = _put(spool, adapter.extras[path], path)
    return pieces, ranks, bake


def _write_safetensors(pieces: Mapping[str, _Piece], spool: BinaryIO, path: Path, bake: bool) -> str:
    """Make the safetensors file of the spool, tensor by tensor; its sha256. Wide types first: so all are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(pieces, key=lambda key: (-pieces[key].dtype.itemsize, key))
    end = 0
    for key in order:
        piece = pieces[key]
        span = [end, end := end + piece.size]
        header[key] = {"dtype": _DTYPES[piece.dtype], "shape": list(piece.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    total = hashlib.sha256()
    with path.open("wb") as out:
        for chunk in (len(text).to_bytes(8, "little"), text):
            total.update(chunk)
            out.write(chunk)
        for key in order:
            piece = pieces[key]
            spool.seek(piece.start)
            data: Any = bytearray(piece.size)
            spool.readinto(data)  # type: ignore[attr-defined]
            if bake and piece.scale != 1.0:
                data = (torch.frombuffer(data, dtype=piece.dtype) * piece.scale).view(torch.uint8).numpy().data
            total.update(data)
            out.write(data)
        _sync(out)
    return total.hexdigest()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.write(text)
        _sync(out)


def _card(config: Mapping[str, Any], record: Mapping[str, Any], name: str, modules: int) -> str:
    """README.md: front matter that the Hub and PEFT users expect, what it is, how it was made, how to load it."""
    base = str(config.get("base_model_name_or_path") or "")
    kind = str(config["peft_type"]).lower()
    tags = [*([f"base_model:adapter:{base}"] if base else []), kind, *(["dora"] if config.get("use_dora") else [])]
    front = [f"base_model: {json.dumps(base)}"] if base else []
    front += ["library_name: peft", "tags:", *(f"- {json.dumps(tag)}" for tag in [*tags, "loraloom"])]
    inputs = [f"- `{node.get('name')}`, sha256 `{node.get('sha256')}`" for node in record.get("inputs", [])]
    made = [f"Operation: `{record['operation']}`", ""] if record.get("operation") else []
    made += [f"Command: `{record['command']}`", ""] if record["command"] else []
    loader = _LOADERS.get(str(config.get("task_type")), "AutoModel")
    load_it = [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"model = {loader}.from_pretrained({json.dumps(base or 'BASE MODEL')})",
        f"model = PeftModel.from_pretrained(model, {json.dumps(name)})",
        "```",
    ]
    what = f"{'DoRA' if config.get('use_dora') else kind.upper()} adapter of {modules} modules"
    lines = ["---", *front, "---", "", f"# {name}", "", what + (f" for `{base}`." if base else "."), ""]
    lines += ["## How it was made", "", f"Written by loraloom {record['loraloom']}; `{RECORD}` has every detail.", ""]
    lines += [*made, *(["Inputs:", "", *inputs, ""] if inputs else []), "## How to load it", "", *load_it]
    return "\n".join(lines) + "\n"


def _refuse(target: Path, overwrite: bool) -> None:
    """Refuse a path that is taken, or that --overwrite must not remove: only an adapter folder may be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; give another path or --overwrite (overwrite=True)")
    held = [] if not target.is_dir() else list(target.iterdir())
    plain = target.is_dir() and not any(item.is_dir() and not item.is_symlink() for item in held)
    if not plain or (held and not (target / CONFIG).is_file()):
        raise FileExistsError(f"{target} is not just an adapter folder, so it is not overwritten; remove it yourself")


def _publish(work: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name; an old one is put aside first and comes back if that fails."""
    _sync_folder(work)
    aside = work.with_name(work.name.removesuffix(UNFINISHED) + REPLACED)
    if overwrite:
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside)
    try:
        work.rename(target)
    except OSError as error:
        if aside.exists() and not target.exists():
            aside.rename(target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(f"{target} was written by another process meanwhile; use --overwrite") from None
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(target.parent)


def save(adapter: Adapter, path: str | Path, *, overwrite: bool = False, command: str = "") -> Path:
    """Write an ordinary PEFT folder with provenance and a model card; peak memory is that of one module.

    Where the configuration does not say the modules' scales, they are multiplied into B and alpha becomes the rank.
    Where it does not select the modules that are there, it names them one by one.

    Args:
        adapter: what to write; its modules are read once, in order.
        path: the new folder; its parents are made.
        overwrite: replace an adapter folder that is there.
        command: the command line, for the record.

    Raises:
        FileExistsError: ``path`` is there, or holds more than an adapter, or another process was faster.
        AdapterMismatch, ValueError: the adapter is not whole (no modules, NaN, a magnitude without DoRA).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from loraloom.adapter import Factors
        >>> a = Adapter({"peft_type": "LORA"}, {"layers.0.q": Factors(torch.ones(3, 1), torch.ones(1, 2), scale=0.5)})
        >>> with TemporaryDirectory() as folder:
        ...     again = load(save(a, f"{folder}/a"))
        ...     again.modules["layers.0.q"].delta().sum()
        tensor(3.)
    """
    target = Path(path).resolve()
    _refuse(target, overwrite)
    check_config(adapter.config, "configuration")
    if not adapter.modules:
        raise ValueError(f"{adapter!r} has no modules; PEFT cannot load such an adapter")
    _record(adapter, command, hashed=False)  # a record that cannot be written is refused before the work, not after
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name[:80]}.{secrets.token_hex(8)}{UNFINISHED}")
    work.mkdir()
    try:
        with (work / "spool").open("w+b") as spool:
            pieces, ranks, bake = _fill(adapter, spool)
            record = _record(adapter, command)  # now: operators may note what they saw while modules were read
            record["sha256"] = _write_safetensors(pieces, spool, work / WEIGHTS, bake)
        (work / "spool").unlink()
        config = settled(adapter.config, ranks, bake=bake, retarget=not knows_targets(adapter))
        _write_text(work / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
        _write_text(work / CARD, _card(config, record, target.name, len(ranks)))
        _write_text(work / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        _publish(work, target, overwrite)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return target
