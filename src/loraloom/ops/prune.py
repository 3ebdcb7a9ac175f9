"""Pruning an adapter: whole layers or projections (structured), or single entries by magnitude (unstructured)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, Factors, Modules, Shape, UnsupportedKind
from loraloom.ops.merge import check_linear, module_generator
from loraloom.ops.spaces import refactor
from loraloom.registry import UnknownName
from loraloom.strategies.units import group, role, tower

_INFINITE = 0x7F80  # the upper half of the bit pattern of float32's infinity; NaN lies above
KEEPS = ("every-other", "low", "middle", "high")
SPACES = ("factors", "delta")


def prune(
    adapter: Adapter,
    *,
    keep: str | None = None,
    modules: str | Sequence[str] | None = None,
    density: float | None = None,
    space: str = "factors",
    by: str = "magnitude",
    rank: int | None = None,
    seed: int = 0,
) -> Adapter:
    """Prune an adapter; nothing is computed before a module of the result is read.

    Structured, ``keep`` and ``modules`` (together: what both keep); the other modules leave the adapter. The choices of
    CoTo's pruning experiments (arXiv 2506.05713):

    - ``keep="every-other"``: the 1st, 3rd, 5th ... of the layers that the adapter has;
    - ``keep="low"``, ``"middle"``, ``"high"``: a third of them, from the input up (of 10 layers: 3, 4, 3);
    - ``keep="0,2,5-7"``: layers by the number in their path (where paths hold two numbers, as in Swin, by their
      place). Each tower (encoder and decoder, text and vision) is pruned by itself. A module that is in no numbered
      layer (a head, an embedding) stays;
    - ``modules="q_proj,v_proj"``: projections by their name in the layer (``self_attn.q_proj``) or its last part.

    Unstructured, ``density``: exactly ``round(density * n)`` of the adapter's n entries stay, the largest ones over all
    modules together, the rest is set to 0; of equal entries the first stay (in the order of the modules, B before A, by
    rows). Biases, magnitudes and whole tensors are left alone.

    - ``space="factors"``: entries of B and A as they are stored, without scale;
    - ``space="delta"``: entries of the dense updates, one module at a time. What is left has a higher rank and goes
      back to factors by SVD, at ``rank`` or the module's own rank: the saved update is the best one of that rank, not
      itself sparse. ``provenance["record"]["error"]`` fills with the relative errors as modules are read.

    The threshold takes two readings of all modules, by histogram of the bit patterns, and holds only the few entries
    next to it; it is found when the first module is read. Entries are compared as float32.

    Args:
        adapter: of any kind for whole modules and for ``factors``; ``delta`` needs LoRA.
        keep: which layers stay.
        modules: which projections stay, a list or a string with commas.
        density: share of entries kept, in (0, 1]; 1 keeps the adapter as it is.
        space: ``factors`` or ``delta``, with ``density``.
        by: ``magnitude``, or ``random`` as the baseline, with ``density``.
        rank: of the result, with ``space="delta"``.
        seed: of ``by="random"``.

    Raises:
        UnknownName: no such projection, choice, space or score.
        ValueError: none, or both, of structured and unstructured are asked for; nothing would be kept; density is
            outside (0, 1]; an entry is not finite (when read).
        UnsupportedKind: ``delta`` on DoRA or HiRA; ``density`` on a start that moves the base weights (PiSSA).

    Example:
        >>> one = Factors(B=torch.tensor([[1.0], [4.0]]), A=torch.tensor([[2.0, 3.0]]))
        >>> a = Adapter({"r": 1}, {f"layers.{n}.{p}": one for n in range(4) for p in ("q", "v")})
        >>> list(prune(a, keep="every-other", modules="q").modules)
        ['layers.0.q', 'layers.2.q']
        >>> prune(a, density=0.5).modules["layers.3.v"].delta()
        tensor([[ 0.,  0.],
                [ 0., 12.]])
    """
    arguments = {"keep": keep, "modules": modules, "density": density, "space": space, "by": by, "rank": rank}
    record: dict[str, Any] = {}
    provenance = {
        "operation": "prune",
        "arguments": {key: value for key, value in arguments.items() if value is not None},
        "inputs": [dict(adapter.provenance)],
        "seed": seed,
        "record": record,
    }
    if (density is None) == (keep is None and modules is None):
        raise ValueError("prune takes either keep and/or modules (whole modules), or density (single entries)")
    config = {**adapter.config, "inference_mode": True}
    if density is None:
        names = _chosen(adapter, keep, modules)
        record.update(modules=len(names), modules_before=len(adapter.modules))
        kept = Modules(names, adapter.modules.__getitem__, adapter.shape)
        return replace(adapter, config=config, modules=kept, provenance=provenance)
    cut = _Entries(adapter, density, space, by, rank, seed, record)
    _check(cut)
    if density == 1 and rank is None:
        return replace(adapter, provenance=provenance)
    record.update(entries=cut.total, entries_kept=cut.kept, kept={})
    shape = adapter.shape if space == "factors" else cut.shape
    pruned = Modules(tuple(adapter.modules), cut.read, shape)
    return replace(adapter, config=config, modules=pruned, provenance=provenance)


# ---- structured ----


def _chosen(adapter: Adapter, keep: str | None, modules: str | Sequence[str] | None) -> list[str]:
    names = list(adapter.modules)
    if not names:
        raise ValueError("the adapter has no modules to prune")
    layers = set(names) if keep is None else _by_layer(names, keep)
    projections = set(names) if modules is None else _by_projection(names, modules)
    chosen = [name for name in names if name in layers and name in projections]
    if not chosen:
        asked = ", ".join(f"{k}={v!r}" for k, v in (("keep", keep), ("modules", modules)) if v is not None)
        raise ValueError(f"{asked} keeps none of the {len(names)} modules")
    return chosen


def _by_layer(names: Sequence[str], keep: str) -> set[str]:
    """The modules of the layers that stay, and those that are in no numbered layer."""
    towers: dict[str, list[tuple[int, tuple[str, ...]]]] = {}  # layers with their numbers, in natural order
    kept: set[str] = set()
    units = group(names, "layer")
    for unit, members in units.items():
        numbers = [int(part) for part in unit.split(".") if part.isdecimal()]
        if not numbers:
            kept.update(members)
            continue
        layers = towers.setdefault(tower(unit), [])
        layers.append((numbers[0] if len(numbers) == 1 else len(layers), members))
    if not towers:
        raise ValueError(f"keep={keep!r}: none of the {len(names)} modules is in a numbered layer")
    if keep in KEEPS:
        picked = [members for layers in towers.values() for _, members in _picked(layers, keep)]
        if not picked:
            most = max(len(layers) for layers in towers.values())
            raise ValueError(f"keep={keep!r} keeps no layer of {most}")
    else:
        numbers_there = {number for layers in towers.values() for number, _ in layers}
        wanted = _numbers(keep, numbers_there)
        picked = [members for layers in towers.values() for number, members in layers if number in wanted]
    return kept.union(*picked)


def _picked(layers: list, keep: str) -> list:
    if keep == "every-other":
        return layers[::2]
    third = KEEPS.index(keep) - 1
    start, stop = ((at * len(layers) + 1) // 3 for at in (third, third + 1))  # to the nearest: 3, 4, 3 of 10
    return layers[start:stop]


def _numbers(keep: str, there: set[int]) -> set[int]:
    """Layer numbers of "0,2,5-7"; each number and each range must name a layer."""
    wanted: set[int] = set()
    for part in keep.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UnknownName("keep", keep, [*KEEPS, "layer numbers such as 0,2,5-7"])
        low, high = int(match[1]), int(match[2] or match[1])
        found = {number for number in there if low <= number <= high}
        if not found:
            raise ValueError(f"keep={keep!r}: {part.strip()} names no layer; layers are {_ranges(sorted(there))}")
        wanted |= found
    return wanted


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: 0-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _by_projection(names: Sequence[str], modules: str | Sequence[str]) -> set[str]:
    wanted = [part.strip() for part in (modules.split(",") if isinstance(modules, str) else modules)]
    kept: set[str] = set()
    for projection in wanted:
        found = [name for name in names if projection in (role(name), name.split(".")[-1])]
        if not found:
            raise UnknownName("projection", projection, sorted({role(name) for name in names}))
        kept.update(found)
    return kept


# ---- unstructured ----


def _magnitude(values: Tensor, generator: torch.Generator) -> Tensor:
    return values.abs()


def _random(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(values.shape, generator=generator).to(values.device)


SCORES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"magnitude": _magnitude, "random": _random}


def _check(cut: _Entries) -> None:
    if cut.space not in SPACES:
        raise UnknownName("space", cut.space, list(SPACES))
    if cut.by not in SCORES:
        raise UnknownName("by", cut.by, list(SCORES))
    if not 0 < cut.density <= 1:
        raise ValueError(f"density must be in (0, 1], got {cut.density}")
    if cut.rank is not None and (cut.space != "delta" or cut.rank < 1):
        raise ValueError(f"rank must be at least 1 and goes with space='delta', got {cut.rank} with {cut.space!r}")
    if cut.density < 1 and cut.kept < 1:
        raise ValueError(f"density={cut.density} keeps none of the {cut.total} entries")
    if cut.space == "delta" and cut.adapter.kind == "hira":
        raise UnsupportedKind("entries of a HiRA update depend on the base weights; use space='factors'")
    if cut.adapter.kind != "dora" or cut.space == "delta":
        check_linear(cut.adapter, "prune entries of")


@dataclass(frozen=True)
class _Entries:
    """Unstructured pruning of one adapter, as asked for."""

    adapter: Adapter
    density: float
    space: str
    by: str
    rank: int | None
    seed: int
    record: dict[str, Any]

    @cached_property
    def total(self) -> int:
        """Number of entries over all modules."""
        shapes = [self.adapter.shape(name) for name in self.adapter.modules]
        if self.space == "delta":
            return sum(shape.out * shape.in_ for shape in shapes)
        return sum((shape.out + shape.in_) * shape.rank for shape in shapes)

    @property
    def kept(self) -> int:
        return round(self.density * self.total)

    def shape(self, name: str) -> Shape:
        shape = self.adapter.shape(name)
        return shape._replace(rank=self.rank or shape.rank)

    def values(self, factors: Factors) -> Tensor:
        """The entries in question, flat."""
        if self.space == "delta":
            working = torch.promote_types(factors.dtype, torch.float32)
            return (factors.scale * (factors.B.to(working) @ factors.A.to(working))).flatten()
        return torch.cat([factors.B.flatten(), factors.A.flatten()])

    def patterns(self, name: str, values: Tensor) -> Tensor:
        """Scores as integers of the same order: the bits of a float that is not negative."""
        scores = SCORES[self.by](values, module_generator(self.seed, name)).float()
        return scores.contiguous().view(torch.int32)

    @cached_property
    def threshold(self) -> tuple[int, dict[str, int]]:
        """The pattern of the last entry that stays, and how many entries equal to it stay in each module."""
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for name in self.adapter.modules:
            patterns = self.patterns(name, self.values(self.adapter.modules[name]))
            binned = torch.bincount(patterns >> 16, minlength=1 << 16).cpu()
            if binned[_INFINITE:].any():
                raise ValueError(f"{name}: NaN or infinite entries have no order to prune by")
            counts += binned
        from_top = counts.flip(0).cumsum(0).flip(0)  # entries in this bin and above
        high = int((from_top >= self.kept).nonzero().max())
        need = self.kept - int(from_top[high] - counts[high])  # of the entries in this bin
        near: dict[str, Tensor] = {}
        for name in self.adapter.modules:
            patterns = self.patterns(name, self.values(self.adapter.modules[name]))
            near[name] = patterns[patterns >> 16 == high].cpu()
        bin_ = torch.cat(list(near.values()))
        last = int(bin_.kthvalue(len(bin_) - need + 1).values)
        equal = need - int((bin_ > last).sum())
        quota = {}
        for name, patterns in near.items():
            quota[name] = min(equal, int((patterns == last).sum()))
            equal -= quota[name]
        return last, quota

    def read(self, name: str) -> Factors:
        """One pruned module."""
        last, quota = self.threshold
        factors = self.adapter.modules[name]
        values = self.values(factors)
        patterns = self.patterns(name, values)
        stays = patterns > last
        stays[(patterns == last).nonzero()[: quota[name], 0]] = True
        self.record["kept"][name] = int(stays.sum())
        pruned = values.masked_fill(~stays, 0)
        if self.space == "factors":
            b, a = pruned.split([factors.B.numel(), factors.A.numel()])
            return replace(factors, B=b.view_as(factors.B), A=a.view_as(factors.A))
        shape = self.shape(name)
        dense = pruned.view(shape.out, shape.in_)
        cut, error = refactor(dense, shape.rank, factors.baked(), name)
        self.record.setdefault("error", {})[name] = error
        return cut
