"""MokA's layers on a frozen weight as one node of the graph: forward as in ``rankspace.py``, and backward by hand.

Attention in the rank space is cheap beside the layer, so backward does it again and nothing of it is kept: only x, and
for each token what its own A makes of it, as in LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.fused import Adapted, passes
from loraloom.fused.passes import in_kind
from loraloom.strategies.modality import MokA
from loraloom.strategies.rankspace import Lookup, Routing, chosen, spread, turned

BLOCK = 2**22  # entries of the attention's weights at a time


class Between(NamedTuple):
    """What happens between the A's and the B's of MokA layers that see one input.

    All three work on (batch * tokens) x columns, layers side by side.

    Attributes:
        plan: of all these layers.
        routing: of their tokens.
        shape: batch and tokens.

    Example:
        >>> from loraloom.strategies.rankspace import route
        >>> plan = MokA({"image": 1}, rank=1, attention="none")
        >>> between = Between(plan, route(plan, torch.tensor([[0, 1]])), torch.Size([1, 2]))
        >>> kept = between.enter(torch.tensor([[1.0, 10.0], [2.0, 20.0]]))
        >>> kept.flatten(), between.again(kept, torch.ones(2, 1))[1]
        (tensor([ 1., 20.]), tensor([[1., 0.],
                [0., 1.]]))
    """

    plan: MokA
    routing: Routing
    shape: torch.Size

    def enter(self, down: Tensor) -> Tensor:
        """Of what all A's make of each token, that of its own A, and without the rest's memory."""
        return chosen(self.plan, self._apart(down), self.routing).flatten(0, 1).contiguous()

    def leave(self, kept: Tensor) -> Tensor:
        """What B is applied to."""
        return turned(self.plan, self._apart(kept), self.routing).flatten(0, 1)

    def again(self, kept: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`leave` gave, and what its gradient is for what :meth:`enter` was given."""
        plan, routing, z = self.plan, self.routing, self._apart(kept)
        h, back = z, _gathered(plan, self._apart(grad), routing)
        if routing.lookups:
            h, back = _looked_again(plan, z, back, routing.lookups)
        return spread(plan, h, routing).flatten(0, 1), _unchosen(plan, back, routing).flatten(0, 1)

    def _apart(self, rows: Tensor) -> Tensor:
        return rows.view(*self.shape, rows.shape[-1])


def routed(x: Tensor, layers: Sequence[Adapted], *, dropout: float = 0.0, dtype: torch.dtype | None = None) -> tuple:
    """What MokA layers on one input give: ``W x + bias + scale B h(A x)``, h as the routing says.

    MokA is arXiv 2506.05191, equations 4 to 13. Kept for backward are x and what ``between.enter`` makes of A x, as
    much as LoRA keeps. The rest is made again.

    Args:
        x: batch x tokens x in.
        layers: one or more, all with this input, of equal rank; ``between`` is that of the first.
        dropout: as in :func:`loraloom.fused.lora`, for a single layer.
        dtype: as in :func:`loraloom.fused.lora`.

    Returns:
        One batch x tokens x out a layer.

    Example:
        >>> from loraloom.strategies.rankspace import route
        >>> plan = MokA({"image": 1}, rank=1, attention="none")
        >>> between = Between(plan, route(plan, torch.tensor([[0, 1]])), torch.Size([1, 2]))
        >>> W, A, B = torch.eye(2), torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([[1.0], [0.0]])
        >>> routed(torch.ones(1, 2, 2), [Adapted(W, None, A, B, scale=2.0, between=between)])
        (tensor([[[ 5.,  1.],
                 [13.,  1.]]]),)
    """
    tensors = [part for one in layers for part in (one.weight, one.bias, one.a, one.b)]
    return _Routed.apply(x, layers[0].between, [one.scale for one in layers], dropout, dtype, *tensors)


