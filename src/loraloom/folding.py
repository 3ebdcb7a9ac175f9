"""Folding adapters into a base model on disk: shard by shard, without making the model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind, is_finite
from loraloom.checkpoint import INDEX, Checkpoint, as_matrix
from loraloom.experts import holds_experts, owner_of
from loraloom.folders import refuse_taken, whole_folder, write_text
from loraloom.modalities import text_only as of_text
from loraloom.ops.checks import Weights, check_linear, checked_weights
from loraloom.ops.extras import frozen_of
from loraloom.ops.merge import effective
from loraloom.registry import UnknownName
from loraloom.safefile import DTYPES, FLOATS, Writer, sha256
from loraloom.store import CONFIG, RECORD, hashing, written_as
from loraloom.stream import ahead

_TIED = "{key} is input embedding and output head in one (tied weights), {path} only one of them; untie the base first"
_BLOCK = 1 << 20  # entries of a weight that are worked on at once
_KINDS = (".json", ".jsonl", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".vocab", ".bpe", ".yaml", ".yml", "")


def fold(
    adapters: Sequence[Adapter],
    base: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    dtype: str | None = None,
    extras: str = "refuse",
    text_only: bool = False,
    overwrite: bool = False,
    command: str = "",
) -> Path:
    """Write the base model with ``W + sum_i w_i D_i`` for every adapted weight W; memory holds a few tensors.

    D is the effective update: the delta of LoRA, ``W * BA`` of HiRA, ``m (W + BA) / |W + BA| - W`` of DoRA; each is
    exact, and adapters of different kinds may be folded together. Sums are formed in float32 at least and rounded once
    to the type in which the weight is stored. Parameters without an adapter, and the files of configuration and
    tokenizer, are copied.

    An embedding that is also the output head (tied weights) is refused: the adapter changes it in one place only.
    Whole weights of another vocabulary size are taken over if one adapter holds all that have that size.

    Args:
        adapters: at least one.
        base: folder of the base model (safetensors, one file or shards).
        out: the new folder.
        weights: one per adapter, or such a list for every module path; 1 each by default, which is what using them
            together does.
        dtype: ``fp32``, ``bf16``, ``fp16`` or ``fp64``: convert all floating point parameters; by default each keeps
            its own.
        extras: trained biases and ``modules_to_save``, where several adapters hold some: ``refuse``, or ``average``:
            ``W + sum_i w_i (E_i - W)`` over the adapters that hold them. Those of a single adapter replace W, whatever
            its weight.
        text_only: of MokA adapters, fold what they do to text; what they do to other modalities is lost.
        overwrite: replace a folder that loraloom wrote.
        command: the command line, for the record.

    Returns:
        The folder. Its ``loraloom.json`` tells what was folded into what, with hashes.

    Raises:
        AdapterMismatch: a module or parameter that the base does not have, or has in another size.
        UnsupportedKind: a quantised base or weight, a tied embedding, a start that moves the base weights, parameters
            of experts; MokA without ``text_only``, or another kind with it.
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
    if text_only:
        adapters = [of_text(adapter) for adapter in adapters]
    given = checked_weights([1.0] * len(adapters) if weights is None else weights, adapters)
    if dtype is not None and dtype not in FLOATS:
        raise UnknownName("dtype", dtype, list(FLOATS))
    checkpoint = Checkpoint(base)
    plan = _planned(adapters, given, checkpoint, extras)
    shards = checkpoint.shards
    with whole_folder(target, **kind) as work, hashing(*adapters) as hashes, ThreadPoolExecutor(1) as pool:
        hashed = {name: pool.submit(sha256, file.path) for name, file in shards.items()}
        try:
            written = {name: _write_shard(checkpoint, name, work, plan, FLOATS.get(dtype or "")) for name in shards}
            _copy_rest(checkpoint, work, _settled(checkpoint, plan, dtype), sum(size for size, _ in written.values()))
            read = {name: made.result() for name, made in hashed.items()}
        finally:
            pool.shutdown(cancel_futures=True)
        inputs = [dict(adapter.provenance) for adapter in adapters]
        inputs.append({"name": checkpoint.folder.absolute().name, "sha256": read})
        arguments = {"weights": given, "dtype": dtype, "extras": extras, **({"text_only": True} if text_only else {})}
        made = {"operation": "fold", "arguments": arguments, "inputs": inputs}
        record = written_as(Adapter({}, {}, provenance=made), command, hashes)
        record["sha256"] = {name: digest for name, (_, digest) in written.items()}
        write_text(work / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
    return target


class _Source(NamedTuple):
    """One adapter's part in a parameter: the module, or the path of a whole tensor."""

    at: int  # which adapter
    weight: float
    adapter: Adapter
    name: str


@dataclass
class _Change:
    """What becomes of one parameter."""

    shape: tuple[int, ...]
    turned: bool = False
    average: bool = False
    part: str = "weight"
    updates: list[_Source] = field(default_factory=list)
    replaced: list[_Source] = field(default_factory=list)


# --- what changes -----------------------------------------------------------------------------------------------------
def _planned(adapters: Sequence[Adapter], weights: Weights, checkpoint: Checkpoint, extras: str) -> dict[str, _Change]:
    """The change of every parameter that changes; all that can be wrong is found here, but for numbers."""
    if extras not in ("refuse", "average"):
        raise UnknownName("extras", extras, ["refuse", "average"])
    frozen = frozen_of(adapters)
    holders = sum(any(path not in frozen for path in adapter.extras) for adapter in adapters)
    if holders > 1 and extras == "refuse":
        raise AdapterMismatch(f"{holders} adapters hold whole tensors; extras='average' averages them")
    if holders > 1 and isinstance(weights, dict):
        raise ValueError("weights that differ by module do not say how to average whole tensors of several adapters")
    plan: dict[str, _Change] = {}
    for at, adapter in enumerate(adapters):
        for path in adapter.extras:
            weight = 1.0 if isinstance(weights, dict) else weights[at]
            _plan_extra(plan, checkpoint, _Source(at, weight, adapter, path), holders > 1)
    _check_vocabulary(plan, checkpoint)
    for at, adapter in enumerate(adapters):
        check_linear(replace(adapter, config={**adapter.config, "use_dora": False}), "fold")  # DoRA is, on its base
        for name in adapter.modules:
            weight = (weights[name] if isinstance(weights, dict) else weights)[at]
            _plan_module(plan, checkpoint, _Source(at, weight, adapter, name))
    return plan


def _plan_extra(plan: dict[str, _Change], checkpoint: Checkpoint, source: _Source, average: bool) -> None:
    """Enter a whole tensor; one that the base has already (PEFT stores frozen embeddings too) changes nothing."""
    _, _, adapter, path = source
    held = adapter.extras[path]

    def twins() -> list[str | None]:  # only where they count: all are read for it
        others = (other for other in adapter.extras if other != path and _same(adapter.extras[other], held))
        return [_key(checkpoint, other) for other in others]

    try:
        key = checkpoint.parameter(path)
    except AdapterMismatch:
        # The head of tied weights is not in the base. PEFT may store it all the same, equal to the embedding.
        if any(twin is not None and checkpoint.tied(twin) for twin in twins()):
            return
        raise
    if checkpoint.shape(key) == tuple(held.shape) and _same(checkpoint[key], held):
        return
    if checkpoint.tied(key) and None not in twins():
        raise UnsupportedKind(_TIED.format(key=key, path=path))
    if average and (not held.is_floating_point() or checkpoint.shape(key) != tuple(held.shape)):
        raise AdapterMismatch(
            f"{key} is {checkpoint.shape(key)} in the base, {tuple(held.shape)} {held.dtype} in an adapter:"
            " that has no average"
        )
    change = plan.setdefault(key, _Change(tuple(held.shape), average=average))
    _check_once(change.replaced, source, key)
    change.replaced.append(source)


def _check_once(sources: Sequence[_Source], source: _Source, key: str) -> None:
    for other in sources:
        if other.at == source.at:
            raise AdapterMismatch(f"{source.name} and {other.name} of one adapter are both {key}")


def _key(checkpoint: Checkpoint, path: str) -> str | None:
    """The name under which the files hold a parameter; None if they do not."""
    try:
        return checkpoint.parameter(path)
    except AdapterMismatch:
        return None


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _check_vocabulary(plan: Mapping[str, _Change], checkpoint: Checkpoint) -> None:
    """Tensors of another size than in the base: only the first one may differ, in all that have the old size."""
    resized = {key: change.shape for key, change in plan.items() if change.shape != checkpoint.shape(key)}
    if not resized:
        return
    first = next(iter(resized))
    old = checkpoint.shape(first)[:1]
    for key, shape in resized.items():
        there = checkpoint.shape(key)
        if there[1:] != shape[1:] or there[:1] != old or shape[:1] != resized[first][:1] or not old:
            raise AdapterMismatch(f"{key} is {there} in the base, {shape} in the adapter")
    rest = [key for key in checkpoint if checkpoint.shape(key)[:1] == old and key not in resized]
    if rest or old[0] != _vocabulary(checkpoint.config):
        why = f"{rest[0]} keeps {old[0]} rows" if rest else f"{old[0]} is not the size of the vocabulary"
        raise AdapterMismatch(
            f"{first} is {checkpoint.shape(first)} in the base, {resized[first]} in the adapter; {why}"
        )


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    held = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return held if isinstance(held, int) else None


def _plan_module(plan: dict[str, _Change], checkpoint: Checkpoint, source: _Source) -> None:
    at, _, adapter, name = source
    if owner_of(name) != name and holds_experts(adapter.config, owner_of(name)):
        raise UnsupportedKind(
            f"cannot fold {name}: PEFT's names do not tell which parameter of its module an expert's update is of, nor"
            " how that is stored; merge it in PEFT (merge_and_unload)"
        )
    for part in ["weight", *(["bias"] if adapter.config.get("lora_bias") else [])]:
        key = checkpoint.parameter(f"{name}.{part}")
        if checkpoint.stored(key) not in {DTYPES[dtype] for dtype in FLOATS.values()}:
            raise UnsupportedKind(f"{key} is stored as {checkpoint.stored(key)}, which cannot be added to exactly")
        change = plan.setdefault(key, _Change(checkpoint.shape(key)))
        change.part = part
        _check_once(change.updates, source, key)
        if part == "bias" and change.shape != (adapter.shape(name).out,):
            raise AdapterMismatch(f"{key} is {change.shape}, the update of {name} has {adapter.shape(name).out} rows")
        if part == "weight":
            if checkpoint.tied(key):
                raise UnsupportedKind(_TIED.format(key=key, path=name))
            turned = checkpoint.turned(key, adapter, name, change.shape)
            if change.updates and turned != change.turned:
                raise AdapterMismatch(f"{key} is stored in x out for one adapter, out x in for another")
            change.turned = turned
            alone = not change.average and all(other.at == at for other in change.replaced)
            if adapter.kind != "lora" and not alone:
                raise UnsupportedKind(f"{key}: an update of {adapter.kind} depends on a weight that adapters replace")
        change.updates.append(source)


# --- the numbers ------------------------------------------------------------------------------------------------------
def _changed(weight: Tensor, change: _Change, wanted: torch.dtype) -> Tensor:
    """One parameter with its change: formed in float32 at least, a block of rows at a time, and rounded once.

    Where the type stays, the result takes the place of ``weight``, which nobody else holds.
    """
    working = torch.promote_types(torch.promote_types(weight.dtype, wanted), torch.float32)
    start = weight
    if change.average:
        start = weight.to(working)
        for _, by, adapter, path in change.replaced:
            start = start + by * (adapter.extras[path].to(working) - weight.to(working))
    elif change.replaced:
        start = change.replaced[0].adapter.extras[change.replaced[0].name]
    if not change.updates:
        return start.to(wanted)
    result = weight if start is weight and weight.dtype == wanted else torch.empty(change.shape, dtype=wanted)
    parts = [(by, adapter.kind, _prepared(adapter.modules[name], working)) for _, by, adapter, name in change.updates]
    if change.part == "bias":
        total = start.to(working)
        for by, _, factors in parts:
            if factors.bias is not None:
                total = total + by * factors.scale * factors.bias.to(working)
        return total.to(wanted)
    source, into = as_matrix(start, change.turned), as_matrix(result, change.turned)
    step = max(1, _BLOCK // source.shape[1])
    for at in range(0, source.shape[0], step):
        rows = slice(at, at + step)
        block = source[rows].to(working, copy=True)
        total = block if all(kind == "lora" for _, kind, _ in parts) else block.clone()
        for by, kind, factors in parts:
            if kind == "lora":
                total.addmm_(factors.B[rows], factors.A, alpha=by * factors.scale)
            else:
                magnitude = None if factors.magnitude is None else factors.magnitude[rows]
                piece = replace(factors, B=factors.B[rows], magnitude=magnitude)
                total.add_(effective(block, kind, piece), alpha=by)
        into[rows] = total.to(wanted)
    return result


def _prepared(factors: Factors, working: torch.dtype) -> Factors:
    return replace(factors, B=factors.B.to(working), A=factors.A.to(working))


# --- the files --------------------------------------------------------------------------------------------------------
def _write_shard(
    checkpoint: Checkpoint, shard: str, work: Path, plan: Mapping[str, _Change], dtype: torch.dtype | None
) -> tuple[int, str]:
    """Write one shard; the bytes of its tensors, and its sha256."""
    file = checkpoint.shards[shard]

    def made(key: str) -> Tensor:
        weight = file.read(key)
        wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        if key not in plan and wanted == weight.dtype:
            return weight
        result = _changed(weight, plan[key], wanted) if key in plan else weight.to(wanted)
        if not is_finite(result) and (key in plan or is_finite(weight)):
            raise ValueError(f"{key}: the result is not finite as {DTYPES[wanted]}; another dtype may hold it")
        return result

    size = 0
    room = 1024 + sum(len(key) + 150 for key in file.shapes)
    with (
        contextlib.closing(Writer(work / shard, room)) as writer,
        contextlib.closing(ahead(made, file.shapes)) as parts,
    ):
        for key, tensor in parts:
            writer.add(key, tensor)
            size += tensor.numel() * tensor.element_size()
        writer.finish({"format": "pt"} | file.metadata)
    return size, sha256(work / shard)


def _settled(checkpoint: Checkpoint, plan: Mapping[str, _Change], dtype: str | None) -> dict[str, Any]:
    """The configuration, with the type and the size of the vocabulary that the weights now have."""
    config: dict[str, Any] = json.loads(json.dumps(checkpoint.config))
    sizes = [change.shape[0] for key, change in plan.items() if change.shape != checkpoint.shape(key)]
    if sizes:
        (config if "vocab_size" in config else config["text_config"])["vocab_size"] = sizes[0]
    if dtype is not None:
        name = str(FLOATS[dtype]).removeprefix("torch.")
        said = False
        for part in (config, *(part for part in config.values() if isinstance(part, dict))):
            for key in ("torch_dtype", "dtype"):
                if isinstance(part.get(key), str):
                    part[key], said = name, True
        if not said:
            config["dtype"] = name
    return config


def _copy_rest(checkpoint: Checkpoint, work: Path, config: Mapping[str, Any], size: int) -> None:
    """Configuration, tokenizer and what else lies there; not weights in other forms, adapters, nor code that runs."""
    for item in sorted(checkpoint.folder.iterdir()):
        if not item.is_file() or item.suffix not in _KINDS or item.name.startswith("."):
            continue
        if item.name in (RECORD, CONFIG) or item.name.endswith(".index.json"):
            continue
        if item.name == "config.json" and config != checkpoint.config:
            write_text(work / item.name, json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(item, work / item.name)
    if (checkpoint.folder / INDEX).is_file():
        index = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
        write_text(work / INDEX, json.dumps(index, indent=2) + "\n")
