"""Scaling and subtracting adapters."""

from __future__ import annotations

import math
from dataclasses import replace

from loraloom.adapter import Adapter, AdapterMismatch
from loraloom.ops.checks import check_linear
from loraloom.ops.extras import frozen_of
from loraloom.ops.merge import merge


def scale(adapter: Adapter, by: float) -> Adapter:
    """Every update (and bias of B) times a number; -1 turns the adapter round, as in task negation.

    Args:
        adapter: LoRA, HiRA or MokA.
        by: any finite number.

    Raises:
        ValueError: ``by`` is not finite.
        UnsupportedKind: DoRA, whose magnitudes do not scale with the update, unless ``by`` is 1.
        AdapterMismatch: it holds whole tensors (trained biases, ``modules_to_save``), which are no updates.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))
        >>> scale(Adapter({"r": 1}, {"fc": one}), -0.5).modules["fc"].delta()
        tensor([[-0.5000, -0.5000],
                [-0.5000, -0.5000]])
    """
    if not math.isfinite(by):
        raise ValueError(f"by must be a finite number, got {by}")
    provenance = {"operation": "scale", "arguments": {"by": by}, "inputs": [dict(adapter.provenance)]}
    if by == 1:
        return replace(adapter, provenance=provenance)
    if adapter.kind != "moka":  # its B is scaled alike in all modalities
        check_linear(adapter, "scale")
    if whole := _whole(adapter):
        raise AdapterMismatch(f"the adapter holds whole tensors ({whole}), which are no updates and do not scale")
    modules = adapter.derived(tuple(adapter.modules), lambda name: adapter.modules[name].scaled(by), adapter.shape)
    return replace(adapter, modules=modules, provenance=provenance)


def subtract(a: Adapter, b: Adapter, weight: float = 1.0, *, same_base: bool = True) -> Adapter:
    """``a - weight * b``, exactly, at the sum of both ranks; a module that one lacks counts as zero.

    Args:
        a: what to take from; its whole tensors are kept.
        b: what to take away; it must not hold whole tensors.
        weight: how much of it.
        same_base: refuse adapters whose base models have different names.

    Raises:
        AdapterMismatch: ``b`` holds whole tensors, or the two do not merge (see :func:`loraloom.ops.merge.merge`).

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 2))
        >>> a, b = (Adapter({"r": 1}, {"fc": one.scaled(by)}) for by in (5.0, 2.0))
        >>> subtract(a, b).modules["fc"].delta()
        tensor([[3., 3.]])
    """
    if whole := _whole(b):
        raise AdapterMismatch(f"what is taken away holds whole tensors ({whole}), which are no updates")
    left = merge([a, b], weights=[1.0, -weight], same_base=same_base)
    arguments = {"weight": weight, "same_base": same_base}
    return replace(left, provenance={**left.provenance, "operation": "subtract", "arguments": arguments})


def _whole(adapter: Adapter) -> str | None:
    """The first whole tensor that is a change."""
    frozen = frozen_of([adapter])
    return next((path for path in adapter.extras if path not in frozen), None)
