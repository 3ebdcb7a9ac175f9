"""Merging adapters: all that is equal for every method (alignment, spaces, scales, output rank, seeds, record)."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, UnsupportedKind, padded
from loraloom.modalities import ready_to_merge
from loraloom.ops.certificate import chained, note
from loraloom.ops.checks import (
    Weights,
    check_device,
    check_fit,
    check_gauge,
    check_knobs,
    check_linear,
    check_size,
    check_sizes,
    check_statistics,
    checked_space,
    checked_weights,
    which,
)
from loraloom.ops.extras import config_of, extras_of, one_scale
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.spaces import SPACES, Combine, Request
from loraloom.registry import Technique


def merge(  # noqa: PLR0913 - every option that a merge has
    adapters: Sequence[Adapter],
    method: str = "linear",
    weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    *,
    space: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    density: float | None = None,
    seed: int = 0,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    base: Mapping[str, Tensor] | None = None,
    device: str | None = None,
    same_base: bool = True,
    extras: str = "refuse",
    **knobs: Any,
) -> Adapter:
    """Merge adapters of one base model into one adapter; a module is computed when it is read, each time.

    To share out a ``budget`` every module is computed once more, at once, as is an ``energy`` of HiRA adapters.

    Spaces: what the method sees (docs/methods.md says which ones a method supports, and its own).

    - ``delta``: the updates ``scale * B @ A``. A linear method runs on the factors and is exact: the result has the sum
      of the ranks. Any other method sees dense updates, one module at a time, and its result goes back to factors by
      SVD, at the sum of the ranks but at most min(out, in).
    - ``core``: the updates in joint orthonormal bases, at most (sum of ranks) square. Lossless and small.
    - ``knots``: the right parts of the SVD of all updates side by side.
    - ``factors``: B and A by themselves, ``(sum w_i B_i)(sum w_i A_i)`` for the linear method. The result has the rank
      of the adapters and depends on the gauge: ``(B P, P^-1 A)`` is the same update as ``(B, A)`` but merges to
      another one. Each weight enters twice: one adapter of weight w becomes w^2 times its update, and a negative
      weight is refused. Adapters of equal scale keep it; otherwise sqrt(scale) goes into both factors.
    - ``units``: rank-one units, one a row, for methods that pair or cluster them. Depends on the gauge too.

    MokA adapters merge by ``linear`` and ``cat`` alone, at no chosen rank: in ``factors`` each A and the shared B are
    averaged, in ``delta`` each adapter's part of the rank attends by itself, so that it is the exact sum too.

    A module that an adapter lacks counts as zero; ``factors`` refuses it. An adapter of weight 0 takes no part: the
    updates are as without it, also by methods where one of small weight counts (``model_stock``, ``ctm``). A
    ``lora_bias`` is one more column of the update (times the scale) and is merged by the same method. One adapter of
    weight 1 is returned as it is, unless the method declares otherwise, a knob is given or the size of the result is
    asked for.

    Args:
        adapters: at least one, all of one kind.
        method: name of a merge method (``loraloom list methods``).
        weights: one finite number per adapter, or such a list for every module path; 1/k each by default.
        space: one of those above; by default the method's own.
        rank: cut each module to this rank by SVD.
        energy: cut each module to the least rank that keeps this share of its squared singular values, in (0, 1].
        budget: bytes of the result's factors, shared out by singular value (as :func:`loraloom.ops.compress.compress`).
        density: share of entries that the method keeps, in (0, 1], for those that take it.
        seed: of methods that draw; every module has its own generator made from (seed, module path).
        statistics: what some methods ask to know of each adapter, by module path (``loraloom measure``).
        base: weights of the base model by module path, out x in, for DoRA and HiRA: their whole effective updates are
            merged in ``delta``, to an ordinary LoRA.
        device: where to compute ("cuda"); by default where the factors are. The result is where the factors were.
        same_base: refuse adapters whose base models have different names (the last part of the path is compared).
        extras: trained biases and ``modules_to_save``, when several adapters hold some: ``refuse``, or ``average``
            them by weight over the adapters that hold them. Those of a single adapter are kept.
        knobs: further arguments of the method.

    Returns:
        A lazy adapter. The error certificate ``provenance["record"]`` fills as modules are read that were cut:
        ``error`` is ``{module: |asked - result| / |asked|}``, ``norm`` ``{module: |asked|}``, in Frobenius norms.

    Raises:
        AdapterMismatch: the adapters differ in kind, base model or sizes; for ``factors`` also in modules or ranks.
        UnsupportedKind: DoRA without ``base`` (magnitudes do not add), MokA under another method or space, HiRA under
            a method that looks at single entries of the delta, an initialisation that moved the base weights (PiSSA
            and its like, unless converted).
        UnknownName: no such method, space or option.
        ValueError: weights, size, density, statistics, knobs or a device that do not fit.

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
    checked = checked_weights(weights, adapters)
    check_fit(adapters, same_base)
    space = checked_space(technique, space, checked)
    check_size(rank, energy, budget)
    given = knobs if density is None else {"density": density, **knobs}
    check_knobs(technique, given)
    check_device(device)
    check_statistics(technique, len(adapters), space, statistics)
    later = energy is not None or budget is not None
    job = _Job(adapters, technique, given, checked, space, rank, later, seed, statistics, base, device)
    job.rehearse()
    asked = {"method": method, "weights": checked, "space": space, "rank": rank, "energy": energy, "budget": budget}
    provenance = {
        "operation": "merge",
        "arguments": asked | given | {"same_base": same_base, "extras": extras},
        "inputs": [dict(adapter.provenance) for adapter in adapters],
        "seed": seed,
        "record": job.record,
    }
    if job.untouched:
        return replace(adapters[0], provenance=provenance)
    plan = None
    if adapters[0].kind == "moka":
        ready, plan = ready_to_merge(adapters, checked, space)
        job = replace(job, adapters=ready)
    shapes = _aligned(job)
    modules = Modules(tuple(shapes), partial(_read, job, shapes), shapes.__getitem__, heavy=job.heavy)
    kept = space == "factors" and not job.cut and one_scale(adapters)
    config = config_of(adapters, shapes, kept=kept, as_lora=base is not None)
    if plan is not None:
        config["moka"] = plan
    merged = Adapter(config, modules, extras_of(adapters, job.weights_of(None), extras), provenance)
    return _shrunk(merged, energy, budget) if later else merged


