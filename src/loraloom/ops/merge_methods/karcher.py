"""Mean on the sphere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.sphere import exp_map, log_map, on_sphere


@merge_methods.register(
    "karcher", paper="https://doi.org/10.1002/cpa.3160300502", space="core", spaces=("core", "delta", "knots")
)
def karcher(
    deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"], *, steps: int = 100
) -> Float[Tensor, " *shape"]:
    """Weighted mean of the directions on the sphere (Karcher 1977), of the norms along the line.

    The direction m with ``sum_i w_i log_m(u_i) = 0``, found from the normalised weighted mean by steps along that sum
    until it is below 1e-7 (float64: 1e-12). The norm is the weighted mean of the norms, times the sum of the weights.
    For two updates it is ``slerp``. Zero updates count for the norm only. Directions that cancel out, or of which one
    is opposite to where the steps begin, have no mean: the weighted sum is taken.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, not negative.
        steps: at most so many.

    Raises:
        ValueError: a weight is negative, all are 0, or ``steps`` is below 1.

    Example:
        >>> karcher(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0.5, 0.5]))
        tensor([1.4142, 1.4142])
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    points = on_sphere(deltas, weights)
    if points.mean is None:
        return torch.tensordot(weights, deltas, dims=1)
    mean, enough = points.mean, 1e-12 if deltas.dtype == torch.float64 else 1e-7
    for _ in range(steps):
        step = torch.zeros_like(mean)
        for share, unit in zip(points.shares, points.units, strict=True):
            step += share * log_map(mean, unit)
        mean = exp_map(mean, step)
        if float(step.norm()) < enough:
            break
    return points.placed(mean, deltas)
