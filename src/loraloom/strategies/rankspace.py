"""MokA on tensors alone: which token is of which modality, which text it looks at, and what a layer does with it.

:func:`route` decides once a forward pass; :func:`hidden` is each layer's part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
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
        sharp: factor of the logits.
    """

    index: Int[Tensor, "batch keys"]
    bias: Float[Tensor, "batch 1 queries keys"]
    gain: Float[Tensor, "batch tokens 1"]
    sharp: float


@dataclass(frozen=True)
class Routing:
    """What every layer needs to know of the tokens of one forward pass; never changed.

    Attributes:
        types: number of each token's A (0 text), batch x tokens.
        plain: whether all are text.
        columns: where each token's A stands in the stacked ones, batch x tokens x columns of B; None where all are
            text or share an A.
        lookups: what to look up; empty without attention.
        live: 1 where a token gets the update, batch x tokens x 1; None is everywhere.
    """

    types: Int[Tensor, "batch tokens"]
    plain: bool
    columns: Int[Tensor, "batch tokens width"] | None = None
    lookups: tuple[Lookup, ...] = ()
    live: Float[Tensor, "batch tokens 1"] | None = None
    elsewhere: dict[torch.device, Routing] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> Routing:
        """The same on a device, copied once."""
        if self.types.device == device:
            return self
        if device not in self.elsewhere:
            lookups = tuple(_moved(one, device) for one in self.lookups)
            self.elsewhere[device] = replace(_moved(self, device), lookups=lookups, elsewhere={})
        return self.elsewhere[device]


def _moved(held: Any, device: torch.device) -> Any:
    values = {one.name: getattr(held, one.name) for one in fields(held)}
    return replace(held, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})


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
    strange: Mapping[int, str] | None = None,
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
        strange: what to say of types that the plan does not have.

    Raises:
        RoutingError: a modality would be separated from its keys, what ``plan.keys`` needs is not there, or a type is
            none of the plan's.

    Example:
        >>> types = torch.tensor([[1, 1, 0, 0]])
        >>> route(MokA({"image": 1}), types, labels=torch.tensor([[-100, -100, -100, 7]])).lookups[0].index
        tensor([[2]])
    """
    for name, given in (("labels", labels), ("question_mask", question), ("segment_ids", segments)):
        if given is not None and given.shape != types.shape:
            raise RoutingError(f"{name} is {tuple(given.shape)}, the tokens are {tuple(types.shape)}; give one a token")
    missing = _missing(plan, question, ids)
    looked = types == TEXT if missing else _looked_at(plan, types, labels, question, ids, segments, prompt)
    asked = _asked(plan, types, looked)
    widths = [keys.sum(1).max() for _, _, keys in asked]
    lonely = ((types > 0).any(1) & ~looked.any(1)).any()
    low, high, alone, *sizes = torch.stack([*types.aminmax(), lonely.long(), *widths]).tolist()
    if low < PAD or high >= len(plan.groups):
        outside = high if high >= len(plan.groups) else low
        allowed = f"types go from {PAD} (padding) to {len(plan.groups) - 1}, of {', '.join(plan.groups)}"
        raise RoutingError((strange or {}).get(outside, f"a token of type {outside}; {allowed}"))
    some = high > 0
    if asked and some and missing:
        raise RoutingError(missing)
    if asked and some and past and (alone or (plan.keys == "prompt" and question is None)):
        raise RoutingError(
            f"tokens of another modality come after {past} cached ones, apart from the text that they look at; "
            "give the whole prompt in one forward pass (no prefill_chunk_size, no reused cache)"
        )
    if asked and alone and plan.keys == "span" and question is None:
        raise RoutingError(f"a row has tokens of another modality and no text between the markers {plan.span}")
    if not some:
        return text_only(plan, types)
    lookups = [
        _lookup(plan, number, who, keys, size, segments)
        for (number, who, keys), size in zip(asked, sizes, strict=True)
        if size
    ]
    types = types.clamp(min=TEXT)
    return Routing(types, False, _columns(plan, types), tuple(lookups), _live(plan, types))


def text_only(plan: MokA, like: Shaped[Tensor, "batch tokens ..."]) -> Routing:
    """The routing of a forward pass without other modalities; does not wait for the device.

    Example:
        >>> text_only(MokA({"image": 1}), torch.ones(1, 3)).types
        tensor([[0, 0, 0]])
    """
    types = torch.zeros(like.shape[:2], dtype=torch.long, device=like.device)
    return Routing(types, plain=True, live=_live(plan, types))


def _live(plan: MokA, types: Tensor) -> Tensor | None:
    if plan.active is None:
        return None
    on = [float(group.split("+")[0] in plan.active) for group in plan.groups]
    return _valued(on, types)[..., None]


def _columns(plan: MokA, types: Tensor) -> Tensor | None:
    """For each token the columns of its A; one behind the last, which is 0, where its rank is below B's."""
    if plan.own == "B":
        return None
    place = torch.arange(plan.width, device=types.device)
    starts = [sum(plan.ranks[:number]) for number in range(len(plan.ranks))]
    found = place + _valued(starts, types).long()[..., None]
    return torch.where(place < _valued(plan.ranks, types)[..., None], found, plan.rows)


