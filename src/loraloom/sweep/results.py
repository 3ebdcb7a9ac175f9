"""What a finished sweep says: chosen rates, every measurement by arm, each arm against the first, maps over rates."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from scipy.special import stdtrit

from loraloom import __version__
from loraloom.report import Bars, Curve, Heatmap, Panel, Report, Series, Table
from loraloom.sweep.operations import operations
from loraloom.sweep.plan import Cell, cells
from loraloom.sweep.table import Sweep
from loraloom.sweep.work import Journal, chooser, finished
from loraloom.tasks.metrics import difference

Outcomes = Mapping[int, np.ndarray]  # by first seed: the outcome of every example
Key = tuple[Cell, str]  # a place of the table and the name of an operation
Place = tuple[tuple[str, ...], str]  # axes and task


def spread(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean and Student's interval of it over seeds; one value has none.

    Example:
        >>> [round(end, 3) for end in spread([0.8, 0.9])]
        [0.85, 0.215, 1.485]
    """
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, None, None
    half = float(stdtrit(count - 1, 0.5 + level / 2)) * float(np.std(values, ddof=1)) / count**0.5
    return mean, mean - half, mean + half


def _rounded(*values: float | None) -> tuple[float | None, ...]:
    return tuple(None if value is None else round(float(value), 4) + 0.0 for value in values)  # no -0


class Found:
    """All outcomes of a finished sweep by place and operation."""

    def __init__(self, sweep: Sweep, journal: Journal) -> None:
        self.sweep, self.journal = sweep, journal
        self.choose = chooser(sweep, journal)
        self.jobs = finished(sweep, journal)
        drawn: dict[Key, dict[int, list[np.ndarray]]] = {}  # a coalition has several draws a seed
        self.validation: dict[Cell, list[float]] = {}
        for job in self.jobs:
            outcome = journal.correct(job, job.splits[-1])
            drawn.setdefault((job.cell, job.operation.name), {}).setdefault(job.seed, []).append(outcome)
            if job.operation.how == "alone" and job.seed in (sweep.tuned_on or sweep.seeds):
                value = float(journal.correct(job, "validation").mean())
                self.validation.setdefault(job.cell, []).append(value)
        self.by: dict[Key, dict[int, np.ndarray]] = {
            key: {seed: np.mean(outcomes, axis=0) for seed, outcomes in seeds.items()} for key, seeds in drawn.items()
        }

    @property
    def chosen(self) -> list[Cell]:
        """The places with the chosen rate, in order."""
        places = dict.fromkeys((cell.axes, cell.task) for cell in cells(self.sweep))
        return [self.at(arm, *place) for place in places for arm in self.sweep.arms]

    def first(self, cell: Cell) -> Cell:
        """The place of the first arm that a place is compared with, at that arm's own choice."""
        return self.at(next(iter(self.sweep.arms)), cell.axes, cell.task)

    def at(self, arm: str, axes: tuple[str, ...], task: str) -> Cell:
        """The place of an arm at its chosen rate."""
        return Cell(arm, axes, task, self.choose(Cell(arm, axes, task, 0.0)))


def summarised(sweep: Sweep, journal: Journal, *, seconds: float, processes: int) -> Report:
    """The report of a sweep whose jobs are all done."""
    found = Found(sweep, journal)
    names = ["alone", *dict.fromkeys(operation.name for operation in operations(sweep))]
    optional: list[Panel | None] = []
    if len(sweep.arms) > 1:
        optional += _over_tasks(found, names) if len(sweep.tasks) > 1 else ()
        optional.append(_by_setting(found, names))
    optional.append(_barriers(found))
    panels = [_rates(found), *(panel for panel in optional if panel is not None), *_paths(found), *_maps(found, names)]
    panels.append(_time(found))
    panels += [_against(found, names)] if len(sweep.arms) > 1 else []
    panels.append(_all(found, names))  # the longest ones last
    about = {
        "sweep": sweep.model_dump(mode="json", exclude={"recipe"}, exclude_defaults=True)
        | {"recipe": sweep.recipe.name},
        "version": __version__,
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "seconds of the last call": round(seconds, 1),
        "processes of the last call": processes,
        "jobs": len(found.jobs),
    }
    return Report(sweep.title, _summary(found), tuple(panels), run=about, records=tuple(_records(found)))


def _where(sweep: Sweep, cell: Cell) -> tuple[Any, ...]:
    values = [json.loads(value) for value in cell.axes]
    told = [
        value if isinstance(value, str | int | float) else text for value, text in zip(values, cell.axes, strict=True)
    ]
    return (*told, cell.task)


