"""MokA on tensors alone: which token is of which modality, which text it looks at, and what a layer does with it.

:func:`route` decides once a forward pass; :func:`hidden` is each layer's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loraloom.strategies.modality import MokA

TEXT, PAD = 0, -1
NO_LABEL = -100


@dataclass(frozen=True)
class Lookup:
    """Who looks at what inside the rank space.

    Attributes:
        index: places of the tokens that are looked at, batch x keys; rows that have fewer are filled up.
        bias: 0 where a token may look, -inf where not: batch x 1 x (1 or tokens) x keys.
        gain: weight of what it finds, 0 for tokens that look at nothing: batch x tokens x 1.
    """

    index: Int[Tensor, "batch keys"]
    bias: Float[Tensor, "batch 1 queries keys"]
    gain: Float[Tensor, "batch tokens 1"]


@dataclass(frozen=True)
class Routing:
    """What every layer needs to know of the tokens of one forward pass; never changed.

    Attributes:
        types: number of each token's A (0 text), batch x tokens.
        plain: whether all are text.
        lookups: what to look up; empty without attention.
        live: 1 where a token gets the update, batch x tokens x 1; None is everywhere.
    """

    types: Int[Tensor, "batch tokens"]
    plain: bool
    lookups: tuple[Lookup, ...] = ()
    live: Float[Tensor, "batch tokens 1"] | None = None


class RoutingError(ValueError):
    """The tokens' modalities, or the text that they look at, cannot be told; the message names the remedy."""


def route(
    plan: MokA,
    types: Int[Tensor, "batch tokens"],
    *,
    labels: Int[Tensor, "batch tokens"] | None = None,
    question: Bool[Tensor, "batch tokens"] | None = None,
    ids: Int[Tensor, "batch tokens"] | None = None,
    segments: Int[Tensor, "batch tokens"] | None = None,
    prompt: int | None = None,
    past: int = 0,
) -> Routing:
    """The routing of one forward pass; waits for the device once.

    Args:
        plan: the adapter's.
        types: 0 text, from 1 on the number of another modality's A, -1 padding.
        labels: -100 on everything that is not answer.
        question: the text to look at, instead of what ``plan.keys`` says.
        ids: for ``keys="span"``.
        segments: numbers that do not fall along a row: tokens look only at text of their own segment (packing).
        prompt: columns of the prompt, where later ones were generated.
        past: tokens in the cache before these.

    Raises:
        RoutingError: a modality would be separated from its keys, or what ``plan.keys`` needs is not there.

    Example:
        >>> types = torch.tensor([[1, 1, 0, 0]])
        >>> route(MokA({"image": 1}), types, labels=torch.tensor([[-100, -100, -100, 7]])).lookups[0].index
        tensor([[2]])
    """
    for name, given in (("labels", labels), ("question_mask", question), ("segment_ids", segments)):
        if given is not None and given.shape != types.shape:
            raise RoutingError(f"{name} is {tuple(given.shape)}, the tokens are {tuple(types.shape)}; give one a token")
    other = types > 0
    live = None
    if plan.active is not None:
        names = {0: "text", **{at: name for name, at in plan.modalities.items() if name in plan.active}}
        on = torch.tensor([names.get(i) in plan.active for i in range(len(plan.groups))], device=types.device)
        live = on[types.clamp(min=0)][..., None].float()
    looked = _looked_at(plan, types, labels, question, ids, segments, prompt)
    pairs = [] if plan.attention == "none" or plan.own == "B" else [(other, looked)]
    if plan.attention == "text-as-query" and pairs:
        pairs = [(looked, types == number) for number in range(1, len(plan.groups))]
    widths = [keys.sum(1).max() for _, keys in pairs]
    lonely = (other.any(1) & ~looked.any(1)).any()
    some, alone, *most = torch.stack([other.any().long(), lonely.long(), *widths]).tolist()
    if some and past and ((plan.keys == "prompt" and question is None) or alone):
        raise RoutingError(
            f"tokens of another modality come after {past} cached ones, apart from the text that they look at; "
            "give the whole prompt in one forward pass (no prefill_chunk_size, no reused cache)"
        )
    types = types.clamp(min=0)
    if not some:
        return Routing(types, plain=True, live=live)
    weights = torch.tensor(plan.weights, device=types.device)
    lookups = [
        _lookup(who, keys, size, weights[types if plan.attention != "text-as-query" else number + 1], segments)
        for number, ((who, keys), size) in enumerate(zip(pairs, most, strict=True))
        if size
    ]
    return Routing(types, False, tuple(lookups), live)


def _lookup(who: Tensor, keys: Tensor, size: int, weight: Tensor, segments: Tensor | None) -> Lookup:
    """Packed keys, and who may look at them."""
    index = keys.long().argsort(dim=1, descending=True, stable=True)[:, :size]
    there = keys.gather(1, index)[:, None]
    reached = who & keys.any(1, keepdim=True)
    if segments is not None:
        there = there & (segments[:, :, None] == segments.gather(1, index)[:, None])
        reached = who & there.any(2)
        there = there | ~there.any(2, keepdim=True)  # a row of -inf alone would be NaN; its gain is 0
    else:
        there = there | ~there.any(2, keepdim=True)
    bias = torch.zeros(there.shape, device=who.device).masked_fill_(~there, -math.inf)
    return Lookup(index, bias[:, None], (reached * weight)[..., None].float())


