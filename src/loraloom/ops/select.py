"""Exact selection of the largest magnitudes without sorting: a sample brackets the threshold, few passes settle it."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from loraloom.adapter import is_finite

_SAMPLE = 1 << 16
_CHUNK = 1 << 22


def threshold(values: Tensor, count: int) -> Tensor:
    """The ``count``-th largest magnitude, exactly, as a scalar of the tensor's type.

    An evenly spaced sample of 65,536 entries brackets it; one pass counts what lies above the bracket and collects what
    lies inside, and only that remainder is searched. If the sample misleads, all entries are searched.

    Args:
        values: any shape, finite.
        count: from 1 to the number of entries.

    Raises:
        ValueError: ``count`` is out of range, or an entry is NaN or infinite.

    Example:
        >>> threshold(torch.tensor([3.0, -5.0, 1.0]), 2)
        tensor(3.)
    """
    flat = values.detach().flatten()
    if not 1 <= count <= flat.numel():
        raise ValueError(f"count must be from 1 to {flat.numel()}, got {count}")
    if not is_finite(flat):
        raise ValueError("NaN or infinite entries have no order to select by")
    low, high = _bracket(flat, count)
    above, inside = 0, []
    for chunk in flat.split(_CHUNK):
        size = chunk.abs()
        above += int((size > high).sum())
        inside.append(size[(size >= low) & (size <= high)])
    near = torch.cat(inside)
    rank = count - above  # among those inside, from the top
    if not 1 <= rank <= near.numel():
        near, rank = flat.abs(), count
    return near.kthvalue(near.numel() - rank + 1).values


def _bracket(flat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two magnitudes that have the one that is sought between them, almost surely."""
    step = max(1, flat.numel() // _SAMPLE) | 1  # odd: rows of even length are not all met at one column
    sample = flat[::step].abs().sort(descending=True).values
    share, size = count / flat.numel(), sample.numel()
    slack = 5 * (share * (1 - share) * size) ** 0.5 + 5
    first, last = int(share * size - slack), int(share * size + slack) + 1
    high = sample[first] if first >= 0 else sample.new_tensor(float("inf"))
    low = sample[last] if last < size else sample.new_zeros(())
    return low, high


def largest(values: Tensor, count: int) -> Bool[Tensor, "*shape"]:
    """Where the ``count`` entries of largest magnitude are; of equal ones the first by flat index are taken.

    Raises:
        ValueError: ``count`` is below 0 or above the number of entries, or an entry is NaN or infinite.

    Example:
        >>> largest(torch.tensor([1.0, -2.0, 2.0, 0.0]), 2)
        tensor([False,  True,  True, False])
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if count == values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    last = threshold(values, count)
    size = values.abs()
    stays = size > last
    short = count - int(stays.sum())
    equal = (size == last).flatten().nonzero()[:short, 0]
    stays.view(-1)[equal] = True
    return stays


def share_of(density: float, values: Tensor) -> int:
    """How many entries a density keeps: ``round(density * n)``, but at least one.

    Example:
        >>> share_of(0.2, torch.zeros(3, 4))
        2
    """
    return max(1, round(density * values.numel()))
