"""What a finished sweep found, by place and operation, and its intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from loraloom.intervals import half_width
from loraloom.sweep.known import NOTHING, Known
from loraloom.sweep.plan import Cell, Group, cells
from loraloom.sweep.table import Sweep
from loraloom.sweep.work import Journal, chooser, finished
from loraloom.tasks.metrics import difference

Outcomes = Mapping[Group, np.ndarray]  # by the seeds that went into it: the outcome of every example
Key = tuple[Cell, str]  # a place of the table and the name of an operation


def spread(values: Mapping[Group, float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean over groups of seeds and its interval over seeds, by the jackknife that leaves out one seed after another.

    A seed is left out with all its groups, so groups that share seeds do not pass for independent ones. Of groups of
    one seed it is Student's interval. There is none where leaving a seed out leaves nothing, or changes nothing: values
    that are equal, as accuracies of few examples may be, do not say how they vary.

    Source:
        Efron and Stein 1981, The jackknife estimate of variance.

    Example:
        >>> [round(end, 3) for end in spread({(0,): 0.8, (1,): 0.9})]
        [0.85, 0.215, 1.485]
        >>> spread({(0, 1): 0.8, (1, 0): 0.9})[1:]
        (None, None)
    """
    mean = float(np.mean(list(values.values())))
    seeds = sorted({seed for group in values for seed in group})
    without = [[value for group, value in values.items() if seed not in group] for seed in seeds]
    if not all(without):
        return mean, None, None
    left, count = [np.mean(some) for some in without], len(seeds)
    if np.ptp(left) < 1e-12:
        return mean, None, None
    half = half_width(float(np.var(left) * (count - 1)) ** 0.5, count, level)
    return mean, mean - half, mean + half


def means(outcomes: Outcomes) -> dict[Group, float]:
    """Accuracy of each group."""
    return {group: float(one.mean()) for group, one in outcomes.items()}


def gap_of(one: Outcomes | None, other: Outcomes | None) -> tuple[float | None, ...] | None:
    """Mean difference with its interval over seeds and over examples, of the groups that both have."""
    shared = [group for group in one or {} if group in (other or {})]
    if one is None or other is None or not shared:
        return None
    gaps = {group: float(one[group].mean() - other[group].mean()) for group in shared}
    if any(len(one[group]) != len(other[group]) or len(one[group]) < 2 for group in shared):
        return rounded(*spread(gaps), None, None)  # of one of them single examples are not known
    pooled = difference(*(np.mean([each[group] for group in shared], axis=0) for each in (one, other)))
    return rounded(*spread(gaps), pooled.low, pooled.high)


def rounded(*values: float | None) -> tuple[float | None, ...]:
    """To four decimals, and no -0."""
    return tuple(None if value is None else round(float(value), 4) + 0.0 for value in values)


class Found:
    """All outcomes of a finished sweep by place and operation, on the split that the sweep measures on."""

    def __init__(self, sweep: Sweep, journal: Journal, known: Known = NOTHING) -> None:
        self.sweep, self.journal, self.known = sweep, journal, known
        own = known.own(sweep)
        choose = chooser(own, journal)
        self.choose = lambda cell: known.chosen[cell.place] if cell.arm in known.source else choose(cell)
        self.jobs = finished(own, journal)
        drawn: dict[Key, dict[Group, list[np.ndarray]]] = {}  # a coalition has several draws a seed
        tuned: dict[Cell, list[float]] = {}
        for job in self.jobs:
            split = sweep.measure.split if job.operation.how == "alone" else job.splits[-1]
            outcome = journal.correct(job, split)
            drawn.setdefault((job.cell, job.operation.name), {}).setdefault(job.group, []).append(outcome)
            if job.operation.how == "alone" and job.seed in (sweep.tuned_on or sweep.seeds):
                value = float(journal.correct(job, "validation").mean())
                tuned.setdefault(job.cell, []).append(value)
        self.by: dict[Key, dict[Group, np.ndarray]] = {
            key: {group: np.mean(draws, axis=0) for group, draws in groups.items()} for key, groups in drawn.items()
        } | known.outcomes()
        self.validation = {**known.validation, **{cell: round(float(np.mean(one)), 4) for cell, one in tuned.items()}}

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
