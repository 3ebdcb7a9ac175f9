"""Trim, elect sign, disjoint mean."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.election import elected_mean
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.select import largest, share_of


@merge_methods.register(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    breaks=("single",),
    spaces=("delta", "core", "knots", "factors"),
)
def ties(
    deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"], *, density: float = 0.2
) -> Float[Tensor, " *shape"]:
    """Merge updates that disagree in sign (TIES: Yadav et al. 2023, section 3).

    Per module and update the ``round(density * n)`` largest entries stay (at least one; of equal ones the first). Of
    every entry the sign of the weighted sum is elected (a tie elects +), and the weighted mean of the updates that have
    it is taken, times the sum of the weights (the paper's lambda). PEFT elects before weighting and divides by a count;
    mergekit and this elect after weighting.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; they weigh the election and the mean. Negative ones turn an update round.
        density: share of entries kept, in (0, 1].

    Example:
        >>> ties(torch.tensor([[3.0, -1.0], [1.0, 2.0]]), torch.tensor([0.5, 0.5]), density=1.0)
        tensor([2., 2.])
    """
    trimmed = [delta * largest(delta, share_of(density, delta)) for delta in deltas]
    return elected_mean(trimmed, weights, torch.zeros_like(deltas[0]))
