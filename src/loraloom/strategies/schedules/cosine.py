"""A slow start and a slow end."""

from __future__ import annotations

import math

from loraloom.strategies.schedules import schedules


@schedules.register("cosine", paper="https://arxiv.org/abs/1608.03983")
def cosine(x: float) -> float:
    """Slow start and slow end, f(x) = (1 - cos(pi x)) / 2: half a cosine wave, upside down.

    The shape is that of cosine learning rates (Loshchilov & Hutter 2017, equation 5); the CoTo paper does not try it.

    Example:
        >>> round(cosine(0.5), 4)
        0.5
    """
    return (1 - math.cos(math.pi * x)) / 2
