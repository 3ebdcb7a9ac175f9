"""Probes as a user asks for them: adapters and tasks to a report, the model loaded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.forgetting import Forgetting, forgetting
from loraloom.probes.partial_modality import PartialModality, partial_modality, told_apart
from loraloom.probes.shapley import Shapley, shapley
from loraloom.probes.stability import Stability, stability
from loraloom.registry import edge
from loraloom.report import Bars, Curve, Heatmap, Report, Series, Table
from loraloom.strategies.units import layer, role


def forgetting_report(
    phases: Sequence[Adapter],
    tasks: Sequence[Any],
    *,
    names: Sequence[str] = (),
    model: str = "",
    split: str = "test",
    limit: int | None = None,
) -> Report:
    """What a chain of adapters keeps of each task (:func:`loraloom.forgetting`), as a heat map and a table.

    Args:
        phases: the adapter after each phase.
        tasks: one a phase, in order.
        names: of the phases.
        model: base model; by default what the first adapter names.
        split: train, validation or test.
        limit: only the first so many examples.

    Raises:
        ValueError: their numbers differ, or no model is named.
    """
    if len(phases) != len(tasks) or not phases:
        raise ValueError(f"{len(phases)} adapters and {len(tasks)} tasks; one task an adapter is needed, in order")
    bench_for = edge("statistics").bench_for
    first = bench_for(phases[0], tasks[0], model)
    told = {"family": first.family, "processor": first.processor}
    benches = [first, *(bench_for(phases[0], task, first.model, **told) for task in tasks[1:])]  # one model for all
    scores = {made.task.name: lambda adapter, made=made: made.evaluate(adapter, split, limit).value for made in benches}
    return report_of(forgetting(phases, scores), names or [f"phase {i + 1}" for i in range(len(phases))])


def report_of(found: Forgetting, names: Sequence[str]) -> Report:
    """The result as a page: the matrix and its three summaries.

    Example:
        >>> r = Forgetting(("one",), (0.5,), ((0.9,),), 0.9, None, None)
        >>> report_of(r, ["first"]).panels[0].z
        ((0.5,), (0.9,))
    """
    rows = ("before", *names)
    matrix = Heatmap(
        "Score of each task after each phase", "task", "phase", found.tasks, rows, (found.before, *found.scores)
    )
    told = {"ACC": found.accuracy, "BWT": found.backward, "FWT": found.forward}
    means = {
        "ACC": "mean over the tasks at the end",
        "BWT": "change of earlier tasks since they were learned; below 0 is forgetting",
        "FWT": "what earlier phases gave a task before its own, against the base",
    }
    table = Table("Summaries", ("figure", "value", "meaning"), tuple((k, v, means[k]) for k, v in told.items()))
    rest = zip(found.tasks, found.scores[-1], strict=True)
    lost, where = min((last - found.scores[j][j], task) for j, (task, last) in enumerate(rest))
    worst = f"; most is lost on {where} ({lost:+.3f})" if lost < 0 else "; no task lost anything"
    return Report(
        "Forgetting",
        f"After {len(names)} phases the tasks score {found.accuracy:.3f} on average{worst}.",
        (matrix, table),
        run={"tasks": list(found.tasks), "phases": list(names)},
        records=(found.to_json(),),
    )


def partial_modality_report(
    adapter: Adapter,
    task: Any,
    *,
    modalities: Mapping[str, int] | None = None,
    name: str = "adapter",
    model: str = "",
    split: str = "test",
    limit: int | None = None,
) -> Report:
    """What an adapter does for each modality's tokens alone (:func:`loraloom.partial_modality`), as bars and a table.

    Args:
        adapter: MokA, or a LoRA with ``modalities``.
        task: what to score.
        modalities: number by name, for a LoRA.
        name: of the adapter.
        model: base model; by default what the adapter names.
        split: train, validation or test.
        limit: only the first so many examples.

    Raises:
        ValueError: no model is named, or the adapter does not tell modalities apart.
    """
    moka = told_apart(adapter, modalities)  # before a model is loaded
    bench = edge("statistics").bench_for(moka, task, model)
    found = partial_modality(moka, lambda variant: bench.evaluate(variant, split, limit).value)
    return partial_report_of(found, name, bench.task.name)


def partial_report_of(found: PartialModality, name: str, task: str) -> Report:
    """The result as a page: the scores, and what each modality keeps of the gain.

    Example:
        >>> r = PartialModality(("text", "image"), (0.75, 0.5), 1.0, 0.5)
        >>> partial_report_of(r, "a", "vqa").summary
        'Of its gain of +0.500 on vqa the adapter keeps, on for one modality alone, 50 % for text, 0 % for image.'
    """
    places = ("none", *(f"{group} alone" for group in found.modalities), "all")
    values = (found.base, *found.values, found.whole)
    bars = Bars("Score with the update on for", task, places, (Series(name, places, values),))
    shares = found.shares or (None,) * len(found.modalities)
    rows = zip(found.modalities, shares, found.values, strict=True)
    table = Table("Each modality alone", ("modality", "share of the gain", "score"), tuple(rows))
    gain = f"{found.whole - found.base:+.3f}"
    told = f"On {task} the adapter gains nothing over the base ({gain}), so there are no shares to tell."
    if found.shares:
        kept = (f"{100 * s:.0f} % for {group}" for group, s in zip(found.modalities, found.shares, strict=True))
        told = f"Of its gain of {gain} on {task} the adapter keeps, on for one modality alone, {', '.join(kept)}."
    return Report(
        "Partial modality",
        told,
        (bars, table),
        run={"task": task, "adapter": name},
        records=(found.to_json(),),
    )


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
    score, told = _asked(next(iter(adapters.values())), task, model, split, limit)
    if len(adapters) == 1:
        ((name, adapter),) = adapters.items()
        return shapley_report_of(shapley(adapter, score, **options), name, told())
    return shapley_report_of(shapley(adapters, score, **{"unit": "adapter", **options}), ", ".join(adapters), told())


def _asked(
    adapter: Adapter, task: Any, model: str, split: str, limit: int | None
) -> tuple[Callable[[Adapter | None], float], Callable[[], str]]:
    """A score and the name of its task; the model is loaded when one is first called: wrong requests fail before."""
    bench = cache(lambda: edge("statistics").bench_for(adapter, task, model))
    return (lambda variant: bench().evaluate(variant, split, limit).value), (lambda: bench().task.name)


def shapley_report_of(found: Shapley, name: str, task: str) -> Report:
    """The result as a page: the values, and whether they add up.

    Example:
        >>> units = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
        >>> r = Shapley(units, (0.1, 0.0, 0.2, 0.1), (0.0,) * 4, "exact", "module", 0, 16, 18, 0.9, 0.5, 1e-9)
        >>> shapley_report_of(r, "a", "digits").panels[0].z
        ((0.1, 0.0), (0.2, 0.1))
    """
    gain = found.whole - found.base
    third = max(1, round(len(found.units) / 3))
    share = found.top_third
    rows: list[tuple[str, Any, str]] = [
        ("gain", gain, f"score {found.whole:.4g} with all on, {found.base:.4g} with none"),
        ("top third", share, f"share of the sum that the {third} highest of {len(found.units)} have"),
        ("gap", found.gap, "sum of the values less the gain"),
        ("evaluations", found.evaluations, f"{found.saved} more were known; {found.samples} draws"),
    ]
    told = f"{found.by} values of {len(found.units)} units ({found.unit}) for a gain of {gain:+.3f} on {task}"
    if share is not None:
        told += f"; the highest {third} have {100 * share:.0f} % of the sum"
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
    pairs = list(zip(found.values, found.stderr, strict=True))
    low, high = (tuple(value + z * error for value, error in pairs) for z in (-1.96, 1.96))
    ends = {"low": low, "high": high} if any(found.stderr) else {}
    series = Series(name, found.units, found.values, **ends)
    return Bars(f"{title} by {found.unit}", "value", found.units, (series,), _error(found))


def _error(found: Shapley) -> str:
    worst = max(found.stderr)
    return f"Standard errors are at most {worst:.2g}." if worst else "The values are exact."


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
    score, told = _asked(adapter, task, model, split, limit)
    return stability_report_of(stability(adapter, score, **options), name, told())


def stability_report_of(found: Stability, name: str, task: str) -> Report:
    """The result as a page: the curve with its interval, those of pruning, and how much of the gain stays.

    Example:
        >>> ends = ((0.8,), (0.7,), (0.9,), ((0.75, 0.85),), "layer", 4, 1.0, 0.6, None, None, 6, 0)
        >>> stability_report_of(Stability((0.5,), *ends), "a", "digits").summary
        'With each layer off by a chance of 0.5 the adapter scores 0.800 on digits (all on: 1.000, none: 0.600).'
    """
    drawn = Series(name, found.at, found.mean, found.low, found.high)
    curves = {"units of the smallest update": found.structured, "smallest entries": found.unstructured}
    pruned = [Series(f"{name}, pruned: {what}", found.at, y) for what, y in curves.items() if y is not None]
    note = f"Means of {len(found.scores[0])} draws with 95 % intervals; {found.units} units ({found.unit})."
    x_label = "share off" if pruned else "chance of a unit to be off"
    curve = Curve(f"Score with units off: {found.unit}", x_label, task, (drawn, *pruned), note)
    gain = found.whole - found.base
    rows: list[tuple[str, Any, str]] = [
        ("all on", found.whole, "the adapter as it is"),
        ("all off", found.base, "the base"),
        *((f"kept at {p:g}", (y - found.base) / gain, "share of the gain") for p, y in _steps(found) if gain > 0),
        ("evaluations", found.evaluations, f"{found.saved} more were known"),
    ]
    p, y = found.at[-1], found.mean[-1]
    return Report(
        "Stability",
        f"With each {found.unit} off by a chance of {p:g} the adapter scores {y:.3f} on {task} (all on:"
        f" {found.whole:.3f}, none: {found.base:.3f}).",
        (curve, Table("Summary", ("figure", "value", "meaning"), tuple(rows))),
        run={"task": task, "adapter": name},
        records=(found.to_json(),),
    )


def _steps(found: Stability) -> list[tuple[float, float]]:
    return list(zip(found.at, found.mean, strict=True))


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
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{where}: score of {unit} is {score!r}; scores must be finite numbers")
    return {unit: max(score, least) for unit, score in scores.items()} if listed else scores