class _Routed(torch.autograd.Function):
    """MokA layers on one input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, between: Between, scales: list[float], p: float, dtype: torch.dtype | None, *tensors: Any
    ) -> tuple:
        parts = list(passes.each(tensors, 4))
        wide, thin = dtype or x.dtype, dtype or parts[0][2].dtype
        flat = in_kind(passes.rows(x), wide)
        down, kept = passes.down(x, flat, passes.stacked([part[2] for part in parts], thin), p)
        z = between.enter(down)
        outs = []
        for (weight, bias, _, b), scale, h in zip(parts, scales, between.leave(z).chunk(len(parts), 1), strict=True):
            y = F.linear(flat, in_kind(weight, wide), None if bias is None else in_kind(bias, wide))
            outs.append(passes.placed(passes.plus(y, h, in_kind(b, thin).T, scale), x))
        ctx.between, ctx.scales, ctx.p, ctx.dtype = between, scales, p, dtype
        ctx.set_materialize_grads(False)
        learns = any(need[2] for need in passes.each(ctx.needs_input_grad[5:], 4))
        held = [part for weight, _, a, b in parts for part in (weight, a, b)]
        ctx.save_for_backward(x if learns else None, kept, z, *held)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, kept, z, *saved = ctx.saved_tensors
        parts, needs = list(passes.each(saved, 3)), list(passes.each(ctx.needs_input_grad[5:], 4))
        found: list[list] = [[None] * 4 for _ in parts]
        there = {i: passes.rows(g) for i, g in enumerate(grads) if g is not None}  # nobody used the others
        if not there:
            return (None,) * (5 + 4 * len(parts))
        through = None
        inner: list[Any] = [
            None if i in there else z.new_zeros(len(z), b.shape[1]) for i, (_, _, b) in enumerate(parts)
        ]
        for i, g in there.items():
            weight, _, b = parts[i]
            if ctx.needs_input_grad[0]:
                wide = in_kind(weight, ctx.dtype or g.dtype)
                through = torch.mm(g, wide) if through is None else through.addmm_(g, wide)
            inner[i] = torch.mm(in_kind(g, z.dtype), in_kind(b, z.dtype)).mul_(ctx.scales[i])
        h, up = ctx.between.again(z, inner[0] if len(inner) == 1 else torch.cat(inner, dim=1))
        lows = [a for _, a, _ in parts]
        of_lows = None if x is None else passes.apart(passes.of_lows(ctx, x, kept, up), lows, dim=0)
        seen = h.chunk(len(parts), 1)
        for i, g in there.items():
            _, a, b = parts[i]
            if needs[i][3]:
                found[i][3] = in_kind(torch.mm(in_kind(g, z.dtype).T, seen[i]).mul_(ctx.scales[i]), b.dtype)
            if needs[i][2] and of_lows is not None:
                found[i][2] = in_kind(of_lows[i], a.dtype)
        if through is not None:
            through = passes.with_update(through, up, passes.stacked(lows, z.dtype), kept, ctx.p)
            through = through.view(*ctx.between.shape, through.shape[1])
        return through, None, None, None, None, *(grad for one in found for grad in one)


def _gathered(plan: MokA, grad: Tensor, routing: Routing) -> Tensor:
    """Backward of ``spread``."""
    if plan.own != "A":
        types, each = routing.types[..., None, None], grad.unflatten(-1, (-1, plan.columns))
        parts = each.split(plan.width, -1)
        grad = torch.stack([part * (types == number) for number, part in enumerate(parts)]).sum(0).flatten(-2)
    return grad if routing.live is None else grad * routing.live.to(grad.dtype)


def _unchosen(plan: MokA, grad: Tensor, routing: Routing) -> Tensor:
    """Backward of ``chosen``."""
    if plan.own == "B":
        return grad
    each = grad.unflatten(-1, (-1, plan.width))
    if routing.columns is None:
        return F.pad(each[..., : plan.ranks[0]], (0, plan.rows - plan.ranks[0])).flatten(-2)
    columns, several = routing.columns.unsqueeze(2).expand(each.shape), len(set(plan.ranks)) > 1
    full = each.new_zeros(*each.shape[:-1], plan.rows + several).scatter_(-1, columns, each)
    return (full[..., :-1] if several else full).flatten(-2)  # the last column took what lies beyond a smaller rank


def _looked_again(plan: MokA, h: Tensor, grad: Tensor, lookups: Sequence[Lookup]) -> tuple[Tensor, Tensor]:
    """h after looking, and the gradient of h before it; in float32 at least. Calls are few: layers are many."""
    device = "cpu" if h.is_meta else h.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _looked_again(plan, h, grad, lookups)
    kind, heads = torch.promote_types(h.dtype, torch.float32), h.shape[-1] * plan.heads // plan.width
    wide, of_h = in_kind(h, kind), in_kind(grad, kind)
    total, back = wide, of_h
    for lookup in lookups:
        gain, bias = in_kind(lookup.gain, kind), in_kind(lookup.bias, kind)
        bias = bias.squeeze(1) if heads == 1 else bias.expand(-1, heads, -1, -1).flatten(0, 1)
        index = lookup.index.unsqueeze(-1).expand(-1, -1, h.shape[-1])
        query, key, of_found = (_heads(part, heads) for part in (wide, wide.gather(1, index), of_h * gain))
        found, of_query, of_key = _attended(query, key, of_found, bias, lookup.sharp)
        total = torch.addcmul(total, gain, _joined(found, heads))
        back = torch.add(back, _joined(of_query, heads), alpha=lookup.sharp)
        back.scatter_add_(1, index, _joined(of_key, heads))
    return in_kind(total, h.dtype), in_kind(back, grad.dtype)


def _attended(query: Tensor, key: Tensor, grad: Tensor, bias: Tensor, sharp: float) -> tuple[Tensor, Tensor, Tensor]:
    """``softmax(sharp q k^T + bias) k``, and the gradients of q, without ``sharp``, and of k; heads x tokens x size."""
    step = max(1, BLOCK // max(1, key.shape[0] * key.shape[1]))
    if step >= query.shape[1]:
        return _block(query, key, grad, bias, sharp)
    blocks = []
    for start in range(0, query.shape[1], step):
        rows = slice(start, start + step)
        off = bias if bias.shape[1] == 1 else bias[:, rows]
        blocks.append(_block(query[:, rows], key, grad[:, rows], off, sharp))
    found, of_query, of_key = zip(*blocks, strict=True)
    return torch.cat(found, 1), torch.cat(of_query, 1), torch.stack(of_key).sum(0)


def _block(query: Tensor, key: Tensor, grad: Tensor, bias: Tensor, sharp: float) -> tuple[Tensor, Tensor, Tensor]:
    turned = key.transpose(1, 2)
    share = torch.baddbmm(bias, query, turned, alpha=sharp).softmax(-1)
    found = torch.bmm(share, key)
    of_share = torch.bmm(grad, turned).sub_((grad * found).sum(-1, keepdim=True)).mul_(share)
    of_key = torch.bmm(share.transpose(1, 2), grad)
    of_key.baddbmm_(of_share.transpose(1, 2), query, alpha=sharp)
    return found, torch.bmm(of_share, key), of_key


def _heads(x: Tensor, heads: int) -> Tensor:
    """batch x tokens x (heads * size) as (batch * heads) x tokens x size."""
    return x if heads == 1 else x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def _joined(x: Tensor, heads: int) -> Tensor:
    """Backward of ``_heads``."""
    return x if heads == 1 else x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


__all__ = ["Between", "routed"]