def _valued(values: Sequence[float], types: Tensor) -> Tensor:
    """The value of each token's type, without a table that would be copied to the device."""
    found = torch.full(types.shape, values[TEXT], device=types.device)
    for number, value in enumerate(values[1:], start=1):
        found.masked_fill_(types == number, value)
    return found


def _missing(plan: MokA, question: Tensor | None, ids: Tensor | None) -> str | None:
    """What to say if there is anything to look up and not what tells where."""
    if plan.keys == "explicit" and question is None:
        return "keys='explicit' needs question_mask, batch x tokens, in every forward pass"
    if plan.keys == "span" and question is None and ids is None:
        return "keys='span' finds its markers in input_ids; give them, or question_mask"
    return None


def _asked(plan: MokA, types: Tensor, looked: Tensor) -> list[tuple[int | Tensor, Tensor, Tensor]]:
    """Number(s) of the modality, who looks and what is looked at, for each lookup."""
    numbers = range(1, len(plan.groups))
    if plan.attention == "none":
        return []
    if plan.attention == "text-as-query":
        return [(number, looked, types == number) for number in numbers]
    if len(set(plan.ranks)) == 1:  # all in one
        return [(types.clamp(min=0), types > 0, looked)]
    return [(number, types == number, looked) for number in numbers]


def _lookup(plan: MokA, number: int | Tensor, who: Tensor, keys: Tensor, size: int, segments: Tensor | None) -> Lookup:
    """Packed keys, and who may look at them."""
    index = keys.long().argsort(dim=1, descending=True, stable=True)[:, :size]
    there = keys.gather(1, index)[:, None]
    if segments is not None:
        there = there & (segments[:, :, None] == segments.gather(1, index)[:, None])
    reached = there.any(2)
    # a row of -inf alone would be NaN; nothing of it is used
    bias = torch.zeros(there.shape, device=who.device).masked_fill_(~there & reached[..., None], -math.inf)
    weight = _valued(plan.weights, number) if isinstance(number, Tensor) else plan.weights[number]
    rank = plan.ranks[0] if isinstance(number, Tensor) else min(plan.ranks[0], plan.ranks[number])
    sharp = 0.0 if plan.attention == "uniform" else (rank / plan.heads) ** -0.5
    if plan.logits == "official":
        sharp *= plan.scale**2
    return Lookup(index, bias[:, None], (weight * (who & reached))[..., None], sharp)


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
    if plan.span is not None and ids is not None and plan.keys == "span":
        started, ended = (_last(ids == marker) for marker in plan.span)
        inside = text & (started > ended) & (ids != plan.span[0])
        return inside if labels is None else inside & (labels == NO_LABEL)
    if labels is not None:
        text = text & (_since_start((labels != NO_LABEL).long(), segments) == 0)
    if prompt is not None:
        text = text & (torch.arange(types.shape[1], device=types.device) < prompt)
    if plan.keys == "after-last-modality":
        later = _since_start((types > 0).long().flip(1), None if segments is None else -segments.flip(1)).flip(1)
        text = text & (later == 0)
    return text


