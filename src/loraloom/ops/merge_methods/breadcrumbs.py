"""Weighted sum without the largest and the smallest entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.entrywise import by_blocks
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.products import Updates, each_update
from loraloom.ops.select import cutoff, share_of


@merge_methods.register(
    "breadcrumbs",
    paper="https://arxiv.org/abs/2312.06795",
    breaks=("single",),
    spaces=("delta", "core", "knots", "factors"),
    by_rows=True,
)
def breadcrumbs(
    deltas: Updates,
    weights: Float[Tensor, " k"],
    *,
    density: float = 0.85,
    gamma: float = 0.01,
) -> Float[Tensor, " *shape"]:
    """Outliers and small entries are masked (Model Breadcrumbs: Davari and Belilovsky 2023).

    Per module and update the ``round(gamma * n)`` largest entries are dropped, then the ``round(density * n)`` largest
    of the rest stay (at least one, at most all of the rest); the result is their weighted sum. A small tensor, where
    ``gamma * n`` rounds to 0, loses no outlier.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, as they are.
        density: share of entries kept, in (0, 1].
        gamma: share of the largest entries dropped, in [0, 1).

    Raises:
        ValueError: ``gamma`` is outside [0, 1).

    Example:
        >>> breadcrumbs(torch.tensor([[9.0, 3.0, 2.0, 1.0]]), torch.ones(1), density=0.5, gamma=0.25)
        tensor([0., 3., 2., 0.])
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
    size = deltas[0].numel()
    outliers = min(round(gamma * size), size - 1)
    kept = min(share_of(density, deltas[0]), size - outliers)
    cuts = each_update(deltas, lambda delta: (cutoff(delta, outliers + kept), cutoff(delta, outliers)))

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        total = torch.zeros_like(rows[0])
        for (low, high), one, weight in zip(cuts, rows, weights, strict=True):
            total.add_(low.kept(one, start) - high.kept(one, start), alpha=float(weight))
        return total

    return by_blocks(deltas, combine)
