"""Updates as points on a sphere: directions and norms, and the maps to and from the plane that touches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Points:
    """Directions of the updates that are not zero, flat and in float64.

    Attributes:
        units: their directions.
        shares: their weights, as shares of the sum over those that are not zero.
        mean: the normalised weighted mean; None where it vanishes, or an update is opposite to it, so that no one great
            circle leads there.
        norm: that of the result.
    """

    units: Sequence[Tensor]
    shares: Sequence[float]
    mean: Tensor | None
    norm: float

    def placed(self, direction: Tensor, like: Float[Tensor, " k *shape"]) -> Float[Tensor, " *shape"]:
        """A direction as an update of the right norm, shape and type."""
        return (self.norm * direction).view(like.shape[1:]).to(like.dtype)


def on_sphere(deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"]) -> Points:
    """Directions, shares, mean direction and norm of the updates.

    Raises:
        ValueError: a weight is negative, or all are 0.

    Example:
        >>> points = on_sphere(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([0.5, 0.5]))
        >>> points.norm, points.mean
        (3.0, tensor([0.7071, 0.7071], dtype=torch.float64))
    """
    given = [float(weight) for weight in weights]
    if min(given) < 0 or sum(given) <= 0:
        raise ValueError(f"on a sphere weights must not be negative and not all 0, got {given}")
    flat = [delta.flatten().double() for delta in deltas]
    norms = [float(one.norm()) for one in flat]
    used = [
        (one / norm, weight) for one, norm, weight in zip(flat, norms, given, strict=True) if norm > 0 and weight > 0
    ]
    whole = sum(weight for _, weight in used)
    units, shares = [unit for unit, _ in used], [weight / whole for _, weight in used]
    mean = sum((share * unit for share, unit in zip(shares, units, strict=True)), torch.zeros_like(flat[0]))
    norm = sum(weight * size for weight, size in zip(given, norms, strict=True))
    length = float(mean.norm())
    if length <= 1e-6 or (len(units) == 2 and _opposite(*units)):
        return Points(units, shares, None, norm)
    mean = mean / length
    return Points(units, shares, None if any(_opposite(mean, unit) for unit in units) else mean, norm)


def _opposite(one: Tensor, other: Tensor) -> bool:
    """Whether of two unit vectors one is the other turned round, up to rounding."""
    return float((one + other).norm()) <= 1e-6


def log_map(at: Float[Tensor, " n"], to: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The step in the plane that touches the sphere at one unit vector, towards another; as long as the angle.

    Example:
        >>> log_map(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.5708])
    """
    across = to - torch.dot(at, to) * at
    length = across.norm()
    angle = torch.atan2(length, torch.dot(at, to))
    return across * (angle / length) if length > 0 else torch.zeros_like(at)


def exp_map(at: Float[Tensor, " n"], step: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The unit vector that a step in the plane at another one leads to.

    Example:
        >>> exp_map(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.1415926])).round()
        tensor([-1., 0.])
    """
    length = step.norm()
    if length == 0:
        return at
    found = torch.cos(length) * at + torch.sin(length) * step / length
    return found / found.norm()