def _last(here: Tensor) -> Tensor:
    """Where the last such token of a row was, up to each token; -1 before the first."""
    places = torch.arange(here.shape[1], device=here.device)
    return torch.where(here, places, -1).cummax(1).values


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
    plan: MokA, stacked: Float[Tensor, "batch tokens rows"], routing: Routing
) -> Float[Tensor, "batch tokens columns"]:
    """What B is applied to: the tokens in the rank space, after their look at the text (eq. 4 to 12).

    With several B's (``own``) a token stands in the columns of its own. Several layers of one plan go side by side.

    Args:
        plan: the adapter's.
        stacked: what the A's of all modalities make of each token, side by side.
        routing: of the same tokens.

    Example:
        >>> plan = MokA({"image": 1}, rank=1, attention="none")
        >>> stacked = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
        >>> hidden(plan, stacked, route(plan, torch.tensor([[0, 1]]))).flatten()
        tensor([ 1., 20.])
    """
    return turned(plan, chosen(plan, stacked, routing), routing)


def chosen(plan: MokA, stacked: Tensor, routing: Routing) -> Tensor:
    """A_m x of each token, with zeros up to the width of B; layers side by side stay so."""
    if plan.own == "B":
        return stacked
    each = stacked.unflatten(-1, (-1, plan.rows))
    if routing.columns is None:
        each = each[..., : plan.ranks[0]]
        each = each if plan.ranks[0] == plan.width else F.pad(each, (0, plan.width - plan.ranks[0]))
    else:
        each = F.pad(each, (0, 1)) if len(set(plan.ranks)) > 1 else each
        each = each.gather(-1, routing.columns.unsqueeze(2).expand(*each.shape[:-1], -1))
    return each.flatten(-2)


def turned(plan: MokA, h: Tensor, routing: Routing) -> Tensor:
    """What B is applied to, of A_m x of each token."""
    if routing.lookups:
        h = _after_looking(plan, h, routing.lookups)
    return spread(plan, h, routing)


def _after_looking(plan: MokA, h: Tensor, lookups: Sequence[Lookup]) -> Tensor:
    """h with what each token finds in the rank space; float64 stays so, all else looks in float32."""
    with torch.autocast("cpu" if h.is_meta else h.device.type, enabled=False):
        wide = h if h.dtype == torch.float64 else h.float()
        total = wide
        for lookup in lookups:
            keys = wide.gather(1, lookup.index[..., None].expand(-1, -1, wide.shape[-1]))
            query, key = (part.unflatten(-1, (-1, plan.width // plan.heads)).transpose(1, 2) for part in (wide, keys))
            bias = lookup.bias.to(wide.dtype)
            found = F.scaled_dot_product_attention(query, key, key, attn_mask=bias, scale=lookup.sharp)
            total = torch.addcmul(total, lookup.gain.to(wide.dtype), found.transpose(1, 2).flatten(2))
        return total.to(h.dtype)


def spread(plan: MokA, h: Tensor, routing: Routing) -> Tensor:
    """h where the update is wanted, and with several B's in the columns of each token's own."""
    if routing.live is not None:
        h = h * routing.live.to(h.dtype)
    if plan.own == "A":
        return h
    types, each = routing.types[..., None, None], h.unflatten(-1, (-1, plan.width))
    return torch.cat([each * (types == number) for number in range(len(plan.groups))], -1).flatten(-2)


__all__ = [
    "Lookup",
    "MokA",
    "Routing",
    "RoutingError",
    "chosen",
    "hidden",
    "route",
    "segments_of",
    "spread",
    "text_only",
    "turned",
]
