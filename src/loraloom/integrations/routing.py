"""Which token of a forward pass is of which modality: hooks on a Transformers model that make one routing for it.

The hooks stand on the Transformers model, which PEFT, ``generate`` and wrappers for several devices all call; they make
one :class:`Routing` for the whole forward pass. Layers read it from a context variable, so threads do not meet;
recomputation in checkpointed layers gets the one of its own forward pass. ``generate`` is given a context too, so that
what was generated is never looked at and the explicit arguments reach the first forward pass.

What cannot be seen from here: a cache whose tokens of another modality were computed beside another question. Give the
whole prompt in one forward pass; do not share prefixes between questions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraloom.adapter import UnsupportedKind
from loraloom.strategies.modality import MokA
from loraloom.strategies.rankspace import PAD, TEXT, Routing, RoutingError, route, segments_of, text_only

OWN_ARGUMENTS = ("modality_ids", "question_mask", "segment_ids")
_KINDS = ("text", "image", "video", "audio")  # what mm_token_type_ids numbers
_OPEN_END = "moka_open_end"  # on a cache: which rows ended in another modality
_REMEDY = (
    "call the whole model with input_ids that hold its placeholder tokens, with mm_token_type_ids, or with "
    "modality_ids (batch x tokens: 0 text, 1 and on the number of the modality's A, -1 padding)"
)


class _Pass(NamedTuple):
    """A forward pass that is going on; without adapters it has no routing."""

    module: nn.Module
    routing: Routing | None
    open_end: Tensor | None


@dataclass(frozen=True)
class _Generation:
    """What ``generate`` was called with; its prompt takes the places from ``start`` to ``end`` of the cache."""

    router: Router
    start: int
    end: int
    given: Mapping[str, Tensor]

    def of(self, past: int, length: int) -> dict[str, Tensor]:
        """What was given for the tokens of a forward pass; those generated are text and not looked at."""
        first = past - self.start
        padded = {name: nn.functional.pad(told, (0, length)) for name, told in self.given.items()}
        return {name: told[:, first : first + length] for name, told in padded.items()}


_passes: ContextVar[tuple[_Pass, ...]] = ContextVar("passes", default=())
_generating: ContextVar[_Generation | None] = ContextVar("generating", default=None)


def current(tokens: torch.Size) -> Routing:
    """The routing of the forward pass that is going on, for a layer that sees so many tokens.

    Raises:
        RoutingError: there is none, or it is of other tokens.
    """
    passes = _passes.get()
    routing = passes[-1].routing if passes else None
    if routing is None:
        raise RoutingError(f"no routing in this forward pass: {_REMEDY}")
    if tokens != routing.types.shape:
        raise RoutingError(
            f"a layer sees {tuple(tokens)} tokens, the routing is of {tuple(routing.types.shape)}: "
            "the model puts tokens in, takes some out or reorders them; expand the placeholders with the "
            "processor, or give modality_ids of the expanded sequence (layers of MoE experts cannot be adapted)"
        )
    return routing


class Router:
    """Makes the routing of each forward pass of one model, in hooks.

    In an encoder-decoder the encoder's tokens are the other modality and the decoder's are text. The encoder has run
    before there is any text, so its tokens have nothing to look at, and a plan with attention is refused.

    Attributes:
        plan: the adapter's.
        layers: those that ask for it.

    Raises:
        UnsupportedKind: an encoder-decoder, and a plan with attention.
    """

    def __init__(self, plan: MokA, model: nn.Module, layers: Sequence[Any]) -> None:
        self.plan, self.layers, self.seq2seq = plan, list(layers), is_seq2seq(model)
        if self.seq2seq and plan.attention != "none":
            raise UnsupportedKind(
                f"attention={plan.attention!r}: the encoder of {type(model).__name__} has run before there is any "
                "text to look at; an encoder-decoder needs attention='none'"
            )
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        found = {name: id_ for name in _KINDS[1:] if (id_ := _placeholder(model, name)) is not None}
        told = {**found, **plan.tokens}
        strange = [name for name in dict.fromkeys((*told, *_KINDS[1:])) if name not in plan.modalities]
        numbers = {**plan.modalities, **{name: i for i, name in enumerate(strange, start=len(plan.groups))}}
        self._ids = {id_: numbers[name] for name, id_ in told.items()}
        self._told_ids = {id_: numbers[name] for name, id_ in plan.tokens.items()}
        self._kinds = [numbers[name] for name in _KINDS[1:]]
        self._untold = [name for name in plan.modalities if name not in told]
        names = ", ".join(plan.groups)
        self._wrong = len(plan.groups) + len(strange)
        self._strange = {
            numbers[name]: f"{name} tokens in the input, but the adapter has {names}; "
            f"make it with MokA(modalities={{..., {name!r}: number}})"
            for name in strange
        }
        self._strange[self._wrong] = (
            f"modality_ids go from {PAD} (padding) to {len(plan.groups) - 1}, of {names}; mm_token_type_ids from 0 to 3"
        )

    # --- hooks ---------------------------------------------------------------------------------------------------
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Make the routing; takes out the arguments that are ours."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        routing, open_end = None, None
        if any(not layer.disable_adapters for layer in self.layers):
            routing, open_end = self._routed(given, module.training)
        if torch.is_grad_enabled():
            _capture(module)
        others = [one for one in _passes.get() if one.module is not module]  # an interrupted pass leaves its own
        _passes.set((*others, _Pass(module, routing, open_end)))
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forget the routing; called when forward raises, too."""
        passes = _passes.get()
        if not passes or passes[-1].module is not module:  # it raised before there was a routing
            return
        _passes.set(passes[:-1])
        if passes[-1].open_end is not None and (cache := _cache_of(output)) is not None:
            setattr(cache, _OPEN_END, passes[-1].open_end)

    # --- which token is what -------------------------------------------------------------------------------------
    def _routed(self, given: Mapping[str, Any], training: bool) -> tuple[Routing, Tensor | None]:
        """The routing, and which rows a later forward pass with the same cache must not go on with."""
        like = self._tokens(given)
        if self.seq2seq:
            return text_only(self.plan, like), None
        length, past = like.shape[1], _cached(given.get("past_key_values"))
        generation = _generating.get()
        if generation is not None and generation.router is not self:
            generation = None
        if generation is not None:
            if past >= generation.end:
                return text_only(self.plan, like), None
            given = {**generation.of(past, length), **given}
        given = {**given, **{name: _fitted(name, given, like, generation) for name in OWN_ARGUMENTS}}
        types = self._types(given, like)
        pads, allowed = _seen(given, types, past)
        types = torch.where(pads, PAD, types)
        segments = _segments(given, types, pads)
        if segments is None and generation is None and allowed is not None:
            _refuse_parted(allowed)
        labels, question = given.get("labels"), given["question_mask"]
        routing = route(
            self.plan,
            types,
            labels=labels if labels is not None and labels.ndim == 2 and not labels.is_floating_point() else None,
            question=question,
            ids=given.get("input_ids"),
            segments=segments,
            prompt=None if generation is None else generation.end - past,
            past=past,
            strange=self._strange,
        )
        if routing.plain or self.plan.attention == "none":
            return routing, None
        if generation is not None:
            _refuse_parts(past + length, generation.end)
            return routing, None
        told = labels is not None or question is not None
        if training and not told and self.plan.keys in ("prompt", "after-last-modality"):
            raise RoutingError(
                "a forward pass in training mode without labels: the answer cannot be told from the prompt, and "
                "other modalities would look at it; pass labels, or question_mask (batch x tokens, 1 on the prompt)"
            )
        return routing, None if told else _open_end(types)

    def _tokens(self, given: Mapping[str, Any]) -> Tensor:
        """Ids or embeddings of the tokens that the decoder sees."""
        names = ("input_ids", "inputs_embeds")
        if self.seq2seq:
            names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")  # type: ignore[assignment]
        found = next((given[name] for name in names if given.get(name) is not None), None)
        if found is None:
            raise RoutingError(f"a forward pass without {' or '.join(names)}: the tokens cannot be told")
        cache = given.get("past_key_values")
        open_end = getattr(cache, _OPEN_END, None)
        if open_end is not None and _cached(cache) and bool(open_end.any()):
            raise RoutingError(
                "the cached tokens end in another modality, and the text that it looks at may only follow now; give "
                "the whole prompt in one forward pass, or question_mask with its tokens"
            )
        return found

    def _types(self, given: Mapping[str, Any], like: Tensor) -> Tensor:
        """Numbers of A's from the explicit ids, the processor's types or the placeholders, in this order."""
        explicit, kinds, ids = (given.get(name) for name in ("modality_ids", "mm_token_type_ids", "input_ids"))
        if explicit is not None:
            allowed = (explicit >= PAD).logical_and(explicit < len(self.plan.groups))
            return torch.where(allowed, explicit, self._wrong).long()
        if kinds is not None and kinds.shape != like.shape[:2]:
            kinds = None
        marked = self._ids if kinds is None else self._told_ids
        if ids is None and (kinds is None or marked):
            raise RoutingError(f"the tokens' modalities cannot be told: {_REMEDY}")
        untold = [name for name in self._untold if name not in _KINDS]
        if untold or (kinds is None and len(self._untold) == len(self.plan.modalities)):
            raise RoutingError(
                f"the model's configuration has no placeholder id of {', '.join(untold or self._untold)}: tell it "
                "with MokA(tokens={name: id}), or pass modality_ids"
            )
        types = torch.zeros(like.shape[:2], dtype=torch.long, device=like.device)
        if kinds is not None:
            for kind, number in enumerate((*self._kinds, self._wrong), start=1):
                types = torch.where(kinds.to(like.device) >= kind, number, types)
        for id_, number in marked.items():
            types = torch.where(ids == id_, number, types)
        return types


