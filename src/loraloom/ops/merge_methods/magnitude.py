"""Weighted sum of the largest entries."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.select import largest, share_of


@merge_methods.register(
    "magnitude",
    paper="https://arxiv.org/abs/2212.04089",
    breaks=("single",),
    spaces=("delta", "core", "knots", "factors"),
)
def magnitude(
    deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"], *, density: float = 0.2
) -> Float[Tensor, " *shape"]:
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
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta * largest(delta, share_of(density, delta)), alpha=float(weight))
    return total