def _looked_at(
    plan: MokA,
    types: Tensor,
    labels: Tensor | None,
    question: Tensor | None,
    ids: Tensor | None,
    segments: Tensor | None,
    prompt: int | None,
) -> Tensor:
    """Which text tokens are looked at, batch x tokens."""
    text = types == TEXT
    if question is not None:
        return text & question.bool()
    if plan.keys == "explicit":
        raise RoutingError("keys='explicit' needs question_mask, batch x tokens, in every forward pass")
    if plan.keys == "span":
        if ids is None or plan.span is None:
            raise RoutingError("keys='span' finds its markers in input_ids; give them, or question_mask")
        start, end = plan.span
        opened = (ids == start).cumsum(1) - (ids == end).cumsum(1) > 0
        return text & opened & (ids != start)
    if labels is not None:
        text = text & (_since_start((labels != NO_LABEL).long(), segments) == 0)
    if prompt is not None:
        text = text & (torch.arange(types.shape[1], device=types.device) < prompt)
    if plan.keys == "after-last-modality":
        later = _since_start((types > 0).long().flip(1), None if segments is None else -segments.flip(1)).flip(1)
        text = text & (later == 0)
    return text


def _since_start(counts: Tensor, segments: Tensor | None) -> Tensor:
    """Running sums along each row, beginning again in each segment."""
    total = counts.cumsum(1)
    if segments is None:
        return total
    before = total - counts
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return total - torch.where(starts, before, 0).cummax(1).values


def segments_of(positions: Int[Tensor, "batch tokens"], pads: Bool[Tensor, "batch tokens"]) -> Tensor | None:
    """Segments of packed rows: a new one wherever positions do not rise; None where no row is packed.

    Example:
        >>> segments_of(torch.tensor([[0, 1, 0, 1, 2]]), torch.zeros(1, 5, dtype=torch.bool))
        tensor([[0, 0, 1, 1, 1]])
    """
    falls = torch.zeros_like(positions, dtype=torch.bool)
    falls[:, 1:] = (positions[:, 1:] <= positions[:, :-1]) & ~pads[:, 1:] & ~pads[:, :-1]
    return falls.long().cumsum(1) if falls.any() else None


def hidden(
    plan: MokA, a: Float[Tensor, "rows in"], x: Float[Tensor, "batch tokens in"], routing: Routing
) -> Float[Tensor, "batch tokens columns"]:
    """What B is applied to: the tokens in the rank space, after their look at the text (eq. 4 to 12).

    With several B's (``own``) a token stands in the columns of its own.

    Example:
        >>> plan = MokA({"image": 1}, rank=1, attention="none")
        >>> a, x = torch.tensor([[1.0], [10.0]]), torch.tensor([[[1.0], [2.0]]])
        >>> hidden(plan, a, x, Routing(torch.tensor([[0, 1]]), plain=False)).flatten()
        tensor([ 1., 20.])
    """
    h = _chosen(plan, a, x, routing)
    for lookup in routing.lookups:
        h = _looked_up(plan, h, lookup, routing)
    if routing.live is not None:
        h = h * routing.live.to(h.dtype)
    if plan.own == "A":
        return h
    place = F.one_hot(routing.types, len(plan.groups)).to(h.dtype)
    return (place[..., None] * h[..., None, :]).flatten(2)


def _chosen(plan: MokA, a: Tensor, x: Tensor, routing: Routing) -> Tensor:
    """A_m x of each token, with zeros up to the width of B."""
    if plan.own == "B":
        return F.linear(x, a)
    ranks, width = plan.ranks, plan.width
    if routing.plain:
        return F.pad(F.linear(x, a[: ranks[0]]), (0, width - ranks[0]))
    stacked = F.linear(x, a)
    if len(set(ranks)) > 1:
        stacked = torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in stacked.split(ranks, -1)], -1)
    if len(ranks) == 2:
        return torch.where(routing.types[..., None] > 0, stacked[..., width:], stacked[..., :width])
    place = routing.types[..., None, None].expand(-1, -1, 1, width)
    return stacked.unflatten(-1, (len(ranks), width)).gather(2, place).squeeze(2)


def _looked_up(plan: MokA, h: Tensor, lookup: Lookup, routing: Routing) -> Tensor:
    """h with what each token finds in the rank space, in float32."""
    place = lookup.index[..., None].expand(-1, -1, h.shape[-1])
    heads = (plan.heads, plan.width // plan.heads)
    with torch.autocast(h.device.type, enabled=False):
        wide = h.float()
        query, key = wide, wide.gather(1, place)
        sharp = plan.scale**2 if plan.logits == "official" else 1.0
        sharp *= 0.0 if plan.attention == "uniform" else 1.0
        if len(set(plan.ranks)) > 1:
            shared = [min(rank, plan.ranks[0]) for rank in plan.ranks]
            root = torch.tensor(shared, device=h.device).rsqrt()[routing.types][..., None]
            query = query * (root if plan.attention != "text-as-query" else heads[1] ** -0.5)
        else:
            sharp *= heads[1] ** -0.5
        query, key = (part.unflatten(-1, heads).transpose(1, 2) for part in (query, key))
        found = F.scaled_dot_product_attention(query, key, key, attn_mask=lookup.bias, scale=sharp)
        return (wide + lookup.gain * found.transpose(1, 2).flatten(2)).to(h.dtype)


__all__ = ["Lookup", "MokA", "Routing", "RoutingError", "hidden", "route", "segments_of"]
