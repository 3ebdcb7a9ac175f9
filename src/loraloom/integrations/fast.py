"""Fast paths: PEFT's LoRA, DoRA and HiRA layers compute by ``loraloom.fused`` while they train.

A layer keeps its parameters, its state dict and its results; its class is replaced by a subclass that has another
``forward``. What a fast path does not cover (several adapters at once, hooks on parts that it would pass by, quantised
or trainable base weights, ...) takes PEFT's own code, call by call.
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
_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}


def fast(model: nn.Module, on: bool = True) -> Any:
    """Give the LoRA, DoRA and HiRA layers of a model their fast paths, in place; parameters and results stay.

    Linear layers (and Transformers' ``Conv1D``) with frozen dense weights train by :mod:`loraloom.fused`: one node of
    the graph a layer or a group of layers on one input, DoRA's norm without ``B A``, HiRA in one product. Rounding is
    as PEFT's, in another order. In evaluation mode, and for all that a fast path does not cover, PEFT's own code runs;
    the log says so, once a reason.

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
    for layer in tuned.values():
        if on and type(layer) in _FAST:
            layer.__class__ = _FAST[type(layer)]
            layer._siblings = _Siblings([layer])
        elif not on and type(layer) in _FAST.values():
            layer.__class__ = type(layer).__bases__[0]
            for name in ("_siblings", "_square"):
                vars(layer).pop(name, None)
    for group in _groups(tuned):
        siblings = _Siblings(group)
        for layer in group:
            layer._siblings = siblings
    left = Counter(f"{type(layer).__module__}.{type(layer).__name__}" for layer in tuned.values())
    for name in [
        name for name in left if on and not name.startswith("loraloom.")
    ]:  # MokA's layers are quick as they are
        _say(f"{left[name]} layers of {name} have no fast path")
    return model


def _groups(tuned: dict[str, Any]) -> list[list[Any]]:
    """Fast layers that by their names see one input."""
    found = []
    for path in tuned:
        parent, _, name = path.rpartition(".")
        for names in _TOGETHER:
            if name == names[0] and not any(word in parent.lower() for word in _CROSS):
                group = [tuned[f"{parent}.{other}"] for other in names if f"{parent}.{other}" in tuned]
                found.append([layer for layer in group if type(layer) in _FAST.values()])
    return [group for group in found if len(group) > 1]


class _Siblings:
    """Layers that are computed together when the first of them is called; each takes its own when it is called.

    Their names say so (``_TOGETHER``), and not what was seen: a run that is resumed computes as the unbroken one. Those
    that turn out to see another input, or none, leave for good. What is computed ahead is held until its layer is
    called.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.seen: tuple = (None, None)
        self.ahead: dict[nn.Module, Tensor] = {}

    def __reduce__(self) -> tuple:
        return _Siblings, (self.members,)

    def taken(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What was computed for the layer on this input; if nothing was, it is the first of them on this input."""
        state = (x._version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        same = self.seen[0] is not None and self.seen[0]() is x and self.seen[1] == state
        if same and layer in self.ahead:
            return self.ahead.pop(layer)
        if self.ahead:
            _say(f"{len(self.ahead)} of {len(self.members)} layers of like names, which do not see one input, apart")
            self.members = [one for one in self.members if one not in self.ahead]
        self.seen, self.ahead = (ref(x), state), {}
        return None

    def others(self, layer: nn.Module) -> list[nn.Module]:
        """Those to compute with the layer that is called first."""
        return [one for one in self.members if one is not layer] if layer in self.members else []


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


_FAST: dict[type, type] = {LoraLinear: FastLora, HiraLinear: FastHira}


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
        return _with_dropout(layer, x, adapted, dropout, dtype)
    if alone:
        (out,) = run(x, [adapted], dtype=dtype)
        return out
    siblings = layer._siblings
    out = siblings.taken(layer, x)
    if out is None:
        found = {one: describe(one, x) for one in siblings.others(layer) if type(one) is type(layer) and _open(one)}
        fit = {one: told[0] for one, told in found.items() if _fits(told, adapted)}
        out, *ahead = run(x, [adapted, *fit.values()], dtype=dtype)
        siblings.ahead = dict(zip(fit, ahead, strict=True))
    return out


def _open(layer: Any) -> bool:
    return layer.training and not layer._disable_adapters


def _fits(told: tuple | str, lead: Adapted) -> bool:
    """Whether a layer can be computed with the one that leads."""
    if isinstance(told, str) or told[1] is not None:
        return False
    return told[0].a.dtype is lead.a.dtype and told[0].a.shape[1] == lead.a.shape[1]


def _with_dropout(layer: Any, x: Tensor, one: Adapted, dropout: nn.Dropout, dtype: torch.dtype | None) -> Tensor:
    """Layers whose update sees another input than the base does."""
    if isinstance(layer, FastHira):
        base = layer.base_layer(x)
        (update,) = fused.hira(dropout(x), [one], whole=False, dtype=dtype)
        return base + update
    if one.magnitude is None:
        (out,) = fused.lora(x, [one], dropout=dropout.p, dtype=dtype)
        return out
    with torch.no_grad():
        norms = fused.row_norms(one.weight, one.a, one.b, one.scale, one.square).to(one.magnitude.dtype)
    base, seen, by = layer.base_layer(x), dropout(x), one.magnitude / norms
    update = torch.nn.functional.linear(torch.nn.functional.linear(seen.to(one.a.dtype), one.a), one.b) * one.scale
    return (base + (by - 1) * torch.nn.functional.linear(seen, one.weight) + by * update).to(base.dtype)


def _lora(layer: Any, x: Tensor) -> tuple[Adapted, nn.Dropout | None, torch.dtype | None] | str:
    """What the kernel needs of a LoRA layer, its dropout if it has any, and autocast's type; or why it does not fit."""
    parts = layer._modules  # nn.Module's own lookup is slow, and layers are many
    name = _only(layer, parts["lora_A"])
    if name is None:
        return "several adapters at once, or none"
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, DoraLinearVariant) and variant is not DoraLinearVariant:
        return f"LoRA with {getattr(variant, '__name__', type(variant).__name__)}"
    a, b, dropout = (parts[kind]._modules[name] for kind in ("lora_A", "lora_B", "lora_dropout"))
    if b.bias is not None or _hooked(a, b, dropout):
        return "a LoRA layer with a bias or hooks on its parts"
    low, high = a.weight, b.weight
    weights = _frozen(layer, x, low, high)
    if isinstance(weights, str):
        return weights
    weight, bias, dtype = weights
    scale, dropping = layer.scaling[name], _dropping(dropout)
    if variant is None:
        return Adapted(weight, bias, low, high, scale), dropping, dtype
    magnitude = parts["lora_magnitude_vector"]._modules[name].weight
    return Adapted(weight, bias, low, high, scale, magnitude, _square(layer, weight)), dropping, dtype


def _hira(layer: Any, x: Tensor) -> tuple[Adapted, nn.Dropout | None, torch.dtype | None] | str:
    """As :func:`_lora`."""
    name = _only(layer, layer.hira_A)
    if name is None:
        return "several adapters at once, or none"
    a, b, dropout = layer.hira_A[name], layer.hira_B[name], layer.hira_dropout[name]
    weights = _frozen(layer, x, a, b)
    if isinstance(weights, str):
        return weights
    return Adapted(weights[0], weights[1], a, b), _dropping(dropout), weights[2]


def _only(layer: Any, there: Any) -> str | None:
    names = layer.active_adapters
    return names[0] if len(names) == 1 and names[0] in there and not layer.merged_adapters else None


def _dropping(dropout: nn.Module) -> nn.Dropout | None:
    return dropout if isinstance(dropout, nn.Dropout) and dropout.p > 0 else None


def _frozen(layer: Any, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype | None] | str:
    """Weight (out, in) and bias of a frozen dense base layer, and the type in which autocast computes."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"a base layer of {type(base).__name__}"
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return "a base layer with a quantised, sharded or trained weight or bias"
    if _hooked(base) or "forward" in vars(base) or getattr(layer, "_is_replica", False):
        return "a base layer that something hooks into"
    kind, dtype = x.dtype, None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if not {kind, weight.dtype, a.dtype, b.dtype} <= _AUTOCAST:
            return "autocast of other types than float32 and 16 bits"
    elif kind is not weight.dtype or a.dtype is not b.dtype or not getattr(layer, "cast_input_dtype_enabled", True):
        return "input, base weight or factors of different types"
    return weight if type(base) is nn.Linear else weight.T, bias, dtype


def _hooked(*modules: nn.Module) -> bool:
    return any(
        held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]
        for held in map(vars, modules)
    )


def _square(layer: Any, weight: Tensor) -> Tensor | None:
    """Sums of squares of the rows of DoRA's frozen weight, made again when the weight has changed."""
    if torch.compiler.is_compiling():
        return None
    key = (weight.data_ptr(), weight._version, weight.dtype)
    held = getattr(layer, "_square", None)
    if held is None or held[0] != key:
        kind = torch.promote_types(weight.dtype, torch.float32)
        held = layer._square = (key, torch.linalg.vector_norm(weight, dim=1, dtype=kind).square_())
    return held[1]


@cache
def _say(what: str) -> None:
    _log.warning("PEFT's own code runs for %s", what)
