"""Spherical interpolation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.sphere import exp_map, log_map, on_sphere


@merge_methods.register(
    "slerp", paper="https://doi.org/10.1145/325165.325242", space="core", spaces=("core", "delta", "knots")
)
def slerp(deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"]) -> Float[Tensor, " *shape"]:
    """Interpolation of the directions along the great circle, of the norms along the line (Shoemake 1985).

    With shares ``t_i = w_i / sum w`` the direction goes the share of the angle between two updates; the norm is the
    mean of the norms by the same shares, times the sum of the weights. For more than two updates the directions are
    averaged in the plane that touches the sphere at their weighted mean (one step of ``karcher``, "multi-SLERP").
    Zero updates count for the norm only. Directions that cancel out, or of which one is opposite to their mean, as two
    that are opposite, have no great circle: the line is taken, the weighted sum.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, not negative.

    Raises:
        ValueError: a weight is negative, or all are 0.

    Example:
        >>> slerp(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0.5, 0.5]))
        tensor([1.4142, 1.4142])
    """
    points = on_sphere(deltas, weights)
    if points.mean is None:
        return torch.tensordot(weights, deltas, dims=1)
    if len(points.units) == 2:
        first, second = points.units
        return points.placed(exp_map(first, points.shares[1] * log_map(first, second)), deltas)
    step = torch.zeros_like(points.mean)
    for share, unit in zip(points.shares, points.units, strict=True):
        step += share * log_map(points.mean, unit)
    return points.placed(exp_map(points.mean, step), deltas)