def _columns(sweep: Sweep) -> tuple[str, ...]:
    return (*(key.rsplit(".", 1)[-1] for key in sweep.axes), "task")


def _rates(found: Found) -> Table:
    sweep = found.sweep
    rows = []
    for cell in found.chosen:
        edge = cell.rate in (min(sweep.rates), max(sweep.rates)) and len(sweep.rates) > 1
        mean = float(np.mean(found.validation[cell]))
        rows.append((*_where(sweep, cell), cell.arm, cell.rate, round(mean, 4), "yes" if edge else ""))
    return Table(
        "Learning rates chosen on validation",
        (*_columns(sweep), "arm", "rate", "validation", "at the end of the grid"),
        tuple(rows),
        note=f"Every arm chose from {', '.join(f'{rate:g}' for rate in sweep.rates)}, by the mean of its seeds "
        f"{', '.join(map(str, sweep.tuned_on or sweep.seeds))}. At an end of the grid a better rate may lie beyond.",
    )


def _all(found: Found, names: Sequence[str]) -> Table:
    rows = []
    for cell in found.chosen:
        for name in names:
            if outcomes := found.by.get((cell, name)):
                told = (*_rounded(*spread([float(one.mean()) for one in outcomes.values()])), len(outcomes))
                rows.append((*_where(found.sweep, cell), name, cell.arm, *told))
    return Table(
        "Accuracy at the chosen rates",
        (*_columns(found.sweep), "measurement", "arm", "mean", "low", "high", "n"),
        tuple(rows),
        note="Student's 95 % interval over n seeds, or groups of seeds, which overlap from three on; none for n = 1.",
    )


def _against(found: Found, names: Sequence[str]) -> Table:
    rows = []
    for cell in found.chosen:
        other = found.first(cell)
        for name in names if other.arm != cell.arm else ():
            gap = _gap(found.by.get((cell, name)), found.by.get((other, name)))
            if gap is not None:
                rows.append((*_where(found.sweep, cell), name, cell.arm, *gap))
    reference = next(iter(found.sweep.arms))
    told = ("difference", "low, seeds", "high, seeds", "low, examples", "high, examples")
    return Table(
        f"Against {reference}",
        (*_columns(found.sweep), "measurement", "arm", *told),
        tuple(rows),
        note=f"Accuracy minus that of {reference} on the same examples and seeds, each arm at its own chosen rate. "
        "95 % intervals: Student's over seeds, and a paired bootstrap over examples for these seeds.",
    )


def _over_tasks(found: Found, names: Sequence[str]) -> Iterator[Panel]:
    """Means over the tasks, and every arm's gap to the first one, as a table and as bars."""
    sweep, reference = found.sweep, next(iter(found.sweep.arms))
    rows = []
    bars: dict[tuple[tuple[str, ...], str], list[tuple[str, Any]]] = {}
    for axes, name, arm in product(dict.fromkeys(cell.axes for cell in found.chosen), names, sweep.arms):
        pairs = [[found.by.get((found.at(a, axes, task), name), {}) for a in (arm, reference)] for task in sweep.tasks]
        seeds = [seed for seed in sweep.seeds if all(seed in one for pair in pairs for one in pair)]
        if seeds:
            means = np.array([[[one[seed].mean() for seed in seeds] for one in pair] for pair in pairs])
            gaps = means[:, 0] - means[:, 1]  # tasks x seeds
            told = (gaps.mean(), *spread(gaps.mean(axis=0))[1:], *spread(gaps.mean(axis=1))[1:])
            where = _where(sweep, Cell(arm, axes, "", 0.0))[:-1]
            rows.append((*where, name, arm, *_rounded(means[:, 0].mean(), *(told if arm != reference else [None] * 5))))
            if arm != reference and len(seeds) > 1:
                bars.setdefault((axes, arm), []).append((name, _rounded(*told[:3])))
    columns = (
        "measurement",
        "arm",
        "mean",
        f"minus {reference}",
        "low, seeds",
        "high, seeds",
        "low, tasks",
        "high, tasks",
    )
    yield Table(
        "Over the tasks",
        (*_columns(sweep)[:-1], *columns),
        tuple(rows),
        note=f"Accuracy averaged over the {len(sweep.tasks)} tasks. 95 % intervals, both Student's: over seeds, of the "
        "gap averaged over the tasks; over tasks, of the gap averaged over the seeds (what other tasks would show).",
    )
    tables = list(dict.fromkeys(axes for axes, _ in bars))
    for axes in tables:
        series = []
        for arm in sweep.arms:
            if ends := bars.get((axes, arm)):
                gap, low, high = zip(*(values for _, values in ends), strict=True)
                series.append(Series(arm, tuple(name for name, _ in ends), gap, low, high))
        yield Bars(
            f"Gap to {reference} over the tasks" + (f": {', '.join(axes)}" if len(tables) > 1 else ""),
            f"accuracy minus {reference}",
            tuple(dict.fromkeys(str(name) for one in series for name in one.x)),
            tuple(series),
            note="Means over the tasks, intervals over the seeds.",
        )


