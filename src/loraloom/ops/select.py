"""Exact selection of the largest magnitudes without sorting: a sample brackets the threshold, few passes settle it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from loraloom.adapter import is_finite

_SAMPLE = 1 << 16
_CHUNK = 1 << 20  # entries at a time: what is made of them stays in the cache


class Cutoff(NamedTuple):
    """Which entries of a tensor are its largest: those above ``last``, and those equal to it up to the index ``place``.

    ``last`` is infinite where none is.
    """

    last: float
    place: int

    def kept(self, entries: Tensor, start: int = 0) -> Tensor:
        """Some entries of the tensor, from the flat index ``start`` on, with those that are not the largest at 0."""
        if start <= self.place < start + entries.numel():
            return torch.where(self.mask(entries, start), entries, 0.0)
        last = self.last  # before the place all that equal it stay, behind it none
        if start < self.place:
            last = float(torch.nextafter(entries.new_tensor(last), entries.new_tensor(-1.0)))
        return torch.nn.functional.hardshrink(entries, last)

    def mask(self, entries: Tensor, start: int = 0) -> Bool[Tensor, "*shape"]:
        """Where the largest are among some entries of the tensor."""
        size = entries.abs()
        stays = size >= self.last
        if self.place < start + entries.numel():
            index = torch.arange(start, start + entries.numel(), device=entries.device).view_as(entries)
            stays &= (size != self.last) | (index <= self.place)
        return stays


def cutoff(values: Tensor, count: int) -> Cutoff:
    """What tells the ``count`` entries of largest magnitude; of equal ones the first by flat index are taken.

    Raises:
        ValueError: ``count`` is below 0 or above the number of entries, or an entry is NaN or infinite.

    Example:
        >>> values = torch.tensor([1.0, -2.0, 2.0, 0.0])
        >>> found = cutoff(values, 1)
        >>> found, found.kept(values)
        (Cutoff(last=2.0, place=1), tensor([ 0., -2.,  0.,  0.]))
    """
    if count == 0:
        return Cutoff(float("inf"), -1)
    flat = values.detach().flatten()
    last = float(threshold(flat, count))
    above = sum(int((chunk.abs() > last).count_nonzero()) for chunk in flat.split(_CHUNK))
    missing = count - above
    for start in range(0, flat.numel(), _CHUNK):
        equal = (flat[start : start + _CHUNK].abs() == last).nonzero()[:, 0]
        if len(equal) >= missing:
            return Cutoff(last, start + int(equal[missing - 1]))
        missing -= len(equal)
    raise ValueError("NaN or infinite entries have no order to select by")


def largest(values: Tensor, count: int) -> Bool[Tensor, "*shape"]:
    """Where the ``count`` entries of largest magnitude are; of equal ones the first by flat index are taken.

    Example:
        >>> largest(torch.tensor([1.0, -2.0, 2.0, 0.0]), 2)
        tensor([False,  True,  True, False])
    """
    return cutoff(values, count).mask(values)


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
        above += int((size > high).count_nonzero())
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


def share_of(density: float, values: Tensor) -> int:
    """How many entries a density keeps: ``round(density * n)``, but at least one.

    Example:
        >>> share_of(0.2, torch.zeros(3, 4))
        2
    """
    return max(1, round(density * values.numel()))
