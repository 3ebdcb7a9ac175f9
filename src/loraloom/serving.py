"""Exporting an adapter to what a server's loader accepts, verified by reading it back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, UnsupportedKind, padded
from loraloom.registry import UnknownName
from loraloom.store import load, save

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_FIELDS = (
    *("peft_type", "base_model_name_or_path", "task_type", "inference_mode", "r", "lora_alpha", "target_modules"),
    *("bias", "modules_to_save", "use_rslora", "use_dora"),
)
_SHORT = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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

    Args:
        adapter: LoRA.
        out: the new folder.
        target: ``vllm``.
        max_rank: refuse a larger rank (vLLM's ``--max-lora-rank``).
        dtype: ``fp32``, ``fp16`` or ``bf16``; by default as it is.
        overwrite: replace an adapter folder that is there.
        command: the command line, for the record.

    Raises:
        UnsupportedKind: DoRA, HiRA, a bias of B, trained biases, ``modules_to_save``, embeddings or convolutions.
        AdapterMismatch: what was read back is another update (nothing is left behind then).
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
    if dtype is not None and dtype not in _SHORT:
        raise UnknownName("dtype", dtype, list(_SHORT))
    ready = TARGETS[target](adapter, max_rank, None if dtype is None else _SHORT[dtype])
    existed = Path(out).exists()
    path = save(ready, out, overwrite=overwrite, command=command)
    try:
        _verify(adapter, load(path), _VLLM_FIELDS)
    except AdapterMismatch:
        if not existed:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return path


def _for_vllm(adapter: Adapter, max_rank: int | None, dtype: torch.dtype | None) -> Adapter:
    if adapter.kind != "lora":
        raise UnsupportedKind(f"vLLM loads no {adapter.kind} adapters; fold it into the base model (loraloom fold)")
    if adapter.extras or adapter.config.get("lora_bias"):
        what = next(iter(adapter.extras), "lora_bias")
        raise UnsupportedKind(f"vLLM loads no trained biases or whole modules ({what}); fold them in (loraloom fold)")
    start = str(adapter.config.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "corda", "olora", "loftq", "lora_ga")):
        raise UnsupportedKind(
            f"init_lora_weights={start!r} moves the base weights, which vLLM does not; convert it first"
        )
    ranks = [adapter.shape(name).rank for name in adapter.modules]
    rank = next((allowed for allowed in _VLLM_RANKS if allowed >= max(ranks) and allowed > 1), None)
    if rank is None or (max_rank is not None and rank > max_rank):
        most = max_rank or _VLLM_RANKS[-1]
        raise ValueError(f"rank {max(ranks)} needs {rank or 'more'}, and at most {most} is allowed; compress it first")

    def read(name: str) -> Factors:
        factors = adapter.modules[name]
        if factors.kernel is not None or factors.embedding:
            raise UnsupportedKind(f"{name}: vLLM's loader takes linear layers only; fold it in (loraloom fold)")
        factors = factors.baked()
        stored = dtype or factors.dtype
        b, a = padded(factors.B, rank), padded(factors.A.T, rank).T
        return replace(factors, B=b.to(stored), A=a.to(stored))

    config = {key: adapter.config.get(key) for key in ("base_model_name_or_path", "task_type")}
    config |= {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(adapter.modules),
    }
    config |= {"bias": "none", "modules_to_save": None, "use_rslora": False, "use_dora": False}
    modules = Modules(tuple(adapter.modules), read, lambda name: adapter.shape(name)._replace(rank=rank))
    arguments = {"target": "vllm", "max_rank": max_rank, "dtype": str(dtype) if dtype else None}
    provenance = {"operation": "export", "arguments": arguments, "inputs": [dict(adapter.provenance)]}
    return Adapter(config, modules, {}, provenance)


TARGETS: Mapping[str, Callable[[Adapter, int | None, torch.dtype | None], Adapter]] = {"vllm": _for_vllm}


def _verify(asked: Adapter, got: Adapter, fields: tuple[str, ...]) -> None:
    """Every update as asked for, to rounding, and no field beyond those that the loader knows."""
    strange: list[Any] = [key for key in got.config if key not in fields and got.config[key]]
    if strange:
        raise AdapterMismatch(f"the exported configuration has {strange[0]}, which the loader does not know")
    if list(got.modules) != list(asked.modules):
        raise AdapterMismatch("the exported adapter has other modules than the one that was given")
    for name in asked.modules:
        left, right = asked.modules[name], got.modules[name]
        wide = (
            replace(left, B=left.B.double(), A=left.A.double()),
            replace(right, B=right.B.double(), A=right.A.double()),
        )
        apart = max(wide[0].inner(wide[0]) - 2 * wide[0].inner(wide[1]) + wide[1].inner(wide[1]), 0.0) ** 0.5
        size = left.norm()
        if apart > max(4 * torch.finfo(right.dtype).eps, 1e-6) * size:
            raise AdapterMismatch(f"{name}: the exported update differs by {apart / size:.2g} of its norm")
