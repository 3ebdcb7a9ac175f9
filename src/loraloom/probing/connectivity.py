"""Connectivity as a user asks for it: two adapters and a task to a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.connectivity import Connectivity, connectivity
from loraloom.probing.asking import asked
from loraloom.probing.naming import apart
from loraloom.report import Curve, Report, Series, Table


def connectivity_report(
    a: Adapter,
    b: Adapter,
    task: Any,
    *,
    via: Adapter | None = None,
    names: Sequence[str] = ("a", "b", "via"),
    model: str = "",
    split: str = "test",
    limit: int | None = None,
    **options: Any,
) -> Report:
    """What the adapters between two adapters score (:func:`loraloom.connectivity`), as curves and a table.

    Args:
        a, b: the ends.
        task: what to score.
        via: the control point of bent paths.
        names: of a, b and the control point.
        model: base model; by default what a names.
        split: train, validation or test.
        limit: only the first so many examples.
        options: further arguments of :func:`loraloom.connectivity`.

    Raises:
        ValueError: no model is named, or as :func:`loraloom.connectivity`.
    """
    score = asked(a, task, model, split, limit)
    return connectivity_report_of(connectivity(a, b, score, via=via, **options), names, score.task)


def connectivity_report_of(found: Connectivity, names: Sequence[str], task: str) -> Report:
    """The result as a page: a curve for each path, and how far each sinks.

    Example:
        >>> from loraloom.probes.connectivity import Path
        >>> path = Path("delta", None, False, (0.9, 0.5, 0.7), 0.3, 0.3, 0.5)
        >>> connectivity_report_of(Connectivity((0.0, 0.5, 1.0), (path,), 3), ["x", "y"], "digits").summary
        'From x (0.900 on digits) to y (0.700) the path in delta sinks by up to 0.300 below the line between its ends.'
    """
    first, last, *via = apart(names)
    bent = any(path.bent for path in found.paths)
    curve = Curve(
        f"From {first} to {last}",
        f"position (0: {first}, 1: {last})",
        task,
        tuple(Series(path.name, found.at, path.scores) for path in found.paths),
        "Straight in the updates (delta) or in the factors B and A (factors), there also with the factors of"
        f" {last} first brought near those of {first} where it says how."
        + (f" Bent paths are Bezier curves with the control point {via[0]}, which they do not reach." if bent else ""),
    )
    head: tuple[str, ...] = ("path", "barrier", "drop", "lowest at", "lowest score")
    rows = [(path.name, path.barrier, path.drop, path.lowest, min(path.scores)) for path in found.paths]
    note = "Barrier: below the line between the end scores, at most. Drop: the lowest score below the mean of the ends."
    if bent:
        head = (*head, "1:1:1 mean")
        rows = [(*row, path.centre) for row, path in zip(rows, found.paths, strict=True)]  # type: ignore[misc]
        note += f" The 1:1:1 mean is that of {first}, {last} and {via[0]}."
    return Report(
        "Connectivity",
        _said(found, first, last, task),
        (curve, Table("How far each path sinks", head, tuple(rows), note)),
        run={"task": task, "adapters": [first, last, *(via if bent else [])], "evaluations": found.evaluations},
        records=(found.to_json(),),
    )


def _said(found: Connectivity, first: str, last: str, task: str) -> str:
    start, end = found.scores[0], found.scores[-1]
    ways = sorted(found.paths, key=lambda path: path.barrier)
    said = f"From {first} ({start:.3f} on {task}) to {last} ({end:.3f}) the path in {ways[0].name} sinks by up to"
    said += f" {ways[0].barrier:.3f} below the line between its ends"
    if len(ways) > 1:
        said += f", the path in {ways[-1].name} by up to {ways[-1].barrier:.3f}"
    return f"{said}."
