"""MokA: each token meets the A of its modality, other modalities look at the text inside the rank space, B is shared.

What is decided here is decided on tensors alone: which token is of which modality and which text it looks at
(:func:`route`, once a forward pass), and what a layer does with it (:func:`hidden`). Hooks and PEFT's layers are in
``integrations/modality.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loraloom.registry import UnknownName, edge

TEXT, PAD = 0, -1
ATTENTION = ("cross", "none", "uniform", "text-as-query")
KEYS = ("prompt", "after-last-modality", "span", "explicit")
OWN = ("A", "B", "both")
LOGITS = ("paper", "official")
NO_LABEL = -100


@dataclass(frozen=True)
class MokA:
    """Multimodal low-rank adaptation (MokA, NeurIPS 2025, arXiv 2506.05191, eq. 4 to 13), as a plan without a model.

    For a token x of modality m, ``h = A_m x``; for one that is not text, ``h += weight * softmax(h K^T / sqrt(r)) K``
    with the text's ``A_text x`` as keys and values K; the layer adds ``alpha / r * B h``. One head, no mask between
    earlier and later tokens, no further parameters. Text alone is plain LoRA with ``A_text`` and ``B``.

    Attributes:
        modalities: number of its A by name; 0 is the text's, names may share one (``{"image": 1, "video": 1}``).
        rank: r, or one by name (with ``text``); B has as many columns as the largest.
        alpha: the update is scaled by alpha / r.
        dropout: of the input.
        attention: ``cross``: of the other modalities to the text; ``none``; ``uniform``: the mean of the text is added
            (the paper's "naive interaction"); ``text-as-query``: the text looks at each other modality instead.
        keys: which text is looked at. ``prompt``: what comes before the first label, or before what is generated;
            ``after-last-modality``: of that, what follows the last token of another modality; ``span``: what stands
            between two marker tokens; ``explicit``: the tokens of ``question_mask``. Never the answer: it would leak.
        weight: lambda, or one by name.
        span: ids of the markers, for ``keys="span"``.
        logits: ``paper``: h h^T / sqrt(r); ``official``: times (alpha / r)^2, as the official audio-visual code has it.
        tokens: placeholder ids by name, where the model's configuration does not tell them.
        own: what each modality has of its own: ``A`` is MokA; ``B`` is one A and several B's, ``both`` is uni-modal
            LoRA, for comparison.
        heads: the rank is taken as so many equal parts that attend separately: what a ``cat`` of adapters gives.
        active: names of the modalities (with ``text``) whose tokens get the update; None is all.

    Raises:
        ValueError: a value is not allowed.

    Example:
        >>> moka = MokA(modalities={"image": 1, "audio": 2}, rank=4)
        >>> moka.ranks, moka.scale
        ((4, 4, 4), 4.0)
    """

    modalities: Mapping[str, int]
    rank: int | Mapping[str, int] = 4
    alpha: float = 16.0
    dropout: float = 0.05
    attention: str = "cross"
    keys: str = "prompt"
    weight: float | Mapping[str, float] = 1.0
    span: tuple[int, int] | None = None
    logits: str = "paper"
    tokens: Mapping[str, int] = field(default_factory=dict)
    own: str = "A"
    heads: int = 1
    active: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("attention", ATTENTION), ("keys", KEYS), ("logits", LOGITS), ("own", OWN)):
            if getattr(self, name) not in allowed:
                raise UnknownName(name, getattr(self, name), list(allowed))
        places = sorted(set(self.modalities.values()))
        if not places or "text" in self.modalities or places != list(range(1, len(places) + 1)):
            raise ValueError(
                f"modalities must number the A's of everything but the text from 1 on, got {dict(self.modalities)}"
            )
        for what in ("rank", "weight"):
            told = getattr(self, what)
            needed = {*self.modalities, *(["text"] if what == "rank" else [])}
            if isinstance(told, Mapping) and set(told) != needed:
                raise ValueError(f"{what} must be a number, or one for each of {', '.join(sorted(needed))}")
        for name, number in self.modalities.items():
            if self._rank(name) != self.ranks[number] or self._weight(name) != self.weights[number]:
                raise ValueError(f"{name} shares its A with another modality, so rank and weight must be the same")
        if not all(isinstance(r, int) and r >= 1 for r in self.ranks):
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if not all(math.isfinite(w) for w in self.weights) or not 0 < self.alpha < math.inf:
            raise ValueError(f"weight and alpha must be finite and alpha above 0, got {self.weight!r}, {self.alpha!r}")
        if len(set(self.ranks)) > 1 and (self.own == "B" or self.heads > 1):
            raise ValueError("several ranks need an A for each modality and one head")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads must divide the rank {self.width}, got {self.heads!r}")
        if self.keys == "span" and self.span is None:
            raise ValueError("keys='span' needs span=(id of the start marker, id of the end marker)")
        strange = {*(self.active or ()), *self.tokens} - {"text", *self.modalities}
        if strange:
            raise UnknownName("modality", min(strange), ["text", *self.modalities])

    def _rank(self, name: str) -> int:
        return self.rank[name] if isinstance(self.rank, Mapping) else self.rank

    def _weight(self, name: str) -> float:
        return float(self.weight[name] if isinstance(self.weight, Mapping) else self.weight)

    @property
    def groups(self) -> tuple[str, ...]:
        """What has an A of its own, by number: ``text``, then the names that share each."""
        count = max(self.modalities.values())
        others = ["+".join(n for n, at in self.modalities.items() if at == i) for i in range(1, count + 1)]
        return ("text", *others)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each A, by number."""
        return tuple(self._rank(name.split("+")[0]) for name in self.groups)

    @property
    def weights(self) -> tuple[float, ...]:
        """lambda by number; that of the text is 1 and counts where the text is the query."""
        return (1.0, *(self._weight(name.split("+")[0]) for name in self.groups[1:]))

    @property
    def width(self) -> int:
        """Columns of B."""
        return max(self.ranks)

    @property
    def rows(self) -> int:
        """Rows of the stacked A."""
        return self.width if self.own == "B" else sum(self.ranks)

    @property
    def columns(self) -> int:
        """Columns of B, or of the stacked B's."""
        return self.width if self.own == "A" else self.width * len(self.groups)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.width

    def to_json(self) -> dict[str, Any]:
        """What the adapter's configuration holds under ``moka``."""
        told = asdict(self) | {"modalities": dict(self.modalities), "tokens": dict(self.tokens)}
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in told.items()}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> MokA:
        """The plan of a configuration.

        Raises:
            ValueError: a key is missing or not known, or a value is not allowed.
        """
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in told.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"moka: {str(error).split('__init__() ')[-1]}") from None

    def wrap(self, model: Any, target_modules: str | Sequence[str] = "all-linear", **options: Any) -> Any:
        """Put fresh adapters on a Transformers model: a ``PeftModel`` whose routing finds itself from the inputs.

        Args:
            model: a multimodal model; only its language model is adapted (of an encoder-decoder both sides).
            target_modules: names of linear layers, or all of them.
            options: further fields of PEFT's LoraConfig, such as ``modules_to_save=["multi_modal_projector"]``.

        Raises:
            ValueError: a layer is outside of the language model, or the model's tokens cannot be told apart.
        """
        return edge("modality").wrap(self, model, target_modules, **options)


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
    if some and past and (plan.keys == "prompt" and question is None or alone):
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
