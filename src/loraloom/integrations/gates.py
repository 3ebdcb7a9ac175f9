"""Gates on a model's PEFT layers: units are switched by the tuner's own disabled path, whatever the tuner.

A closed gate costs nothing in forward and leaves no gradient; ``requires_grad`` is never touched and no weight changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loraloom.adapter import UnsupportedKind
from loraloom.integrations.adalora import heed_absence, mute, unmute
from loraloom.integrations.layers import (
    frozen_beside,
    inner_model,
    learning_weights,
    parts_of,
    start_that_changes_base,
    tuner_layers,
)
from loraloom.integrations.routing import is_in
from loraloom.strategies import Strategy
from loraloom.strategies.units import group

# Layers that are off because a gate is closed, and not because the user disabled their adapters.
_closed: WeakSet[nn.Module] = WeakSet()


class Gates:
    """The switches of one model, a gate a unit.

    A layer whose adapters the user had disabled stays so whatever the gates do. Layers inside another tuner's layer (as
    PEFT nests them for MoE parameters) go with the outermost. Modules that PEFT saves whole (``modules_to_save``,
    ``trainable_token_indices``) are no adapters and have no gate.

    With gradient checkpointing a step's backward pass belongs inside the same state as its forward pass. Making gates
    removes the hook by which Transformers and PEFT let the embeddings' output require a gradient: with it every
    backward pass would run down to the embeddings whatever is closed. Only reentrant checkpoints need a gradient to
    come in; with these the first layer that learns asks for it itself, and those below it make no checkpoint.
    :func:`applied` gives the hook back afterwards.

    Args:
        model: a PEFT model, or any model with PEFT layers in it, wrapped (DDP, torch.compile) or not.
        unit: what is switched together (``strategies.units.group``).
        trained: only layers in which an active adapter learns have a gate; all, where none does.

    Attributes:
        units: unit names in order.
        modules: module paths in the base model, by unit.
        inner: the module that every forward passes through, ``generate``'s too: the base model within PEFT's.

    Raises:
        ValueError: the model has no PEFT layers, or ``unit`` matches none.
        UnsupportedKind: the adapter's layers cannot be switched one by one, or are merged into the base.
    """

    def __init__(self, model: nn.Module, unit: str = "layer", *, trained: bool = False) -> None:
        self._layers = tuner_layers(model)
        if not self._layers:
            raise ValueError(f"the model ({type(model).__name__}) has no PEFT layers to switch; add an adapter first")
        learning = {name: some for name, some in self._layers.items() if trained and any(map(learning_weights, some))}
        self._layers, self._beside = learning or self._layers, frozen_beside(learning)
        parts = parts_of(model)  # once: gates are made anew in each step of a plain loop
        self.inner = inner_model(model, parts)
        self._start = start_that_changes_base(parts)
        self._refuse_merged()
        self._freed = _free_inputs(parts)
        heed_absence(parts)
        self.modules = group(self._layers, unit)
        self.units = tuple(self.modules)
        self._found_dropout = {drop: drop.p for drop in self._dropouts()}

    def set(self, active: Sequence[bool]) -> None:
        """Open the gates of the units that are active, close all others.

        Raises:
            ValueError: not one truth value a unit.
            UnsupportedKind: a layer has been merged since, or a gate is to close on an adapter that started as a part
                of the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA): the layer without it is another than
                the base layer; or on a frozen adapter that is active beside the one that learns.
        """
        if len(active) != len(self.units):
            raise ValueError(f"{len(active)} values for {len(self.units)} units ({self.units[0]}, ...); give one each")
        self._refuse_merged()
        if self._start and not all(active):
            raise UnsupportedKind(
                f"{self._start} takes a part out of the base weights: without the adapter, the layer is not the base "
                "layer; allowed are starts that keep the base (true, gaussian, eva, orthogonal)"
            )
        if self._beside and not all(active):
            raise UnsupportedKind(
                f"{self._beside}: switching the layer off would switch it off too; merge it into the base first "
                "(merge_and_unload), or make the one that learns the only active adapter"
            )
        for unit, on in zip(self.units, active, strict=True):
            self.set_one(unit, on)

    def set_one(self, unit: str, on: bool) -> None:
        """Open or close the gate of one unit, where :meth:`set` was allowed to close it."""
        for name in self.modules[unit]:
            for layer in self._layers[name]:
                (_open if on else _close)(layer)

    def open(self) -> None:
        """All gates open and every input dropout as it was when these gates were made."""
        for layers in self._layers.values():
            for layer in layers:
                _open(layer)
        for drop, p in self._found_dropout.items():
            drop.p = p

    def state(self) -> tuple[bool, ...]:
        """For every unit whether all of its adapters take part in forward (false too where the user disabled one)."""
        return tuple(
            not any(layer.disable_adapters for name in self.modules[unit] for layer in self._layers[name])
            for unit in self.units
        )

    def settings(self) -> tuple[tuple[bool, ...], list[float]]:
        """The state, and the probabilities of the input dropouts."""
        return self.state(), [drop.p for drop in self._found_dropout]

    def set_dropout(self, p: float) -> None:
        """Give every adapter's input dropout the probability ``p``, in [0, 1).

        Raises:
            ValueError: ``p`` is out of range, or there is no dropout: PEFT makes none when its probability is 0.
        """
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1), got {p!r}")
        dropouts = self._dropouts()
        if not dropouts:
            raise ValueError(
                "the adapter has no input dropout to set: make it with a dropout above 0 (lora_dropout=0.1)"
            )
        for drop in dropouts:
            drop.p = p

    def layers(self, name: str) -> list[Any]:
        """PEFT's layers at a module path: one, or several that are nested."""
        return self._layers[name]

    @property
    def moved_base(self) -> bool:
        """Whether an adapter started as a part of the base weights (PiSSA and the like)."""
        return bool(self._start)

    def parameters(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """The trainable adapter parameters of each unit, for gradient norms by unit.

        Parameters that several units share (VeRA, VB-LoRA and the like) are listed in each of them.
        """
        found = {}
        for unit, names in self.modules.items():
            layers = [layer for name in names for layer in self._layers[name]]
            found[unit] = tuple(dict.fromkeys(weight for layer in layers for weight in learning_weights(layer)))
        return found

    def _dropouts(self) -> list[nn.Dropout]:
        """Input dropouts of all layers: tuners keep them in ``<tuner>_dropout``, one an adapter."""
        found = []
        for layers in self._layers.values():
            for layer in layers:
                for name, part in layer.named_children():
                    if name.endswith("_dropout") and isinstance(part, nn.ModuleDict):
                        found += [drop for drop in part.values() if isinstance(drop, nn.Dropout)]
        return found

    def _refuse_merged(self) -> None:
        for name, layers in self._layers.items():
            if any(layer.merged for layer in layers):
                raise UnsupportedKind(
                    f"the adapter of {name} is merged into the base weights and cannot be switched; unmerge it first"
                )


@contextmanager
def applied(plan: Strategy, model: nn.Module, step: int) -> Iterator[Gates]:
    """The model in the state that ``plan`` has for ``step`` inside, exactly as before afterwards (also when nested).

    Passes that are not differentiated (evaluation, generation, a reference model) see all adapters inside, too: those
    without gradients, and those in evaluation mode. A model is in training mode where its base or one of its adapters
    is; one that :func:`peft.get_peft_model` has just made is, whatever the base model's mode.

    Raises:
        ValueError: the model has no PEFT layers, or ``plan`` cannot be carried out on them.
    """
    gates = Gates(model, plan.unit, trained=True)
    layers = [layer for some in gates._layers.values() for layer in some]
    closed = [layer in _closed for layer in layers]
    try:
        with drawn(plan, gates, step):
            yield gates
    finally:
        for layer, was_closed in zip(layers, closed, strict=True):
            if was_closed:
                _close(layer)
        gates._freed.close()


@contextmanager
def drawn(plan: Strategy, gates: Gates, step: int) -> Iterator[None]:
    """Gates as ``plan`` has them for ``step`` in all passes that will be differentiated; others see all adapters.

    The backward pass sees the draw too, whatever ran in between: checkpoints are computed again there.
    """
    inside = True
    if len(gates.units) == 1 and plan.skips_parameters and plan.probability(step) < 1:
        warnings.warn(
            f"all adapters are in one unit ({gates.units[0]}), which is always on: {type(plan).__name__} does nothing; "
            "name another unit (module, projection, a regular expression)",
            stacklevel=2,
        )

    def trains(module: nn.Module) -> bool:
        return module.training or any(layer.training for some in gates._layers.values() for layer in some)

    def before(module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and trains(module):
            restore()
        elif any(gates.state()):  # else the adapter is switched off as a whole: a reference model, as in TRL's DPO
            gates.open()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        hook = restore if trains(module) else missed
        for part in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(hook)

    def missed(*_: Any) -> None:
        if inside and gates.settings() != wanted:
            warnings.warn(
                "a pass in evaluation mode is differentiated: all adapters took part in it; call model.train() first",
                stacklevel=2,
            )

    def restore(*_: Any) -> None:
        if inside and gates.settings() != wanted:
            plan.apply(gates, step)

    hooks: list[Any] = []
    try:
        plan.apply(gates, step)
        wanted = gates.settings()
        hooks += [gates.inner.register_forward_pre_hook(before), gates.inner.register_forward_hook(after)]
        yield
    finally:
        inside = False
        for hook in hooks:
            hook.remove()
        gates.open()


def set_dropout(model: nn.Module, p: float) -> None:
    """Give the input dropout of every adapter in ``model`` the probability ``p``, in [0, 1).

    Raises:
        ValueError: ``p`` is out of range, or the model has no PEFT layers with dropout.
    """
    Gates(model).set_dropout(p)


def _close(layer: Any) -> None:
    # enable_adapters() would also freeze the weights, and the optimizer then has parameters that come and go
    if not layer._disable_adapters:
        layer._disable_adapters = True
        _closed.add(layer)
        mute(layer)


def _open(layer: Any) -> None:
    if layer in _closed:
        layer._disable_adapters = False
        _closed.discard(layer)
        unmute(layer)


def _free_inputs(parts: Sequence[nn.Module]) -> ExitStack:
    """Let backward end where nothing below learns, with either kind of checkpoint; closing the result undoes it."""
    undo = ExitStack()
    held: list[Any] = [module for module in parts if vars(module).get("gradient_checkpointing")]
    runs = [getattr(module, "_gradient_checkpointing_func", None) for module in held]
    settings = [getattr(run, "keywords", {}).get("use_reentrant") for run in runs]
    if not runs or None in settings:
        return undo
    for module, run, reentrant in zip(held, runs, settings, strict=True):
        if reentrant and not is_in(run, _FromHereOn):
            undo.callback(setattr, module, "_gradient_checkpointing_func", run)
            module._gradient_checkpointing_func = _FromHereOn(run, module)
    for module in parts:
        # by name: the public way to remove them forgets all but the last of several
        for key, hook in reversed(module._forward_hooks.copy().items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                undo.callback(module._forward_hooks.__setitem__, key, hook)
                del module._forward_hooks[key]
    return undo


class _FromHereOn:
    """Transformers' reentrant checkpoint of one layer, for inputs that require no gradient as well.

    Such a checkpoint passes gradients to the layer's own weights only if one of its inputs requires one.
    """

    def __init__(self, run: Any, layer: nn.Module) -> None:
        self.function, self.layer, self.keywords = run, layer, run.keywords

    def __call__(self, function: Any, *args: Any) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if not tensors or not torch.is_grad_enabled():
            return function(*args)
        if any(value.requires_grad for value in tensors):
            return self.function(function, *args)
        if not _learns(self.layer):
            return function(*args)
        first = next(at for at, value in enumerate(args) if value is tensors[0])
        asked = tensors[0].detach().requires_grad_()
        return self.function(function, *args[:first], asked, *args[first + 1 :])


def _learns(module: nn.Module) -> bool:
    """Whether anything in a module takes part and is trained; adapters behind closed gates are not."""
    closed = module in _closed
    own = any(weight.requires_grad for weight in module.parameters(recurse=False))
    parts = [child for name, child in module.named_children() if not closed or name == "base_layer"]
    return (own and not closed) or any(_learns(child) for child in parts)