def _segments(given: Mapping[str, Any], types: Tensor, pads: Tensor) -> Tensor | None:
    """Segments of packed rows, from what we or Transformers are given for them; None where no row is packed."""
    bounds, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    for name in ("segment_ids", "seq_idx"):
        if given.get(name) is not None:
            return given[name].expand(types.shape)
    if bounds is not None:
        places = torch.arange(types.shape[1], device=types.device)
        return torch.bucketize(places, bounds[1:].to(places), right=True).expand(types.shape)
    if positions is not None and positions.ndim == 3 and positions.shape[0] == 4:  # text, time, height, width
        positions = positions[0]
    if positions is None or positions.ndim != 2 or types.shape[1] == 1:
        return None
    return segments_of(positions.expand(types.shape), pads)


def _seen(given: Mapping[str, Any], types: Tensor, past: int) -> tuple[Tensor, Tensor | None]:
    """Which tokens are padding; of a mask of four dimensions also which token sees which, batch x tokens x tokens."""
    pads, length, mask = types == PAD, types.shape[1], given.get("attention_mask")
    if isinstance(mask, Mapping):  # by kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return pads, None
    if not isinstance(mask, Tensor):
        if given["modality_ids"] is None:
            raise RoutingError(
                f"attention_mask is a {type(mask).__name__}, which does not tell the padding; pass modality_ids, "
                f"{PAD} on padding"
            )
        return pads, None
    last = past + length if mask.shape[-1] >= past + length else mask.shape[-1]
    mask = mask[..., max(last - length, 0) : last].to(types.device)
    if mask.ndim == 2:
        return (pads | ~mask.bool() if mask.shape[1] == length else pads), None
    allowed = mask[:, 0] > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask[:, 0].bool()
    if allowed.shape[1] != length:
        return pads, None
    return pads | ~allowed.any(1), allowed


