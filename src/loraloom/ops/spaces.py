"""Spaces: maps from one module of all adapters to the matrices that a merge method sees, and back to factors.

- ``delta``: the updates, dense, one module at a time.
- ``factors``: B and A as they are stored. Depends on the gauge: ``(B P, P^-1 A)`` is the same update, and merges to
  another one.
- ``core``: the updates in joint orthonormal bases, ``M_t = U^T D_t V``, at most (sum of ranks) square; lossless (Core
  Space, Panariello et al. 2025, arXiv 2509.17786). U holds the left singular vectors of ``[D_1 ... D_k]``, V the right
  ones of the updates on top of each other: the paper's spans, but bases that do not depend on the gauge.
- ``knots``: the right parts V_t of ``[D_1 ... D_k] = U S [V_1 ... V_k]`` (KnOTS, Stoica et al. 2025, arXiv
  2410.19735), each R x in. What the authors' code merges is ``S V_t``: the same but where entries are selected by size.
- ``units``: the rank-one units of every adapter, one a row, ``[b_i, a_i]`` with sqrt(scale) in both. Depends on the
  gauge too.

``core`` and ``knots`` come from Gram matrices of the stacked factors: the large matrices are touched by two products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.adapter import Factors, Shape, UnsupportedKind, concat, is_finite, padded, truncate
from loraloom.ops.dense import low_rank
from loraloom.ops.joint import Stacked
from loraloom.ops.products import Product, Products, Updates
from loraloom.ops.spectrum import triples

Combine = Callable[..., Tensor]  # a method with its knobs bound: (stack, weights) -> tensor
Parts = Sequence[Factors | None]  # one module of every adapter; None where an adapter has no such module


@dataclass(frozen=True)
class Request:
    """What a merge wants of one module.

    Attributes:
        name: the module path, for messages.
        combine: the method, its knobs and generator bound.
        weights: one per adapter.
        linear: whether the method is a sum with coefficients that depend on the weights alone.
        by_rows: whether the method takes updates that are formed a block of rows at a time.
        rank: the rank of the result.
        cut: whether that rank was asked for, so that an exact result of another rank is cut to it.
        keep_scale: whether parts of one scale may keep it (the configuration still says it).
        bias: whether the result has a bias even where no part has one.
        statistics: what the method asks to know of each adapter, in the order of the parts.
        dense: the update of one part, out x in, where that takes more than its factors (DoRA and HiRA, with the base).
    """

    name: str
    combine: Combine
    weights: Sequence[float]
    linear: bool
    by_rows: bool
    rank: int
    cut: bool
    keep_scale: bool
    bias: bool
    statistics: Sequence[Tensor] | None = None
    dense: Callable[[Factors], Tensor] | None = None


@dataclass(frozen=True)
class Space:
    """A space: how a module goes through it, and what it needs.

    Attributes:
        carry: (parts, request) -> the merged factors and their relative error (None where nothing was cut).
        rank: (sizes of the parts, linear) -> rank of the result where none is asked for.
        same: whether all adapters must have the same modules at the same ranks.
        gauge: whether the result depends on the gauge of the factors.
    """

    carry: Callable[[Parts, Request], tuple[Factors, float | None]]
    rank: Callable[[Sequence[Shape], bool], int]
    same: bool = False
    gauge: bool = False


def refactor(dense: Tensor, rank: int, like: Factors, name: str, start: Tensor | None = None) -> tuple[Factors, float]:
    """Factors of a dense out x in update at a rank, as :func:`loraloom.ops.dense.low_rank` has it; scale is 1.

    Args:
        dense: out x in.
        rank: number of columns of the new B.
        like: gives the type, the layout and the bias of the result.
        name: the module path, for messages.
        start: columns that span a first guess of the column space.

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
    b, a, error = low_rank(dense, rank, start)
    return replace(like, B=b.to(like.dtype), A=a.to(like.dtype), scale=1.0), error


