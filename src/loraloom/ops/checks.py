"""What a merge refuses before anything is read: weights, kinds, bases, spaces and knobs that do not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Shape, UnsupportedKind
from loraloom.experts import all_parameters, owner_of, parameters_of
from loraloom.ops.spaces import SPACES
from loraloom.registry import Technique, UnknownName
from loraloom.starts import moves_base
from loraloom.untrusted import is_number, short

Weights = list[float] | dict[str, list[float]]  # of all modules, or by module path
_MOST_RANK = 1 << 14  # of a result: the width of the largest models

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # of a method's arguments, as their annotations say
    "float": ("a finite number", is_number),
    "int": ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("a word", lambda value: isinstance(value, str)),
    "None": ("none", lambda value: value is None),
}


def check_linear(adapter: Adapter, verb: str) -> None:
    """Refuse an adapter whose updates do not add: DoRA, unknown kinds, and those of a base that PEFT moves on loading.

    Raises:
        UnsupportedKind: says which and why.
    """
    if adapter.kind == "dora":
        raise UnsupportedKind(f"cannot {verb} DoRA adapters: their magnitudes are not linear in the update")
    if verb == "fold" and adapter.kind == "moka":
        raise UnsupportedKind(
            "cannot fold MokA adapters: their update depends on each token's modality and on the text beside it; "
            "--text-only (text_only=True) folds what they do to text"
        )
    check_gauge(adapter, verb)
    if adapter.kind not in ("lora", "hira"):
        raise UnsupportedKind(f"cannot {verb} adapters of kind {adapter.kind!r}; allowed: lora, hira")
    start = adapter.config.get("init_lora_weights")
    if moves_base(start):
        raise UnsupportedKind(
            f"cannot {verb} an adapter with init_lora_weights={start!r}: its update is relative to base weights that"
            " this start has moved; convert it first (PEFT: path_initial_model_for_weight_conversion)"
        )


def check_gauge(adapter: Adapter, verb: str, how: str = "") -> None:
    """Refuse MokA where the factors would become others of the same product, or each modality's would by themselves.

    Raises:
        UnsupportedKind: says what is allowed.
    """
    if adapter.kind == "moka":
        raise UnsupportedKind(
            f"cannot {verb} MokA adapters{how}: the modalities of a layer share B, and attention sees A x; allowed"
            " are merging by linear (in factors or delta) and cat at no chosen rank, interpolate, scale, subtract, and"
            " pruning whole layers or modules"
        )


def checked_weights(
    weights: Sequence[float] | Mapping[str, Sequence[float]] | None, adapters: Sequence[Adapter]
) -> Weights:
    """Finite numbers, one per adapter, for all modules or for each.

    Raises:
        ValueError: says which is missing, too many or not finite.
    """
    if not adapters:
        raise ValueError("there is nothing to merge: at least one adapter is needed")
    if weights is None:
        return [1.0 / len(adapters)] * len(adapters)
    if not isinstance(weights, Mapping):
        return _numbers(weights, len(adapters), "")
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    for name in names:
        if name not in weights:
            raise ValueError(f"weights by module: {name} has none; every module needs {len(adapters)}")
    for name in weights:
        if name not in names:
            raise UnknownName("module", name, names)
    return {name: _numbers(weights[name], len(adapters), f"{name}: ") for name in names}


def _numbers(weights: Any, count: int, where: str) -> list[float]:
    if isinstance(weights, np.ndarray | Tensor):
        weights = weights.tolist()
    if not isinstance(weights, list | tuple):
        raise ValueError(f"{where}weights must be a list of {count} numbers, got {short(weights)}")
    if len(weights) != count:
        raise ValueError(f"{where}{len(weights)} weights for {count} adapters; one weight per adapter is needed")
    weights = [weight.item() if isinstance(weight, np.generic | Tensor) else weight for weight in weights]
    for at, weight in enumerate(weights):
        if not is_number(weight):
            raise ValueError(f"{where}weight {at + 1} of {count} is {short(weight)}; weights must be finite numbers")
    return [float(weight) for weight in weights]


def check_fit(adapters: Sequence[Adapter], same_base: bool) -> None:
    """One kind, one base model, and the same parameters of every module.

    Raises:
        AdapterMismatch: says which adapter differs, and how.
    """
    kinds = [adapter.kind for adapter in adapters]
    if len(set(kinds)) > 1:
        raise AdapterMismatch(f"adapters of different kinds do not merge: {', '.join(kinds)}")
    named = [(which(at, adapters), adapter.base) for at, adapter in enumerate(adapters) if adapter.base]
    for who, base in named if same_base else ():
        if _last(base) != _last(named[0][1]):
            raise AdapterMismatch(
                f"{named[0][0]} is of base model {named[0][1]!r}, {who} of {base!r};"
                " if they fit all the same, say same_base=False (--allow-different-bases)"
            )
    _check_parameters(adapters)


def _check_parameters(adapters: Sequence[Adapter]) -> None:
    """Refuse factors of different parameters of one module: PEFT's names do not tell them apart."""
    together = {"target_parameters": all_parameters(adapters)}
    for at, adapter in enumerate(adapters):
        for owner in dict.fromkeys(map(owner_of, adapter.modules)):
            own, asked = (", ".join(sorted(parameters_of(one, owner))) for one in (adapter.config, together))
            if own != asked:
                raise AdapterMismatch(
                    f"{owner}: {which(at, adapters)} adapts the parameters {own or 'none'} of it, the adapters together"
                    f" {asked}; they merge only if each adapts the same parameters of a module"
                )


