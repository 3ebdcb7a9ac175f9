"""Attribution as a user asks for it: adapters and a task to a page, and what is read of such a page again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.shapley import Shapley, shapley
from loraloom.probing.asking import asked
from loraloom.probing.naming import passes_row
from loraloom.report import Bars, Heatmap, Report, Series, Table
from loraloom.strategies.units import layer, role
from loraloom.untrusted import is_number, short, word


def shapley_report(
    adapters: Mapping[str, Adapter],
    task: Any,
    *,
    model: str = "",
    split: str = "test",
    limit: int | None = None,
    **options: Any,
) -> Report:
    """What the units of one adapter are worth, or several whole adapters (:func:`loraloom.shapley`).

    A heat map of layers and projections where modules are the units, bars otherwise, and a table.

    Args:
        adapters: by name; of several the players are they themselves.
        task: what to score.
        model: base model; by default what the first adapter names.
        split: train, validation or test.
        limit: only the first so many examples.
        options: further arguments of :func:`loraloom.shapley`.

    Raises:
        ValueError: no model is named, or as :func:`loraloom.shapley`.
    """
    score = asked(next(iter(adapters.values())), task, model, split, limit)
    if len(adapters) == 1:
        ((name, adapter),) = adapters.items()
        found = shapley(adapter, score, **options)
    else:
        name, found = ", ".join(adapters), shapley(adapters, score, **{"unit": "adapter", **options})
    return shapley_report_of(found, name, score.task, score.why)


def shapley_report_of(found: Shapley, name: str, task: str, why: str = "") -> Report:
    """The result as a page: the values, and whether they add up.

    Args:
        why: what kept passes of the model from sharing their beginnings.

    Example:
        >>> units = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
        >>> r = Shapley(units, (0.1, 0.0, 0.2, 0.1), (0.0,) * 4, "exact", "module", 0, 16, 18, 0.9, 0.5, 1e-9)
        >>> shapley_report_of(r, "a", "digits").panels[0].z
        ((0.1, 0.0), (0.2, 0.1))
    """
    gain = found.whole - found.base
    third = max(1, round(len(found.units) / 3))
    share, lost = found.top_third, [value for value in found.values if value < 0]
    what = "sum of the values above 0" if lost else "sum"
    rows: list[tuple[str, Any, str]] = [
        ("gain", gain, f"score {found.whole:.4g} with all on, {found.base:.4g} with none"),
        ("top third", share, f"share of the {what} that the {third} highest of {len(found.units)} have"),
        ("gap", found.gap, "sum of the values less the gain"),
        ("evaluations", found.evaluations, f"{found.saved} more were known; {found.samples} draws"),
        *passes_row(found.passes, found.passes_saved, why),
    ]
    told = f"{found.by} values of {len(found.units)} units ({found.unit}) for a gain of {gain:+.3f} on {task}"
    if share is not None:
        told += f"; the highest {third} have {100 * share:.0f} % of the {what}"
    if lost:
        told += f"; {len(lost)} of {len(found.values)} values are below 0, {math.fsum(lost):.3g} in sum"
    if found.adds_up is False:
        told += f". They do not add up: the gap of {found.gap:+.3g} is beyond chance ({found.slack:.3g})"
    title = "Shapley values" if found.slack is not None else "Attribution"
    return Report(
        title,
        f"{told}.",
        (
            _map(found, title) or _bars(found, title, name),
            Table("Summary", ("figure", "value", "meaning"), tuple(rows)),
        ),
        run={"task": task, "adapter": name},
        records=(found.to_json(),),
    )


def _map(found: Shapley, title: str) -> Heatmap | None:
    """Layers by projections, where every module is a unit and has a cell of its own."""
    cells = {(layer(unit), role(unit)): value for unit, value in zip(found.units, found.values, strict=True)}
    layers, roles = (tuple(dict.fromkeys(key[at] for key in cells)) for at in (0, 1))
    if found.unit != "module" or len(cells) < len(found.units) or min(len(layers), len(roles)) < 2:
        return None
    rows = tuple(tuple(cells.get((one, other)) for other in roles) for one in layers)
    return Heatmap(f"{title} by module", "projection", "layer", roles, layers, rows, _error(found))


def _bars(found: Shapley, title: str, name: str) -> Bars:
    pairs = list(zip(found.values, found.half_widths, strict=True))
    ends: dict[str, Any] = {}
    note = _error(found)
    if any(found.stderr):
        ends = {"low": tuple(value - half for value, half in pairs), "high": tuple(sum(pair) for pair in pairs)}
        note += f" Bars have 95 % intervals over the {found.blocks} blocks of draws (Student's t)."
    series = Series(name, found.units, found.values, **ends)
    return Bars(f"{title} by {found.unit}", "value", found.units, (series,), note)


def _error(found: Shapley) -> str:
    worst = max(found.stderr)
    return f"Standard errors are at most {worst:.2g}." if worst else "The values are exact."


def scores_in(held: Mapping[str, Any], where: str, least: float = -math.inf) -> dict[str, float]:
    """Scores by unit of a JSON file: a mapping, ``units`` and ``values``, or the report of ``loraloom probe shapley``.

    Args:
        held: the content of the file.
        where: what to call it.
        least: ``values`` below it count as it.

    Raises:
        ValueError: a report without values by unit, lists of different lengths, or a score that is no finite number.

    Example:
        >>> scores_in({"format": "...", "records": [{"units": ["a", "b"], "values": [1.0, -2.0]}]}, "s.json")
        {'a': 1.0, 'b': -2.0}
    """
    if isinstance(held.get("records"), list):
        own = [one for one in held["records"] if isinstance(one, Mapping) and {"units", "values"} <= set(one)]
        if not own:
            raise ValueError(f"{where} is a report without values by unit; `loraloom probe shapley` writes one")
        held = own[0]
    scores, listed = dict(held), {"units", "values"} <= set(held)
    if listed:
        units, values = held["units"], held["values"]
        if not isinstance(units, list) or not isinstance(values, list) or len(units) != len(values):
            raise ValueError(f"{where}: units and values must be lists of one length")
        scores = dict(zip(map(str, units), values, strict=True))
    for unit, score in scores.items():
        if not is_number(score):
            raise ValueError(f"{where}: score of {word(unit)} is {short(score)}; scores must be finite numbers")
    return {unit: max(score, least) for unit, score in scores.items()} if listed else scores
