"""Random drop and rescale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.entrywise import by_blocks
from loraloom.ops.merge_methods import merge_methods


@merge_methods.register(
    "dare",
    paper="https://arxiv.org/abs/2311.03099",
    breaks=("single", "order"),
    spaces=("delta", "core", "knots", "factors"),
)
def dare(
    deltas: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    *,
    density: float = 0.5,
    generator: torch.Generator,
) -> Float[Tensor, " *shape"]:
    """Weighted sum of updates of which random entries are dropped, the others rescaled (DARE: Yu et al. 2024).

    Each entry of each update stays with probability ``density`` and is divided by it, so the expected result is the
    weighted sum. Masks are drawn for the updates one after another, a block of rows at a time: another order of the
    adapters gives another draw.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, as they are.
        density: probability to stay, in (0, 1].
        generator: the only source of chance.

    Example:
        >>> updates = torch.ones(1, 8)
        >>> dare(updates, torch.ones(1), density=0.5, generator=torch.Generator().manual_seed(0))
        tensor([2., 0., 2., 2., 2., 0., 2., 0.])
    """

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        total = torch.zeros_like(rows[0])
        for one, weight in zip(rows, weights, strict=True):
            total.addcmul_(one, _stays(one, density, generator), value=float(weight) / density)
        return total

    return by_blocks(deltas, combine)


def dropped(delta: Float[Tensor, " *shape"], density: float, generator: torch.Generator) -> Float[Tensor, " *shape"]:
    """One update with random entries set to 0 and the others divided by their probability to stay.

    Example:
        >>> dropped(torch.ones(2), 1.0, torch.Generator())
        tensor([1., 1.])
    """
    return _stays(delta, density, generator).mul_(delta).div_(density)


def _stays(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """1 where an entry stays, 0 where it is dropped."""
    return torch.rand(delta.shape, generator=generator).lt_(density).to(delta)
