"""Random drop and rescale, then sign election."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.entrywise import block_generators, by_blocks, elected_mean
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.merge_methods.dare import dropped
from loraloom.ops.products import Updates


@merge_methods.register(
    "dare_ties",
    paper="https://arxiv.org/abs/2311.03099",
    breaks=("single", "order"),
    spaces=("delta", "core", "knots", "factors"),
    by_rows=True,
)
def dare_ties(
    deltas: Updates,
    weights: Float[Tensor, " k"],
    *,
    density: float = 0.5,
    generator: torch.Generator,
) -> Float[Tensor, " *shape"]:
    """DARE's random drop and rescale (Yu et al. 2024), then TIES' sign election and disjoint mean.

    Each entry of each update stays with probability ``density`` and is divided by it; signs are elected and means
    taken as in ``ties``, over the entries that stay.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; they weigh the election and the mean.
        density: probability to stay, in (0, 1].
        generator: the only source of chance.

    Example:
        >>> updates, draw = torch.tensor([[3.0, -1.0], [1.0, 2.0]]), torch.Generator().manual_seed(0)
        >>> dare_ties(updates, torch.tensor([0.5, 0.5]), density=1.0, generator=draw)
        tensor([2., 2.])
    """

    draws = block_generators(generator)

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        draw = draws(start)
        return elected_mean([dropped(one, density, draw) for one in rows], weights)

    return by_blocks(deltas, combine)
