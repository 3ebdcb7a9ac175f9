"""Merging adapters: all that is equal for every method (alignment, spaces, scales, output rank, seeds, record)."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, UnsupportedKind, concat, truncate
from loraloom.ops.merge_methods import merge_methods
from loraloom.registry import Technique, UnknownName

Combine = Callable[[Tensor, Tensor], Tensor]  # a method with its knobs bound: (stack, weights) -> tensor
Parts = Sequence[Factors | None]  # one module of every adapter, None where an adapter has no such module


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
    - ``factors``: B and A by themselves, ``(sum w_i B_i)(sum w_i A_i)`` for the linear method. The result depends on the
      gauge: ``(B P, P^-1 A)`` is the same update as ``(B, A)`` but merges to another one. It has the adapters'
      rank; each weight enters twice, so one adapter of weight w becomes w^2 times its update. Adapters of equal scale
      keep it; otherwise sqrt(scale) goes into both factors.

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
    given = knobs if density is None else {"density": density, **knobs}
    space = _checked_space(technique, space)
    _check_knobs(technique, given, weights)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    record: dict[str, Any] = {"error": {}}
    arguments = {"method": method, "weights": weights, "space": space, "rank": rank, **given}
    provenance = {
        "operation": "merge",
        "arguments": {**arguments, "same_base": same_base, "extras": extras},
        "inputs": [dict(adapter.provenance) for adapter in adapters],
        "seed": seed,
        "record": record,
    }
    if len(adapters) == 1 and weights == [1.0] and rank is None and "single" not in technique.breaks:
        return replace(adapters[0], provenance=provenance)
    for adapter in adapters:
        check_linear(adapter, "merge")
    if adapters[0].kind == "hira" and space != "factors" and not technique.facts.get("linear"):
        raise UnsupportedKind(
            f"method {method!r} looks at entries of the update, which for HiRA needs the base weights; use space='factors'"
        )
    job = _Job(adapters, technique, given, weights, space, rank, seed, record)
    shapes = _aligned(adapters, job)
    merged = Modules(tuple(shapes), partial(_read, job), shapes.__getitem__)
    config = _config(adapters, shapes, kept=space == "factors" and rank is None and _one_scale(adapters))
    return Adapter(config, merged, _extras(adapters, weights, extras), provenance)


def check_linear(adapter: Adapter, verb: str) -> None:
    """Refuse an adapter whose updates do not add: DoRA, unknown kinds, and those of a base that PEFT moves on loading.

    Raises:
        UnsupportedKind: says which and why.
    """
    if adapter.kind == "dora":
        raise UnsupportedKind(f"cannot {verb} DoRA adapters: the magnitude of each output is not linear in the update")
    if adapter.kind not in ("lora", "hira"):
        raise UnsupportedKind(f"cannot {verb} adapters of kind {adapter.kind!r}; allowed: lora, hira")
    start = str(adapter.config.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "corda", "olora", "loftq")):
        raise UnsupportedKind(
            f"cannot {verb} an adapter with init_lora_weights={start!r}: its update is relative to base weights that the"
            " start has changed; convert it first (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))"
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
    parts = [adapter.modules.get(name) for adapter in job.adapters]
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


# ---- checks and alignment, all before anything is read ----------------------------------------------------------------


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


def _which(at: int, adapters: Sequence[Adapter]) -> str:
    return f"adapter {at + 1} of {len(adapters)}"


def _check_fit(adapters: Sequence[Adapter], same_base: bool) -> None:
    kinds = [adapter.kind for adapter in adapters]
    if len(set(kinds)) > 1:
        raise AdapterMismatch(f"adapters of different kinds do not merge: {', '.join(kinds)}")
    named = [(at, adapter.base.rstrip("/\\")) for at, adapter in enumerate(adapters) if adapter.base]
    for at, base in named:
        if same_base and base.replace("\\", "/").split("/")[-1] != named[0][1].replace("\\", "/").split("/")[-1]:
            raise AdapterMismatch(
                f"{_which(named[0][0], adapters)} is of base model {named[0][1]!r}, {_which(at, adapters)} of {base!r};"
                " if they are the same, say same_base=False (--allow-different-bases)"
            )


def _checked_space(technique: Technique, space: str | None) -> str:
    supported = tuple(technique.facts.get("spaces", SPACES))
    chosen = technique.facts.get("space", "delta") if space is None else space
    if chosen not in SPACES:
        raise UnknownName("space", chosen, list(SPACES))
    if chosen not in supported:
        raise ValueError(f"method {technique.name!r} has no space {chosen!r}; allowed: {', '.join(supported)}")
    return chosen


def _check_knobs(technique: Technique, given: Mapping[str, Any], weights: list[float]) -> None:
    parameters = inspect.signature(technique.function).parameters.values()
    takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "generator"]
    for knob in given:
        if knob not in takes:
            raise ValueError(f"method {technique.name!r} takes no {knob!r}; it takes: {', '.join(takes) or 'no knobs'}")
    if "density" in given and not 0 < given["density"] <= 1:
        raise ValueError(f"density must be in (0, 1], got {given['density']}")
    # On zeros a method finds nothing to do, but refuses knobs and numbers of adapters that it cannot serve, now.
    technique.function(torch.zeros(len(weights), 2, 2), torch.tensor(weights), **given)


def _joint_rank(shapes: Sequence[Shape], job: _Job) -> int:
    if job.rank is not None:
        return job.rank
    if job.space == "factors":
        return shapes[0].rank
    total = sum(shape.rank for shape in shapes)
    return total if job.technique.facts.get("linear") else min(total, *shapes[0][:2])


def _aligned(adapters: Sequence[Adapter], job: _Job) -> dict[str, Shape]:
    """The modules of the result with their sizes, in the order of the first adapter that has them."""
    if job.space == "factors" and min(job.weights) < 0:
        raise ValueError(
            f"weights {job.weights}: in space 'factors' a weight enters B and A both, so a negative one takes nothing"
            " away; use space='delta'"
        )
    found: dict[str, Shape] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        shapes = {at: adapter.shape(name) for at, adapter in enumerate(adapters) if name in adapter.modules}
        start, first = next(iter(shapes.items()))
        for at, shape in shapes.items():
            if shape[:2] != first[:2]:
                raise AdapterMismatch(
                    f"{name}: {_which(start, adapters)} is {first.out} x {first.in_},"
                    f" {_which(at, adapters)} is {shape.out} x {shape.in_}"
                )
            if job.space == "factors" and shape.rank != first.rank:
                raise AdapterMismatch(
                    f"{name}: {_which(start, adapters)} has rank {first.rank}, {_which(at, adapters)} has rank"
                    f" {shape.rank}; factors of different ranks do not add, use space='delta'"
                )
        if job.space == "factors" and len(shapes) < len(adapters):
            lacking = next(at for at in range(len(adapters)) if at not in shapes)
            raise AdapterMismatch(
                f"{name}: {_which(lacking, adapters)} has no such module; space 'factors' needs the same modules in all,"
                " use space='delta'"
            )
        found[name] = Shape(first.out, first.in_, _joint_rank(list(shapes.values()), job))
    return found


# ---- what the folder says besides the factors --------------------------------------------------------------------------


def _one_scale(adapters: Sequence[Adapter]) -> bool:
    """Whether all configurations ask for the same scale of every module."""
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return all(all(a.config.get(key) == adapters[0].config.get(key) for key in keys) for a in adapters[1:])


def _config(adapters: Sequence[Adapter], shapes: Mapping[str, Shape], *, kept: bool) -> dict[str, Any]:
    config = {**adapters[0].config, "inference_mode": True}
    for adapter in adapters:
        saved = [m for m in adapter.config.get("modules_to_save") or () if m not in (config.get("modules_to_save") or ())]
        if saved:
            config["modules_to_save"] = [*(config.get("modules_to_save") or ()), *saved]
        for key, nothing in (("bias", "none"), ("lora_bias", False)):
            if config.get(key, nothing) == nothing and adapter.config.get(key, nothing) != nothing:
                config[key] = adapter.config[key]
    return config if kept else {**config, **_baked_config(adapters[0].kind, shapes)}


def _baked_config(kind: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The entries that say: these ranks, and a scale of 1 everywhere."""
    ranks = Counter(shape.rank for shape in shapes.values())
    usual = ranks.most_common(1)[0][0] if ranks else 1
    # PEFT reads the keys as regular expressions for the end of a path; "^" makes one name mean one module.
    others = {f"^{name}": shape.rank for name, shape in shapes.items() if shape.rank != usual}
    if kind == "hira":
        return {"r": usual, "rank_pattern": others, "init_weights": True}
    scales = {"lora_alpha": usual, "alpha_pattern": dict(others), "use_rslora": False}
    return {"r": usual, "rank_pattern": others, **scales, "init_lora_weights": True}