def which(at: int, adapters: Sequence[Adapter]) -> str:
    """What messages call an adapter."""
    return f"adapter {at + 1} of {len(adapters)}"


def _last(base: str) -> str:
    """The last part of a model's path: the same model is found under many."""
    return base.replace("\\", "/").rstrip("/").split("/")[-1]


def checked_space(technique: Technique[..., Tensor], space: str | None, weights: Weights) -> str:
    """The space that was asked for, or the method's own.

    Raises:
        UnknownName, ValueError: no such space, not of this method, or it cannot honour a negative weight.
    """
    supported = tuple(technique.facts.get("spaces", SPACES))
    chosen = technique.facts.get("space", "delta") if space is None else space
    if chosen not in SPACES:
        raise UnknownName("space", chosen, list(SPACES))
    if chosen not in supported:
        why = f" ({technique.facts['lacks']})" if "lacks" in technique.facts else ""
        raise ValueError(f"method {technique.name!r} has no space {chosen!r}; allowed: {', '.join(supported)}{why}")
    least = min(min(each) for each in (weights.values() if isinstance(weights, dict) else [weights]))
    if SPACES[chosen].gauge and least < 0:
        raise ValueError(
            f"weight {least}: in space {chosen!r} a weight enters B and A both, so that a negative one takes"
            " nothing away; use space='delta'"
        )
    return chosen


def check_knobs(technique: Technique[..., Tensor], knobs: Mapping[str, Any]) -> None:
    """Only arguments that the method has, of their types; ``density`` in (0, 1].

    Raises:
        ValueError: says which the method takes.
    """
    density = knobs.get("density")
    if isinstance(density, int | float) and not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    parameters = inspect.signature(technique.function).parameters.values()
    takes = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("generator", "statistics")}
    for knob, value in knobs.items():
        if knob not in takes:
            raise ValueError(
                f"method {technique.name!r} takes no {knob!r}; it takes: {', '.join(takes) or 'no such arguments'}"
            )
        annotation = takes[knob].annotation
        kinds = getattr(annotation, "__name__", str(annotation)).split(" | ")
        if all(kind in _KINDS for kind in kinds) and not any(_KINDS[kind][1](value) for kind in kinds):
            raise ValueError(
                f"method {technique.name!r}: {knob} must be {' or '.join(_KINDS[kind][0] for kind in kinds)},"
                f" got {value!r}"
            )


def check_size(rank: int | None, energy: float | None, budget: int | str | None) -> None:
    """At most one of the three that say how large the result may be.

    Raises:
        ValueError: more than one, a rank that is not a whole number of at least 1 or is larger than the width of any
            model, or an energy outside (0, 1].
    """
    if sum(value is not None for value in (rank, energy, budget)) > 1:
        raise ValueError("rank, energy and budget each say how large the result may be; give at most one")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if rank is not None and rank > _MOST_RANK:
        raise ValueError(f"rank must be at most {_MOST_RANK}, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")


def check_device(device: str | None) -> None:
    """A device that torch has here.

    Raises:
        ValueError: says why it is none.
    """
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r}: {str(error).splitlines()[0]}") from None


def check_sizes(name: str, shapes: Mapping[int, Shape], adapters: Sequence[Adapter], space: str) -> None:
    """Updates of one module of equal sizes; of equal ranks and in all adapters, where the space needs that.

    Args:
        name: of the module.
        shapes: sizes by place of the adapters that have it.
        adapters: all of the merge.
        space: of the merge.

    Raises:
        AdapterMismatch: says which adapter differs, and how.
    """
    start, first = next(iter(shapes.items()))
    who = which(start, adapters)
    for at, shape in shapes.items():
        other = which(at, adapters)
        if shape[:2] != first[:2]:
            raise AdapterMismatch(f"{name}: {who} is {first.out} x {first.in_}, {other} is {shape.out} x {shape.in_}")
        if SPACES[space].same and shape.rank != first.rank:
            raise AdapterMismatch(
                f"{name}: {who} has rank {first.rank}, {other} has rank {shape.rank}; space {space!r} needs equal"
                " ranks, use space='delta'"
            )
    if SPACES[space].same and len(shapes) < len(adapters):
        lacking = next(at for at in range(len(adapters)) if at not in shapes)
        raise AdapterMismatch(
            f"{name}: {which(lacking, adapters)} has no such module; space {space!r} needs the same modules in"
            " all, use space='delta'"
        )


def check_statistics(
    technique: Technique[..., Tensor], count: int, space: str, statistics: Sequence[Any] | None
) -> None:
    """Statistics where the method works by them, and only there; one per adapter, of its kind and of the space.

    Raises:
        ValueError: says what is missing, or too much.
    """
    kind = technique.facts.get("statistics")
    if kind and statistics is None:
        raise ValueError(
            f"method {technique.name!r} needs statistics ({kind}) of every adapter; see `loraloom measure`"
        )
    if statistics is not None and not kind:
        raise ValueError(f"method {technique.name!r} uses no statistics")
    if statistics is not None and len(statistics) != count:
        raise ValueError(f"{len(statistics)} statistics for {count} adapters; one per adapter is needed")
    for at, known in enumerate(statistics or ()):  # a plain mapping does not say what it is
        which_one, about = f"statistics {at + 1} of {count}", getattr(known, "about", {})
        if getattr(known, "kind", kind) != kind:
            raise ValueError(f"{which_one} are of kind {known.kind!r}; method {technique.name!r} needs {kind!r}")
        if about.get("space", space) != space:
            raise ValueError(f"{which_one} are of space {about['space']!r}, the merge is in {space!r}")
