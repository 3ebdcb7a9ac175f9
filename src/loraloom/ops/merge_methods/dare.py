"""Random drop and rescale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.entrywise import block_generators, by_blocks
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.products import Updates

_STEPS = 1 << 16  # of a probability


@merge_methods.register(
    "dare",
    paper="https://arxiv.org/abs/2311.03099",
    breaks=("single", "order"),
    spaces=("delta", "core", "knots", "factors"),
    by_rows=True,
)
def dare(
    deltas: Updates,
    weights: Float[Tensor, " k"],
    *,
    density: float = 0.5,
    generator: torch.Generator,
) -> Float[Tensor, " *shape"]:
    """Weighted sum of updates of which random entries are dropped, the others rescaled (DARE: Yu et al. 2024).

    Each entry of each update stays with probability ``density`` (rounded to a multiple of 1/65536) and is divided by
    it, so the expected result is the weighted sum. Masks are drawn for the updates one after another, a block of rows
    at a time: another order of the adapters gives another draw.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, as they are.
        density: probability to stay, in (0, 1].
        generator: the only source of chance.

    Example:
        >>> updates = torch.ones(1, 8)
        >>> dare(updates, torch.ones(1), density=0.5, generator=torch.Generator().manual_seed(0))
        tensor([2., 0., 0., 2., 2., 0., 0., 0.])
    """

    draws, chance = block_generators(generator), _chance(density)

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        total, draw = torch.zeros_like(rows[0]), draws(start)
        for one, weight in zip(rows, weights.tolist(), strict=True):
            total.addcmul_(one, _stays(one, chance, draw), value=weight * _STEPS / chance)
        return total

    return by_blocks(deltas, combine)


def dropped(delta: Float[Tensor, " *shape"], density: float, generator: torch.Generator) -> Float[Tensor, " *shape"]:
    """One update with random entries set to 0 and the others divided by their probability to stay.

    Example:
        >>> dropped(torch.ones(2), 1.0, torch.Generator())
        tensor([1., 1.])
    """
    chance = _chance(density)
    return _stays(delta, chance, generator).mul_(delta).mul_(_STEPS / chance)


def _chance(density: float) -> int:
    """The probability to stay, in steps of 1/65536, at least one of them."""
    return max(1, round(density * _STEPS))


def _stays(delta: Tensor, chance: int, generator: torch.Generator) -> Tensor:
    """1 where an entry stays, 0 where it is dropped: 16 random bits are compared, a quarter of the draws of floats."""
    words = torch.empty(delta.numel() // 4 + 1, dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    drawn = words.view(torch.int16)[: delta.numel()].view(delta.shape).to(delta.device)
    return torch.le(drawn, chance - _STEPS // 2 - 1, out=torch.empty_like(delta))