def in_factors(parts: Parts, request: Request) -> tuple[Factors, float | None]:
    """The method on the stacked B and on the stacked A, each by itself; differing scales go in as square roots."""
    whole = [part for part in parts if part is not None]
    stored, working = _types(whole)
    scales = [part.scale for part in whole]
    keep = request.keep_scale and len(set(scales)) == 1
    inner = [1.0] * len(whole) if keep else scales  # what goes into the factors; the rest stays outside
    signed = [math.copysign(math.sqrt(abs(scale)), scale) for scale in inner]
    if request.linear:
        shares = _shares(request)
        b = _weighted([part.B for part in whole], [c * root for c, root in zip(shares, signed, strict=True)], working)
        a = _weighted(
            [part.A for part in whole], [c * abs(root) for c, root in zip(shares, signed, strict=True)], working
        )
    else:
        b, a = _combined_factors(whole, signed, working, request)
    merged = replace(
        whole[0],
        B=b,
        A=a,
        scale=scales[0] if keep else 1.0,
        bias=_bias(whole, inner, request),
    )
    return _cut(merged, stored, request)


def _weighted(tensors: Sequence[Tensor], shares: Sequence[float], working: torch.dtype) -> Tensor:
    """Weighted sum, one tensor after the other: no stack is made."""
    total = torch.zeros_like(tensors[0], dtype=working)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor, alpha=share)
    return total


def _combined_factors(
    whole: Sequence[Factors], signed: Sequence[float], working: torch.dtype, request: Request
) -> tuple[Tensor, Tensor]:
    """The method on the stacked B and on the stacked A, roots of scales multiplied in."""
    b = torch.stack([root * part.B.to(working) for root, part in zip(signed, whole, strict=True)])
    a = torch.stack([abs(root) * part.A.to(working) for root, part in zip(signed, whole, strict=True)])
    flat, size = _stacked(request, b), b[0].numel()  # B before A
    if flat is None:
        return _combined(b, request), _combined(a, request)
    if flat.shape[1:] != (size + a[0].numel(),):
        got = " x ".join(map(str, flat.shape[1:]))
        raise ValueError(f"{request.name}: statistics of B and A are {size + a[0].numel()} numbers, got {got}")
    return _combined(b, request, flat[:, :size].view_as(b)), _combined(a, request, flat[:, size:].view_as(a))


def in_delta(parts: Parts, request: Request) -> tuple[Factors, float | None]:
    """The method on the updates: through the factors where it is linear, on dense matrices otherwise."""
    present = [part for part in parts if part is not None]
    stored, working = _types(present)
    scales = [0.0 if part is None else part.scale for part in parts]
    if request.linear and request.dense is None:
        used = [c for part, c in zip(parts, _shares(request), strict=True) if part is not None]
        dtype = working if request.cut else stored
        cast = [replace(part, B=part.B.to(dtype), A=part.A.to(dtype)) for part in present]
        whole = replace(concat(cast, used), bias=_bias(parts, scales, request))
        return _cut(whole, stored, request) if request.cut else (whole, None)  # float16 may have become float32
    if request.by_rows and request.dense is None:
        none = Product(present[0].B.new_zeros(present[0].shape.out, 0, dtype=working), present[0].A[:0].to(working))
        dense = _combined(Products([none if part is None else _product(part, working) for part in parts]), request)
    else:
        stack = torch.empty(len(parts), *present[0].shape[:2], dtype=working, device=present[0].B.device)
        for row, part in zip(stack, parts, strict=True):
            if part is None:
                row.zero_()
            elif request.dense is not None:
                row.copy_(request.dense(part))
            else:
                torch.mm(part.scale * part.B.to(working), part.A.to(working), out=row)
        dense = _combined(stack, request, _stacked(request, stack))
        del stack
    like = replace(present[0], B=present[0].B.to(stored), bias=_bias(parts, scales, request), magnitude=None)
    start = torch.cat([part.B.to(working) for part in present], dim=1)
    return refactor(dense, request.rank, like, request.name, start)


def _product(part: Factors, working: torch.dtype) -> Product:
    return Product(part.scale * part.B.to(working), part.A.to(working))


class _Joint(NamedTuple):
    """The factors of all adapters."""

    B: Tensor  # out x R, side by side
    A: Tensor  # R x in, on top of each other
    blocks: list[tuple[float, slice] | None]  # scale and place of each adapter's part; None where it has none

    def scaled(self, roots: Sequence[Tensor]) -> list[Tensor]:
        """Roots of the factors of one kind, each times the scale of its update."""
        used = [block for block in self.blocks if block is not None]
        return [scale * root for (scale, _), root in zip(used, roots, strict=True)]


