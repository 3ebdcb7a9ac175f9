"""Stability as a user asks for it: an adapter and a task to a page."""

from __future__ import annotations

from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.stability import Stability, stability
from loraloom.probing.asking import asked
from loraloom.probing.naming import passes_row
from loraloom.report import Curve, Report, Series, Table


def stability_report(
    adapter: Adapter,
    task: Any,
    *,
    name: str = "adapter",
    model: str = "",
    split: str = "test",
    limit: int | None = None,
    **options: Any,
) -> Report:
    """What an adapter scores with units off at random (:func:`loraloom.stability`), as a curve and a table.

    Args:
        adapter: the adapter.
        task: what to score.
        name: of the adapter.
        model: base model; by default what the adapter names.
        split: train, validation or test.
        limit: only the first so many examples.
        options: further arguments of :func:`loraloom.stability`.

    Raises:
        ValueError: no model is named, or as :func:`loraloom.stability`.
    """
    score = asked(adapter, task, model, split, limit)
    found = stability(adapter, score, **options)
    return stability_report_of(found, name, score.task, score.why)


def stability_report_of(found: Stability, name: str, task: str, why: str = "") -> Report:
    """The result as a page: the curve with its interval, those of pruning, and how much of the gain stays.

    Args:
        why: what kept passes of the model from sharing their beginnings.

    Example:
        >>> ends = ((0.8,), (0.7,), (0.9,), ((0.75, 0.85),), "layer", 4, 1.0, 0.6, None, None, 6, 0)
        >>> stability_report_of(Stability((0.5,), *ends), "a", "digits").summary
        'With each layer off by a chance of 0.5 the adapter scores 0.800 on digits (all on: 1.000, none: 0.600).'
    """
    drawn = Series(name, found.at, found.mean, found.low, found.high)
    curves = {"units of the smallest update": found.structured, "smallest entries": found.unstructured}
    pruned = [Series(f"{name}, pruned: {what}", found.at, y) for what, y in curves.items() if y is not None]
    note = f"Means of {len(found.scores[0])} draws with 95 % intervals over them; {found.units} units ({found.unit})."
    x_label = "share off" if pruned else "chance of a unit to be off"
    curve = Curve(f"Score with units off: {found.unit}", x_label, task, (drawn, *pruned), note)
    gain = found.whole - found.base
    off, share, none = "the base", "share of the gain", "none"
    if found.rest:
        off = f"the adapter without these units; {found.rest} modules are in none and stay on"
        share, none = "share of what these units add", "none of these units"
    rows: list[tuple[str, Any, str]] = [
        ("all on", found.whole, "the adapter as it is"),
        ("all off", found.base, off),
        *((f"kept at {p:g}", (y - found.base) / gain, share) for p, y in _steps(found) if gain > 0),
        ("evaluations", found.evaluations, f"{found.saved} more were known"),
        *passes_row(found.passes, found.passes_saved, why),
    ]
    p, y = found.at[-1], found.mean[-1]
    return Report(
        "Stability",
        f"With each {found.unit} off by a chance of {p:g} the adapter scores {y:.3f} on {task} (all on:"
        f" {found.whole:.3f}, {none}: {found.base:.3f}).",
        (curve, Table("Summary", ("figure", "value", "meaning"), tuple(rows))),
        run={"task": task, "adapter": name},
        records=(found.to_json(),),
    )


def _steps(found: Stability) -> list[tuple[float, float]]:
    return list(zip(found.at, found.mean, strict=True))
