"""No rise at all: stochastic depth."""

from __future__ import annotations

from loraloom.strategies.schedules import schedules


@schedules.register("constant", paper="https://arxiv.org/abs/1603.09382", breaks=("reaches_one",))
def constant(x: float) -> float:
    """No rise, f(x) = 0: p stays at ``start``, which is stochastic depth (Huang et al. 2016, section 3).

    One of the CoTo paper's baselines. Their survival probability falls linearly with depth; that comes close to
    ``nesting="high-to-low"``. As f never reaches 1, ``start`` must be above 0.

    Example:
        >>> constant(1.0)
        0.0
    """
    return 0.0
