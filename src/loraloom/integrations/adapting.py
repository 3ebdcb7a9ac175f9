"""A fresh adapter on a live model, for as long as it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loraloom.adapter import Adapter
from loraloom.integrations.peft import put_on


@contextmanager
def training(
    model: nn.Module,
    *,
    kind: str = "lora",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
    start: Adapter | None = None,
) -> Iterator[Any]:
    """Attach a new adapter and yield the PeftModel; on leaving, the base is bare again, its weights untouched.

    The start of the adapter is a function of ``seed`` alone; the global random stream is left as it was.

    Args:
        model: the frozen base.
        kind: ``lora``, ``rslora``, ``dora`` or ``hira`` (HiRA has no alpha).
        rank: r.
        alpha: the update is scaled by alpha / r, for rsLoRA by alpha / sqrt(r).
        dropout: of the adapters' input.
        target_modules: names, or ``all-linear``.
        seed: of the adapter's random start.
        start: an adapter to go on with; it decides kind, rank, alpha and targets.

    Raises:
        ValueError: no module of the model has such a name, or ``start`` does not fit the model.
    """
    was_training = model.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks Transformers by an old name whether gradient checkpointing is on; not our user's concern.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(seed)
        if start is None:
            adapted = _fresh(model, kind, rank, alpha, dropout, target_modules)
        else:
            adapted = put_on(model, start, lora_dropout=dropout, hira_dropout=dropout, inference_mode=False)
            adapted.train(was_training)
    try:
        yield adapted
    finally:
        adapted.unload()
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        for leftover in ("peft_config", "active_peft_config"):
            if hasattr(model, leftover):
                delattr(model, leftover)


def _fresh(model: nn.Module, kind: str, rank: int, alpha: float, dropout: float, modules: str | Sequence[str]) -> Any:
    """A new adapter on the model."""
    from peft import HiraConfig, LoraConfig, get_peft_model

    targets = modules if isinstance(modules, str) else list(modules)
    if kind == "hira":
        config: Any = HiraConfig(r=rank, target_modules=targets, hira_dropout=dropout)
    else:
        config = LoraConfig(
            r=rank,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=targets,
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
        )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"adapter.target_modules: {' '.join(str(error).split())}") from None
