"""Interference: how the updates of several adapters lie to each other, told from their factors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch
from loraloom.experts import as_stored
from loraloom.masks import Mask, support
from loraloom.ops.checks import which
from loraloom.ops.overlap import angles_of, check_comparable, comparable_parts, joint_cores, signs_of, sums_of
from loraloom.probes import probes

Matrix = tuple[tuple[float | None, ...], ...]  # k x k; None where there is nothing to compare
Angles = dict[tuple[int, int], tuple[Tensor, Tensor]]


class Spaces(NamedTuple):
    """One thing of the column spaces of the updates and of their row spaces."""

    columns: Any
    rows: Any


@dataclass(frozen=True)
class Interference:
    """How k updates lie to each other, over all modules or in one. A matrix is k x k.

    Attributes:
        kind: of the adapters. For all but ``lora`` the numbers are those of ``scale * B @ A``, whatever else the kind
            makes of it (DoRA's magnitudes, HiRA's base weights, what MokA finds in the text).
        norms: Frobenius norms of the k updates.
        cosine: ``<dW_a, dW_b> / (|dW_a| |dW_b|)``; 0 where one is zero.
        distance: ``|dW_a - dW_b|``.
        angles: principal angles, rising, in radians; ``angles.columns[a][b]`` between the column spaces, as many as
            the smaller dimension. Over all modules: those of all modules together.
        grassmann: root of the sum of squared angles. Where ranks differ it is that of the smaller space to the nearest
            part of the larger one (Ye and Lim 2016, arXiv 1407.0900), so 0 where one contains the other.
        tsv: interference of each pair's singular vectors, over the sum of both sums of singular values: 0 where the
            vectors are orthogonal on either side, 1 for the same update twice, more where two updates share their
            spaces but not their vectors.
        tsv_all: that of all k together, as the paper has it, not divided by anything; over all modules their sum.
        core: share of the row's energy in the core of the column's: ``|P dW Q|^2 / |dW|^2``.
        core_rest: share of each update's energy in the joint core of all others.
        sign_conflict: of the entries that neither has as 0, the share of unlike signs. None if not asked for.
        sign_conflict_weighted: the same, each entry weighed by |a| |b|.
        mask_overlap: share of the row's trained entries of B that the column trains too. None where no B is sparse.
        modules: the same by module path; empty for a module.
    """

    kind: str
    norms: tuple[float, ...]
    cosine: Matrix
    distance: Matrix
    angles: Spaces
    grassmann: Spaces
    tsv: Matrix
    tsv_all: float
    core: Matrix
    core_rest: tuple[float | None, ...]
    sign_conflict: Matrix | None = None
    sign_conflict_weighted: Matrix | None = None
    mask_overlap: Matrix | None = None
    modules: Mapping[str, Interference] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists; angles by module only, and those of each pair once."""
        told: dict[str, Any] = {name: _lists(value) for name, value in vars(self).items() if name != "modules"}
        told["grassmann"] = {name: _lists(value) for name, value in self.grassmann._asdict().items()}
        told["angles"] = [
            {"pair": [i, j], "columns": list(self.angles.columns[i][j]), "rows": list(self.angles.rows[i][j])}
            for i, j in combinations(range(len(self.norms)), 2)
        ]
        if self.modules:
            del told["angles"]
            told["modules"] = {name: module.to_json() for name, module in self.modules.items()}
        return told


