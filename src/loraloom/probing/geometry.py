"""Geometry as a user asks for it: adapters to a page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.geometry import Geometry, geometry
from loraloom.probing.naming import BEYOND, apart, pair_of, plane
from loraloom.report import Curve, Heatmap, Report, Series, Table


def geometry_report(adapters: Sequence[Adapter], names: Sequence[str], **options: Any) -> Report:
    """Where adapters lie (:func:`loraloom.geometry`), as a page; arguments as there.

    Args:
        names: of the adapters; equal ones get a number.
        options: further arguments of :func:`loraloom.geometry`.
    """
    return geometry_report_of(geometry(adapters, **options), adapters[0].kind, names)


def geometry_report_of(found: Geometry, kind: str, names: Sequence[str]) -> Report:
    """The result as a page: cosines, principal axes, distances.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))
        >>> found = geometry([Adapter({}, {"q": one.scaled(x)}) for x in (1.0, 2.0)])
        >>> geometry_report_of(found, "lora", ["a", "b"]).summary
        'The distance of the two updates is 2, their cosine 1.000.'
    """
    names = apart(names)
    axes = tuple(f"axis {at + 1}" for at in range(len(found.explained)))
    rows: tuple[tuple[Any, ...], ...] = tuple(
        (name, norm, *place) for name, norm, place in zip(names, found.norms, found.positions, strict=True)
    )
    panels: list[Any] = [
        Heatmap(
            *("Cosine of the updates", "adapter", "adapter", tuple(names), tuple(names), found.cosine),
            note=BEYOND.get(kind, ""),
            z_label="cosine",
        ),
        Table("Norms and places", ("adapter", "norm", *axes), rows),
    ]
    if len(axes) > 1:
        panels.append(plane(names, found.positions, found.explained))
    if found.neighbours is not None:
        points = zip(names, found.neighbours, strict=True)
        series = tuple(Series(name, (place[0],), (place[1],)) for name, place in points)
        note = (
            f"t-SNE of the distances, perplexity {found.perplexity:g}. Near ones stay near; the axes, and how far "
            "groups lie apart, mean nothing."
        )
        panels.append(Curve("Who is near whom", "t-SNE 1", "t-SNE 2", series, note))
    panels.append(
        Heatmap(
            "Distance of the updates",
            "adapter",
            "adapter",
            tuple(names),
            tuple(names),
            found.distance,
            z_label="distance",
        )
    )
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: found.distance[pair[0]][pair[1]])
    near, far = (f"{pair_of(names, i, j)} ({found.distance[i][j]:.3g})" for i, j in (pairs[0], pairs[-1]))
    summary = f"The distance of the two updates is {found.distance[0][1]:.3g}, their cosine {found.cosine[0][1]:.3f}."
    if len(pairs) > 1:
        shown = 100 * sum(found.explained)
        summary = f"Nearest are {near}, farthest {far}; two axes show {shown:.0f} % of the spread."
    return Report(
        "Geometry", summary, tuple(panels), run={"adapters": list(names), "kind": kind}, records=(found.to_json(),)
    )
