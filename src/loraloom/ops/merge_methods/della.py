"""Drop by rank of magnitude, then sign election."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.entrywise import block_generators, by_blocks, elected_mean
from loraloom.ops.merge_methods import merge_methods


@merge_methods.register(
    "della",
    paper="https://arxiv.org/abs/2406.11617",
    breaks=("single", "order"),
    spaces=("delta", "core", "knots", "factors"),
)
def della(
    deltas: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    *,
    density: float = 0.5,
    epsilon: float = 0.2,
    generator: torch.Generator,
) -> Float[Tensor, " *shape"]:
    """Small entries are dropped more often than large ones, then signs elected (DELLA: Deep et al. 2024).

    MAGPRUNE: in every row the n entries are ranked by magnitude (of equal ones the first is the larger); the one of
    rank i, from the smallest, stays with probability ``density + epsilon * (i / (n - 1) - 1/2)`` and is divided by it.
    A row of one entry stays with probability ``density``. Signs are then elected and means taken as in ``ties``.

    Args:
        deltas: the k updates, stacked; rows are along the last dimension.
        weights: one weight per update; they weigh the election and the mean.
        density: mean probability to stay, in (0, 1].
        epsilon: difference between the probabilities of the largest and the smallest entry of a row.
        generator: the only source of chance.

    Raises:
        ValueError: a probability would leave (0, 1].

    Example:
        >>> updates, draw = torch.tensor([[3.0, -1.0], [1.0, 2.0]]), torch.Generator().manual_seed(0)
        >>> della(updates, torch.tensor([0.5, 0.5]), density=1.0, epsilon=0.0, generator=draw)
        tensor([2., 2.])
    """
    most = 2 * min(1 - density, density)
    if not (0 <= epsilon <= most and epsilon < 2 * density):
        raise ValueError(
            f"epsilon must be in [0, {most:.4g}] (below {2 * density:.4g}) for this density, got {epsilon}"
        )

    draws = block_generators(generator)

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        draw = draws(start)
        return elected_mean([_magprune(one, density, epsilon, draw) for one in rows], weights)

    return by_blocks(deltas, combine)


def _magprune(delta: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    size = delta.shape[-1]
    place = delta.abs().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # 0: the largest
    rise = (size - 1 - place) / (size - 1) - 0.5 if size > 1 else torch.zeros_like(delta)
    chance = (density + epsilon * rise).to(delta.dtype)
    stays = torch.rand(delta.shape, generator=generator).to(delta.device) < chance
    return torch.where(stays, delta / chance, 0.0)
