"""What merge methods that look at single entries share: work by blocks of rows, sign election, disjoint mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 1 << 18  # entries of one update at a time: the blocks of a few updates stay in the cache


def by_blocks(
    deltas: Float[Tensor, " k *shape"], combine: Callable[[Sequence[Tensor], int], Tensor]
) -> Float[Tensor, " *shape"]:
    """A result that depends on the updates entry by entry, or row by row, made a block of rows at a time.

    Args:
        deltas: the k updates, stacked.
        combine: gets the same rows of every update (rows x columns) and the flat index of their first entry, and gives
            the rows of the result.

    Example:
        >>> by_blocks(torch.ones(2, 3), lambda rows, start: rows[0] + rows[1])
        tensor([2., 2., 2.])
    """
    shape = deltas.shape[1:]
    width = shape[-1] if len(shape) else 1
    flat = deltas.reshape(len(deltas), -1, width)
    result = torch.empty_like(flat[0])
    rows = max(1, _BLOCK // max(width, 1))
    for start in range(0, flat.shape[1], rows):
        result[start : start + rows] = combine([one[start : start + rows] for one in flat], start * width)
    return result.view(shape)


def elected_mean(updates: Sequence[Float[Tensor, " *shape"]], weights: Float[Tensor, " k"]) -> Float[Tensor, " *shape"]:
    """Of every entry the weighted mean of the updates that have the elected sign, times the sum of the weights.

    The elected sign is that of ``sum_i w_i d_i`` (a tie elects ``+``); with the updates ``e_i = sign(w_i) d_i`` that
    have it, the result is ``sum |w_i| e_i / sum |w_i|`` over those, times ``sum |w_i|`` over all. So equal weights that
    add up to 1 give the disjoint mean of Yadav et al. 2023, section 3, and twice the weights give twice the result.

    Args:
        updates: already trimmed: entries of 0 do not take part.
        weights: one per update.

    Example:
        >>> updates = torch.tensor([[1.0, 2.0], [-0.8, 4.0], [-0.8, 0.0]])
        >>> elected_mean(updates, torch.tensor([1.0, 0.2, 0.2])) / 1.4
        tensor([1.0000, 2.3333])
    """
    signed = [update * float(weight) for update, weight in zip(updates, weights, strict=True)]
    total = torch.zeros_like(signed[0])
    for one in signed:
        total += one
    elected = torch.where(total >= 0, total.new_ones(()), -total.new_ones(()))
    total.zero_()
    share = torch.zeros_like(total)
    for one, weight in zip(signed, weights, strict=True):
        one.mul_(elected).clamp_(min=0)  # what agrees, and 0 where the sign is the other one
        total += one
        share.add_(one.sign_(), alpha=abs(float(weight)))
    total.mul_(elected).div_(torch.where(share > 0, share, share.new_ones(())))
    return total * float(weights.abs().sum())
