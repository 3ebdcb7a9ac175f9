"""Entries that several tasks use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.entrywise import by_blocks
from loraloom.ops.merge_methods import merge_methods


@merge_methods.register(
    "consensus", paper="https://arxiv.org/abs/2405.07813", spaces=("delta", "core", "knots", "factors")
)
def consensus(
    deltas: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    *,
    agree: int = 2,
    strictness: float = 0.4,
) -> Float[Tensor, " *shape"]:
    """Weighted sum over the entries that at least so many tasks use (TALL masks: Wang et al. 2024).

    Task t uses an entry if ``|d_t| >= strictness * |sum_i d_i - d_t|`` (the sum is over the updates of
    weight not zero, turned round where the weight is negative). Entries that fewer than ``agree`` of them use, or fewer
    than all where there are fewer, are set to 0.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, as they are.
        agree: how many tasks must use an entry, at least 1 (2 in the paper; 1 drops those that no task uses).
        strictness: the paper's lambda, at least 0.

    Raises:
        ValueError: ``agree`` is below 1 or ``strictness`` below 0.

    Example:
        >>> updates = torch.tensor([[1.0, 5.0], [1.0, 0.1]])
        >>> consensus(updates, torch.tensor([0.5, 0.5]))
        tensor([1., 0.])
    """
    if agree < 1 or strictness < 0:
        raise ValueError(f"agree must be at least 1 and strictness at least 0, got {agree} and {strictness}")
    used = [(at, float(weight)) for at, weight in enumerate(weights) if weight != 0]
    needed = min(agree, len(used))

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        turned = [math.copysign(1.0, weight) * rows[at] for at, weight in used]
        whole, total, users = (torch.zeros_like(rows[0]) for _ in range(3))
        for one, (_, weight) in zip(turned, used, strict=True):
            whole += one
            total.add_(one, alpha=abs(weight))
        for one in turned:
            users += (one.abs() >= strictness * (whole - one).abs()) & (one != 0)
        return total * (users >= needed)

    return by_blocks(deltas, combine)
