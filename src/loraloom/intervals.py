"""Intervals of means by Student's t, which holds for a few values too (Student 1908)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def half_width(stderr: float, count: int, level: float = 0.95) -> float:
    """How far the interval of a mean reaches to either side.

    Args:
        stderr: standard error of the mean.
        count: of independent values that the mean and its error are of, at least 2.
        level: how often intervals like this one cover the truth.

    Example:
        >>> round(half_width(1.0, 2), 3), round(half_width(1.0, 1000), 3)
        (12.706, 1.962)
    """
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.5 + level / 2)) * stderr


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Ends of the interval of the mean of at least 2 values; a point where all are equal.

    Example:
        >>> [round(end, 3) for end in interval([0.8, 0.9])]
        [0.215, 1.485]
    """
    n = len(values)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = half_width(deviation / math.sqrt(n), n, level)
    return mean - half, mean + half