@probes.register("interference", paper="https://arxiv.org/abs/2412.00081")
def interference(
    adapters: Sequence[Adapter],
    *,
    entries: bool = True,
    masks: Sequence[Mask | None] | None = None,
    same_base: bool = True,
) -> Interference:
    """How adapters lie to each other, before any merge: directions, subspaces, signs; no model, no score.

    - cosine and distance of the updates ``dW = scale * B @ A``;
    - principal angles of their column and row spaces, of numerically determined rank, and the Grassmann distance
      (Bjorck and Golub 1973; Ye and Lim 2016, arXiv 1407.0900). The column space is that of dW: that of B where A has
      full rank;
    - interference of singular vectors, ``|(U^T U - I) S (V^T V - I)|_1`` (Gargiulo et al. 2025, arXiv 2412.00081; the
      norm taken as the sum of absolute entries);
    - the share of each update that lies in the core of the others, as Core Space has it (Panariello et al. 2025, arXiv
      2509.17786);
    - sign conflict entry by entry, what TIES settles (Yadav et al. 2023, arXiv 2306.01708);
    - for LoRI how masks overlap (arXiv 2504.07448).

    All but signs and masks comes from small matrices in float64 and does not depend on the gauge of the factors. Signs
    take a pass over all entries of all updates, a block of rows at a time: that is nearly all of the time for large
    models. A module that an adapter lacks is a zero update. Biases and whole saved modules are not looked at.

    Args:
        adapters: at least two, of one kind.
        entries: whether to compare signs.
        masks: for each adapter the mask it was trained with, or None for the entries of its B that are not 0.
        same_base: refuse adapters of base models of different names.

    Raises:
        ValueError: fewer than two adapters, other numbers of masks, or factors that are not finite.
        AdapterMismatch: kinds, base models or the sizes of a module differ, or a mask is that of another adapter.
        UnsupportedKind: updates that are relative to base weights which their start has moved (PiSSA and the like).

    Example:
        >>> from loraloom.adapter import Factors
        >>> a = Adapter({}, {"q": Factors(B=torch.eye(2)[:, :1], A=torch.tensor([[1.0, 0.0]]))})
        >>> b = Adapter({}, {"q": Factors(B=torch.eye(2)[:, :1], A=torch.tensor([[-1.0, 1.0]]))})
        >>> r = interference([a, b])
        >>> round(r.cosine[0][1], 3), round(r.angles.rows[0][1][0], 3), r.sign_conflict[0][1]
        (-0.707, 0.785, 1.0)
        >>> round(r.modules["q"].core[1][0], 3)
        0.5
    """
    check_comparable(adapters, same_base, "interference")
    if masks is not None and len(masks) != len(adapters):
        raise ValueError(f"{len(masks)} masks for {len(adapters)} adapters; give one (or None) an adapter")
    overlap = _overlaps(adapters, masks)
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    k, kind = len(adapters), adapters[0].kind
    total: dict[str, Tensor] = {}
    found: dict[str, Interference] = {}
    together: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {pair: [] for pair in combinations(range(k), 2)}
    for name in names:
        parts = comparable_parts(name, adapters)
        cores = joint_cores(parts)
        sums = sums_of(cores) | (signs_of(parts) if entries else {})
        angles = {pair: (columns.cpu(), rows.cpu()) for pair, columns, rows in angles_of(cores)}
        for pair, both in angles.items():
            together[pair].append(both)
        total = {key: value + total.get(key, 0) for key, value in sums.items()}
        found[name] = _told(kind, sums, angles, overlap.get(name))
    merged = {
        pair: (torch.cat([c for c, _ in of]).sort().values, torch.cat([r for _, r in of]).sort().values)
        for pair, of in together.items()
    }
    shared = torch.stack(list(overlap.values())).sum(dim=0) if overlap else None
    return replace(_told(kind, total, merged, shared), modules=found)


