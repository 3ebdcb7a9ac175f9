"""Spaces: maps from one module of all adapters to the matrices that a merge method sees, and back to factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from loraloom.adapter import Factors, Shape, concat, truncate

Combine = Callable[[Tensor, Tensor], Tensor]  # a method with its knobs bound: (stack, weights) -> tensor
Parts = Sequence[Factors | None]  # one module of every adapter; None where an adapter has no such module


@dataclass(frozen=True)
class Request:
    """What a merge wants of one module.

    Attributes:
        name: the module path, for messages.
        combine: the method, its knobs and generator bound.
        weights: one per adapter.
        linear: whether the method is a sum with coefficients that depend on the weights alone.
        rank: the rank of the result.
        cut: whether that rank was asked for, so that an exact result of another rank is cut to it.
        keep_scale: whether parts of one scale may keep it (the configuration still says it).
        bias: whether the result has a bias even where no part has one.
    """

    name: str
    combine: Combine
    weights: Sequence[float]
    linear: bool
    rank: int
    cut: bool
    keep_scale: bool
    bias: bool


@dataclass(frozen=True)
class Space:
    """A space: how a module goes through it, and what it needs.

    Attributes:
        carry: (parts, request) -> the merged factors and their relative error (None where nothing was cut).
        rank: (sizes of the parts, linear) -> rank of the result where none is asked for.
        same: whether all adapters must have the same modules at the same ranks.
    """

    carry: Callable[[Parts, Request], tuple[Factors, float | None]]
    rank: Callable[[Sequence[Shape], bool], int]
    same: bool


def refactor(dense: Tensor, rank: int, like: Factors, name: str) -> tuple[Factors, float]:
    """Factors of the best approximation of a dense out x in update, its singular values split evenly; scale is 1.

    Args:
        dense: out x in.
        rank: number of columns of the new B; zeros fill up where the update has fewer singular values.
        like: gives the type, the layout and the bias of the result.
        name: the module path, for messages.

    Returns:
        The factors, and their relative error in the Frobenius norm.

    Raises:
        ValueError: the update has NaN or infinite entries.

    Example:
        >>> like = Factors(B=torch.zeros(2, 1), A=torch.zeros(1, 2))
        >>> cut, error = refactor(torch.diag(torch.tensor([3.0, 4.0])), 1, like, "fc")
        >>> cut.delta().diagonal().round(), round(error, 3)
        (tensor([0., 4.]), 0.6)
    """
    _check_finite(name, dense)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    b, a = dense.new_zeros(dense.shape[0], rank), dense.new_zeros(rank, dense.shape[1])
    b[:, :kept], a[:kept] = u[:, :kept] * root, root[:, None] * vh[:kept]
    total, tail = float(s.norm()), float(s[kept:].norm())
    cut = replace(like, B=b.to(like.dtype), A=a.to(like.dtype), scale=1.0)
    return cut, (tail / total if total > 0 else 0.0)


def in_factors(parts: Parts, request: Request) -> tuple[Factors, float | None]:
    """The method on the stacked B and on the stacked A, each by itself; differing scales go in as square roots."""
    whole = [part for part in parts if part is not None]
    stored, working = _types(whole)
    scales = [part.scale for part in whole]
    keep = request.keep_scale and len(set(scales)) == 1
    inner = [1.0] * len(whole) if keep else scales  # what goes into the factors; the rest stays outside
    signed = [math.copysign(math.sqrt(abs(scale)), scale) for scale in inner]
    b = [root * part.B.to(working) for root, part in zip(signed, whole, strict=True)]
    a = [abs(root) * part.A.to(working) for root, part in zip(signed, whole, strict=True)]
    merged = replace(
        whole[0],
        B=_combined(b, request),
        A=_combined(a, request),
        scale=scales[0] if keep else 1.0,
        bias=_bias(whole, inner, request),
    )
    return _cut(merged, stored, request)


def in_delta(parts: Parts, request: Request) -> tuple[Factors, float | None]:
    """The method on the updates: through the factors where it is linear, on dense matrices otherwise."""
    present = [part for part in parts if part is not None]
    stored, working = _types(present)
    scales = [0.0 if part is None else part.scale for part in parts]
    if request.linear:
        # A linear method is known by what it makes of the unit vectors: its coefficients.
        unit = torch.eye(len(parts), dtype=torch.float64)
        share = request.combine(unit, torch.tensor(request.weights, dtype=torch.float64)).tolist()
        used = [c for part, c in zip(parts, share, strict=True) if part is not None]
        dtype = working if request.cut else stored
        cast = [replace(part, B=part.B.to(dtype), A=part.A.to(dtype)) for part in present]
        return _cut(replace(concat(cast, used), bias=_bias(parts, scales, request)), stored, request)
    zero = torch.zeros(present[0].shape[:2], dtype=working, device=present[0].B.device)
    deltas = [zero if part is None else part.scale * (part.B.to(working) @ part.A.to(working)) for part in parts]
    dense = _combined(deltas, request)
    like = replace(present[0], B=present[0].B.to(stored), bias=_bias(parts, scales, request))
    return refactor(dense, request.rank, like, request.name)


def _factor_rank(shapes: Sequence[Shape], linear: bool) -> int:
    return shapes[0].rank


def _delta_rank(shapes: Sequence[Shape], linear: bool) -> int:
    total = sum(shape.rank for shape in shapes)
    return total if linear else min(total, *shapes[0][:2])


SPACES: Mapping[str, Space] = {
    "factors": Space(in_factors, _factor_rank, same=True),
    "delta": Space(in_delta, _delta_rank, same=False),
}


def _types(parts: Sequence[Factors]) -> tuple[torch.dtype, torch.dtype]:
    """The type of the result, and the one to compute in: at least float32."""
    stored = reduce(torch.promote_types, (part.dtype for part in parts))
    return stored, torch.promote_types(stored, torch.float32)


def _combined(tensors: Sequence[Tensor], request: Request) -> Tensor:
    stack = torch.stack(list(tensors))
    return request.combine(stack, torch.tensor(request.weights, dtype=stack.dtype, device=stack.device))


def _bias(parts: Parts, scales: Sequence[float], request: Request) -> Tensor | None:
    """The biases, each a column of its update, merged by the same method; one that is missing counts as zero."""
    present = [part for part in parts if part is not None]
    if not request.bias and all(part.bias is None for part in present):
        return None
    stored, working = _types(present)
    zero = torch.zeros(present[0].shape.out, dtype=working, device=present[0].B.device)
    columns = [
        zero if part is None or part.bias is None else scale * part.bias.to(working)
        for part, scale in zip(parts, scales, strict=True)
    ]
    return _combined([column[:, None] for column in columns], request)[:, 0].to(stored)


def _cut(merged: Factors, stored: torch.dtype, request: Request) -> tuple[Factors, float | None]:
    """The result in the type in which it is stored, cut to the rank that was asked for, if one was."""
    error = None
    if request.cut:
        _check_finite(request.name, merged.B, merged.A)
        merged, error = truncate(merged.baked(), request.rank)
    return replace(merged, B=merged.B.to(stored), A=merged.A.to(stored)), error


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError(f"{name}: a matrix with NaN or infinite entries has no singular values")