@dataclass(frozen=True)
class _Job:
    """One merge, as asked for."""

    adapters: Sequence[Adapter]
    technique: Technique[..., Tensor]
    knobs: Mapping[str, Any]
    weights: Weights
    space: str
    rank: int | None
    later: bool  # whether an energy or a budget cuts the result afterwards
    seed: int
    statistics: Sequence[Mapping[str, Tensor]] | None
    base: Mapping[str, Tensor] | None
    device: str | None
    record: dict[str, Any] = field(default_factory=lambda: {"error": {}, "norm": {}})

    @property
    def linear(self) -> bool:
        return bool(self.technique.facts.get("linear"))

    @property
    def heavy(self) -> bool:
        """Whether matrices as large as weights are formed: updates, or Gram matrices."""
        dense = self.space == "delta" and (not self.linear or self.base is not None)
        return dense or (self.space != "factors" and self.statistics is not None)

    @property
    def cut(self) -> bool:
        """Whether the rank of the result was chosen, by the user or by the method, rather than come about."""
        return self.rank is not None or (self.technique.facts.get("rank") == "largest" and not self.later)

    @property
    def untouched(self) -> bool:
        """Whether the one adapter that there is comes out as it went in."""
        plain = self.rank is None and not self.later and self.base is None and not self.knobs
        return (
            plain
            and len(self.adapters) == 1
            and self.weights_of(None) == [1.0]
            and "single" not in self.technique.breaks
        )

    def weights_of(self, name: str | None) -> list[float]:
        """The weights of one module; of None, those of all modules if they are the same."""
        if not isinstance(self.weights, dict):
            return self.weights
        if name is not None:
            return self.weights[name]
        every = list(self.weights.values())
        return every[0] if all(each == every[0] for each in every) else []

    def seen(self, name: str) -> list[int]:
        """Which adapters a method sees of a module: one of weight 0 takes no part, unless no other has the module."""
        used = [at for at, weight in enumerate(self.weights_of(name)) if weight != 0]
        there = any(name in self.adapters[at].modules for at in used)
        return used if there and not self.linear else list(range(len(self.adapters)))

    def combine(self, name: str) -> Combine:
        """The method with its knobs, and its own generator for this module."""
        knobs = dict(self.knobs)
        if "generator" in inspect.signature(self.technique.function).parameters:
            knobs["generator"] = module_generator(self.seed, name)
        return partial(self.technique.function, **knobs)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Sizes of the merged module from those of its parts."""
        rank = SPACES[self.space].rank(shapes, self.linear)
        if own := self.knobs.get(self.technique.facts.get("size", "")):
            rank = min(own, rank)
        elif self.cut:
            rank = max(shape.rank for shape in shapes)
        return Shape(shapes[0].out, shapes[0].in_, self.rank or rank)

    def rehearse(self) -> None:
        """Refuse now what would be refused at the first module: the kind, and what the method finds wrong on zeros."""
        kind = self.adapters[0].kind
        lists = self.weights.values() if isinstance(self.weights, dict) else [self.weights]
        for each in dict.fromkeys(map(tuple, lists)):
            used = [weight for weight in each if weight != 0] or each
            self.combine("")(torch.zeros(len(used), 2, 2), torch.tensor(used))
        if self.base is not None and (kind not in ("dora", "hira") or self.space != "delta"):
            raise ValueError(f"base goes with DoRA or HiRA in space 'delta', got {kind} in space {self.space!r}")
        if self.untouched:
            return
        if not self.linear or self.cut or self.space not in ("factors", "delta"):
            how = "to a chosen rank" if self.linear and self.cut else f"by {self.technique.name} in {self.space}"
            check_gauge(self.adapters[0], "merge", f" {how}")
        for adapter in self.adapters if self.base is None and kind != "moka" else ():
            check_linear(adapter, "merge")
        if kind == "hira" and self.base is None and self.space != "factors" and not self.linear:
            raise UnsupportedKind(
                f"method {self.technique.name!r} looks at entries of the update, which HiRA multiplies by the base"
                " weights; use space='factors', or give base (--base)"
            )


def module_generator(seed: int, name: str) -> torch.Generator:
    """A generator for one module: a function of (seed, module path), so the order of reading does not matter.

    Example:
        >>> torch.equal(*(torch.rand(2, generator=module_generator(0, "layers.0.q")) for _ in range(2)))
        True
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _read(job: _Job, shapes: Mapping[str, Shape], name: str) -> Factors:
    """Merge one module; called each time that it is read from the result."""
    # Not .get(): it would take a KeyError in reading for a module that is not there, that is, for zero.
    seen = job.seen(name)
    held = [job.adapters[at].modules for at in seen]
    parts = [modules[name] if name in modules else None for modules in held]  # noqa: SIM401
    present = [part for part in parts if part is not None]
    layouts = [(part.kernel, part.embedding) for part in present]
    if any(layout != layouts[0] for layout in layouts):
        raise AdapterMismatch(f"{name}: different kinds of layer (kernel, embedding): {layouts}")
    home = present[0].B.device
    if job.device is not None:
        parts = [None if part is None else part.to(job.device) for part in parts]
    request = Request(
        name=name,
        combine=job.combine(name),
        weights=[job.weights_of(name)[at] for at in seen],
        linear=job.linear,
        by_rows=bool(job.technique.facts.get("by_rows")),
        rank=shapes[name].rank,
        cut=job.cut,
        keep_scale=one_scale(job.adapters),
        bias=any(adapter.config.get("lora_bias") for adapter in job.adapters),
        statistics=_statistics(job, name, seen),
        dense=None if job.base is None else partial(effective, _weight(job, name), job.adapters[0].kind),
    )
    merged, error = SPACES[job.space].carry(parts, request)
    if error is not None:
        note(job.record, name, error, merged)
    if merged.rank < request.rank:
        merged = replace(merged, B=padded(merged.B, request.rank), A=padded(merged.A.T, request.rank).T)
    return merged.to(home) if job.device is not None else merged


