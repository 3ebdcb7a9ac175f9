"""A staircase."""

from __future__ import annotations

import math

from loraloom.strategies.schedules import schedules

STEPS = 4


@schedules.register("step", paper="https://arxiv.org/abs/2506.05713")
def step(x: float) -> float:
    """Staircase of four equal steps, f(x) = floor(4x) / 4: the line, held for a quarter of the ramp each.

    The paper does not try it; phases of constant p are easier to compare with one another.

    Example:
        >>> [step(x) for x in (0.0, 0.24, 0.25, 0.99, 1.0)]
        [0.0, 0.0, 0.25, 0.75, 1.0]
    """
    # x comes out of a division: a step that lies on the edge in exact arithmetic must not miss it by a rounding error
    return min(1.0, math.floor(STEPS * x + 1e-9) / STEPS)
