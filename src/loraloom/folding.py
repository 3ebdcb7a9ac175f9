"""Folding adapters into a base model on disk: shard by shard, without making the model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind, is_finite
from loraloom.checkpoint import INDEX, Checkpoint, as_matrix, in_place_of
from loraloom.folders import refuse_taken, whole_folder, write_text
from loraloom.ops.checks import check_linear, checked_weights
from loraloom.ops.merge import effective
from loraloom.registry import UnknownName
from loraloom.safefile import DTYPES, Writer
from loraloom.store import RECORD, hashing, written_as
from loraloom.stream import ahead

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHORT = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def fold(
    adapters: Sequence[Adapter],
    base: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    extras: str = "refuse",
    overwrite: bool = False,
    command: str = "",
) -> Path:
    """Write the base model with ``W + sum_i w_i D_i`` for every adapted weight W; memory holds a few tensors.

    D is the effective update: the delta of LoRA, ``W * BA`` of HiRA, ``m (W + BA) / |W + BA| - W`` of DoRA; each is
    exact, and adapters of different kinds may be folded together. Sums are formed in float32 at least and rounded once
    to the type in which the weight is stored. Parameters without an adapter, and all other files of the folder, are
    copied.

    Args:
        adapters: at least one.
        base: folder of the base model (safetensors, one file or shards).
        out: the new folder.
        weights: one per adapter; 1 each by default, which is what using them together does.
        dtype: ``fp32``, ``bf16``, ``fp16`` or ``fp64``: convert all floating point parameters; by default each keeps
            its own.
        extras: trained biases and ``modules_to_save``, where several adapters hold some: ``refuse``, or ``average``:
            ``W + sum_i w_i (E_i - W)`` over the adapters that hold them. Those of a single adapter replace W.
        overwrite: replace a folder that this function wrote.
        command: the command line, for the record.

    Returns:
        The folder. Its ``loraloom.json`` tells what was folded, with hashes.

    Raises:
        AdapterMismatch: a module or parameter that the base does not have, or has in another size.
        UnsupportedKind: a quantised base or weight; DoRA on an embedding; a start that moves the base weights.
        FileExistsError: ``out`` is there.
        ValueError: weights that do not fit, or a result that is not finite (fp16 overflows at 65504).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import load_file, save_file
        >>> a = Adapter({"peft_type": "LORA"}, {"fc": Factors(B=torch.ones(2, 1), A=torch.ones(1, 3), scale=0.5)})
        >>> with TemporaryDirectory() as folder:
        ...     Path(f"{folder}/base").mkdir()
        ...     save_file({"fc.weight": torch.ones(2, 3)}, f"{folder}/base/model.safetensors")
        ...     folded = fold([a], f"{folder}/base", f"{folder}/folded", weights=[2.0])
        ...     load_file(folded / "model.safetensors")["fc.weight"]
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    target = Path(out).resolve()
    kind: Any = {"overwrite": overwrite, "mark": RECORD, "what": "a folder that loraloom wrote"}
    refuse_taken(target, **kind)
    given = [float(weight) for weight in ([1.0] * len(adapters) if weights is None else weights)]
    checked_weights(given, adapters)
    if dtype is not None and dtype not in _SHORT:
        raise UnknownName("dtype", dtype, list(_SHORT))
    checkpoint = Checkpoint(base)
    plan = _planned(adapters, given, checkpoint, extras)
    made = Adapter({}, {}, provenance=_provenance(adapters, given, checkpoint, dtype, extras))
    with whole_folder(target, **kind) as work, hashing(*adapters) as hashes:
        size = 0
        for name in checkpoint.shards:
            size += _write_shard(checkpoint, name, work, plan, _SHORT.get(dtype or ""))
        _copy_rest(checkpoint, work, dtype, size)
        record = written_as(made, command, hashes)
        write_text(work / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
    return target


@dataclass
class _Change:
    """What becomes of one parameter."""

    updates: list[tuple[float, Adapter, str, str]] = field(default_factory=list)  # weight, adapter, module, part
    replaced: list[tuple[float, Adapter, str]] = field(default_factory=list)  # weight, adapter, path of the extra


def _planned(
    adapters: Sequence[Adapter], weights: Sequence[float], checkpoint: Checkpoint, extras: str
) -> dict[str, _Change]:
    """The change of every parameter that changes; all that can be wrong is found here."""
    if extras not in ("refuse", "average"):
        raise UnknownName("extras", extras, ["refuse", "average"])
    holders = sum(bool(adapter.extras) for adapter in adapters)
    if holders > 1 and extras == "refuse":
        raise AdapterMismatch(f"{holders} adapters hold whole tensors; extras='average' averages them")
    plan: dict[str, _Change] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.kind != "dora":
            check_linear(adapter, "fold")
        for name in adapter.modules:
            parts = ["weight", *(["bias"] if adapter.config.get("lora_bias") else [])]
            for part in parts:
                key = checkpoint.parameter(f"{name}.{part}")
                if checkpoint.stored(key) not in _FLOATS:
                    raise UnsupportedKind(
                        f"{key} is stored as {checkpoint.stored(key)}, which cannot be added to exactly"
                    )
                plan.setdefault(key, _Change()).updates.append((weight, adapter, name, part))
            _check_size(checkpoint, checkpoint.parameter(f"{name}.weight"), adapter, name)
        for path in adapter.extras:
            key = checkpoint.parameter(path)
            plan.setdefault(key, _Change()).replaced.append((weight if holders > 1 else 1.0, adapter, path))
    return plan


def _check_size(checkpoint: Checkpoint, key: str, adapter: Adapter, name: str) -> None:
    shape, (out, in_, _) = checkpoint.shape(key), adapter.shape(name)
    if sorted([shape[0], torch.Size(shape).numel() // shape[0]]) != sorted([out, in_]):
        raise AdapterMismatch(f"{key} is {shape}, the update of {name} is {out} x {in_}")


def _changed(weight: Tensor, key: str, change: _Change) -> Tensor:
    """One parameter with its change, in float32 at least."""
    working = torch.promote_types(weight.dtype, torch.float32)
    start = weight.to(working)
    total = start.clone()
    for by, adapter, path in change.replaced:
        held = adapter.extras[path].to(working)
        if held.shape != start.shape:
            raise AdapterMismatch(f"{key} is {tuple(start.shape)} in the base, {tuple(held.shape)} in the adapter")
        total += by * (held - start)
    for by, adapter, name, part in change.updates:
        factors = adapter.modules[name]
        if part == "bias":
            bias = factors.bias if factors.bias is not None else torch.zeros(factors.shape.out)
            total += by * factors.scale * bias.to(working)
            continue
        turned = bool(adapter.config.get("fan_in_fan_out"))
        total += by * in_place_of(start, _update(start, adapter, name, factors, turned), factors, turned)
    return total


def _update(start: Tensor, adapter: Adapter, name: str, factors: Factors, turned: bool) -> Tensor:
    """The effective update of one module, out x in."""
    matrix = as_matrix(start, factors, turned, name)
    if adapter.kind == "lora":
        return factors.scale * (factors.B.to(start.dtype) @ factors.A.to(start.dtype))
    if adapter.kind == "dora" and factors.embedding:
        raise UnsupportedKind(f"{name}: DoRA on an embedding has no out x in form")
    return effective(matrix, adapter.kind, replace(factors, B=factors.B.to(start.dtype), A=factors.A.to(start.dtype)))


def _write_shard(
    checkpoint: Checkpoint, shard: str, work: Path, plan: Mapping[str, _Change], dtype: torch.dtype | None
) -> int:
    """Write one shard; its bytes."""
    file = checkpoint.shards[shard]

    def made(key: str) -> Tensor:
        weight = file.read(key)
        wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        if key not in plan:
            return weight.to(wanted)
        result = _changed(weight, key, plan[key]).to(wanted)
        if not is_finite(result):
            raise ValueError(f"{key}: the result is not finite as {DTYPES[wanted]}; another dtype may hold it")
        return result

    size = 0
    room = 1024 + sum(len(key) + 150 for key in file.shapes)
    with contextlib.closing(Writer(work / shard, room)) as writer:
        for key, tensor in ahead(made, file.shapes):
            writer.add(key, tensor)
            size += tensor.numel() * tensor.element_size()
        writer.finish(file.metadata)
    return size


def _copy_rest(checkpoint: Checkpoint, work: Path, dtype: str | None, size: int) -> None:
    """Configuration, tokenizer and what else lies there; not weights in other forms, nor code that runs."""
    for item in sorted(checkpoint.folder.iterdir()):
        known = item.suffix in (".json", ".txt", ".model", ".jinja", ".md", ".jsonl")
        if not item.is_file() or not known or item.name in (RECORD, INDEX):
            continue
        if item.name == "config.json" and dtype is not None:
            name = str(_SHORT[dtype]).removeprefix("torch.")
            there = {key: name for key in ("torch_dtype", "dtype") if key in checkpoint.config} or {"dtype": name}
            write_text(work / item.name, json.dumps({**checkpoint.config, **there}, indent=2) + "\n")
        else:
            shutil.copyfile(item, work / item.name)
    if (checkpoint.folder / INDEX).is_file():
        index = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        write_text(work / INDEX, json.dumps(index, indent=2) + "\n")


def _provenance(
    adapters: Sequence[Adapter], weights: list[float], checkpoint: Checkpoint, dtype: str | None, extras: str
) -> dict[str, Any]:
    arguments = {"base": checkpoint.folder.name, "weights": weights, "dtype": dtype, "extras": extras}
    inputs = [dict(adapter.provenance) for adapter in adapters]
    return {"operation": "fold", "arguments": arguments, "inputs": inputs}