def _refuse_parted(allowed: Tensor) -> None:
    """Packed rows that only a mask tells: no token of a row sees all that are seen in it."""
    if bool((allowed.sum(2).amax(1) < allowed.any(1).sum(1)).any()):
        raise RoutingError(
            "the attention mask parts a row into several sequences (packing), and nothing tells which; "
            "pass position_ids that begin again in each, or segment_ids (batch x tokens)"
        )


def _refuse_parts(there: int, prompt: int) -> None:
    if there < prompt:
        raise RoutingError(
            f"generate feeds its prompt of {prompt} tokens in parts (up to {there}), and another modality would be "
            "parted from the text that it looks at; leave prefill_chunk_size out"
        )


def _open_end(types: Tensor) -> Tensor:
    """Which rows' last token that is no padding is of another modality."""
    places = torch.arange(types.shape[1], device=types.device)
    last = torch.where(types == PAD, -1, places).amax(1, keepdim=True).clamp(min=0)
    return types.gather(1, last) > TEXT


class _Captured:
    """A checkpoint function that runs the layer, then and in recomputation, in the forward pass of now."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        passes = _passes.get()

        def again(*inner: Any, **named: Any) -> Any:
            token = _passes.set(passes)
            try:
                return layer(*inner, **named)
            finally:
                _passes.reset(token)

        return self.function(again, *args, **kwargs)


def _capture(module: nn.Module) -> None:
    """Have checkpointed layers, of Transformers or in a wrapper of torch, keep the routing for their recomputation."""
    for part in module.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            function = vars(part).get(name)
            if function is not None and not isinstance(function, _Captured):
                setattr(part, name, _Captured(function))


def _cached(cache: Any) -> int:
    """Tokens in a cache before this forward pass."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0][0].shape[-2])


