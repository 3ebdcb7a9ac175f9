"""Linear connectivity: how well do the adapters between two adapters work?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from loraloom.adapter import Adapter
from loraloom.ops.interpolate import interpolate
from loraloom.probes import probes


@dataclass(frozen=True)
class Connectivity:
    """Scores along the straight path of two adapters.

    Attributes:
        at: positions on the path, evenly from 0 (a) to 1 (b).
        scores: score of the adapter at each position.
        barrier: how far the path sinks below the straight line between the end scores, at its worst point; at least 0.
        space: the space in which the path is straight.
    """

    at: tuple[float, ...]
    scores: tuple[float, ...]
    barrier: float
    space: str

    def to_json(self) -> dict[str, Any]:
        """The four fields by name, tuples as lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@probes.register("connectivity", paper="https://arxiv.org/abs/2110.06296")
def connectivity(
    a: Adapter, b: Adapter, score: Callable[[Adapter], float], points: int = 11, space: str = "delta"
) -> Connectivity:
    """Score along the path from ``a`` to ``b``, and its barrier ``max_t (1-t) s(0) + t s(1) - s(t)``.

    The barrier against the line between the end scores is that of Entezari et al. 2022, section 2 (there of a loss, so
    the sign is turned). Frankle et al. 2020, section 2, take the mean of the end scores instead: the same where both
    ends score the same. It is that of the points looked at: more points in between can only find a higher one.

    Args:
        a: where t is 0.
        b: where t is 1.
        score: called once a point, in the order of t; higher is better.
        points: how many points, ends included, at least 2.
        space: ``delta`` or ``factors`` (see :func:`loraloom.ops.interpolate.interpolate`).

    Raises:
        ValueError: fewer than 2 points, the two do not interpolate, or a score is not finite.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))
        >>> a, b = Adapter({"r": 1}, {"fc": one}), Adapter({"r": 1}, {"fc": one.scaled(-1.0)})
        >>> r = connectivity(a, b, score=lambda adapter: adapter.modules["fc"].norm() ** 2, points=5)
        >>> r.scores, r.barrier
        ((1.0, 0.25, 0.0, 0.25, 1.0), 1.0)
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points must be a whole number of at least 2 (both ends count), got {points!r}")
    at = tuple(i / (points - 1) for i in range(points))
    scores = []
    for t in at:
        value = float(score(interpolate(a, b, at=t, space=space)))
        if not math.isfinite(value):
            raise ValueError(f"the score at t = {t:.4g} is {value}; a barrier needs finite scores")
        scores.append(value)
    line = [(1 - t) * scores[0] + t * scores[-1] for t in at]
    falls = [level - value for level, value in zip(line[1:-1], scores[1:-1], strict=True)]
    return Connectivity(at, tuple(scores), max([0.0, *falls]), space)
