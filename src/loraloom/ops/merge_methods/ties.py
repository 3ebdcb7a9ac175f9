"""Trim, elect sign, disjoint mean."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from loraloom.ops.entrywise import by_blocks, elected_mean
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.products import Updates, each_update
from loraloom.ops.select import cutoff, share_of


@merge_methods.register(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    breaks=("single",),
    spaces=("delta", "core", "knots", "factors"),
    by_rows=True,
)
def ties(deltas: Updates, weights: Float[Tensor, " k"], *, density: float = 0.2) -> Float[Tensor, " *shape"]:
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
        >>> import torch
        >>> ties(torch.tensor([[3.0, -1.0], [1.0, 2.0]]), torch.tensor([0.5, 0.5]), density=1.0)
        tensor([2., 2.])
    """
    cuts = each_update(deltas, lambda delta: cutoff(delta, share_of(density, delta)))

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        return elected_mean([cut.kept(one, start) for cut, one in zip(cuts, rows, strict=True)], weights)

    return by_blocks(deltas, combine)
