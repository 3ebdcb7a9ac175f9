"""Interference as a user asks for it: adapters to a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from loraloom.adapter import Adapter
from loraloom.masks import Mask
from loraloom.ops.merge import merge
from loraloom.probes.game import many
from loraloom.probes.geometry import principal_axes
from loraloom.probes.interference import Interference, interference
from loraloom.probing.asking import asked_all
from loraloom.probing.naming import BEYOND, apart, pair_of, plane
from loraloom.report import Heatmap, Report, Table
from loraloom.strategies.units import group

_MEANING = {
    "interference": "of the singular vectors: 0 orthogonal, 1 the same update twice, more in one space but turned",
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


def interference_report(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    *,
    entries: bool = True,
    masks: Sequence[Mask | None] | None = None,
    same_base: bool = True,
    tasks: Sequence[Any] = (),
    model: str = "",
    split: str = "test",
    limit: int | None = None,
) -> Report:
    """How adapters lie to each other (:func:`loraloom.interference`), as a page; arguments as there.

    With ``tasks`` it also tells what averaging the adapters does to their scores: whether what interferes does harm.

    Args:
        names: of the adapters; equal ones get a number.
        tasks: what to score the base, each adapter and their linear average on; a second table and a second record.
        model: base model, for ``tasks``; by default what the first adapter names.
        split: train, validation or test.
        limit: only the first so many examples.
    """
    page = interference_report_of(interference(adapters, entries=entries, masks=masks, same_base=same_base), names)
    if not tasks:
        return page
    average = merge(list(adapters), "linear", same_base=same_base).loaded()
    rows = {"base": None, **dict(zip(apart(names), adapters, strict=True)), "average of all": average}
    scores = asked_all(adapters[0], tasks, model, split, limit)
    found = {task: many(score, list(rows.values())) for task, score in scores.items()}
    shown = Table(
        "Scores, and what averaging does to them",
        ("adapter", *found),
        tuple((row, *(values[at] for values in found.values())) for at, row in enumerate(rows)),
    )
    record = {"adapters": list(rows), "scores": found}
    return replace(page, panels=(*page.panels[:2], shown, *page.panels[2:]), records=(*page.records, record))


def interference_report_of(found: Interference, names: Sequence[str]) -> Report:
    """The result as a page: cosines, the pair that interferes most, the worst modules by layer, principal axes.

    Example:
        >>> from loraloom.adapter import Factors
        >>> one = Adapter({}, {"layers.0.q": Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))})
        >>> interference_report_of(interference([one, one]), ["a", "b"]).summary
        'a | b: interference 1.000, cosine 1.000, sign conflict 0.000; worst in layers.0.q.'
    """
    names = apart(names)
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: -(found.tsv[pair[0]][pair[1]] or 0.0))
    first = _figures(found, *pairs[0])
    note = BEYOND.get(found.kind, "")
    panels: list[Any] = [
        Heatmap("Cosine of the updates", "adapter", "adapter", tuple(names), tuple(names), found.cosine, note=note),
        Table(
            "The worst pair, over all modules",
            ("figure", "value", "meaning"),
            (
                ("pair", pair_of(names, *pairs[0]), "the two that interfere most"),
                *((figure, value, _MEANING[figure]) for figure, value in first.items()),
            ),
        ),
    ]
    if len(pairs) > 1:
        rows = tuple((pair_of(names, *pair), *_figures(found, *pair).values()) for pair in pairs)
        panels.append(Table("Every pair, over all modules", ("first | second", *first), rows))
    layers = [_worst(found, names, unit, modules) for unit, modules in group(list(found.modules), "layer").items()]
    columns = ("layer", "module", "first | second", *first)
    panels.append(Table("The worst module of each layer, by interference", columns, tuple(layers)))
    if len(names) > 2:
        norms = torch.tensor(found.norms, dtype=torch.float64)
        gram = torch.tensor(found.cosine, dtype=torch.float64) * norms[:, None] * norms
        positions, shares = principal_axes(gram, 2)
        panels.append(plane(names, positions.tolist(), shares.tolist()))
    said = ", ".join(
        f"{figure} {first[figure]:.3f}"
        for figure in ("interference", "cosine", "sign conflict")
        if first.get(figure) is not None
    )
    i, j = pairs[0]
    worst = max(found.modules, key=lambda name: found.modules[name].tsv[i][j] or 0.0)
    most = (
        f"Of {len(pairs)} pairs {pair_of(names, *pairs[0])} interfere most" if len(pairs) > 1 else pair_of(names, 0, 1)
    )
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
    return unit, name, pair_of(names, i, j), *(told.get(figure) for figure in _figures(found, i, j))
