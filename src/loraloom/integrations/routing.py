"""Which token of a forward pass is of which modality: hooks on a Transformers model that make one routing for it.

The hooks stand on the PEFT model and on the Transformers model in it; the outermost one that is called makes one
:class:`Routing` for the whole forward pass. Layers read it from a context variable; recomputation in checkpointed
layers gets the one of its own forward pass. ``generate`` is given a context too, so that what was generated is never
looked at and the explicit arguments reach the first forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.strategies.modality import MokA
from loraloom.strategies.rankspace import PAD, Routing, RoutingError, route, segments_of

OWN_ARGUMENTS = ("modality_ids", "question_mask", "segment_ids")
_PROCESSOR_TYPES = ("text", "image", "video", "audio")  # what mm_token_type_ids numbers

_routing: ContextVar[tuple[Router, Routing | None] | None] = ContextVar("routing", default=None)
_generating: ContextVar[_Generation | None] = ContextVar("generating", default=None)
_set_tokens: ContextVar[tuple[Token, ...]] = ContextVar("set_tokens", default=())
_ADD = 'add it to MokA(modalities={..., "name": number})'
_REMEDY = (
    "call the whole model with input_ids that hold its placeholder tokens, with mm_token_type_ids, or with "
    "modality_ids (batch x tokens: 0 text, 1 and on the number of the modality's A, -1 padding)"
)


@dataclass(frozen=True)
class _Generation:
    """What ``generate`` was called with."""

    router: Router
    prompt: int | None
    given: Mapping[str, Tensor]


def current(tokens: torch.Size) -> Routing:
    """The routing of the forward pass that is going on, for a layer that sees so many tokens.

    Raises:
        RoutingError: there is none, or it is of other tokens.
    """
    found = _routing.get()
    routing = None if found is None else found[1]
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

    Attributes:
        plan: the adapter's.
        ids: number of the A by placeholder id.
        unknown: placeholder ids of the model of which the plan has no modality, by name.
    """

    def __init__(self, plan: MokA, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.plan = plan
        self.layers = list(layers)
        known = {name: _placeholder(model, name) for name in ("image", "video", "audio")}
        told = {name: id_ for name, id_ in known.items() if id_ is not None} | dict(plan.tokens)
        self.ids = {id_: plan.modalities[name] for name, id_ in told.items() if name in plan.modalities}
        self.unknown = {name: id_ for name, id_ in told.items() if name not in plan.modalities}
        self._signature = inspect.signature(model.forward)
        self.text_only = is_seq2seq(model)  # the decoder's tokens: other modalities are in the encoder
        self._checkpoints = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]

    # --- hooks ---------------------------------------------------------------------------------------------------
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Make the routing, unless an outer module did; takes out the arguments that are ours."""
        current = _routing.get()
        own = {name: kwargs[name] for name in OWN_ARGUMENTS if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        if current is not None and current[0] is self:
            self._enter(current)
            return args, kwargs
        self._capture()
        routing = None
        if any(not layer.disable_adapters for layer in self.layers):
            bound = {**self._bound(args), **kwargs, **own}
            routing = self._routed(bound, module.training)
        self._enter((self, routing))
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forget the routing; called when forward raises, too."""
        stack = _set_tokens.get()
        if stack:
            _routing.reset(stack[-1])
            _set_tokens.set(stack[:-1])

    def _enter(self, value: tuple[Router, Routing | None]) -> None:
        _set_tokens.set((*_set_tokens.get(), _routing.set(value)))

    def _bound(self, args: tuple) -> dict[str, Any]:
        return dict(zip(self._signature.parameters, args, strict=False))

    def _capture(self) -> None:
        """Have checkpointed layers keep the routing of their forward pass for their recomputation."""
        for module in self._checkpoints:
            function = vars(module).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _Captured):
                module._gradient_checkpointing_func = _Captured(function)  # type: ignore[assignment]

    # --- which token is what -------------------------------------------------------------------------------------
    def _routed(self, given: Mapping[str, Any], training: bool) -> Routing | None:
        generation = _generating.get()
        if generation is not None and generation.router is not self:
            generation = None
        past = _cached(given.get("past_key_values"))
        ids, labels = given.get("input_ids"), given.get("labels")
        question, segments = given.get("question_mask"), given.get("segment_ids")
        if generation is not None and not past:
            given = {**generation.given, **given}
            question = given.get("question_mask") if question is None else question
        types = self._types(given, ids, past).to(torch.long)
        mask = given.get("decoder_attention_mask" if self.text_only else "attention_mask")
        pads = _pads(mask, types, training and segments is None)
        types = torch.where(pads, PAD, types)
        prompt = None if generation is None or past else generation.prompt
        if prompt is not None and types.shape[1] < prompt:
            raise RoutingError(
                f"generate feeds its prompt of {prompt} tokens in parts ({types.shape[1]} first): a modality may be "
                "parted from the text that it looks at; leave prefill_chunk_size out"
            )
        question = None if question is None else _fitted(question, types)
        if segments is None:
            segments = self._segments(given, types, pads)
        if training and labels is None and question is None and self._needs_labels():
            raise RoutingError(
                "a forward pass in training mode without labels: the answer cannot be told from the prompt, and "
                "other modalities would look at it; pass labels, or question_mask (batch x tokens, 1 on the prompt)"
            )
        routing = route(
            self.plan,
            types,
            labels=labels if labels is not None and labels.shape == types.shape else None,
            question=question,
            ids=ids,
            segments=segments,
            prompt=prompt,
            past=past,
        )
        if given.get("past_key_values") is not None and generation is None and not past and labels is None:
            self._refuse_open_end(types, routing)
        return routing

    def _needs_labels(self) -> bool:
        looks = self.plan.attention != "none" and self.plan.own != "B" and not self.text_only
        return looks and self.plan.keys in ("prompt", "after-last-modality")

    def _types(self, given: Mapping[str, Any], ids: Tensor | None, past: int) -> Tensor:
        """Numbers of A's from the explicit ids, the processor's types or the placeholders, in this order."""
        explicit, told = given.get("modality_ids"), given.get("mm_token_type_ids")
        embeds = given.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if explicit is not None:
            explicit = _fitted(explicit, explicit if source is None else source)
            if int(explicit.max()) >= len(self.plan.groups) or int(explicit.min()) < PAD:
                raise RoutingError(
                    f"modality_ids go from -1 (padding) to {len(self.plan.groups) - 1}, of {self._names()}"
                )
            return explicit
        if self.text_only:
            source = next(given[k] for k in ("decoder_input_ids", "labels", "decoder_inputs_embeds") if k in given)
            return torch.zeros(source.shape[:2], dtype=torch.long, device=source.device)
        if told is not None and (source is None or told.shape == source.shape[:2]):
            return self._from_processor(told)
        if ids is not None and self.ids:
            types = torch.zeros_like(ids)
            for id_, number in self.ids.items():
                types = torch.where(ids == id_, number, types)
            for name, id_ in self.unknown.items():
                if bool((ids == id_).any()):
                    raise RoutingError(f"{name} tokens in input_ids, but the adapter has only {self._names()}; {_ADD}")
            return types
        if past and embeds is not None and embeds.shape[1] == 1:  # a decoding step
            return torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        if ids is not None:
            raise RoutingError(
                f"the model's configuration has no placeholder id of {self._names()}: tell it with "
                "MokA(tokens={name: id}), or pass modality_ids"
            )
        raise RoutingError(f"the tokens' modalities cannot be told: {_REMEDY}")

    def _from_processor(self, told: Tensor) -> Tensor:
        types = torch.zeros_like(told)
        for number, name in enumerate(_PROCESSOR_TYPES[1:], start=1):
            here = told == number
            if name in self.plan.modalities:
                types = torch.where(here, self.plan.modalities[name], types)
            elif bool(here.any()):
                raise RoutingError(f"{name} tokens in mm_token_type_ids, but the adapter has {self._names()}; {_ADD}")
        return types

    def _names(self) -> str:
        return ", ".join(self.plan.groups)

    def _segments(self, given: Mapping[str, Any], types: Tensor, pads: Tensor) -> Tensor | None:
        """Segments of packed rows, from what Transformers is given for them."""
        bounds, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
        if bounds is not None:
            places = torch.arange(types.shape[1], device=types.device)
            return torch.bucketize(places, bounds[1:].to(places), right=True)[None].expand(types.shape)
        if given.get("seq_idx") is not None:
            return given["seq_idx"].expand(types.shape)
        if positions is not None and positions.ndim == 3 and positions.shape[0] == 4:  # text, time, height, width
            positions = positions[0]
        if positions is None or positions.ndim != 2 or types.shape[1] == 1:
            return None
        return segments_of(positions.expand(types.shape), pads)

    def _refuse_open_end(self, types: Tensor, routing: Routing) -> None:
        if not routing.plain and routing.lookups and bool((types[:, -1] > 0).any()):
            raise RoutingError(
                "the first part of a cached sequence ends in tokens of another modality, and the text that they look "
                "at may follow; give the whole prompt in one forward pass (no prefill_chunk_size)"
            )


