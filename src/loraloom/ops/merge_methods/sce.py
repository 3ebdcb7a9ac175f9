"""Select by variance, calculate weights, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.entrywise import by_blocks, elected_mean
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.select import cutoff, share_of


@merge_methods.register("sce", paper="https://arxiv.org/abs/2408.07990", spaces=("delta", "core", "knots", "factors"))
def sce(
    deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"], *, density: float = 0.1
) -> Float[Tensor, " *shape"]:
    """Select, calculate, erase (SCE of FuseChat: Wan et al. 2024).

    Per module: the ``round(density * n)`` entries of largest variance across the updates stay (at least one; of equal
    ones the first; one update alone keeps all). Each update's coefficient is the sum of its squared selected entries,
    as a share of that of all, times its weight. Signs are elected as in ``ties``, by the weights alone, and means are
    taken by the coefficients; the result is times the sum of the absolute weights. With equal weights this is what
    mergekit does, but that it rounds the number of entries down, of those whose variance is not 0.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; they vote, and multiply the coefficients. Negative ones turn an update round.
        density: share of entries kept, in (0, 1].

    Example:
        >>> sce(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([0.5, 0.5]), density=0.5)
        tensor([2.8000, 0.0000])
    """
    if len(deltas) == 1:
        return deltas[0] * weights[0]
    mean = deltas.mean(dim=0)
    variance = torch.zeros_like(mean)
    for delta in deltas:
        variance.add_((delta - mean).square_())
    cut = cutoff(variance, share_of(density, variance))
    stays = cut.mask(variance)
    energy = torch.stack([torch.where(stays, delta, 0.0).square().sum() for delta in deltas])
    share = weights * energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    whole = share.abs().sum()
    scale = weights.abs().sum() / whole if whole > 0 else whole
    spread = variance.reshape(-1, variance.shape[-1])

    def combine(rows: Sequence[Tensor], start: int) -> Tensor:
        first = start // spread.shape[1]
        mask = cut.mask(spread[first : first + len(rows[0])], start)
        return elected_mean([torch.where(mask, one, 0.0) for one in rows], share, weights)

    return by_blocks(deltas, combine) * scale
