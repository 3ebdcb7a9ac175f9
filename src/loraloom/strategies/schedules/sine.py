"""A fast start and a slow end."""

from __future__ import annotations

import math

from loraloom.strategies.schedules import schedules


@schedules.register("sine", paper="https://arxiv.org/abs/2506.05713")
def sine(x: float) -> float:
    """Fast start, f(x) = sin(pi x / 2) (CoTo, ablation of the schedule: it merged and pruned worst there).

    Example:
        >>> round(sine(0.5), 4)
        0.7071
    """
    return math.sin(math.pi * x / 2)
