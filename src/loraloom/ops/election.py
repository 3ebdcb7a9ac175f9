"""Sign election and disjoint mean, the second half of TIES; DARE-TIES, DELLA and SCE end in it too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def elected_mean(
    updates: Iterable[Float[Tensor, " *shape"]],
    weights: Float[Tensor, " k"],
    zero: Float[Tensor, " *shape"],
) -> Float[Tensor, " *shape"]:
    """Of every entry the weighted mean of the updates that have the elected sign, times the sum of the weights.

    The elected sign is that of ``sum_i w_i d_i`` (a tie elects ``+``); with the updates ``e_i = sign(w_i) d_i`` that
    have it, the result is ``sum |w_i| e_i / sum |w_i|`` over those, times ``sum |w_i|`` over all. So equal weights that
    add up to 1 give the disjoint mean of Yadav et al. 2023, section 3, and twice the weights give twice the result.

    Args:
        updates: the updates, iterated twice (a sequence), already trimmed: entries of 0 do not take part.
        weights: one per update.
        zero: a tensor of zeros of one update's size; it is not written to.

    Example:
        >>> updates = torch.tensor([[1.0, 2.0], [-0.8, 4.0], [-0.8, 0.0]])
        >>> elected_mean(updates, torch.tensor([1.0, 0.2, 0.2]), torch.zeros(2)) / 1.4
        tensor([1.0000, 2.3333])
    """
    updates = list(updates)
    total = zero.clone()
    for update, weight in zip(updates, weights, strict=True):
        total.add_(update, alpha=float(weight))
    up = total >= 0
    total.zero_()
    share = torch.zeros_like(total)
    for update, weight in zip(updates, weights, strict=True):
        signed = update * float(weight)
        agrees = (signed != 0) & ((signed > 0) == up)
        total.add_(torch.where(agrees, signed, 0.0))
        share.add_(agrees, alpha=abs(float(weight)))
    total.div_(torch.where(share > 0, share, 1.0))
    return total.mul_(float(weights.abs().sum()))
