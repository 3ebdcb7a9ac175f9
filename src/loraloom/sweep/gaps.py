"""Every arm against the first one, over the tasks of a table: a line a measurement, all the figures, a drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from loraloom.report import Bars, Heatmap, Panel, Series, Table
from loraloom.sweep.found import Found, rounded, spread
from loraloom.sweep.plan import Cell, where

OVER_SEEDS = (
    "95 % interval by the jackknife (Student's where no two groups share a seed; none of too few seeds, or where all "
    "are equal)"
)
MOST_BARS = 4  # beside each other; of more arms a heat map is drawn
NO_BREAK = "\u00a0"  # a space at which no line ends
Axes = tuple[str, ...]
Interval = tuple[float | None, ...]  # the middle and its ends, if it has any


@dataclass(frozen=True)
class Gap:
    """An arm's accuracy and how far it is ahead of the first arm, averaged over tasks and groups of seeds."""

    mean: float
    over_seeds: Interval
    over_tasks: Interval

    def __str__(self) -> str:
        """One cell of a table; marked where zero lies outside the interval over seeds."""
        gap, low, high = self.over_seeds
        if low is None or high is None:
            return f"{self.mean:.3f} ({gap:+.3f})"
        mark = " ▲" if low > 0 else " ▼" if high < 0 else ""
        around = f"({gap:+.3f} ± {(high - low) / 2:.3f}){mark}"
        return f"{self.mean:.3f} {around.replace(' ', NO_BREAK)}"


Gaps = Mapping[tuple[str, str], Gap]  # by measurement and arm


def gaps_over_tasks(found: Found, names: Sequence[str]) -> Iterator[Panel]:
    """Of every combination of axes a line a measurement; of several tasks all the figures and a drawing too."""
    tables = list(dict.fromkeys(cell.axes for cell in found.chosen))
    told = {axes: _gaps(found, axes, names) for axes in tables}
    suffix = {axes: f": {', '.join(axes)}" if len(tables) > 1 else "" for axes in tables}
    yield from (_by_arm(found, told[axes], suffix[axes]) for axes in tables)
    if len(found.sweep.tasks) > 1:
        yield _figures(found, told)
        for axes in tables:
            yield from _drawn(found, told[axes], suffix[axes])


def _gaps(found: Found, axes: Axes, names: Sequence[str]) -> Gaps:
    """Of the groups of seeds that the arm and the first one have of every task."""
    arms, tasks = list(found.sweep.arms), found.sweep.tasks
    gaps = {}
    for name, arm in product(names, arms):
        pairs = [[found.by.get((found.at(one, axes, task), name), {}) for one in (arm, arms[0])] for task in tasks]
        groups = [group for group in pairs[0][0] if all(group in one for pair in pairs for one in pair)]
        if groups:
            scores = np.array([[[one[group].mean() for group in groups] for one in pair] for pair in pairs])
            ahead = scores[:, 0] - scores[:, 1]  # tasks x groups of seeds
            over_seeds = spread(dict(zip(groups, ahead.mean(axis=0), strict=True)))
            over_tasks = spread({(at,): gap for at, gap in enumerate(ahead.mean(axis=1))})
            gaps[name, arm] = Gap(float(scores[:, 0].mean()), over_seeds, over_tasks)
    return gaps


def _on(found: Found) -> str:
    tasks = len(found.sweep.tasks)
    return f"Accuracy on {found.sweep.measure.split}" + (f", averaged over the {tasks} tasks" if tasks > 1 else "")


def _by_arm(found: Found, gaps: Gaps, suffix: str) -> Table:
    reference = next(iter(found.sweep.arms))
    rows = []
    for name in dict.fromkeys(name for name, _ in gaps):
        first, *rest = (gaps.get((name, arm)) for arm in found.sweep.arms)
        told = (None if one is None else str(one) for one in rest)
        rows.append((name, None if first is None else f"{first.mean:.3f}", *told))
    return Table(
        f"Arm by arm{suffix}",
        ("measurement", *found.sweep.arms),
        tuple(rows),
        note=f"{_on(found)}, each arm at its own chosen rate; in brackets minus {reference} ± half of its "
        f"{OVER_SEEDS}. ▲ better, ▼ worse than {reference} beyond that interval.",
    )


def _figures(found: Found, told: Mapping[Axes, Gaps]) -> Table:
    sweep, reference = found.sweep, next(iter(found.sweep.arms))
    rows = []
    for axes, gaps in told.items():
        *place, _ = where(sweep, Cell(reference, axes, "", 0.0)).values()
        for (name, arm), gap in gaps.items():
            ends = (*gap.over_seeds, *gap.over_tasks[1:]) if arm != reference else [None] * 5
            rows.append((*place, name, arm, *rounded(gap.mean, *ends)))
    *axes_told, _ = where(sweep, Cell(reference, next(iter(told)), "", 0.0))
    ends_told = ("low, seeds", "high, seeds", "low, tasks", "high, tasks")
    return Table(
        "Over the tasks",
        (*axes_told, "measurement", "arm", "mean", f"minus {reference}", *ends_told),
        tuple(rows),
        note=f"{_on(found)}. Over seeds, of the gap averaged over the tasks: {OVER_SEEDS}. Over tasks, of the gap "
        "averaged over the seeds (what other tasks would show): Student's 95 % interval.",
    )


def _drawn(found: Found, gaps: Gaps, suffix: str) -> Iterator[Panel]:
    """Bars, or of many arms a heat map."""
    reference, *others = found.sweep.arms
    names = tuple(dict.fromkeys(name for name, _ in gaps))
    title, label = f"Gap to {reference} over the tasks{suffix}", f"accuracy minus {reference}"
    if len(others) > MOST_BARS:
        held = [[gaps.get((name, arm)) for arm in others] for name in names]
        z = tuple(tuple(None if one is None else rounded(one.over_seeds[0])[0] for one in row) for row in held)
        yield Heatmap(title, "", "", tuple(others), names, z, note="Means over the tasks.", z_label=label)
        return
    series = []
    for arm in others:
        ends = {name: rounded(*gap.over_seeds) for (name, one), gap in gaps.items() if one == arm}
        ends = {name: one for name, one in ends.items() if one[1] is not None}
        if ends:
            series.append(Series(arm, tuple(ends), *zip(*ends.values(), strict=True)))
    if series:
        shown = {name for one in series for name in one.x}
        categories = tuple(name for name in names if name in shown)
        note = f"Means over the tasks. Over seeds: {OVER_SEEDS}."
        yield Bars(title, label, categories, tuple(series), note=note)
