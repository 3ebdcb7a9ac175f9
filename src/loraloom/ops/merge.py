"""Merging adapters: all that is equal for every method (alignment, spaces, scales, output rank, seeds, record)."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, UnsupportedKind
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.spaces import SPACES, Combine, Request
from loraloom.registry import Technique, UnknownName


def merge(
    adapters: Sequence[Adapter],
    method: str = "linear",
    weights: Sequence[float] | None = None,
    *,
    space: str | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    same_base: bool = True,
    extras: str = "refuse",
    **knobs: Any,
) -> Adapter:
    """Merge adapters of one base model into one adapter; nothing is computed before a module of it is read.

    Spaces: what the method sees.

    - ``delta``: the updates ``scale * B @ A``; a module that an adapter lacks counts as zero. A linear method runs on
      the factors and is exact: the result has the sum of the ranks. Any other method sees dense updates, one module at
      a time, and its result goes back to factors by SVD, at the sum of the ranks but at most min(out, in).
    - ``factors``: B and A by themselves, ``(sum w_i B_i)(sum w_i A_i)`` for the linear method. The result has the rank
      of the adapters and depends on the gauge: ``(B P, P^-1 A)`` is the same update as ``(B, A)`` but merges to
      another one. Each weight enters twice: one adapter of weight w becomes w^2 times its update, and a negative
      weight is refused. Adapters of equal scale keep it; otherwise sqrt(scale) goes into both factors.

    A ``lora_bias`` is one more column of the update (times the scale) and is merged by the same method.
    One adapter of weight 1 is returned as it is, unless the method declares otherwise or a rank is asked for.

    Args:
        adapters: at least one, all of one kind.
        method: name of a merge method (``loraloom list methods``).
        weights: one finite number per adapter; 1/k each by default.
        space: ``delta`` or ``factors``; by default the method's own.
        rank: cut each module to this rank by SVD; the relative error of each module is recorded.
        density: share of entries that the method keeps, in (0, 1], for those that take it.
        seed: of methods that draw; every module has its own generator made from (seed, module path).
        same_base: refuse adapters whose base models have different names (the last part of the path is compared).
        extras: trained biases and ``modules_to_save``, when several adapters hold some: ``refuse``, or ``average``
            them by weight over the adapters that hold them. Those of a single adapter are kept.
        knobs: further arguments of the method.

    Returns:
        A lazy adapter. ``provenance["record"]["error"]`` fills with ``{module: relative error}`` as modules are read
        that were cut.

    Raises:
        AdapterMismatch: the adapters differ in kind, base model or sizes; for ``factors`` also in modules or ranks.
        UnsupportedKind: DoRA (magnitudes do not add), HiRA under a method that looks at single entries of the delta,
            an initialisation that moved the base weights (PiSSA and its like, unless converted).
        UnknownName: no such method, space or option.
        ValueError: weights, rank, density or knobs that do not fit.

    Example:
        >>> one = Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))
        >>> a = Adapter({"r": 1, "lora_alpha": 1}, {"fc": one})
        >>> b = Adapter({"r": 1, "lora_alpha": 1}, {"fc": one.scaled(3.0)})
        >>> merged = merge([a, b])
        >>> merged.modules["fc"].delta()
        tensor([[2., 2.],
                [2., 2.]])
        >>> merged.shape("fc").rank
        2
    """
    technique = merge_methods[method]
    weights = _checked_weights(weights, adapters)
    _check_fit(adapters, same_base)
    space = _checked_space(technique, space, weights)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    given = knobs if density is None else {"density": density, **knobs}
    job = _Job(adapters, technique, given, weights, space, rank, seed)
    _check_knobs(job)
    errors: dict[str, float] = {}
    provenance = {
        "operation": "merge",
        "arguments": {"method": method, "weights": weights, "space": space, "rank": rank, **given}
        | {"same_base": same_base, "extras": extras},
        "inputs": [dict(adapter.provenance) for adapter in adapters],
        "seed": seed,
        "record": {"error": errors},
    }
    if len(adapters) == 1 and weights == [1.0] and rank is None and "single" not in technique.breaks:
        return replace(adapters[0], provenance=provenance)
    for adapter in adapters:
        check_linear(adapter, "merge")
    if adapters[0].kind == "hira" and space != "factors" and not job.linear:
        raise UnsupportedKind(
            f"method {method!r} looks at entries of the update, which HiRA multiplies by the base weights;"
            " use space='factors'"
        )
    shapes = _aligned(job)
    modules = Modules(tuple(shapes), partial(_read, job, shapes, errors), shapes.__getitem__)
    kept = space == "factors" and rank is None and _one_scale(adapters)
    return Adapter(_config(adapters, shapes, kept=kept), modules, _extras(adapters, weights, extras), provenance)


def check_linear(adapter: Adapter, verb: str) -> None:
    """Refuse an adapter whose updates do not add: DoRA, unknown kinds, and those of a base that PEFT moves on loading.

    Raises:
        UnsupportedKind: says which and why.
    """
    if adapter.kind == "dora":
        raise UnsupportedKind(f"cannot {verb} DoRA adapters: their magnitudes are not linear in the update")
    if adapter.kind not in ("lora", "hira"):
        raise UnsupportedKind(f"cannot {verb} adapters of kind {adapter.kind!r}; allowed: lora, hira")
    start = str(adapter.config.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "corda", "olora", "loftq", "lora_ga")):
        raise UnsupportedKind(
            f"cannot {verb} an adapter with init_lora_weights={start!r}: its update is relative to base weights that"
            " this start has moved; convert it first (PEFT: path_initial_model_for_weight_conversion)"
        )


@dataclass(frozen=True)
class _Job:
    """One merge, as asked for."""

    adapters: Sequence[Adapter]
    technique: Technique[..., Tensor]
    knobs: Mapping[str, Any]
    weights: list[float]
    space: str
    rank: int | None
    seed: int

    @property
    def linear(self) -> bool:
        return bool(self.technique.facts.get("linear"))

    def combine(self, name: str) -> Combine:
        """The method with its knobs, and its own generator for this module."""
        knobs = dict(self.knobs)
        if "generator" in inspect.signature(self.technique.function).parameters:
            knobs["generator"] = module_generator(self.seed, name)
        return partial(self.technique.function, **knobs)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Sizes of the merged module from those of its parts."""
        rank = self.rank or SPACES[self.space].rank(shapes, self.linear)
        return Shape(shapes[0].out, shapes[0].in_, rank)


