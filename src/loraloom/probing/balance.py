"""Balance as a user asks for it: trained adapters to a page that puts the paper's claim to the test."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.balance import Balance, Spread, balance
from loraloom.probing.naming import apart
from loraloom.report import Curve, Heatmap, Report, Series, Table
from loraloom.report.grid import flat
from loraloom.strategies.units import layer, role

_SHARE = "share of the squared norm"
_MEANING = {
    "top third": "Share of the squared norm of the whole update that the upper third of the layers has",
    "centre": "Mean height of the squared norm: 0 lowest layer, 1 highest, 0.5 if all are even",
    "Gini": "Gini coefficient of the layers' squared norms: 0 if all are even, towards 1 if one has all",
}
_WINDOWS, _COLUMNS = 10, 40
Group = Sequence[Balance]


def balance_report(
    adapters: Sequence[Adapter | Mapping[str, Any]], names: Sequence[str], groups: Sequence[str] = ()
) -> Report:
    """How evenly training went over the layers (:func:`loraloom.balance`), as a page.

    Runs whose recipes differ in the seed alone are told as one: means, and bands from the lowest to the highest.

    Args:
        adapters: trained with ``train.balance_every``, or what :meth:`Balance.to_json` gave of a run.
        names: one a run; equal ones get a number.
        groups: one a run: those of one name are told as one, whatever their recipes; none go by the recipes.

    Raises:
        ValueError: nothing was noted of a run.
    """
    held_by: dict[str, list[int]] = {}
    for at, one in enumerate(adapters):
        held_by.setdefault(groups[at] if groups else _recipe(one) or f"run {at}", []).append(at)
    apart_names, found = apart(names), [balance(one) for one in adapters]
    called = held_by if groups else {_together([apart_names[at] for at in held]): held for held in held_by.values()}
    if len(called) < len(held_by):  # two recipes of one name
        called = {", ".join(apart_names[at] for at in held): held for held in held_by.values()}
    grouped = {name: {apart_names[at]: found[at] for at in held} for name, held in called.items()}
    return balance_report_of(grouped)


def _recipe(one: Adapter | Mapping[str, Any]) -> str:
    """What two runs that differ in their seed have in common; empty where it is not known.

    Keys without a value do not count: a later version may have more of them.
    """
    told = one.provenance.get("arguments") if isinstance(one, Adapter) else None
    held = told if isinstance(told, Mapping) else {}
    own = {key: value for key, value in held.items() if key not in ("seed", "output")}
    return repr(sorted((key, value) for key, value in flat(own) if value not in (None, "", "false"))) if own else ""


def _together(names: Sequence[str]) -> str:
    """``lora-digits`` of ``lora-digits-0`` and ``lora-digits-1``."""
    if len(names) == 1:
        return names[0]
    stems = {re.sub(r"[-_. ]*\d+$", "", name) for name in names}
    return stems.pop() if len(stems) == 1 and "" not in stems else ", ".join(names)


def balance_report_of(groups: Mapping[str, Mapping[str, Balance]]) -> Report:
    """The result as a page: figures at the end, shares over training, heat maps of layers.

    Args:
        groups: runs by name, by the name of what they have in common.

    Example:
        >>> rows = ((1.0, 3.0),)
        >>> one = Balance((9,), ("layers.0.q", "layers.1.q"), rows, rows, rows)
        >>> balance_report_of({"lora": {"lora-0": one}}).summary
        'Of the squared norm of the update the upper third of the layers has 90 % in lora (even: 50 %).'
    """
    ends = {name: [found.spread()[-1] for found in held.values()] for name, held in groups.items()}
    seeds = max(len(held) for held in groups.values())
    panels = [
        _by_run(groups),
        _summary(ends),
        _over_training(groups, seeds),
        *([_gradients(groups)] if any(len(one.steps) > 1 for held in groups.values() for one in held.values()) else []),
        *(_layers_by_step(name, list(held.values())) for name, held in groups.items()),
        *(_layers_by_projection(name, list(held.values())) for name, held in groups.items()),
    ]
    even = next((one.even for held in ends.values() for one in held if one is not None), None)
    shares = {name: _mean(one.top_third for one in held if one is not None) for name, held in ends.items()}
    said = ", ".join(f"{100 * share:.0f} % in {name}" for name, share in shares.items() if share is not None)
    told = (
        f"Of the squared norm of the update the upper third of the layers has {said} (even: {100 * (even or 0):.0f} %)."
    )
    return Report(
        "Balance of training",
        told if said and even is not None else "The update is not known by layer, so there is nothing to share out.",
        tuple(panel for panel in panels if panel is not None),
        run={"runs": {name: list(held) for name, held in groups.items()}},
        records=tuple({"run": name} | one.to_json() for held in groups.values() for name, one in held.items()),
    )


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_run(groups: Mapping[str, Mapping[str, Balance]]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for held in groups.values():
        for name, one in held.items():
            end = one.spread()[-1] or Spread(None, None, None, math.nan)
            gradient = _mean(spread.top_third for spread in one.spread("gradient") if spread is not None)
            figures = (end.top_third, end.centre, None if math.isnan(end.gini) else end.gini)
            rows.append((name, one.steps[-1], *figures, _whole(one), gradient))
    columns = ("run", "steps", "top third", "centre", "Gini", "norm of the update", "top third of gradients")
    meaning = "; ".join(f"{name}: {what[0].lower()}{what[1:]}" for name, what in _MEANING.items())
    note = f"After the last step. {meaning}. The last column is the mean over the steps that were noted."
    return Table("How the layers share the update, by run", columns, tuple(rows), note)


def _whole(one: Balance) -> float | None:
    norms = one.update[-1]
    return None if None in norms else math.hypot(*(x for x in norms if x is not None))


def _summary(ends: Mapping[str, Sequence[Spread | None]]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for name, found in ends.items():
        known = [one for one in found if one is not None]
        figures = (("top third", "top_third"), ("centre", "centre"), ("Gini", "gini"))
        for figure, field in figures:
            value = _mean(getattr(one, field) for one in known)
            rows.append((f"{figure}, {name}", value, f"{_MEANING[figure]} (runs: {len(known)})"))
    return Table("Means over the runs of a recipe", ("figure", "value", "meaning"), tuple(rows))


def _over_training(groups: Mapping[str, Mapping[str, Balance]], seeds: int) -> Curve | None:
    series = []
    for name, held in groups.items():
        points: dict[int, list[float]] = {}
        for one in held.values():
            for step, found in zip(one.steps, one.spread(), strict=True):
                if found is not None and found.top_third is not None:
                    points.setdefault(step, []).append(found.top_third)
                    even = found.even or 0.0
        whole = {step: values for step, values in sorted(points.items()) if len(values) == len(held)}
        if whole:
            ends = {
                end: tuple(pick(values) for values in whole.values()) for end, pick in (("low", min), ("high", max))
            }
            mean = tuple(sum(values) / len(values) for values in whole.values())
            series.append(Series(name, tuple(whole), mean, **(ends if len(held) > 1 else {})))
    if not series:
        return None
    span = (min(one.x[0] for one in series), max(one.x[-1] for one in series))
    series.append(Series("even", span, (even, even)))
    note = (
        "The squared norm of the whole update is the sum of those of its layers; this is the part of the upper third."
    )
    if seeds > 1:
        note += " Lines are means over seeds; bands reach from the lowest to the highest."
    return Curve("Share of the upper third in the update", "optimizer step", _SHARE, tuple(series), note)


def _gradients(groups: Mapping[str, Mapping[str, Balance]]) -> Curve | None:
    """Single gradients are noisy, and a closed layer has none: means over tenths of the run."""
    series = []
    for name, held in groups.items():
        windows: list[list[float]] = [[] for _ in range(_WINDOWS)]
        last = max(one.steps[-1] for one in held.values())
        for one in held.values():
            for step, found in zip(one.steps, one.spread("gradient"), strict=True):
                if found is not None and found.top_third is not None and step > 0:
                    windows[min(_WINDOWS - 1, (step - 1) * _WINDOWS // last)].append(found.top_third)
        known = {round((at + 0.5) * last / _WINDOWS): _mean(values) for at, values in enumerate(windows) if values}
        if known:
            series.append(Series(name, tuple(known), tuple(known.values())))  # type: ignore[arg-type]
    note = "Of the gradient as the optimizer gets it, after clipping: means over tenths of training and over runs. "
    note += "A layer that is off in a step has none of it."
    title = "Share of the upper third in the gradient"
    return Curve(title, "optimizer step", _SHARE, tuple(series), note) if series else None


def _layers_by_step(name: str, held: Group) -> Heatmap | None:
    first = held[0]
    same = [one for one in held if (one.steps, one.modules) == (first.steps, first.modules)]
    units, _ = first.by("update")
    shares: list[tuple[int, list[float]]] = []
    for at, step in enumerate(first.steps):
        rows = [_shares(one.by("update")[1][at]) for one in same]
        if all(rows):
            shares.append((step, [sum(column) / len(column) for column in zip(*rows, strict=True)]))
    if len(units) < 2 or len(shares) < 2:
        return None
    every = max(1, -(-len(shares) // _COLUMNS))
    kept = shares[::-1][::every][::-1]  # the last step is among them
    z = tuple(tuple(row[at] for _, row in kept) for at in range(len(units)))
    note = f"Mean of {len(same)} runs. " if len(same) > 1 else ""
    note += (
        f"Each column adds up to 1; {1 / len(units):.3f} everywhere would be even. The top row is the highest layer; "
    )
    note += "each map has colours of its own."
    steps = tuple(step for step, _ in kept)
    title = f"Share of each layer in the update over training, {name}"
    return Heatmap(title, "optimizer step", "layer", steps, _short(units)[::-1], z[::-1], note, z_label="share")


def _shares(norms: Sequence[float | None]) -> list[float]:
    """Shares of the squared norm; nothing where one is unknown or all are 0."""
    energy = [] if None in norms else [x**2 for x in norms if x is not None]
    return [x / sum(energy) for x in energy] if any(energy) else []


def _layers_by_projection(name: str, held: Group) -> Heatmap | None:
    modules = held[0].modules
    same = [one for one in held if one.modules == modules]
    layers, roles = (tuple(dict.fromkeys(of(one) for one in modules)) for of in (layer, role))
    if len(layers) < 2 or len({(layer(one), role(one)) for one in modules}) < len(modules):
        return None
    layers = tuple(held[0].by("update")[0])
    cells = {
        (layer(module), role(module)): _mean(one.update[-1][at] for one in same) for at, module in enumerate(modules)
    }
    z = tuple(tuple(cells.get((one, other)) for other in roles) for one in layers)
    runs = ", means over runs" if len(same) > 1 else ""
    note = f"Frobenius norms of the updates after the last step{runs}. Each map has colours of its own."
    title = f"Norm of the update by layer and projection, {name}"
    return Heatmap(title, "projection", "layer", roles, _short(layers)[::-1], z[::-1], note, z_label="norm")


def _short(paths: Sequence[str]) -> tuple[str, ...]:
    """Paths without what all of them begin with."""
    parts = [path.split(".") for path in paths]
    same = 0
    while len(paths) > 1 and all(len(one) > same + 1 and one[same] == parts[0][same] for one in parts):
        same += 1
    return tuple(".".join(one[same:]) for one in parts)
