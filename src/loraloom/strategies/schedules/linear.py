"""The paper's curve: a straight line."""

from __future__ import annotations

from loraloom.strategies.schedules import schedules


@schedules.register("linear", paper="https://arxiv.org/abs/2506.05713")
def linear(x: float) -> float:
    """Even rise, f(x) = x: with ramp 3/4 and start 0 this is the paper's p(t) = 4t / 3T (CoTo, section 3).

    Example:
        >>> linear(0.25)
        0.25
    """
    return x