def module_generator(seed: int, name: str) -> torch.Generator:
    """A generator for one module: a function of (seed, module path), so the order of reading does not matter.

    Example:
        >>> torch.equal(*(torch.rand(2, generator=module_generator(0, "layers.0.q")) for _ in range(2)))
        True
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _read(job: _Job, shapes: Mapping[str, Shape], errors: dict[str, float], name: str) -> Factors:
    """Merge one module; called each time that it is read from the result."""
    # Not .get(): it would take a KeyError in reading for a module that is not there, that is, for zero.
    parts = [adapter.modules[name] if name in adapter.modules else None for adapter in job.adapters]  # noqa: SIM401
    layouts = [(part.kernel, part.embedding) for part in parts if part is not None]
    if any(layout != layouts[0] for layout in layouts):
        raise AdapterMismatch(f"{name}: different kinds of layer (kernel, embedding): {layouts}")
    request = Request(
        name=name,
        combine=job.combine(name),
        weights=job.weights,
        linear=job.linear,
        rank=shapes[name].rank,
        cut=job.rank is not None,
        keep_scale=_one_scale(job.adapters),
        bias=any(adapter.config.get("lora_bias") for adapter in job.adapters),
    )
    merged, error = SPACES[job.space].carry(parts, request)
    if error is not None:
        errors[name] = error
    return merged


# ---- checks and alignment, all before anything is read ----


def _checked_weights(weights: Sequence[float] | None, adapters: Sequence[Adapter]) -> list[float]:
    if not adapters:
        raise ValueError("there is nothing to merge: at least one adapter is needed")
    if weights is None:
        return [1.0 / len(adapters)] * len(adapters)
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters; one weight per adapter is needed")
    checked = [float(weight) for weight in weights]
    for at, weight in enumerate(checked):
        if not math.isfinite(weight):
            raise ValueError(f"weight {at + 1} of {len(checked)} is {weight}; weights must be finite numbers")
    return checked


def _check_fit(adapters: Sequence[Adapter], same_base: bool) -> None:
    kinds = [adapter.kind for adapter in adapters]
    if len(set(kinds)) > 1:
        raise AdapterMismatch(f"adapters of different kinds do not merge: {', '.join(kinds)}")
    named = [(_which(at, adapters), adapter.base) for at, adapter in enumerate(adapters) if adapter.base]
    for who, base in named if same_base else ():
        if _last(base) != _last(named[0][1]):
            raise AdapterMismatch(
                f"{named[0][0]} is of base model {named[0][1]!r}, {who} of {base!r};"
                " if they fit all the same, say same_base=False (--allow-different-bases)"
            )


def _which(at: int, adapters: Sequence[Adapter]) -> str:
    return f"adapter {at + 1} of {len(adapters)}"


def _last(base: str) -> str:
    """The last part of a model's path: the same model is found under many."""
    return base.replace("\\", "/").rstrip("/").split("/")[-1]


