"""Select by variance, calculate weights, erase minority signs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.election import elected_mean
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.select import largest, share_of


@merge_methods.register("sce", paper="https://arxiv.org/abs/2408.07990", spaces=("delta", "core", "knots", "factors"))
def sce(
    deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"], *, density: float = 0.1
) -> Float[Tensor, " *shape"]:
    """Select, calculate, erase (SCE of FuseChat: Wan et al. 2024, section 3).

    Per module: the ``round(density * n)`` entries of largest variance across the updates stay (at least one; of equal
    ones the first; one update alone keeps all). Each update's coefficient is the sum of its squared selected entries,
    as a share of that of all, times its weight. Signs are elected and means taken as in ``ties``, by these
    coefficients; the result is times the sum of the absolute weights.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; they multiply the coefficients. Negative ones turn an update round.
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
    stays = largest(variance, share_of(density, variance))
    selected = [delta * stays for delta in deltas]
    energy = torch.stack([delta.square().sum() for delta in selected])
    share = weights * energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    whole = share.abs().sum()
    scale = weights.abs().sum() / whole if whole > 0 else whole
    return elected_mean(selected, share, torch.zeros_like(mean)) * scale