def _joint(parts: Parts, request: Request) -> _Joint:
    present = [part for part in parts if part is not None]
    _, working = _types(present)
    b = torch.cat([part.B.to(working) for part in present], dim=1)
    a = torch.cat([part.A.to(working) for part in present], dim=0)
    _check_finite(request.name, b, a)
    blocks: list[tuple[float, slice] | None] = []
    end = 0
    for part in parts:
        blocks.append(None if part is None else (part.scale, slice(end, end + part.rank)))
        end += 0 if part is None else part.rank
    return _Joint(b, a, blocks)


def in_core(parts: Parts, request: Request) -> tuple[Factors, float | None]:
    """The method on the coordinates of the updates in joint bases; nothing is lost on the way there and back.

    ``D_t = s_t B_t A_t`` is ``(U^T B_t) s_t (A_t V)`` there. A weighted sum is the same in any basis: it takes the way
    of ``delta``.
    """
    if request.linear:
        return _summed(parts, request)
    joint, ranks = _joint(parts, request), [part.rank for part in parts if part is not None]
    of_b, of_a, working = Stacked(joint.B), Stacked(joint.A.T), joint.B.dtype
    left, right = of_b.singular(joint.scaled(of_a.roots(ranks))), of_a.singular(joint.scaled(of_b.roots(ranks)))
    stack = torch.zeros(len(parts), len(left.values), len(right.values), dtype=working, device=joint.B.device)
    for core, block in zip(stack, joint.blocks, strict=True):
        if block is not None:
            scale, at = block
            core.copy_(scale * left.rows[:, at] @ right.rows[:, at].T)
    merged = _combined(stack, request) if stack.numel() else stack[0]
    found = triples(merged, of_b.tolerance)
    root = found.values[: request.rank].sqrt()
    b = joint.B @ (left.map @ found.left[:, : request.rank] * root).to(working)
    a = (right.map @ found.right[:, : request.rank] * root).T.to(working) @ joint.A
    return _assembled(parts, request, b, a), _tail(found.values, request)


def _summed(parts: Parts, request: Request) -> tuple[Factors, float | None]:
    """The weighted sum, of no more directions than there are."""
    whole = sum(part.rank for part in parts if part is not None)
    return in_delta(parts, replace(request, cut=request.cut or whole > request.rank))


def _tail(values: Tensor, request: Request) -> float | None:
    """The relative error of a cut to the rank that was asked for, from all singular values."""
    if not request.cut:
        return None
    total = float(values.norm())
    return float(values[request.rank :].norm()) / total if total > 0 else 0.0


def in_knots(parts: Parts, request: Request) -> tuple[Factors, float | None]:
    """The method on the right parts ``V_t = S^-1 U^T s_t B_t A_t``; the result is ``U S`` times what it gives."""
    if request.linear:
        return _summed(parts, request)
    joint = _joint(parts, request)
    working = joint.B.dtype
    roots = [Stacked(joint.A[block[1]].T).root() for block in joint.blocks if block is not None]
    left = Stacked(joint.B).singular(joint.scaled(roots))
    stack = joint.A.new_empty(len(parts), len(left.values), joint.A.shape[1])
    for row, block in zip(stack, joint.blocks, strict=True):
        if block is None:
            row.zero_()
        else:
            scale, at = block
            torch.mm((scale * left.rows[:, at] / left.values[:, None]).to(working), joint.A[at], out=row)
    merged = _combined(stack, request, _stacked(request, stack)) if stack.numel() else stack[0]
    del stack
    if len(merged) <= request.rank:
        whole = joint.B @ (left.map * left.values).to(working)
        return _assembled(parts, request, whole, merged), 0.0 if request.cut else None
    right = Stacked(merged.T).singular([torch.diag(left.values)])  # of S @ merged
    root = right.values[: request.rank].sqrt()
    b = joint.B @ (left.map * left.values @ right.rows[: request.rank].T / root).to(working)
    a = (right.map[:, : request.rank] * root).T.to(working) @ merged
    return _assembled(parts, request, b, a), _tail(right.values, request)


