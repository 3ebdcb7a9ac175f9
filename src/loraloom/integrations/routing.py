"""Which token of a forward pass is of which modality: hooks on a Transformers model that make one routing for it.

The hooks stand on the Transformers model, which PEFT, ``generate`` and wrappers for several devices all call; they make
one :class:`Routing` for the whole forward pass. Layers read it from where their thread keeps it; recomputation in
checkpointed layers gets the one of its own forward pass. ``generate`` keeps where its prompt ends, so that what was
generated is never looked at, and the explicit arguments for the first forward pass.

What cannot be seen from here: a cache whose tokens of another modality were computed beside another question. Give the
whole prompt in one forward pass; do not share prefixes between questions.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraloom.adapter import UnsupportedKind
from loraloom.integrations import inputs
from loraloom.strategies.modality import MokA
from loraloom.strategies.rankspace import PAD, Routing, RoutingError, route, text_only

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

    def refuse_parts(self, there: int) -> None:
        """Refuse a forward pass with other modalities after which there are so many tokens, and not the whole prompt.

        Raises:
            RoutingError: it is one.
        """
        if there < self.end:
            raise RoutingError(
                f"generate feeds its prompt of {self.end} tokens in parts (up to {there}), and another modality would "
                "be parted from the text that it looks at; leave prefill_chunk_size out"
            )


class _Here(threading.local):
    """What goes on in this thread. No context variable: torch.compile cannot read one inside of a layer."""

    passes: tuple[_Pass, ...] = ()
    generation: _Generation | None = None


_here = _Here()


def current(tokens: torch.Size) -> Routing:
    """The routing of the forward pass that is going on, for a layer that sees so many tokens.

    Raises:
        RoutingError: there is none, or it is of other tokens.
    """
    passes = _here.passes
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
        found = {name: id_ for name in _KINDS[1:] if (id_ := inputs.placeholder(model, name)) is not None}
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
        others = [one for one in _here.passes if one.module is not module]  # an interrupted pass leaves its own
        _here.passes = (*others, _Pass(module, routing, open_end))
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forget the routing; called when forward raises, too."""
        if not _here.passes or _here.passes[-1].module is not module:  # it raised before there was a routing
            return
        *others, this = _here.passes
        _here.passes = tuple(others)
        if this.open_end is not None and (cache := inputs.cache_of(output)) is not None:
            setattr(cache, _OPEN_END, this.open_end)

    # --- which token is what -------------------------------------------------------------------------------------
    def _routed(self, given: Mapping[str, Any], training: bool) -> tuple[Routing, Tensor | None]:
        """The routing, and in which rows the text that is looked at may only follow in the next forward pass."""
        like, cache = self._tokens(given), given.get("past_key_values")
        past = inputs.cached(cache)
        if past and (rows := getattr(cache, _OPEN_END, None)) is not None and bool(rows.any()):
            raise RoutingError(
                "the cached tokens end in another modality, and the text that it looks at may only follow now; give "
                "the whole prompt in one forward pass, or question_mask with its first part"
            )
        generation = _here.generation
        if generation is not None and generation.router is not self:
            generation = None
        if self.seq2seq or (generation is not None and past >= generation.end):
            return text_only(self.plan, like), None
        if generation is not None:
            given = {**generation.of(past, like.shape[1]), **given}
        own = {name: given[name] for name in OWN_ARGUMENTS if given.get(name) is not None}
        given = {**given, **{name: inputs.fitted(name, told, like, bool(generation)) for name, told in own.items()}}
        types = self._types(given, like)
        pads, allowed = inputs.padding(given, types, past)
        types = torch.where(pads, PAD, types)
        segments = inputs.segments(given, types, pads)
        if segments is None and generation is None and allowed is not None:
            inputs.refuse_parted(allowed, types)
        routing = route(
            self.plan,
            types,
            labels=inputs.token_labels(given),
            question=given.get("question_mask"),
            ids=given.get("input_ids"),
            segments=segments,
            prompt=None if generation is None else generation.end - past,
            past=past,
            strange=self._strange,
        )
        if routing.plain or self.plan.attention == "none":
            return routing, None
        if generation is not None:
            generation.refuse_parts(past + like.shape[1])
            return routing, None
        return routing, self._open_end(given, types, training)

    def _open_end(self, given: Mapping[str, Any], types: Tensor, training: bool) -> Tensor | None:
        """In which rows the question may go on; None where it is told where it ends, as it must be in training."""
        told = given.get("labels") is not None or given.get("question_mask") is not None
        if told or self.plan.keys not in ("prompt", "after-last-modality"):
            return None
        if training:
            raise RoutingError(
                "a forward pass in training mode without labels: the answer cannot be told from the prompt, and "
                "other modalities would look at it; pass labels, or question_mask (batch x tokens, 1 on the prompt). "
                "With label_smoothing_factor or compute_loss_func a Trainer takes the labels out of the batch: have "
                "its data collator give question_mask"
            )
        return inputs.open_end(types)

    def _tokens(self, given: Mapping[str, Any]) -> Tensor:
        """Ids or embeddings of the tokens that the decoder sees."""
        names = ["input_ids", "inputs_embeds"]
        if self.seq2seq:
            names = ["decoder_input_ids", "decoder_inputs_embeds", "labels"]
        for name in names:
            if given.get(name) is not None:
                return given[name]
        raise RoutingError(f"a forward pass without {' or '.join(names)}: the tokens cannot be told")

    def _types(self, given: Mapping[str, Any], like: Tensor) -> Tensor:
        """Numbers of A's from the explicit ids, the processor's types or the placeholders, in this order."""
        explicit, kinds = given.get("modality_ids"), given.get("mm_token_type_ids")
        ids: Any = given.get("input_ids")
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


