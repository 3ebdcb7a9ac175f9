"""Fast paths: PEFT's LoRA, DoRA and HiRA layers, and MokA's, compute by ``loraloom.fused`` while they train.

A layer keeps its parameters, its state dict and its results; its class is replaced by a subclass that has another
``forward``. What a fast path does not cover (several adapters at once, hooks on parts that it would pass by, quantised
or trainable base weights, ...) takes PEFT's own code (MokA: its layer's), call by call.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import ref

import torch
from peft.tuners.hira.layer import Linear as HiraLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraloom import fused
from loraloom.fused import Adapted
from loraloom.integrations.modality import MokALinear
from loraloom.integrations.sparse import SparseLinear
from loraloom.strategies.rankback import Between, routed

_log = logging.getLogger(__name__)
# Layers of one parent that see the same input; not where some of them see another stream.
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
_CROSS = ("cross", "encoder_attn", "encdec", "attn2")
_SEVERAL = "several adapters at once, or none"
_PLAIN = (nn.Linear, SparseLinear)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}


def fast(model: nn.Module, on: bool = True) -> Any:
    """Give the LoRA, DoRA, HiRA and MokA layers of a model their fast paths, in place; parameters and results stay.

    Linear layers (and Transformers' ``Conv1D``) with frozen dense weights train by :mod:`loraloom.fused`: one node of
    the graph a layer or a group of layers on one input, DoRA's norm without ``B A``, HiRA in one product, MokA with no
    more held for backward than LoRA. Rounding is as PEFT's, in another order. In evaluation mode, and for all that a
    fast path does not cover, the layers' own code runs; the log says so, once a reason.

    Args:
        model: a PEFT model, or any model with PEFT layers in it.
        on: False gives all layers back PEFT's own code.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no PEFT layers.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        >>> type(fast(model).base_model.model[0]).__name__, type(fast(model, on=False).base_model.model[0]).__name__
        ('FastLora', 'Linear')
    """
    tuned: dict[str, Any] = {path: part for path, part in model.named_modules() if isinstance(part, BaseTunerLayer)}
    if not tuned:
        raise ValueError(f"the model ({type(model).__name__}) has no PEFT layers; add an adapter first")
    _part(model)
    for layer in tuned.values():
        if on and type(layer) in _FAST:
            layer.__class__ = _FAST[type(layer)]
            layer._siblings = _Siblings([layer])
        elif not on and type(layer) in _FAST.values():
            layer.__class__ = type(layer).__bases__[0]
            vars(layer).pop("_siblings", None)
    for parent, group in _groups(tuned):
        siblings = _Siblings(group)
        model.get_submodule(parent).register_forward_hook(siblings.forget, always_call=True)
        for layer in group:
            layer._siblings = siblings
    left = Counter(f"{type(layer).__module__}.{type(layer).__name__}" for layer in tuned.values())
    for name in [name for name in left if on and not name.startswith("loraloom.")]:
        _say(f"{left[name]} layers of {name} have no fast path")
    return model


def _part(model: nn.Module) -> None:
    """Take the hooks of earlier groups away."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _Siblings):
                del module._forward_hooks[key], module._forward_hooks_always_called[key]


def _groups(tuned: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """Fast layers that by their names see one input, with the path of their parent."""
    found = []
    for path in tuned:
        name = path.rpartition(".")[2]
        parent = path.removesuffix(name)
        for names in _TOGETHER:
            if name == names[0] and not any(word in parent.lower() for word in _CROSS):
                group = [tuned[parent + other] for other in names if parent + other in tuned]
                found.append((parent[:-1], [layer for layer in group if type(layer) in _FAST.values()]))
    return [(parent, group) for parent, group in found if len(group) > 1]


def _nothing() -> None:
    """In the place of a reference."""


class _Siblings:
    """Layers that are computed together when the first of them is called; each takes its own when it is called.

    Their names say so (``_TOGETHER``), and not what was seen: a checkpoint that is recomputed and a run that is resumed
    compute as it was done before. One that sees another input is computed again by itself, each time. What was computed
    ahead is held until its layer is called or the forward of their parent ends, with an error or without.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.seen: tuple = (_nothing, None, _nothing)
        self.ahead: dict[nn.Module, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": (_nothing, None, _nothing), "ahead": {}}

    def taken(self, layer: nn.Module, x: Tensor, routing: Any) -> tuple[Tensor | None, list[nn.Module]]:
        """What was computed for the layer on this input; if nothing was, which layers to compute with it."""
        state = (x._version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        if layer in self.ahead:
            out, (of_x, of_state, of_routing) = self.ahead.pop(layer), self.seen
            if of_x() is x and of_state == state and of_routing() is routing:
                return out, []
            _say("layers of like names that do not see one input", "What is computed ahead is in vain for")
            return None, []
        self.seen = (ref(x), state, _nothing if routing is None else ref(routing))
        self.ahead = {}
        return None, [one for one in self.members if one is not layer]

    def forget(self, *_: Any) -> None:
        """Let go of what nobody took; a hook on the parent."""
        if not torch.compiler.is_compiling():
            self.ahead = {}


class FastLora(LoraLinear):
    """PEFT's LoRA or DoRA on a linear layer, with the fast path."""

    _siblings: _Siblings

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        out = _quickly(self, x, args, kwargs, _lora, fused.lora)
        return LoraLinear.forward(self, x, *args, **kwargs) if out is None else out


class FastHira(HiraLinear):
    """PEFT's HiRA on a linear layer, with the fast path."""

    _siblings: _Siblings

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        out = _quickly(self, x, args, kwargs, _hira, fused.hira)
        return HiraLinear.forward(self, x, *args, **kwargs) if out is None else out


class FastMokA(MokALinear):
    """MokA's layer, with the fast path."""

    _siblings: _Siblings

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As :class:`MokALinear`'s."""
        out = _quickly(self, x, args, kwargs, _moka, routed)
        return MokALinear.forward(self, x, *args, **kwargs) if out is None else out


_FAST: dict[type, type] = {LoraLinear: FastLora, HiraLinear: FastHira, MokALinear: FastMokA}


def _quickly(
    layer: Any, x: Tensor, args: tuple, kwargs: dict[str, Any], describe: Callable, run: Callable
) -> Tensor | None:
    """What the fast path gives; None where PEFT's code is to run."""
    if layer._disable_adapters:  # the base layer alone: no cast, nothing else
        return None if args or kwargs or layer.merged_adapters else layer.base_layer(x)
    if not (layer.training and torch.is_grad_enabled()):
        return None
    alone = torch.compiler.is_compiling()
    own = "an argument beside the input" if args or kwargs else describe(layer, x)
    if isinstance(own, str):
        if not alone:
            _say(own)
        return None
    adapted, dropout, dtype = own
    if dropout is not None:
        return _with_dropout(layer, x, adapted, dropout, dtype, run)
    if alone:
        (out,) = run(x, [adapted], dtype=dtype)
        return out
    siblings = layer._siblings
    out, others = siblings.taken(layer, x, adapted.between and adapted.between.routing)
    if out is None:
        found = {one: describe(one, x) for one in others if type(one) is type(layer) and _open(one)}
        fit = {one: told[0] for one, told in found.items() if _fits(told, adapted)}
        out, *ahead = run(x, [adapted, *fit.values()], dtype=dtype)
        siblings.ahead |= zip(fit, ahead, strict=True)
    return out


def _open(layer: Any) -> bool:
    return layer.training and not layer._disable_adapters


def _fits(told: tuple | str, lead: Adapted) -> bool:
    """Whether a layer can be computed with the one that leads."""
    if isinstance(told, str) or told[1] is not None:
        return False
    mine, theirs = told[0].between, lead.between
    if mine is not None and (mine.routing is not theirs.routing or mine.plan != theirs.plan):
        return False
    return told[0].a.dtype is lead.a.dtype and told[0].a.shape[1] == lead.a.shape[1]


def _with_dropout(
    layer: Any, x: Tensor, one: Adapted, dropout: nn.Dropout, dtype: torch.dtype | None, run: Callable
) -> Tensor:
    """Layers whose update sees another input than the base does."""
    if isinstance(layer, FastHira):
        base = layer.base_layer(x)
        (update,) = fused.hira(dropout(x), [one], whole=False, dtype=dtype)
        return base + update
    if one.magnitude is None:
        (out,) = run(x, [one], dropout=dropout.p, dtype=dtype)
        return out
    with torch.no_grad():
        norms = fused.row_norms(one.weight, one.a, one.b, one.scale).to(one.magnitude.dtype)
    base, seen, by = layer.base_layer(x), dropout(x), one.magnitude / norms
    update = torch.nn.functional.linear(torch.nn.functional.linear(seen.to(one.a.dtype), one.a), one.b) * one.scale
    return (base + (by - 1) * torch.nn.functional.linear(seen, one.weight) + by * update).to(base.dtype)


def _lora(layer: Any, x: Tensor) -> tuple[Adapted, nn.Dropout | None, torch.dtype | None] | str:
    """What the kernel needs of a LoRA layer, its dropout if it has any, and autocast's type; or why it does not fit."""
    parts = layer._modules  # nn.Module's own lookup is slow, and layers are many
    name = _only(layer, parts["lora_A"])
    if name is None:
        return _SEVERAL
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, DoraLinearVariant) and variant is not DoraLinearVariant:
        return f"LoRA with {getattr(variant, '__name__', type(variant).__name__)}"
    told = _factors(layer, x, name)
    if isinstance(told, str) or variant is None:
        return told
    one, dropping, dtype = told
    magnitude = parts["lora_magnitude_vector"]._modules[name]
    if _touched(magnitude):
        return "DoRA with hooks on its magnitude"
    return one._replace(magnitude=magnitude.weight), dropping, dtype


def _factors(layer: Any, x: Tensor, name: str) -> tuple[Adapted, nn.Dropout | None, torch.dtype | None] | str:
    """Of an adapter in a LoRA layer, all but what a variant adds."""
    parts = layer._modules
    a, b, dropout = (parts[kind]._modules[name] for kind in ("lora_A", "lora_B", "lora_dropout"))
    if type(a) not in _PLAIN or type(b) not in _PLAIN or a.bias is not None or b.bias is not None or _touched(a, b):
        return "a LoRA layer with parts of other kinds, with biases or hooks"
    low, high = a.weight, b.weight
    weights, dropping = _frozen(layer, x, low, high), _dropping(dropout)
    if isinstance(weights, str):
        return weights
    if isinstance(dropping, str):
        return dropping
    return Adapted(weights[0], weights[1], low, high, layer.scaling[name]), dropping, weights[2]


def _moka(layer: Any, x: Tensor) -> tuple[Adapted, nn.Dropout | None, torch.dtype | None] | str:
    """As :func:`_lora`."""
    name = _only(layer, layer._modules["lora_A"])
    if name is None:
        return _SEVERAL
    told = "MokA on anything but batch x tokens" if x.dim() != 3 else _factors(layer, x, name)
    if isinstance(told, str):
        return told
    one, dropping, dtype = told
    return one._replace(between=Between(layer.plan, layer.routing(x), x.shape[:2])), dropping, dtype


def _hira(layer: Any, x: Tensor) -> tuple[Adapted, nn.Dropout | None, torch.dtype | None] | str:
    """As :func:`_lora`."""
    name = _only(layer, layer.hira_A)
    if name is None:
        return _SEVERAL
    a, b, dropout = layer.hira_A[name], layer.hira_B[name], layer.hira_dropout[name]
    weights, dropping = _frozen(layer, x, a, b), _dropping(dropout)
    if isinstance(weights, str):
        return weights
    if isinstance(dropping, str):
        return dropping
    return Adapted(weights[0], weights[1], a, b), dropping, weights[2]


def _only(layer: Any, there: Any) -> str | None:
    names = layer.active_adapters
    return names[0] if len(names) == 1 and names[0] in there and not layer.merged_adapters else None


def _dropping(dropout: Any) -> nn.Dropout | str | None:
    """The dropout where it acts, or why what is in its place does not fit."""
    if type(dropout) not in (nn.Dropout, nn.Identity) or _touched(dropout):
        return "an input dropout of another kind, or with hooks"
    if type(dropout) is nn.Identity or dropout.p == 0 or not dropout.training:
        return None
    return dropout if dropout.p < 1 else "an input dropout of 1"


def _frozen(layer: Any, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype | None] | str:
    """Weight (out, in) and bias of a frozen dense base layer, and the type in which autocast computes."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"a base layer of {type(base).__name__}"
    if _touched(base) or getattr(layer, "_is_replica", False):
        return "a base layer that something hooks into"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return "a base layer with a quantised, sharded or trained weight or bias"
    kind, dtype = x.dtype, None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if not {kind, weight.dtype, a.dtype, b.dtype} <= _AUTOCAST:
            return "autocast of other types than float32 and 16 bits"
    elif kind is not weight.dtype or a.dtype is not b.dtype or not getattr(layer, "cast_input_dtype_enabled", True):
        return "input, base weight or factors of different types"
    return weight if type(base) is nn.Linear else weight.T, bias, dtype


def _touched(*modules: nn.Module) -> bool:
    """Whether a module has hooks or a ``forward`` of its own, which would be passed by."""
    return any("forward" in held or any(map(held.__getitem__, _HOOKS)) for held in map(vars, modules))


@cache
def _say(what: str, how: str = "PEFT's own code, or MokA's layer, runs for") -> None:
    _log.warning("%s %s", how, what)