def _checked_space(technique: Technique, space: str | None, weights: Sequence[float]) -> str:
    supported = tuple(technique.facts.get("spaces", SPACES))
    chosen = technique.facts.get("space", "delta") if space is None else space
    if chosen not in SPACES:
        raise UnknownName("space", chosen, list(SPACES))
    if chosen not in supported:
        raise ValueError(f"method {technique.name!r} has no space {chosen!r}; allowed: {', '.join(supported)}")
    if chosen == "factors" and min(weights) < 0:
        raise ValueError(
            f"weight {min(weights)}: in space 'factors' a weight enters B and A both, so that a negative one takes"
            " nothing away; use space='delta'"
        )
    return chosen


def _check_knobs(job: _Job) -> None:
    parameters = inspect.signature(job.technique.function).parameters.values()
    takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "generator"]
    for knob in job.knobs:
        if knob not in takes:
            raise ValueError(
                f"method {job.technique.name!r} takes no {knob!r}; it takes: {', '.join(takes) or 'no such arguments'}"
            )
    if "density" in job.knobs and not 0 < job.knobs["density"] <= 1:
        raise ValueError(f"density must be in (0, 1], got {job.knobs['density']}")
    # On zeros a method has nothing to do, but it refuses now what it would refuse at the first module.
    job.combine("")(torch.zeros(len(job.weights), 2, 2), torch.tensor(job.weights))


def _aligned(job: _Job) -> dict[str, Shape]:
    """The modules of the result with their sizes, in the order of the first adapter that has them."""
    found: dict[str, Shape] = {}
    for name in dict.fromkeys(name for adapter in job.adapters for name in adapter.modules):
        shapes = {at: adapter.shape(name) for at, adapter in enumerate(job.adapters) if name in adapter.modules}
        _check_sizes(name, shapes, job)
        found[name] = job.shape(list(shapes.values()))
    if not found:
        raise ValueError("there is nothing to merge: the adapters have no modules")
    return found