def _statistics(job: _Job, name: str, seen: Sequence[int]) -> list[Tensor] | None:
    if job.statistics is None:
        return None
    for at in seen:
        if name not in job.statistics[at]:
            raise ValueError(f"{name}: the statistics of {which(at, job.adapters)} do not have this module")
    return [job.statistics[at][name] for at in seen]


def _weight(job: _Job, name: str) -> Tensor:
    base = job.base or {}
    if name not in base:
        raise AdapterMismatch(f"{name}: the base model has no such weight")
    return base[name] if job.device is None else base[name].to(job.device)


def effective(weight: Tensor, kind: str, part: Factors) -> Tensor:
    """What a DoRA or HiRA module adds to its base weight, out x in: ``m (W + D) / |W + D| - W`` or ``W * D``.

    The norm is that of a row (PEFT; the columns of Liu et al. 2024, equation 5, for the weight transposed).

    Raises:
        AdapterMismatch: weight, update and magnitude differ in size.

    Example:
        >>> part = Factors(B=torch.tensor([[1.0]]), A=torch.tensor([[1.0, 2.0]]))
        >>> effective(torch.tensor([[3.0, 2.0]]), "hira", part)
        tensor([[3., 4.]])
    """
    if weight.shape != part.shape[:2]:
        raise AdapterMismatch(f"the base weight is {tuple(weight.shape)}, the update {part.shape[:2]}")
    working = torch.promote_types(part.dtype, torch.float32)
    weight, delta = weight.to(working), part.scale * (part.B.to(working) @ part.A.to(working))
    if kind == "hira":
        return weight * delta
    if part.magnitude is None or part.magnitude.numel() != len(weight):
        raise AdapterMismatch(f"a DoRA module needs a magnitude for each of its {len(weight)} rows")
    moved = weight + delta
    return part.magnitude.to(working)[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight


def _shrunk(merged: Adapter, energy: float | None, budget: int | str | None) -> Adapter:
    """The merge, cut to an energy or a budget; its record tells the error of both steps against what was asked for."""
    from loraloom.ops.compress import compress

    first: dict[str, Any] = merged.provenance["record"]
    small = compress(merged, energy=energy, budget=budget)
    second, record = small.provenance["record"], dict(small.provenance["record"])
    record.update(error={}, norm={})

    def enter(name: str) -> None:
        record["error"][name], record["norm"][name] = chained(first, second, name)

    def read(name: str) -> Factors:
        factors = small.modules[name]
        enter(name)
        return factors

    for name in second["error"]:  # what the budget dropped
        enter(name)

    modules = small.derived(tuple(small.modules), read, small.shape)
    return replace(small, modules=modules, provenance={**merged.provenance, "record": record})


def _aligned(job: _Job) -> dict[str, Shape]:
    """The modules of the result with their sizes, in the order of the first adapter that has them."""
    found: dict[str, Shape] = {}
    for name in dict.fromkeys(name for adapter in job.adapters for name in adapter.modules):
        shapes = {at: adapter.shape(name) for at, adapter in enumerate(job.adapters) if name in adapter.modules}
        check_sizes(name, shapes, job.adapters, job.space)
        found[name] = job.shape([shapes[at] for at in job.seen(name) if at in shapes])
    if not found:
        raise ValueError("there is nothing to merge: the adapters have no modules")
    if job.adapters[0].kind == "hira" and job.base is None:  # PEFT loads them at one rank alone
        most = max(shape.rank for shape in found.values())
        return {name: shape._replace(rank=most) for name, shape in found.items()}
    return found
