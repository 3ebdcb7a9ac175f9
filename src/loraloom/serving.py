"""Exporting an adapter to what a server's loader accepts, verified by reading it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind, padded
from loraloom.experts import owner_of
from loraloom.folders import refuse_taken, whole_folder
from loraloom.registry import UnknownName
from loraloom.safefile import FLOATS
from loraloom.starts import moves_base
from loraloom.store import CONFIG, load, save

_FOLD = "fold it into the base model (loraloom fold)"
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_FIELDS = (
    *("peft_type", "base_model_name_or_path", "task_type", "inference_mode", "r", "lora_alpha", "target_modules"),
    *("bias", "modules_to_save", "use_rslora", "use_dora"),
)
# Layers whose frozen weight PEFT stores beside their factors; vLLM skips those copies.
_VLLM_COPIED = ("embed_tokens", "lm_head")


def export(
    adapter: Adapter,
    out: str | Path,
    *,
    target: str = "vllm",
    max_rank: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str = "",
) -> Path:
    """Write an adapter as a server's loader wants it, read it back and compare.

    ``vllm``: its loader knows ``r``, ``lora_alpha``, ``target_modules``, ``bias``, ``modules_to_save``, ``use_rslora``
    and ``use_dora``, and no pattern. So every scale is multiplied into B, and all modules get one rank that it allows
    (zero rows and columns fill up: the update is the same) with alpha equal to it. What it refuses is refused here,
    with what to do instead.

    ``peft``: the same adapter, of any kind, for readers that know ``r`` and ``lora_alpha`` alone: every scale is
    multiplied into B, all modules get the largest rank of any, and alpha is the rank.

    The folder appears only after it was read back and found to hold the same updates, to rounding.

    Args:
        adapter: LoRA for ``vllm``, any for ``peft``.
        out: the new folder.
        target: ``vllm`` or ``peft``.
        max_rank: refuse a larger rank (vLLM's ``--max-lora-rank``).
        dtype: ``fp32``, ``bf16``, ``fp16`` or ``fp64``; by default as it is.
        overwrite: replace an adapter folder that is there.
        command: the command line, for the record.

    Raises:
        UnsupportedKind: for ``vllm``, DoRA, HiRA, a bias of B, trained biases, ``modules_to_save``, convolutions,
            parameters of experts, or embeddings other than ``embed_tokens``.
        AdapterMismatch: what was read back is another update, as when fp16 makes small entries zero.
        FileExistsError: ``out`` is there.
        UnknownName, ValueError: no such target or dtype; a rank above ``max_rank`` or any that vLLM allows.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> one = Factors(B=torch.ones(3, 2), A=torch.ones(2, 4), scale=3.0)
        >>> a = Adapter({"peft_type": "LORA"}, {"layers.0.q_proj": one})
        >>> with TemporaryDirectory() as folder:
        ...     config = load(export(a, f"{folder}/served")).config
        ...     config["r"], config["lora_alpha"], config["target_modules"]
        (8, 8, ['layers.0.q_proj'])
    """
    if target not in TARGETS:
        raise UnknownName("target", target, list(TARGETS))
    if dtype is not None and dtype not in FLOATS:
        raise UnknownName("dtype", dtype, list(FLOATS))
    folder = Path(out).resolve()
    kind: Any = {"overwrite": overwrite, "mark": CONFIG, "what": "an adapter folder"}
    refuse_taken(folder, **kind)
    ready = TARGETS[target](adapter, max_rank, None if dtype is None else FLOATS[dtype])
    with whole_folder(folder, **kind) as work:
        made = save(ready, work / folder.name, command=command)
        _verify(adapter, load(made), target)
        for item in made.iterdir():
            item.rename(work / item.name)
        made.rmdir()
    return folder


def _for_vllm(adapter: Adapter, max_rank: int | None, dtype: torch.dtype | None) -> Adapter:
    if adapter.kind != "lora":
        how = "what it does to text alone folds (loraloom fold --text-only)" if adapter.kind == "moka" else _FOLD
        raise UnsupportedKind(f"vLLM loads no {adapter.kind} adapters; {how}")
    copied = [f"{name}.weight" for name in adapter.modules if name.rpartition(".")[2] in _VLLM_COPIED]
    whole = [path for path in adapter.extras if path not in copied]
    if whole or adapter.config.get("lora_bias"):
        what = next(iter(whole), "lora_bias")
        raise UnsupportedKind(f"vLLM loads no trained biases or whole modules ({what}); fold them in (loraloom fold)")
    start = adapter.config.get("init_lora_weights")
    if moves_base(start):
        raise UnsupportedKind(
            f"init_lora_weights={start!r} moves the base weights, which vLLM does not; convert it first"
        )
    packed = next((name for name in adapter.modules if owner_of(name) != name), None)
    if packed is not None:  # experts, or groups of a convolution
        raise UnsupportedKind(f"{packed}: vLLM's loader takes linear layers only; merge it in PEFT (merge_and_unload)")
    ranks = [adapter.shape(name).rank for name in adapter.modules]
    rank = next((allowed for allowed in _VLLM_RANKS if allowed >= max(ranks) and allowed > 1), None)
    if rank is None or (max_rank is not None and rank > max_rank):
        most = max_rank or _VLLM_RANKS[-1]
        raise ValueError(f"rank {max(ranks)} needs {rank or 'more'}, and at most {most} is allowed; compress it first")

    def read(name: str) -> Factors:
        factors = adapter.modules[name]
        if factors.kernel is not None or (factors.embedding and name.rpartition(".")[2] != "embed_tokens"):
            raise UnsupportedKind(
                f"{name}: vLLM's loader takes linear layers only, and embed_tokens; fold it in (loraloom fold)"
            )
        return _stored(_at_rank(factors, rank), dtype)

    config = {key: adapter.config.get(key) for key in ("base_model_name_or_path", "task_type")}
    config |= {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(adapter.modules),
    }
    config |= {"bias": "none", "modules_to_save": None, "use_rslora": False, "use_dora": False}
    modules = adapter.derived(tuple(adapter.modules), read, lambda name: adapter.shape(name)._replace(rank=rank))
    arguments = {"target": "vllm", "max_rank": max_rank, "dtype": str(dtype) if dtype else None}
    provenance = {"operation": "export", "arguments": arguments, "inputs": [dict(adapter.provenance)]}
    return Adapter(config, modules, {}, provenance)


def _for_peft(adapter: Adapter, max_rank: int | None, dtype: torch.dtype | None) -> Adapter:
    most = max((adapter.shape(name).rank for name in adapter.modules), default=0)
    if max_rank is not None and most > max_rank:
        raise ValueError(f"rank {most} is above {max_rank}; compress it first")
    modules = adapter.derived(
        tuple(adapter.modules),
        lambda name: _stored(_at_rank(adapter.modules[name], most), dtype),
        lambda name: adapter.shape(name)._replace(rank=most),
    )
    config = dict(adapter.config)
    if adapter.kind in ("lora", "dora"):
        config |= {"r": most, "lora_alpha": most, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    arguments = {"target": "peft", "max_rank": max_rank, "dtype": str(dtype) if dtype else None}
    provenance = {"operation": "export", "arguments": arguments, "inputs": [dict(adapter.provenance)]}
    return replace(adapter, config=config, modules=modules, provenance=provenance)


def _at_rank(factors: Factors, rank: int) -> Factors:
    """The same update; zero columns of B and rows of A fill up."""
    return replace(factors, B=padded(factors.B, rank), A=padded(factors.A.T, rank).T)


def _stored(factors: Factors, dtype: torch.dtype | None) -> Factors:
    """The factors with the scale in B, in a type; the product is formed in float32 at least and rounded once."""
    wanted = dtype or factors.dtype
    working = torch.promote_types(torch.promote_types(factors.dtype, wanted), torch.float32)
    scaled = factors.scale * factors.B.to(working)
    bias = None if factors.bias is None else (factors.scale * factors.bias.to(working)).to(wanted)
    return replace(factors, B=scaled.to(wanted), A=factors.A.to(wanted), bias=bias, scale=1.0)


TARGETS: Mapping[str, Callable[[Adapter, int | None, torch.dtype | None], Adapter]] = {
    "vllm": _for_vllm,
    "peft": _for_peft,
}


def _verify(asked: Adapter, got: Adapter, target: str) -> None:
    """Every update as asked for, to rounding, and for vLLM no field beyond those that its loader knows."""
    config = got.config
    strange = [key for key in config if key not in _VLLM_FIELDS and config[key]] if target == "vllm" else []
    if strange:
        raise AdapterMismatch(f"the exported configuration has {strange[0]}, which the loader does not know")
    if list(got.modules) != list(asked.modules):
        raise AdapterMismatch("the exported adapter has other modules than the one that was given")
    for name in asked.modules:
        left, right = asked.modules[name], got.modules[name]
        if target == "vllm" and not (right.rank == config["r"] == config["lora_alpha"]):
            raise AdapterMismatch(f"{name}: exported at rank {right.rank}, the configuration says {config['r']}")
        scale = left.scale / right.scale
        parts = [(scale * left.B.double(), right.B), (left.A.double().T, right.A.T)]
        if left.bias is not None and right.bias is not None:
            parts.append((scale * left.bias.double()[:, None], right.bias[:, None]))
        for whole, held in parts:
            _check_part(name, whole, held)


def _check_part(name: str, asked: Tensor, held: Tensor) -> None:
    """One factor: its columns as asked for, to rounding, and nothing in those that fill up."""
    apart = float((held.double() - padded(asked, held.shape[1])).norm())
    size = float(asked.norm())
    if apart > 2 * torch.finfo(held.dtype).eps * size:
        raise AdapterMismatch(
            f"{name}: the exported factors differ by {apart / max(size, 1e-30):.2g} of their norm; try fp32 or bf16"
        )
