"""Adapted linear layers in few passes: LoRA, DoRA and HiRA on a frozen weight, with backward passes of their own.

Layers that see the same input are computed together: their A's in one product, and the gradient of the input summed by
the matrix products themselves. Nothing of the size of a weight or of an output is kept for backward that PEFT does not
keep as well; most is not kept at all.

Costs for n tokens and a weight of out x in, beside 4 n in out of the frozen layer (forward, and backward through its
input): LoRA 6 n r (in + out); DoRA in addition 2 r in out, a pass over the weight, and one each way over the output;
HiRA 2 n in out for the gradient of the product, 8 r in out, and two passes each way over the weight, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.fused import passes
from loraloom.fused.passes import in_kind

BLOCK = {"cpu": 2**20}  # entries of a weight that are worked on at a time
_BLOCK_ELSEWHERE = 2**24


class Adapted(NamedTuple):
    """One linear layer with its adapter.

    Attributes:
        weight: frozen, (out, in).
        bias: frozen, (out,), or none.
        a: (r, in).
        b: (out, r).
        scale: of the update.
        magnitude: of DoRA, (out,).
        between: of MokA, what is done between A and B (:class:`loraloom.strategies.rankback.Between`).
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None
    between: Any = None


def lora(x: Tensor, layers: Sequence[Adapted], *, dropout: float = 0.0, dtype: torch.dtype | None = None) -> tuple:
    """What LoRA and DoRA layers on one input give: ``W x + bias + scale B A x``, rescaled by row for DoRA.

    LoRA is Hu et al. 2021 (arXiv 2106.09685), equation 3; DoRA Liu et al. 2024 (arXiv 2402.09353), equation 5, with the
    norm of the updated weight taken as a constant (section 4.3), from its three parts:
    ``|w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b (A A^T) b`` for every row w of W and b of B.

    Args:
        x: (..., in).
        layers: one or more, all with this input.
        dropout: of the input of the updates, for a single LoRA layer; drawn as ``torch.nn.functional.dropout`` draws.
        dtype: what all is computed in, as autocast asks; by default the base is in the type of ``x``, the update in
            that of ``a``.

    Returns:
        One (..., out) a layer.

    Example:
        >>> W, A, B = torch.eye(2), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
        >>> lora(torch.tensor([1.0, 2.0]), [Adapted(W, None, A, B, scale=2.0)])
        (tensor([7., 2.]),)
    """
    tensors = [part for one in layers for part in (one.weight, one.bias, one.a, one.b, one.magnitude)]
    return _Lora.apply(x, [one.scale for one in layers], dropout, dtype, *tensors)


def hira(x: Tensor, layers: Sequence[Adapted], *, whole: bool = True, dtype: torch.dtype | None = None) -> tuple:
    """What HiRA layers on one input give: ``(W + W * (B A)) x + bias`` (``*`` by entry), each in one product.

    HiRA is Huang et al. 2025 (ICLR), equation 3. The product by entries is made again in backward, block by block.

    Args:
        x: (..., in).
        layers: one or more, all with this input; without ``scale`` and ``magnitude``.
        whole: with the frozen layer; otherwise ``(W * (B A)) x`` alone, for inputs with dropout.
        dtype: what all is computed in, as autocast asks; by default the type of the weight and of ``a`` together.

    Returns:
        One (..., out) a layer.

    Example:
        >>> W, A, B = torch.eye(2), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
        >>> hira(torch.tensor([1.0, 2.0]), [Adapted(W, None, A, B)])
        (tensor([2., 2.]),)
    """
    tensors = [part for one in layers for part in (one.weight, one.bias, one.a, one.b)]
    return _Hira.apply(x, whole, dtype, *tensors)


