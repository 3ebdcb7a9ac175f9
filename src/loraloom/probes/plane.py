"""A plane through three adapters: the score around and between them, as a map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from loraloom.adapter import Adapter
from loraloom.ops.merge import merge
from loraloom.probes import probes
from loraloom.probes.game import finite, many
from loraloom.probes.geometry import geometry

_FLAT = 1e-6  # of the longest side and the largest update: three adapters this near to one line have no plane


@dataclass(frozen=True)
class Plane:
    """A map of scores over the plane of three adapters. Lengths are Frobenius norms of updates.

    Attributes:
        x, y: positions of the columns and of the rows, rising.
        scores: ``scores[row][column]``.
        places: where the three adapters lie: a at (0, 0), b on the x axis, c above it.
        ends: their scores.
        centre: score of their mean, 1:1:1, at the centre of the three places.
        evaluations: calls of the score.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    places: tuple[tuple[float, float], ...]
    ends: tuple[float, ...]
    centre: float
    evaluations: int

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists."""
        return {name: _lists(value) for name, value in asdict(self).items()}


@probes.register("plane", paper="https://arxiv.org/abs/1802.10026")
def plane(
    a: Adapter, b: Adapter, c: Adapter, score: Callable[[Adapter | None], float], grid: int = 9, margin: float = 0.25
) -> Plane:
    """Score over the plane through three updates (Garipov et al. 2018, section 3 and figure 1, there of weights).

    The axes are orthonormal in the space of the updates ``scale * B @ A`` of all modules together: ``u = (b - a) /
    |b - a|``, and v is what is left of ``c - a`` across u, over its length. Both follow from inner products of the
    factors. The point (x, y) is a sum of the three with weights that add to 1, some below 0 outside the triangle; its
    rank is the sum of theirs.

    Args:
        a, b, c: adapters of one kind that merge linearly; ranks and modules may differ.
        score: called for a, b, c and their mean, then for the grid, row by row; higher is better.
        grid: positions on each axis, at least 2.
        margin: how far the map goes beyond the three places, as a share of the longer axis; at least 0.

    Raises:
        ValueError: a number out of range, three adapters on one line, or a score that is not finite.
        AdapterMismatch: the three do not add.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> def at(x, y):
        ...     return Adapter({"r": 1}, {"fc": Factors(B=torch.ones(1, 1), A=torch.tensor([[x, y]]))})
        >>> r = plane(at(0.0, 0.0), at(2.0, 0.0), at(1.0, 2.0), lambda a: a.modules["fc"].norm(), grid=3, margin=0.0)
        >>> r.places[1], [round(score, 3) for score in r.scores[0]]
        ((2.0, 0.0), [0.0, 1.0, 2.0])
    """
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 2:
        raise ValueError(f"grid must be a whole number of at least 2, got {grid!r}")
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be a number of at least 0, got {margin!r}")
    three = [a, b, c]
    places = _places(three)
    length, (along, height) = places[1][0], places[2]
    pad = margin * max(length - min(0.0, along), along, height)
    xs = _axis(min(0.0, along) - pad, max(length, along) + pad, grid)
    ys = _axis(-pad, height + pad, grid)

    def at(x: float, y: float) -> Adapter:
        far = y / height
        right = (x - along * far) / length
        return merge(three, weights=[1 - right - far, right, far])

    asked = {f"of {name}": one for name, one in zip("abc", three, strict=True)} | {"of the mean": merge(three)}
    asked |= {f"in row {j + 1}, column {i + 1}": at(x, y) for j, y in enumerate(ys) for i, x in enumerate(xs)}
    values = zip(asked, many(score, list(asked.values())), strict=True)
    first, second, third, centre, *rest = (finite(value, where) for where, value in values)
    scores = tuple(tuple(rest[row * grid : (row + 1) * grid]) for row in range(grid))
    return Plane(xs, ys, scores, places, (first, second, third), centre, len(asked))


def _places(three: list[Adapter]) -> tuple[tuple[float, float], ...]:
    """Gram-Schmidt on b - a and c - a, by their coordinates in the plane that all three lie in."""
    found = geometry(three)
    (ax, ay), (bx, by), (cx, cy) = found.positions
    length = math.hypot(bx - ax, by - ay)
    across = math.hypot(cx - ax, cy - ay)
    along = height = 0.0
    if length > 0:
        along = ((cx - ax) * (bx - ax) + (cy - ay) * (by - ay)) / length
        height = abs((bx - ax) * (cy - ay) - (by - ay) * (cx - ax)) / length
    if height <= _FLAT * max(length, across, *found.norms):
        raise ValueError("the three updates lie on one line, so there is no plane through them; see connectivity")
    return (0.0, 0.0), (length, 0.0), (along, height)


def _axis(low: float, high: float, grid: int) -> tuple[float, ...]:
    return tuple(low + (high - low) * i / (grid - 1) for i in range(grid))


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