def in_units(parts: Parts, request: Request) -> tuple[Factors, float | None]:
    """The method on rows ``[b_i, a_i]``; it may give back any number of them."""
    present = [part for part in parts if part is not None]
    if request.bias or any(part.bias is not None for part in present):
        raise UnsupportedKind(f"{request.name}: space 'units' has no place for a bias of B (lora_bias)")
    _, working = _types(present)
    out, most = present[0].shape.out, max(part.rank for part in present)
    stack = torch.zeros(len(parts), most, sum(present[0].shape[:2]), dtype=working, device=present[0].B.device)
    for rows, part in zip(stack, parts, strict=True):
        if part is not None:
            root = math.sqrt(abs(part.scale))
            rows[: part.rank, :out] = math.copysign(root, part.scale) * part.B.T
            rows[: part.rank, out:] = root * part.A
    merged = _combined(stack, request)
    return _fitted(parts, request, merged[:, :out].T, merged[:, out:])


def _fitted(parts: Parts, request: Request, b: Tensor, a: Tensor) -> tuple[Factors, float | None]:
    """Factors of the rank that was promised, from any number of columns and rows."""
    if len(a) <= request.rank:
        return _assembled(parts, request, b, a), 0.0 if request.cut else None
    whole = _assembled(parts, replace(request, rank=len(a)), b, a)
    return _cut(replace(whole, B=b, A=a), whole.dtype, replace(request, cut=True))


def _assembled(parts: Parts, request: Request, b: Tensor, a: Tensor) -> Factors:
    """Factors of scale 1 at the rank that was promised, stored as the parts are, with the merged bias."""
    present = [part for part in parts if part is not None]
    stored, _ = _types(present)
    scales = [0.0 if part is None else part.scale for part in parts]
    bias = _bias(parts, scales, request)
    b, a = padded(b, request.rank).to(stored), padded(a.T, request.rank).T.to(stored)
    return replace(present[0], B=b, A=a, scale=1.0, bias=bias)


def _sum_of_ranks(shapes: Sequence[Shape], linear: bool) -> int:
    return min(sum(shape.rank for shape in shapes), *shapes[0][:2])


SPACES: Mapping[str, Space] = {
    "factors": Space(in_factors, lambda shapes, linear: shapes[0].rank, same=True, gauge=True),
    "delta": Space(
        in_delta, lambda shapes, linear: sum(s.rank for s in shapes) if linear else _sum_of_ranks(shapes, linear)
    ),
    "core": Space(in_core, _sum_of_ranks),
    "knots": Space(in_knots, _sum_of_ranks),
    "units": Space(in_units, _sum_of_ranks, gauge=True),
}


def _types(parts: Sequence[Factors]) -> tuple[torch.dtype, torch.dtype]:
    """The type of the result, and the one to compute in: at least float32."""
    stored = reduce(torch.promote_types, (part.dtype for part in parts))
    return stored, torch.promote_types(stored, torch.float32)


def _shares(request: Request) -> list[float]:
    """The coefficients of a linear method, known by what it makes of the unit vectors."""
    unit = torch.eye(len(request.weights), dtype=torch.float64)
    share: list[float] = request.combine(unit, torch.tensor(request.weights, dtype=torch.float64)).tolist()
    return share


def _combined(stack: Updates, request: Request, statistics: Tensor | None = None) -> Tensor:
    weights = torch.tensor(request.weights, dtype=stack.dtype, device=stack.device)
    if statistics is None:
        return request.combine(stack, weights)
    return request.combine(stack, weights, statistics=statistics)


def _stacked(request: Request, like: Tensor) -> Tensor | None:
    if request.statistics is None:
        return None
    sizes = dict.fromkeys(tuple(one.shape) for one in request.statistics)
    if len(sizes) > 1:
        raise ValueError(f"{request.name}: statistics of different sizes: {', '.join(map(str, sizes))}")
    return torch.stack(list(request.statistics)).to(like)


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
    if request.statistics is not None:
        raise UnsupportedKind(f"{request.name}: a bias of B (lora_bias) has no statistics to be merged by")
    return _combined(torch.stack(columns)[:, :, None], request)[:, 0].to(stored)


def _cut(merged: Factors, stored: torch.dtype, request: Request) -> tuple[Factors, float | None]:
    """The result in the type in which it is stored, cut to the rank that was asked for, if one was."""
    error = None
    if request.cut:
        _check_finite(request.name, merged.B, merged.A)
        merged, error = truncate(merged.baked(), request.rank)
    return replace(merged, B=merged.B.to(stored), A=merged.A.to(stored)), error


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(is_finite(tensor) for tensor in tensors):
        raise ValueError(f"{name}: a matrix with NaN or infinite entries has no singular values")