class _Lora(torch.autograd.Function):
    """LoRA and DoRA layers on one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: list[float], p: float, dtype: torch.dtype | None, *tensors: Any) -> tuple:
        parts = list(passes.each(tensors, 5))
        wide, thin = dtype or x.dtype, dtype or parts[0][2].dtype
        flat, lows = in_kind(passes.rows(x), wide), [part[2] for part in parts]
        all_down, kept = passes.down(x, flat, passes.stacked(lows, thin), p)
        down = passes.apart(all_down, lows, dim=1)
        outs, norms, bare = [], [], []
        for (weight, bias, a, b, magnitude), scale, u in zip(parts, scales, down, strict=True):
            plain = magnitude is None
            z = F.linear(flat, in_kind(weight, wide), in_kind(bias, wide) if plain and bias is not None else None)
            z = passes.plus(z, u, in_kind(b, thin).T, scale)
            norm, y = None, z
            if not plain:
                norm = row_norms(weight, a, b, scale)
                y = _rescaled(z, magnitude / in_kind(norm, magnitude.dtype), bias)
            norms.append(norm)
            bare.append(None if plain else z)
            outs.append(passes.placed(y, x))
        ctx.scales, ctx.p, ctx.dtype = scales, p, dtype
        ctx.set_materialize_grads(False)
        needs = list(passes.each(ctx.needs_input_grad[4:], 5))
        held = [part for weight, _, a, b, magnitude in parts for part in (weight, a, b, magnitude)]
        us = [u if learns[3] else None for u, learns in zip(down, needs, strict=True)]
        ctx.save_for_backward(x if any(learns[2] for learns in needs) else None, kept, *held, *us, *norms, *bare)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, kept, *saved = ctx.saved_tensors
        k = len(grads)
        parts = list(passes.each(saved[: 4 * k], 4))
        down, norms, bare = saved[4 * k : 5 * k], saved[5 * k : 6 * k], saved[6 * k :]
        wants, needs = ctx.needs_input_grad[0], list(passes.each(ctx.needs_input_grad[4:], 5))
        found: list[list] = [[None] * 5 for _ in parts]
        there = [i for i, g in enumerate(grads) if g is not None]  # a layer that nobody used has no gradient, not zero
        if not there:
            return (None,) * (4 + 5 * k)
        thin = ctx.dtype or parts[0][1].dtype
        through, inner = None, []
        for i in there:
            weight, _, b, magnitude = parts[i]
            g = passes.rows(grads[i])
            if magnitude is not None:
                if needs[i][4]:
                    found[i][4] = in_kind(_sum_of_products(g, bare[i]) / norms[i], magnitude.dtype)
                g = in_kind(g * (magnitude / in_kind(norms[i], magnitude.dtype)), g.dtype)
            if wants:
                wide = in_kind(weight, ctx.dtype or g.dtype)
                through = torch.mm(g, wide) if through is None else through.addmm_(g, wide)
            g = in_kind(g, thin)
            if needs[i][3]:
                found[i][3] = in_kind(torch.mm(g.T, down[i]).mul_(ctx.scales[i]), b.dtype)
            inner.append(torch.mm(g, in_kind(b, thin)).mul_(ctx.scales[i]))
        lows = [parts[i][1] for i in there]
        up = inner[0] if len(inner) == 1 else torch.cat(inner, dim=1)
        if x is not None:
            for i, part in zip(there, passes.apart(passes.of_lows(ctx, x, kept, up), lows, dim=0), strict=True):
                found[i][2] = in_kind(part, parts[i][1].dtype) if needs[i][2] else None
        if through is not None:
            through = passes.with_update(through, up, passes.stacked(lows, thin), kept, ctx.p)
            through = through.view(*grads[there[0]].shape[:-1], through.shape[1])
        return through, None, None, None, *(grad for one in found for grad in one)


class _Hira(torch.autograd.Function):
    """HiRA layers on one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: bool, dtype: torch.dtype | None, *tensors: Any) -> tuple:
        parts = list(passes.each(tensors, 4))
        ctx.whole, ctx.dtype = whole, dtype
        ctx.set_materialize_grads(False)
        flat = passes.rows(x)
        outs = []
        for weight, bias, a, b in parts:
            kind = dtype or torch.promote_types(weight.dtype, a.dtype)
            seen, one = flat.to(kind), whole and _holds_one(kind)
            y = F.linear(seen, weight.to(kind)) if whole and not one else seen.new_empty(len(seen), len(weight))
            for rows in _blocks(weight):
                product = _product(weight[rows], a, b[rows], one, kind).T
                torch.addmm(y[:, rows], seen, product, beta=int(whole and not one), out=y[:, rows])
            if whole and bias is not None:
                y += bias
            outs.append(passes.placed(y.to(dtype or x.dtype), x))
        learns = any(ctx.needs_input_grad[3 + 4 * i + j] for i in range(len(parts)) for j in (2, 3))
        ctx.save_for_backward(x if learns else None, *(t for weight, _, a, b in parts for t in (weight, a, b)))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, *saved = ctx.saved_tensors
        wants, needs = ctx.needs_input_grad[0], list(passes.each(ctx.needs_input_grad[3:], 4))
        through: Tensor | None = None
        found: list[list] = [[None] * 4 for _ in needs]
        for i, (weight, a, b) in enumerate(passes.each(saved, 3)):
            if grads[i] is None:
                continue
            shape = grads[i].shape[:-1]
            kind = ctx.dtype or torch.promote_types(weight.dtype, a.dtype)
            g = passes.rows(grads[i]).to(kind)
            seen = None if x is None else passes.rows(x).to(kind)
            low, high, one = a.to(kind), b.to(kind), ctx.whole and _holds_one(kind)
            grad_a, grad_b = torch.zeros_like(low), torch.empty_like(high)
            if wants and through is None:
                through = g.new_zeros(len(g), weight.shape[1])
            if through is not None and ctx.whole and not one:
                through.addmm_(g, weight.to(kind))
            for rows in _blocks(weight):
                if through is not None:
                    through.addmm_(g[:, rows], _product(weight[rows], a, b[rows], one, kind))
                if seen is not None:
                    of_product = torch.mm(g[:, rows].T, seen).mul_(weight[rows])
                    torch.mm(of_product, low.T, out=grad_b[rows])
                    grad_a.addmm_(high[rows].T, of_product)
            if seen is not None:
                found[i][2] = grad_a.to(a.dtype) if needs[i][2] else None
                found[i][3] = grad_b.to(b.dtype) if needs[i][3] else None
        if through is not None:
            through = through.view(*shape, through.shape[1])
        return through, None, None, *(grad for one in found for grad in one)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Norms of the rows of ``weight + scale * b @ a``, (out,), without making it; in at least float32.

    Example:
        >>> row_norms(torch.eye(2), torch.ones(1, 2), torch.tensor([[2.0], [0.0]]), 1.0)
        tensor([3.6056, 1.0000])
    """
    kind = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        square = torch.linalg.vector_norm(weight, dim=1, dtype=kind).square_()
        low, high = a.to(kind), b.to(kind)
        if weight.dtype == kind:
            across = weight @ low.T
        else:  # by blocks: never a copy of all of the weight
            across = torch.cat([weight[rows].to(kind) @ low.T for rows in _blocks(weight)])
        across.mul_(2 * scale).addmm_(high, low @ low.T, alpha=scale**2)
        return (square + across.mul_(high).sum(1)).clamp_min_(0).sqrt_()


def _rescaled(z: Tensor, by: Tensor, bias: Tensor | None) -> Tensor:
    return (z * by if bias is None else torch.addcmul(bias, z, by)).to(z.dtype)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums over rows of the products by entry, in at least float32."""
    kind = torch.promote_types(a.dtype, torch.float32)
    return (a.to(kind) * b).sum(0)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight, so many at a time that a product of theirs is small beside the model."""
    out, width = weight.shape
    most = max(1, BLOCK.get(weight.device.type, _BLOCK_ELSEWHERE) // max(width, 1))
    count = -(-out // most)  # equal blocks: a short last one would be slow
    step = max(1, -(-out // max(count, 1)))
    return (slice(start, min(start + step, out)) for start in range(0, out, step))


def _product(weight: Tensor, a: Tensor, b: Tensor, one: bool, kind: torch.dtype) -> Tensor:
    """``W * (B A)``, or ``W * (1 + B A)``."""
    product = torch.mm(b.to(kind), a.to(kind))
    return torch.addcmul(weight.to(kind), weight, product, out=product) if one else product.mul_(weight)


def _holds_one(kind: torch.dtype) -> bool:
    """Whether 1 + B A is worth computing: in 16 bits a small update would be rounded away, entry by entry."""
    return torch.finfo(kind).bits >= 32
