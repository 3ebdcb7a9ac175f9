"""A slow start and a fast end."""

from __future__ import annotations

import math

from loraloom.strategies.schedules import schedules

STEEPNESS = 2 * math.log(1 + math.sqrt(2))


@schedules.register("exponential", paper="https://arxiv.org/abs/2506.05713")
def exponential(x: float) -> float:
    """Slow start, f(x) = (e^(kx) - 1) / (e^k - 1) with k = 2 ln(1 + sqrt 2), about 1.76.

    The paper compares an exponential curve (ablation of the schedule; it merged and pruned best there). This k
    makes it as far below the line half-way as ``sine`` is above it: f(1/2) = 1 - sin(pi/4).

    Example:
        >>> round(exponential(0.5), 4)
        0.2929
    """
    return math.expm1(STEEPNESS * x) / math.expm1(STEEPNESS)