class _Captured:
    """A checkpoint function that runs the layer, then and in recomputation, with the routing of now."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = _routing.get()

        def again(*inner: Any, **named: Any) -> Any:
            token = _routing.set(current)
            try:
                return layer(*inner, **named)
            finally:
                _routing.reset(token)

        return self.function(again, *args, **kwargs)

    @property
    def keywords(self) -> Mapping[str, Any]:
        """Of the partial function that Transformers makes, which says whether checkpoints are re-entrant."""
        return getattr(self.function, "keywords", {})


def _cached(cache: Any) -> int:
    """Tokens in a cache before this forward pass."""
    if cache is None:
        return 0
    cache = getattr(cache, "self_attention_cache", cache)
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0][0].shape[-2])


def _fitted(given: Tensor, like: Tensor) -> Tensor:
    """A tensor a row for beams and returned sequences; what was generated meanwhile is text."""
    batch, length = like.shape[:2]
    if given.shape[0] != batch and batch % given.shape[0] == 0:
        given = given.repeat_interleave(batch // given.shape[0], dim=0)
    if _generating.get() is not None and given.shape[1] < length:
        given = nn.functional.pad(given, (0, length - given.shape[1]))
    if given.shape != like.shape[:2]:
        raise RoutingError(f"modality_ids or question_mask is {tuple(given.shape)}, the tokens are {(batch, length)}")
    return given.to(like.device)


def _pads(mask: Any, types: Tensor, check_packing: bool) -> Tensor:
    """Which tokens are padding, from an attention mask of two or four dimensions, several of them, or none."""
    none = types == PAD
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    length = types.shape[1]
    if mask is None or not isinstance(mask, Tensor):
        return none
    if mask.ndim == 2:
        return none | ~mask[:, -length:].bool() if mask.shape[1] >= length else none
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    if allowed.shape[1] != length:
        return none
    seen = allowed[:, :, :length].any(1)
    if check_packing and not torch.equal(seen, allowed[:, -1, :length]):
        raise RoutingError(
            "the attention mask parts a row into several sequences (packing), and nothing tells which; "
            "pass position_ids that begin again in each, or segment_ids (batch x tokens)"
        )
    return none | ~seen.expand(types.shape)


def _placeholder(model: nn.Module, name: str) -> int | None:
    """The id that stands for a token of a modality in ``input_ids``."""
    config = getattr(model, "config", None)
    for key in (f"{name}_token_id", f"{name}_token_index"):
        found = getattr(config, key, None)
        if isinstance(found, int):
            return found
    return None


def generate(router: Router, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the Transformers model, which remembers where the prompt ends."""
    own = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if kwargs.get(name) is not None}
    inputs = next((kwargs[k] for k in ("input_ids", "inputs") if kwargs.get(k) is not None), args[0] if args else None)
    source = inputs if inputs is not None else kwargs.get("inputs_embeds")
    told = kwargs.get("mm_token_type_ids")
    given = own if told is None else {**own, "mm_token_type_ids": told}
    prompt = source.shape[1] if isinstance(source, Tensor) and not router.text_only else None
    token = _generating.set(_Generation(router, prompt, given))
    try:
        return original(*args, **kwargs)
    finally:
        _generating.reset(token)


def is_seq2seq(model: Any) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


__all__ = ["Router", "current", "generate", "is_seq2seq"]
