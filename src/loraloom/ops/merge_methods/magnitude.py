"""Weighted sum of the largest entries."""

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
    "magnitude",
    paper="https://arxiv.org/abs/2212.04089",
    breaks=("single",),
    spaces=("delta", "core", "knots", "factors"),
    by_rows=True,
)
def magnitude(deltas: Updates, weights: Float[Tensor, " k"], *, density: float = 0.2) -> Float[Tensor, " *shape"]:
    """Task arithmetic on magnitude-pruned updates (PEFT's ``magnitude_prune``; task arithmetic: Ilharco et al. 2023).

    Per module and update the ``round(density * n)`` largest entries stay (at least one; of equal ones the first),
    unscaled; the result is their weighted sum.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, as they are.
        density: share of entries kept, in (0, 1].

    Example:
        >>> magnitude(torch.tensor([[3.0, -1.0], [1.0, 2.0]]), torch.tensor([1.0, 1.0]), density=0.5)
        tensor([3., 2.])
    """
    cuts = each_update(deltas, lambda delta: cutoff(delta, share_of(density, delta)))

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        total = torch.zeros_like(rows[0])
        for cut, one, weight in zip(cuts, rows, weights, strict=True):
            total.add_(cut.kept(one, start), alpha=float(weight))
        return total

    return by_blocks(deltas, combine)
