"""Interpolating two adapters: the points of the path from one to the other, straight or bent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from loraloom.adapter import Adapter
from loraloom.ops.align import align as aligned
from loraloom.ops.merge import merge


def interpolate(  # noqa: PLR0913 - every option that a path has
    a: Adapter,
    b: Adapter,
    at: float = 0.5,
    *,
    via: Adapter | None = None,
    space: str = "delta",
    align: str | None = None,
    base: Mapping[str, Tensor] | None = None,
    device: str | None = None,
    same_base: bool = True,
    extras: str = "refuse",
) -> Adapter:
    """The point ``(1 - at) * a + at * b``; at the ends it is the adapter itself.

    In ``delta``, the default, the updates are interpolated, exactly, at the sum of the ranks. In ``factors`` it is
    ``((1 - at) B_a + at B_b)((1 - at) A_a + at A_b)``, the path of CoTo's linear mode connectivity (arXiv 2506.05713):
    it keeps the rank, and depends on the gauge, so two seeds of one task can sag in between; ``align`` mends that part.
    With ``via`` the path is the quadratic Bezier curve ``(1-t)^2 a + 2 t (1-t) via + t^2 b`` (Garipov et al. 2018,
    section 3), which leaves a towards the control point.

    Args:
        a: where ``at`` is 0.
        b: where ``at`` is 1.
        at: in [0, 1].
        via: the control point; the path does not go through it.
        space: ``delta`` or ``factors``.
        align: bring ``b`` and ``via`` to a's gauge first: ``orthogonal`` or ``invertible``
            (see :func:`loraloom.ops.align.align`).
        base: weights of the base model, for DoRA in space ``delta`` (see :func:`loraloom.ops.merge.merge`).
        device: where to compute ("cuda"); by default where the factors are.
        same_base: refuse adapters whose base models have different names.
        extras: ``refuse`` or ``average`` (then interpolated too) whole tensors that several hold.

    Raises:
        ValueError: ``at`` is outside [0, 1], or they do not merge (see :func:`loraloom.ops.merge.merge`).

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 2))
        >>> a, b = (Adapter({"r": 1}, {"fc": one.scaled(scale)}) for scale in (0.0, 4.0))
        >>> interpolate(a, b, at=0.25).modules["fc"].delta()
        tensor([[1., 1.]])
        >>> interpolate(a, b, at=0.25, via=a).modules["fc"].delta()
        tensor([[0.2500, 0.2500]])
    """
    if not 0 <= at <= 1:
        raise ValueError(f"at must be in [0, 1], got {at}")
    others = [b] if via is None else [via, b]
    if align is not None:
        others = [aligned(one, to=a, by=align) for one in others]
    weights = [1 - at, at] if via is None else [(1 - at) ** 2, 2 * at * (1 - at), at**2]
    how: dict[str, Any] = {"base": base, "device": device, "same_base": same_base, "extras": extras}
    point = merge([a, *others], weights=weights, space=space, **how)
    arguments = {"at": at, "space": space, "align": align, "same_base": same_base, "extras": extras}
    provenance = {**point.provenance, "operation": "interpolate", "arguments": arguments}
    if at in (0, 1):
        return replace(b if at else a, provenance=provenance)
    return replace(point, provenance=provenance)