def _check_sizes(name: str, shapes: Mapping[int, Shape], job: _Job) -> None:
    start, first = next(iter(shapes.items()))
    who = _which(start, job.adapters)
    for at, shape in shapes.items():
        other = _which(at, job.adapters)
        if shape[:2] != first[:2]:
            raise AdapterMismatch(f"{name}: {who} is {first.out} x {first.in_}, {other} is {shape.out} x {shape.in_}")
        if SPACES[job.space].same and shape.rank != first.rank:
            raise AdapterMismatch(
                f"{name}: {who} has rank {first.rank}, {other} has rank {shape.rank}; space {job.space!r} needs equal"
                " ranks, use space='delta'"
            )
    if SPACES[job.space].same and len(shapes) < len(job.adapters):
        lacking = next(at for at in range(len(job.adapters)) if at not in shapes)
        raise AdapterMismatch(
            f"{name}: {_which(lacking, job.adapters)} has no such module; space {job.space!r} needs the same modules in"
            " all, use space='delta'"
        )


# ---- what the folder says besides the factors ----


def _one_scale(adapters: Sequence[Adapter]) -> bool:
    """Whether all configurations ask for the same scale of every module."""
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    asked = [[adapter.config.get(key) or None for key in keys] for adapter in adapters]
    return all(scales == asked[0] for scales in asked)


def _config(adapters: Sequence[Adapter], shapes: Mapping[str, Shape], *, kept: bool) -> dict[str, Any]:
    """The first adapter's configuration, with what the others add and, unless ``kept``, ranks and scales made plain."""
    config = {**adapters[0].config, "inference_mode": True}
    saved = list(dict.fromkeys(name for a in adapters for name in a.config.get("modules_to_save") or ()))
    if saved:
        config["modules_to_save"] = saved
    for key, off in (("bias", "none"), ("lora_bias", False)):
        asked = [adapter.config[key] for adapter in adapters if adapter.config.get(key, off) != off]
        if asked:
            config[key] = asked[0]
    return config if kept else {**config, **_plain(adapters[0].kind, shapes)}


def _plain(kind: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The entries that say: these ranks, and a scale of 1 everywhere."""
    usual = Counter(shape.rank for shape in shapes.values()).most_common(1)[0][0]
    # PEFT reads the keys as regular expressions for the end of a path; "^" makes one name mean one module.
    ranks = {f"^{re.escape(name)}": shape.rank for name, shape in shapes.items() if shape.rank != usual}
    if kind == "hira":
        return {"r": usual, "rank_pattern": ranks, "init_weights": True}
    scales = {"lora_alpha": usual, "alpha_pattern": dict(ranks), "use_rslora": False}
    return {"r": usual, "rank_pattern": ranks, **scales, "init_lora_weights": True}


def _extras(adapters: Sequence[Adapter], weights: Sequence[float], how: str) -> Mapping[str, Tensor]:
    if how not in ("refuse", "average"):
        raise UnknownName("extras", how, ["refuse", "average"])
    holders = [(adapter.extras, weight) for adapter, weight in zip(adapters, weights, strict=True) if adapter.extras]
    if len(holders) <= 1:
        return holders[0][0] if holders else {}
    names = list(dict.fromkeys(name for extras, _ in holders for name in extras))
    if how == "refuse":
        raise AdapterMismatch(
            f"{len(holders)} of {len(adapters)} adapters hold whole tensors ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}), which are not updates; extras='average' averages them"
        )
    return {name: _average(name, [(e[name], weight) for e, weight in holders if name in e]) for name in names}


def _average(name: str, held: Sequence[tuple[Tensor, float]]) -> Tensor:
    tensors = [tensor for tensor, _ in held]
    if any(tensor.shape != tensors[0].shape or not tensor.is_floating_point() for tensor in tensors):
        kinds = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise AdapterMismatch(f"{name}: tensors that do not average: {kinds}")
    total = sum(weight for _, weight in held)
    if total == 0:
        raise ValueError(f"{name}: the weights of the adapters that hold it add up to 0, so it has no average")
    stored = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    mean = torch.zeros_like(tensors[0], dtype=torch.promote_types(stored, torch.float32))
    for tensor, weight in held:
        mean += (weight / total) * tensor.to(mean.dtype)
    return mean.to(stored)