def _by_setting(found: Found, names: Sequence[str]) -> Table | None:
    """Where every rate was measured: mean gaps to the first arm, everywhere and at each rate and value of an axis."""
    sweep = found.sweep
    reference, *others = sweep.arms
    every = [cell for cell in cells(sweep) if cell.arm == reference]
    settings = {f"rate {rate:g}": [cell for cell in every if cell.rate == rate] for rate in sweep.rates}
    for at, key in enumerate(sweep.axes):
        for value in dict.fromkeys(cell.axes[at] for cell in every):
            settings[f"{key.rsplit('.', 1)[-1]} {value}"] = [cell for cell in every if cell.axes[at] == value]
    settings = {name: there for name, there in settings.items() if len(there) < len(every)}
    if sweep.measure.rates != "all" or not settings:
        return None
    rows = []
    for name, arm in product(names, others):
        gaps = {}
        for cell in every:
            gap = _gap(found.by.get((replace(cell, arm=arm), name)), found.by.get((cell, name)))
            if gap is not None and gap[0] is not None:
                gaps[cell] = gap[0]
        if gaps:
            means = [[gaps[cell] for cell in there if cell in gaps] for there in (every, *settings.values())]
            better = f"{sum(gap > 0 for gap in gaps.values())} of {len(gaps)}"
            rows.append((name, arm, better, *(round(float(np.mean(one)), 4) if one else None for one in means)))
    return Table(
        f"Where the gap to {reference} grows",
        ("measurement", "arm", "better in", "everywhere", *settings),
        tuple(rows),
        note=f"Accuracy minus that of {reference} at the same rate, averaged over all places of the table with that "
        "setting; all seeds. No intervals: places are not drawn at random.",
    )


def _gap(one: Outcomes | None, other: Outcomes | None) -> tuple[float | None, ...] | None:
    """Mean difference with both intervals, over the seeds that both have."""
    shared = [seed for seed in one or {} if seed in (other or {})]
    if one is None or other is None or not shared:
        return None
    mean, low, high = spread([float(one[seed].mean() - other[seed].mean()) for seed in shared])
    pooled = difference(*(np.mean([each[seed] for seed in shared], axis=0) for each in (one, other)))
    return _rounded(mean, low, high, pooled.low, pooled.high)


def _barriers(found: Found) -> Table | None:
    """How far the path between two seeds sags below the line between its ends."""
    asked = found.sweep.measure.interpolate
    rows = []
    for cell in found.chosen if asked else ():
        seeds = found.sweep.seeds
        after = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
        for space in asked.spaces if asked else ():
            heights = []
            points = [one for one in operations(found.sweep) if one.arguments.get("space") == space]
            path = [(one.arguments["at"], found.by[cell, one.name]) for one in points if one.how == "interpolate"]
            for seed in path[0][1]:
                ends = [float(found.by[cell, "alone"][end].mean()) for end in (seed, after[seed])]
                sag = [
                    (1 - at) * ends[0] + at * ends[1] - float(outcomes[seed].mean())
                    for at, outcomes in path
                    if seed in outcomes
                ]
                heights.append(max(sag))
            told = _rounded(*spread(heights))
            rows.append((*_where(found.sweep, cell), space, cell.arm, *told, len(heights)))
    if not rows:
        return None
    return Table(
        "Barriers between seeds",
        (*_columns(found.sweep), "space", "arm", "height", "low", "high", "n"),
        tuple(rows),
        note="The most that accuracy on the path between two seeds lies below the line between its ends; below 0 the "
        "path is above the line at every point that was measured.",
    )