def _overlaps(adapters: Sequence[Adapter], masks: Sequence[Mask | None] | None) -> dict[str, Tensor]:
    """By stored module: how many entries of B each two masks have in common, k x k; NaN where their sizes differ.

    Empty where every B is dense and no mask is given.
    """
    given = masks or [None] * len(adapters)
    for at, (adapter, mask) in enumerate(zip(adapters, given, strict=True)):
        if mask is not None:
            _check_mask(mask, as_stored(adapter), which(at, adapters))
    held = [support(adapter) if mask is None else mask for adapter, mask in zip(adapters, given, strict=True)]
    if all(mask is None for mask in given) and all(mask.kept == mask.entries for mask in held):
        return {}
    found = {}
    for name in dict.fromkeys(name for mask in held for name in mask):
        shapes = [mask.shapes.get(name) for mask in held]
        entries = [None if shape is None else mask[name] for mask, shape in zip(held, shapes, strict=True)]
        common = torch.zeros(len(held), len(held), dtype=torch.float64)
        for i, one in enumerate(entries):
            for j, other in enumerate(entries):
                if one is not None and other is not None:
                    common[i, j] = int((one & other).sum()) if shapes[i] == shapes[j] else math.nan
        found[name] = common
    return found


def _check_mask(mask: Mask, stored: Adapter, who: str) -> None:
    """Refuse the mask of another adapter."""
    for name, (out, rank) in mask.shapes.items():
        shape = stored.shape(name) if name in stored.modules else None
        if shape is None or (shape.out, shape.rank) != (out, rank):
            there = "no such module" if shape is None else f"a B of {shape.out} x {shape.rank}"
            raise AdapterMismatch(f"{name}: the mask is of {out} x {rank}, {who} has {there}")


def _told(kind: str, sums: Mapping[str, Tensor], angles: Angles, overlap: Tensor | None) -> Interference:
    """The result of sums over modules."""
    energy = sums["gram"].diagonal()
    norms = energy.sqrt()
    k = len(norms)
    sizes = norms[:, None] * norms
    cosine = torch.where(sizes > 0, sums["gram"] / sizes, 0.0).clamp(-1, 1)
    cosine.diagonal().copy_((norms > 0).double())
    tsv = sums["pairs"] / (sums["nuclear"][:, None] + sums["nuclear"])
    tsv = torch.where((norms > 0)[:, None] != (norms > 0), 0.0, tsv)  # with nothing there is none, not its rounding
    grassmann = {
        pair: tuple(float(each.norm()) if len(each) else None for each in both) for pair, both in angles.items()
    }
    listed = {pair: tuple(tuple(each.tolist()) for each in both) for pair, both in angles.items()}
    signs: dict[str, Any] = {}
    if "both" in sums:
        signs["sign_conflict"] = _matrix(sums["differ"] / sums["both"], 0.0)
        signs["sign_conflict_weighted"] = _matrix((sums["against"] / sums["weight"]).clamp(0, 1), 0.0)
    if overlap is not None:
        signs["mask_overlap"] = _matrix(overlap / overlap.diagonal()[:, None])
    return Interference(
        kind=kind,
        norms=tuple(norms.tolist()),
        cosine=_matrix(cosine),
        distance=_matrix(sums["apart"].sqrt()),
        angles=Spaces(*(_of_pairs(k, {pair: both[at] for pair, both in listed.items()}, ()) for at in (0, 1))),
        grassmann=Spaces(*(_of_pairs(k, {pair: both[at] for pair, both in grassmann.items()}, 0.0) for at in (0, 1))),
        tsv=_matrix(tsv, 0.0),
        tsv_all=float(sums["all"]),
        core=_matrix((sums["inside"] / energy[:, None]).clamp(max=1)),
        core_rest=_matrix((sums["rest"] / energy).clamp(max=1)[None])[0],
        **signs,
    )


def _matrix(values: Tensor, diagonal: float | None = None) -> Matrix:
    """Tuples of numbers, None for NaN; with a diagonal, if one is given."""
    rows = values.tolist()
    if diagonal is not None:
        for at, row in enumerate(rows):
            row[at] = diagonal
    return tuple(tuple(None if math.isnan(value) else value for value in row) for row in rows)


def _of_pairs(k: int, values: Mapping[tuple[int, int], Any], diagonal: Any) -> tuple[tuple[Any, ...], ...]:
    """A symmetric k x k matrix of what belongs to each pair."""
    return tuple(tuple(diagonal if i == j else values[min(i, j), max(i, j)] for j in range(k)) for i in range(k))


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
