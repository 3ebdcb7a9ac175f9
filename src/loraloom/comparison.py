"""Adapters compared with each other, as a user asks for it: adapters to a report; no model takes part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from loraloom.adapter import Adapter
from loraloom.masks import Mask
from loraloom.probes.geometry import Geometry, geometry, principal_axes
from loraloom.probes.interference import Interference, interference
from loraloom.report import Curve, Heatmap, Report, Series, Table
from loraloom.strategies.units import group

_MEANING = {
    "interference": "of the singular vectors: 0 orthogonal, 1 the same update twice",
    "cosine": "1 the same direction, 0 none in common, -1 opposite",
    "distance": "norm of the difference of the updates",
    "column angle": "degrees, root mean square of the principal angles of the column spaces; 90 is orthogonal",
    "row angle": "the same of the row spaces",
    "core, first in second": "share of the first update's energy that lies in the core of the second",
    "core, second in first": "the other way round",
    "sign conflict": "share of entries with unlike signs; unrelated updates have about 0.5",
    "sign conflict, weighted": "the same, each entry weighed by both sizes",
    "mask overlap": "share of the first one's trained entries of B that the second trains too",
}
_BEYOND = {
    "dora": "Of scale * B @ A; the magnitudes of DoRA are not looked at.",
    "hira": "Of B @ A; what HiRA multiplies it with, the base weights, is not looked at.",
    "moka": "Of B @ A of each modality; what attention adds to it is not looked at.",
}


def interference_report(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    *,
    entries: bool = True,
    masks: Sequence[Mask | None] | None = None,
    same_base: bool = True,
) -> Report:
    """How adapters lie to each other (:func:`loraloom.interference`), as a page; arguments as there.

    Args:
        names: of the adapters; equal ones get a number.
    """
    found = interference(adapters, entries=entries, masks=masks, same_base=same_base)
    return interference_report_of(found, names)


def interference_report_of(found: Interference, names: Sequence[str]) -> Report:
    """The result as a page: cosines, the pair that interferes most, the worst modules by layer, principal axes.

    Example:
        >>> from loraloom.adapter import Factors
        >>> one = Adapter({}, {"layers.0.q": Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))})
        >>> interference_report_of(interference([one, one]), ["a", "b"]).summary
        'a | b: interference 1.000, cosine 1.000, sign conflict 0.000; worst in layers.0.q.'
    """
    names = _apart(names)
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: -(found.tsv[pair[0]][pair[1]] or 0.0))
    first = _figures(found, *pairs[0])
    note = _BEYOND.get(found.kind, "")
    panels: list[Any] = [
        Heatmap("Cosine of the updates", "adapter", "adapter", tuple(names), tuple(names), found.cosine, note=note),
        Table(
            "The worst pair, over all modules",
            ("figure", "value", "meaning"),
            (
                ("pair", _pair(names, *pairs[0]), "the two that interfere most"),
                *((figure, value, _MEANING[figure]) for figure, value in first.items()),
            ),
        ),
    ]
    if len(pairs) > 1:
        rows = tuple((_pair(names, *pair), *_figures(found, *pair).values()) for pair in pairs)
        panels.append(Table("Every pair, over all modules", ("first | second", *first), rows))
    layers = [_worst(found, names, unit, modules) for unit, modules in group(list(found.modules), "layer").items()]
    columns = ("layer", "module", "first | second", *first)
    panels.append(Table("The worst module of each layer, by interference", columns, tuple(layers)))
    if len(names) > 2:
        norms = torch.tensor(found.norms, dtype=torch.float64)
        gram = torch.tensor(found.cosine, dtype=torch.float64) * norms[:, None] * norms
        positions, shares = principal_axes(gram, 2)
        panels.append(_plane(names, positions.tolist(), shares.tolist()))
    said = ", ".join(
        f"{figure} {first[figure]:.3f}"
        for figure in ("interference", "cosine", "sign conflict")
        if first.get(figure) is not None
    )
    worst = max(layers, key=lambda row: row[3 + list(first).index("interference")] or 0.0)[1]
    most = f"Of {len(pairs)} pairs {_pair(names, *pairs[0])} interfere most" if len(pairs) > 1 else _pair(names, 0, 1)
    summary = f"{most}: {said}; worst in {worst}."
    run = {"adapters": list(names), "kind": found.kind}
    return Report("Interference", summary, tuple(panels), run=run, records=(found.to_json(),))


def _figures(found: Interference, i: int, j: int) -> dict[str, float | None]:
    """What is told of one pair, by the names of the table."""

    def degrees(distance: float | None, angles: Sequence[float]) -> float | None:
        return None if distance is None else math.degrees(distance / math.sqrt(len(angles)))

    told = {
        "interference": found.tsv[i][j],
        "cosine": found.cosine[i][j],
        "distance": found.distance[i][j],
        "column angle": degrees(found.grassmann.columns[i][j], found.angles.columns[i][j]),
        "row angle": degrees(found.grassmann.rows[i][j], found.angles.rows[i][j]),
        "core, first in second": found.core[i][j],
        "core, second in first": found.core[j][i],
    }
    if found.sign_conflict is not None and found.sign_conflict_weighted is not None:
        told["sign conflict"] = found.sign_conflict[i][j]
        told["sign conflict, weighted"] = found.sign_conflict_weighted[i][j]
    if found.mask_overlap is not None:
        told["mask overlap"] = found.mask_overlap[i][j]
    return told


def _worst(found: Interference, names: Sequence[str], unit: str, modules: Sequence[str]) -> tuple[Any, ...]:
    """The row of a layer: the module and the pair with the largest interference."""
    places = [(name, pair) for name in modules for pair in combinations(range(len(names)), 2)]
    name, (i, j) = max(places, key=lambda place: found.modules[place[0]].tsv[place[1][0]][place[1][1]] or 0.0)
    told = _figures(found.modules[name], i, j)
    return unit, name, _pair(names, i, j), *(told.get(figure) for figure in _figures(found, i, j))


def geometry_report(adapters: Sequence[Adapter], names: Sequence[str], *, same_base: bool = True) -> Report:
    """Where adapters lie (:func:`loraloom.geometry`), as a page; arguments as there.

    Args:
        names: of the adapters; equal ones get a number.
    """
    return geometry_report_of(geometry(adapters, same_base=same_base), adapters[0].kind, names)


def geometry_report_of(found: Geometry, kind: str, names: Sequence[str]) -> Report:
    """The result as a page: cosines, principal axes, distances.

    Example:
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))
        >>> found = geometry([Adapter({}, {"q": one.scaled(x)}) for x in (1.0, 2.0)])
        >>> geometry_report_of(found, "lora", ["a", "b"]).summary
        'The distance of the two updates is 2, their cosine 1.000.'
    """
    names = _apart(names)
    axes = tuple(f"axis {at + 1}" for at in range(len(found.explained)))
    rows: tuple[tuple[Any, ...], ...] = tuple(
        (name, norm, *place) for name, norm, place in zip(names, found.norms, found.positions, strict=True)
    )
    panels: list[Any] = [
        Heatmap(
            *("Cosine of the updates", "adapter", "adapter", tuple(names), tuple(names), found.cosine),
            note=_BEYOND.get(kind, ""),
        ),
        Table("Norms and places", ("adapter", "norm", *axes), rows),
    ]
    if len(axes) > 1:
        panels.append(_plane(names, found.positions, found.explained))
    panels.append(Heatmap("Distance of the updates", "adapter", "adapter", tuple(names), tuple(names), found.distance))
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: found.distance[pair[0]][pair[1]])
    near, far = (f"{_pair(names, i, j)} ({found.distance[i][j]:.3g})" for i, j in (pairs[0], pairs[-1]))
    summary = f"The distance of the two updates is {found.distance[0][1]:.3g}, their cosine {found.cosine[0][1]:.3f}."
    if len(pairs) > 1:
        shown = 100 * sum(found.explained)
        summary = f"Nearest are {near}, farthest {far}; two axes show {shown:.0f} % of the spread."
    return Report(
        "Geometry", summary, tuple(panels), run={"adapters": list(names), "kind": kind}, records=(found.to_json(),)
    )


def _plane(names: Sequence[str], positions: Sequence[Sequence[float]], shares: Sequence[float]) -> Curve:
    """Points on the first two principal axes."""
    along = [f"axis {at + 1} ({100 * share:.0f} % of the spread)" for at, share in enumerate(shares)]
    points = tuple(Series(name, (place[0],), (place[1],)) for name, place in zip(names, positions, strict=True))
    note = "Principal component analysis of the dense updates, exact; distances on the plane are at most the true ones."
    return Curve("Where the adapters lie", along[0], along[1], points, note=note)


def _pair(names: Sequence[str], i: int, j: int) -> str:
    return f"{names[i]} | {names[j]}"


def _apart(names: Sequence[str]) -> list[str]:
    """Names that are all different."""
    return list(names) if len(set(names)) == len(names) else [f"{at + 1}: {name}" for at, name in enumerate(names)]