def hook(router: Router, model: Any) -> None:
    """Have a model's forward passes routed; a router of an adapter that was unloaded gives way."""
    first = not hasattr(model, "moka_router")
    model.moka_router = router
    if first:
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True, always_call=True)
        if hasattr(model, "generate"):
            model.generate = functools.partial(_generate, model, model.generate)


def _before(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return module.moka_router.before(module, args, kwargs)


def _after(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    module.moka_router.after(module, args, kwargs, output)


class _Captured:
    """A checkpoint function that runs the layer, then and in recomputation, in the forward pass of now."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.keywords = getattr(function, "keywords", {})  # gates look for the kind of checkpoint there

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        passes = _here.passes

        def again(*inner: Any, **named: Any) -> Any:
            before, _here.passes = _here.passes, passes
            try:
                return layer(*inner, **named)
            finally:
                _here.passes = before

        return self.function(again, *args, **kwargs)


def is_in(run: Any, kind: type) -> bool:
    """Whether a checkpoint function is of this kind, or wraps one that is; those that wrap have it as ``function``."""
    return isinstance(run, kind) or (hasattr(run, "function") and is_in(run.function, kind))


def _capture(module: nn.Module) -> None:
    """Have checkpointed layers, of Transformers or in a wrapper of torch, keep the routing for their recomputation."""
    for part in module.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            function = vars(part).get(name)
            if function is not None and not is_in(function, _Captured):
                setattr(part, name, _Captured(function))


def _generate(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the Transformers model, which remembers where the prompt ends."""
    router = model.moka_router
    given = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if kwargs.get(name) is not None}
    if "segment_ids" in given:
        raise RoutingError("generate goes on with whole rows, not with packed ones: leave segment_ids out")
    told = (kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
    source = next((one for one in (*told, *args[:1]) if isinstance(one, Tensor)), None)
    length = 0 if source is None or router.seq2seq else source.shape[1]
    for name, one in given.items():
        if inputs.whole_numbers(name, one).shape[1] != length:
            raise RoutingError(f"{name} is {tuple(one.shape)}, the prompt has {length} tokens; give one a token")
    mask, cached = kwargs.get("attention_mask"), inputs.cached(kwargs.get("past_key_values"))
    start = cached if mask is not None and mask.shape[-1] != length else 0  # else the prompt holds what is cached
    before, _here.generation = _here.generation, _Generation(router, start, start + length, given)
    try:
        return original(*args, **kwargs)
    finally:
        _here.generation = before


def is_seq2seq(model: Any) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


__all__ = ["Router", "current", "hook", "is_in", "is_seq2seq"]
