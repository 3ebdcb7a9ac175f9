"""Exact selection of the largest magnitudes without sorting: a sample brackets the threshold, few passes settle it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from loraloom.adapter import is_finite
from loraloom.ops.products import Product, Update, blocks_of, each_block

_SAMPLE = 1 << 15
_INFINITE = 0x7F80  # the upper half of the bit pattern of float32's infinity; NaN lies above


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


def cutoff(values: Update, count: int) -> Cutoff:
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
    matrix = _matrix(values)
    last, above, equal = _located(matrix, count)
    missing = count - above
    if missing == equal:
        return Cutoff(last, matrix.numel() - 1)
    for rows in blocks_of(matrix):
        found = (matrix[rows].flatten().abs() == last).nonzero()[:, 0]
        if len(found) >= missing:
            return Cutoff(last, rows.start * matrix.shape[1] + int(found[missing - 1]))
        missing -= len(found)
    raise AssertionError("the entries changed while they were looked at")


def largest(values: Tensor, count: int) -> Bool[Tensor, "*shape"]:
    """Where the ``count`` entries of largest magnitude are; of equal ones the first by flat index are taken.

    Example:
        >>> largest(torch.tensor([1.0, -2.0, 2.0, 0.0]), 2)
        tensor([False,  True,  True, False])
    """
    return cutoff(values, count).mask(values)


def threshold(values: Tensor, count: int) -> Tensor:
    """The ``count``-th largest magnitude, exactly, as a scalar of the tensor's type.

    An evenly spaced sample of 32,768 entries brackets it; one pass counts what lies above the bracket and collects what
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
    return values.new_tensor(_located(_matrix(values), count)[0])


def _matrix(values: Update) -> Update:
    return values if isinstance(values, Product) else values.detach().reshape(-1, 1)


def _located(matrix: Update, count: int) -> tuple[float, int, int]:
    """The ``count``-th largest magnitude, how many are above it, and how many equal it."""
    if not 1 <= count <= matrix.numel():
        raise ValueError(f"count must be from 1 to {matrix.numel()}, got {count}")
    low, high = _bracket(matrix, count)
    found = each_block(matrix, lambda rows: _within(matrix[rows].abs(), low, high))
    if not all(finite for finite, _, _ in found):
        raise ValueError("NaN or infinite entries have no order to select by")
    above, near = sum(over for _, over, _ in found), torch.cat([inside for _, _, inside in found])
    if not 1 <= count - above <= near.numel():  # the sample misled: look at all
        near, above = torch.cat([matrix[rows].abs().flatten() for rows in blocks_of(matrix)]), 0
    last = near.kthvalue(near.numel() - (count - above) + 1).values
    return float(last), above + int((near > last).count_nonzero()), int((near == last).count_nonzero())


def _within(size: Tensor, low: float, high: float) -> tuple[bool, int, Tensor]:
    """Of some magnitudes: whether all are finite, how many are above the bracket, and those in it."""
    finite = is_finite(size)
    if size.device.type != "cpu" or size.dtype not in (torch.float32, torch.float64):
        above = size > high
        return finite, int(above.count_nonzero()), size[(size >= low).logical_xor_(above)]
    flat = size.numpy().ravel()  # NumPy compares several times faster
    over = flat > high
    return finite, int(np.count_nonzero(over)), torch.from_numpy(flat[np.flatnonzero((flat >= low) ^ over)])


def _bracket(matrix: Update, count: int) -> tuple[float, float]:
    """Two magnitudes that have the one that is sought between them, almost surely."""
    total = matrix.numel()
    step = max(1, total // _SAMPLE) | 1  # odd: rows of even length are not all met at one column
    some = matrix.every(step) if isinstance(matrix, Product) else matrix[::step, 0]
    sample = some.abs()
    share, size = count / total, sample.numel()
    slack = 5 * (share * (1 - share) * size) ** 0.5 + 5
    first, last = int(share * size - slack), int(share * size + slack) + 1
    high = float(sample.kthvalue(size - first).values) if first >= 0 else float("inf")
    low = float(sample.kthvalue(size - last).values) if last < size else 0.0
    return low, high


def share_of(density: float, values: Update) -> int:
    """How many entries a density keeps: ``round(density * n)``, but at least one.

    Example:
        >>> share_of(0.2, torch.zeros(3, 4))
        2
    """
    return max(1, round(density * values.numel()))


class Pooled(NamedTuple):
    """Which scores are the largest over several modules: those above ``last``, and some of those that equal it.

    Attributes:
        last: bit pattern of the last score that is taken, as float32.
        equal: by module, how many of those that equal it are taken, the first ones.
    """

    last: int
    equal: Mapping[str, int]

    def mask(self, name: str, scores: Tensor) -> Bool[Tensor, " n"]:
        """Where the largest are among the scores of one module."""
        patterns = _patterns(scores)
        taken = patterns > self.last
        taken[(patterns == self.last).nonzero()[: self.equal[name], 0]] = True
        return taken


def pooled(names: Sequence[str], scores: Callable[[str], Tensor], count: int) -> Pooled:
    """What tells the ``count`` largest scores of all modules together; of equal ones the first by module and index.

    Scores are not kept: each module's are made twice, first for a histogram of the upper 16 bits of their float32
    patterns (which are in the order of the numbers, as none is negative), then for those of the one bin in question.

    Args:
        names: the modules, in order.
        scores: of one module, flat, none negative; compared as float32.
        count: from 0 to the number of all scores.

    Raises:
        ValueError: ``count`` is out of range, or a score is NaN, infinite or negative.

    Example:
        >>> held = {"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([5.0, 2.0])}
        >>> found = pooled(["a", "b"], held.__getitem__, 3)
        >>> {name: found.mask(name, held[name]).tolist() for name in held}
        {'a': [False, True], 'b': [True, True]}
    """
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for name in names:
        patterns = _patterns(scores(name))
        if patterns.numel() and int(patterns.min()) < 0:
            raise ValueError(f"{name}: scores must not be negative or NaN")
        counts += torch.bincount(patterns >> 16, minlength=1 << 16).cpu()
        if counts[_INFINITE:].any():
            raise ValueError(f"{name}: NaN or infinite entries have no order to select by")
    if not 0 <= count <= int(counts.sum()):
        raise ValueError(f"count must be from 0 to {int(counts.sum())}, got {count}")
    if count == 0:
        return Pooled(torch.iinfo(torch.int32).max, dict.fromkeys(names, 0))
    from_top = counts.flip(0).cumsum(0).flip(0)  # scores in this bin and above
    high = int((from_top >= count).nonzero().max())
    need = count - int(from_top[high] - counts[high])  # of the scores in this bin
    near: dict[str, Tensor] = {}
    for name in names:
        patterns = _patterns(scores(name))
        near[name] = patterns[patterns >> 16 == high].cpu()
    bin_ = torch.cat(list(near.values()))
    last = int(bin_.kthvalue(len(bin_) - need + 1).values)
    left = need - int((bin_ > last).sum())
    equal = {}
    for name, patterns in near.items():
        equal[name] = min(left, int((patterns == last).sum()))
        left -= equal[name]
    return Pooled(last, equal)


def _patterns(scores: Tensor) -> Tensor:
    return (scores.float() + 0.0).contiguous().view(torch.int32)  # + 0.0: no negative zero
