"""The plane through three adapters as a user asks for it: adapters and a task to a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.plane import Plane, plane
from loraloom.probing.asking import asked
from loraloom.probing.naming import apart
from loraloom.report import Heatmap, Report, Table


def plane_report(
    adapters: Sequence[Adapter],
    task: Any,
    *,
    names: Sequence[str] = ("a", "b", "c"),
    model: str = "",
    split: str = "test",
    limit: int | None = None,
    **options: Any,
) -> Report:
    """What the adapters around three adapters score (:func:`loraloom.plane`), as a map and a table.

    Args:
        adapters: the three.
        task: what to score.
        names: of the three.
        model: base model; by default what the first one names.
        split: train, validation or test.
        limit: only the first so many examples.
        options: further arguments of :func:`loraloom.plane`.

    Raises:
        ValueError: not three adapters, no model is named, or as :func:`loraloom.plane`.
    """
    if len(adapters) != 3:
        raise ValueError(f"a plane goes through three adapters, got {len(adapters)}")
    score = asked(adapters[0], task, model, split, limit)
    return plane_report_of(plane(*adapters, score, **options), names, score.task)


def plane_report_of(found: Plane, names: Sequence[str], task: str) -> Report:
    """The result as a page: the map, its places named at the axes, and the scores of the three and of their mean.

    Example:
        >>> places = ((0.0, 0.0), (2.0, 0.0), (1.0, 2.0))
        >>> found = Plane((0.0, 2.0), (0.0, 2.0), ((0.9, 0.8), (0.7, 0.6)), places, (0.9, 0.8, 0.9), 0.5, 8)
        >>> plane_report_of(found, ["x", "y", "z"], "digits").summary
        'On digits x scores 0.900, y 0.800, z 0.900 and their mean 0.500; the best place of the map scores 0.900.'
        >>> plane_report_of(found, ["x", "y", "z"], "digits").panels[0].y
        ('2.0 (z)', '0.0 (x, y)')
    """
    names = apart(names)
    across, up = zip(*found.places, strict=True)
    middle = (sum(across) / 3, sum(up) / 3)
    rows = zip([*names, "mean"], [*found.ends, found.centre], [*found.places, middle], strict=True)
    score_map = Heatmap(
        f"{task} on the plane of {', '.join(names)}",
        "distance along the line of the first two",
        "distance across it",
        _marked(found.x, across, names),
        _marked(found.y, up, names)[::-1],
        found.scores[::-1],
        "Distances are norms of updates. A name stands at the column and at the row that its adapter is nearest to.",
    )
    table = Table("The three and their mean", ("place", task, "x", "y"), tuple((n, s, *p) for n, s, p in rows))
    each = ", ".join(f"{name} {'scores ' if not at else ''}{found.ends[at]:.3f}" for at, name in enumerate(names))
    best = max(max(row) for row in found.scores)
    return Report(
        "Plane",
        f"On {task} {each} and their mean {found.centre:.3f}; the best place of the map scores {best:.3f}.",
        (score_map, table),
        run={"task": task, "adapters": names, "evaluations": found.evaluations},
        records=(found.to_json(),),
    )


def _marked(axis: Sequence[float], at: Sequence[float], names: Sequence[str]) -> tuple[str, ...]:
    """Positions as text, with the names of what is nearest to each; never two alike."""
    near: dict[int, list[str]] = {}
    for place, name in zip(at, names, strict=True):
        near.setdefault(min(range(len(axis)), key=lambda i: abs(axis[i] - place)), []).append(name)
    digits = max(0, 1 - math.floor(math.log10(axis[1] - axis[0])))  # two digits of a step
    told = [f"{round(x, digits) + 0.0:.{digits}f}" for x in axis]
    return tuple(f"{text} ({', '.join(near[i])})" if i in near else text for i, text in enumerate(told))