def _cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def _fitted(name: str, given: Mapping[str, Any], like: Tensor, generation: _Generation | None) -> Tensor | None:
    """An argument of ours, checked; in ``generate`` a row is repeated for its beams and returned sequences."""
    told = given.get(name)
    if told is None:
        return None
    told = _whole_numbers(name, told)
    batch = like.shape[0]
    if generation is not None and told.shape[0] and batch % told.shape[0] == 0:
        told = told.repeat_interleave(batch // told.shape[0], dim=0)
    if told.shape != like.shape[:2]:
        raise RoutingError(f"{name} is {tuple(told.shape)}, the tokens are {tuple(like.shape[:2])}; give one a token")
    return told.to(like.device)


def _whole_numbers(name: str, told: Any) -> Tensor:
    if not isinstance(told, Tensor) or told.is_floating_point() or told.ndim != 2:
        what = f"{told.dtype} of {told.ndim} dimensions" if isinstance(told, Tensor) else type(told).__name__
        raise RoutingError(f"{name} must be a tensor of whole numbers, batch x tokens, got {what}")
    return told


def _placeholder(model: nn.Module, name: str) -> int | None:
    """The id that stands for a token of a modality in ``input_ids``."""
    config = getattr(model, "config", None)
    found = (getattr(config, f"{name}_{key}", None) for key in ("token_id", "token_index"))
    return next((id_ for id_ in found if isinstance(id_, int)), None)


def generate(router: Router, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the Transformers model, which remembers where the prompt ends."""
    given = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if kwargs.get(name) is not None}
    if "segment_ids" in given:
        raise RoutingError("generate goes on with whole rows, not with packed ones: leave segment_ids out")
    told = (kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
    source = next((one for one in (*told, *args[:1]) if isinstance(one, Tensor)), None)
    length = 0 if source is None or router.seq2seq else source.shape[1]
    for name, one in given.items():
        if _whole_numbers(name, one).shape[1] != length:
            raise RoutingError(f"{name} is {tuple(one.shape)}, the prompt has {length} tokens; give one a token")
    mask, cached = kwargs.get("attention_mask"), _cached(kwargs.get("past_key_values"))
    start = cached if mask is not None and mask.shape[-1] != length else 0  # else the prompt holds what is cached
    token = _generating.set(_Generation(router, start, start + length, given))
    try:
        return original(*args, **kwargs)
    finally:
        _generating.reset(token)


def is_seq2seq(model: Any) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


__all__ = ["Router", "current", "generate", "is_seq2seq"]
