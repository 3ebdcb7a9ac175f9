"""Interpolating two adapters: the points of the straight path from one to the other."""

from __future__ import annotations

from dataclasses import replace

from loraloom.adapter import Adapter
from loraloom.ops.merge import merge


def interpolate(
    a: Adapter, b: Adapter, at: float = 0.5, *, space: str = "delta", same_base: bool = True, extras: str = "refuse"
) -> Adapter:
    """The point ``(1 - at) * a + at * b``; at the ends it is the adapter itself.

    In ``delta``, the default, the updates are interpolated, exactly, at the sum of both ranks. In ``factors`` it is
    ``((1 - at) B_a + at B_b)((1 - at) A_a + at A_b)``, the path of CoTo's linear mode connectivity (arXiv 2506.05713):
    it keeps the rank, and depends on the gauge, so two seeds of one task can sag in between.

    Args:
        a: where ``at`` is 0.
        b: where ``at`` is 1.
        at: in [0, 1].
        space: ``delta`` or ``factors``.
        same_base: refuse adapters whose base models have different names.
        extras: ``refuse`` or ``average`` (then interpolated too) whole tensors that both hold.

    Raises:
        ValueError: ``at`` is outside [0, 1], or the two do not merge (see :func:`loraloom.ops.merge.merge`).

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 2))
        >>> a, b = (Adapter({"r": 1}, {"fc": one.scaled(scale)}) for scale in (0.0, 4.0))
        >>> interpolate(a, b, at=0.25).modules["fc"].delta()
        tensor([[1., 1.]])
    """
    if not 0 <= at <= 1:
        raise ValueError(f"at must be in [0, 1], got {at}")
    point = merge([a, b], weights=[1 - at, at], space=space, same_base=same_base, extras=extras)
    arguments = {"at": at, "space": space, "same_base": same_base, "extras": extras}
    provenance = {**point.provenance, "operation": "interpolate", "arguments": arguments}
    if at in (0, 1):
        return replace(b if at else a, provenance=provenance)
    return replace(point, provenance=provenance)