def _extras(adapters: Sequence[Adapter], weights: Sequence[float], how: str) -> Mapping[str, Tensor]:
    if how not in ("refuse", "average"):
        raise UnknownName("extras", how, ["refuse", "average"])
    holders = [at for at, adapter in enumerate(adapters) if adapter.extras]
    if len(holders) <= 1:
        return adapters[holders[0]].extras if holders else {}
    names = list(dict.fromkeys(name for at in holders for name in adapters[at].extras))
    if how == "refuse":
        raise AdapterMismatch(
            f"{len(holders)} of {len(adapters)} adapters hold whole tensors ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}), which are not updates; extras='average' averages them"
        )
    return {name: _average(name, adapters, [at for at in holders if name in adapters[at].extras], weights) for name in names}


def _average(name: str, adapters: Sequence[Adapter], holders: Sequence[int], weights: Sequence[float]) -> Tensor:
    tensors = [adapters[at].extras[name] for at in holders]
    if any(tensor.shape != tensors[0].shape or not tensor.is_floating_point() for tensor in tensors):
        kinds = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors]
        raise AdapterMismatch(f"{name}: tensors that do not average: {', '.join(kinds)}")
    total = sum(weights[at] for at in holders)
    if total == 0:
        raise ValueError(f"{name}: the weights of the adapters that hold it add up to 0, so it has no average")
    stored = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    working = torch.promote_types(stored, torch.float32)
    return sum(
        (weights[at] / total * tensor.to(working) for at, tensor in zip(holders, tensors, strict=True)),
        start=torch.zeros_like(tensors[0], dtype=working),
    ).to(stored)