def _paths(found: Found) -> Iterator[Panel]:
    asked = found.sweep.measure.interpolate
    if asked is None or len(asked.at) < 2:
        return
    places = dict.fromkeys((cell.axes, cell.task) for cell in found.chosen)
    for place in places:
        series = []
        for cell in found.chosen:
            if (cell.axes, cell.task) != place:
                continue
            for space in asked.spaces:
                points = [one for one in operations(found.sweep) if one.arguments.get("space") == space]
                points = sorted(
                    (one for one in points if one.how == "interpolate"), key=lambda one: one.arguments["at"]
                )
                values = [spread([float(o.mean()) for o in found.by[cell, one.name].values()])[0] for one in points]
                series.append(
                    Series(f"{cell.arm}, {space}", tuple(one.arguments["at"] for one in points), tuple(values))
                )
        title = f"Between two seeds: {', '.join(map(str, (*place[0], place[1])))}"
        yield Curve(title, "position between the two adapters", "accuracy", tuple(series), note="Means over pairs.")


def _maps(found: Found, names: Sequence[str]) -> Iterator[Panel]:
    """Where every rate was measured: accuracy by rate, alone and after each operation, and gaps to the first arm."""
    sweep = found.sweep
    if len(sweep.rates) < 2:
        return
    places = list(dict.fromkeys((cell.axes, cell.task) for cell in found.validation))
    told = [(*axes, task) for axes, task in places]
    differ = [at for at, values in enumerate(zip(*told, strict=True)) if len(set(values)) > 1] or [-1]
    labels = tuple(", ".join(one[at] for at in differ) for one in told)
    first = next(iter(sweep.arms))

    def mean(name: str, arm: str, place: Place, rate: float) -> float | None:
        outcomes = found.by.get((Cell(arm, *place, rate), name), {})
        return float(np.mean([one.mean() for one in outcomes.values()])) if outcomes else None

    def gap(name: str, arm: str, place: Place, rate: float) -> float | None:
        told = _gap(*(found.by.get((Cell(one, *place, rate), name)) for one in (arm, first)))
        return None if told is None else told[0]

    for name in names if sweep.measure.rates == "all" else ["alone"]:
        for arm in sweep.arms:
            title, value = (f"{name}: {arm}", mean) if arm == first else (f"{name}: {arm} minus {first}", gap)
            z = tuple(tuple(value(name, arm, place, rate) for rate in sweep.rates) for place in places)
            yield Heatmap(title, "learning rate", "place", sweep.rates, labels, z)


def _time(found: Found) -> Table:
    rows = []
    for arm in found.sweep.arms:
        told = [found.journal.get(job) or {} for job in found.jobs if job.cell.arm == arm]
        times = [one["seconds"] for one in told if one.get("seconds") is not None]
        rows.append(
            (arm, len(times), round(float(np.mean(times)), 1) if times else None, sum(one["broken"] for one in told))
        )
    return Table(
        "Training time",
        ("arm", "runs", "seconds a run", "jobs without finite weights"),
        tuple(rows),
        note="Wall time on a machine that others may have used too. Where weights are not finite, no answer is right.",
    )


def _summary(found: Found) -> str:
    """What came out, in words that follow from the numbers alone."""
    sweep, reference = found.sweep, next(iter(found.sweep.arms))
    text = f"{len(found.jobs)} jobs; {len(sweep.seeds)} seeds; learning rate of each arm chosen on validation."
    names = ["alone", *dict.fromkeys(operation.name for operation in operations(sweep))]
    for arm in list(sweep.arms)[1:]:
        cells = [cell for cell in found.chosen if cell.arm == arm]
        gaps = [_gap(found.by.get((c, name)), found.by.get((found.first(c), name))) for c in cells for name in names]
        ends = [(gap[1], gap[2]) for gap in gaps if gap is not None]
        told = [(low, high) for low, high in ends if low is not None and high is not None]
        better, worse = sum(low > 0 for low, _ in told), sum(high < 0 for _, high in told)
        text += (
            f" Of {len(told)} measurements on several seeds {arm} is better than {reference} beyond the interval over "
            f"seeds in {better}, worse in {worse}, and not told apart in {len(told) - better - worse}."
        )
    return text


def _records(found: Found) -> Iterator[dict[str, Any]]:
    for (cell, name), outcomes in found.by.items():
        where = dict(zip(_columns(found.sweep), _where(found.sweep, cell), strict=True))
        values = {str(seed): float(one.mean()) for seed, one in outcomes.items()}
        yield {
            **where,
            "arm": cell.arm,
            "rate": cell.rate,
            "measurement": name,
            "examples": len(next(iter(outcomes.values()))),
            "by_seed": values,
            "chosen": cell.rate == found.choose(cell),
        }
