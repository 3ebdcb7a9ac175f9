"""Arms whose results are known: read from the ``results.json`` of another sweep instead of being trained again.

A page holds the accuracy of every group of seeds, not of every example, so means and intervals over seeds and tasks
are as if the arm had been run here, and intervals over examples are not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loraloom.report import Report, Table, files
from loraloom.report.grid import flat
from loraloom.sweep.operations import ALONE, BASE, Operation, groups, operations
from loraloom.sweep.plan import Cell, Group, about, cells, everywhere, where
from loraloom.sweep.table import Measure, Sweep
from loraloom.untrusted import is_number, short

TIMES = ("Training time", ("arm", "device", "runs", "seconds a run", "jobs without finite weights"))  # of a page
_EARLIER = {"device": "not noted", "jobs without finite weights": 0}  # where a page does not tell


@dataclass
class Known:
    """Results of arms from elsewhere.

    Attributes:
        source: the file that each arm is read from.
        said: a line on each arm that a file has: that it is read, or why it is not.
        chosen: the learning rate that validation chose, by arm, axes and task.
        validation: the mean accuracy that a rate was chosen by; None where the file does not tell.
        accuracy: by place and operation, of each group of seeds.
        records: as they stand in the file, of the places that the sweep has.
        times: rows of the table of training times.
    """

    source: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    chosen: dict[Any, float] = field(default_factory=dict)
    validation: dict[Cell, float | None] = field(default_factory=dict)
    accuracy: dict[tuple[Cell, str], dict[Group, float]] = field(default_factory=dict)
    records: list[Mapping[str, Any]] = field(default_factory=list)
    times: list[tuple[Any, ...]] = field(default_factory=list)

    def own(self, sweep: Sweep) -> Sweep:
        """The sweep without these arms: what is to be run."""
        return sweep.model_copy(update={"arms": {k: v for k, v in sweep.arms.items() if k not in self.source}})

    def outcomes(self) -> dict[tuple[Cell, str], dict[Group, np.ndarray]]:
        """As outcomes of one example each, whose mean is the accuracy: enough for all but intervals over examples."""
        return {key: {group: np.array([one]) for group, one in each.items()} for key, each in self.accuracy.items()}


NOTHING = Known()


def known(sweep: Sweep, paths: Sequence[Path | str]) -> Known:
    """The arms of a sweep that finished sweeps have; each is read from the first file that has all of it.

    Args:
        sweep: the table.
        paths: ``results.json`` files, or folders that hold one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no sweep's, has none of the arms, or other tasks, seeds, examples or recipe; it says which.

    Example:
        >>> from loraloom.sweep import read
        >>> known(read("recipes/small/sweep-images.yaml"), ["docs/results/images"]).source   # doctest: +SKIP
        {'LoRA': 'docs/results/images', 'CoTo': 'docs/results/images', ...}
    """
    made = Known()
    for path in map(str, paths):
        found = files.read([path])
        try:
            for arm, same in _arms(sweep, found.run).items():
                if arm in made.source:
                    continue
                lack = _taken(sweep, arm, found, path, made) if same else "it as it is in this sweep"
                made.said.append(
                    f"{arm} is not read from {path}: it lacks {lack}" if lack else f"{arm} is read from {path}"
                )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return made


def _arms(sweep: Sweep, run: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the arms that a finished sweep has, too, are the same as in this one.

    Raises:
        ValueError: it has none of them, or the sweeps are not comparable.
    """
    ours, mine = _told(about(sweep))
    try:
        theirs, there = _told(run)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("not the results of a sweep") from None
    for name in dict.fromkeys([*theirs, *ours]):
        one, other = (short(told[name]) if name in told else "the default" for told in (theirs, ours))
        if one != other and not (name == "draws" and "the default" in (one, other)):
            raise ValueError(f"{name} is {one} there and {other} in this sweep")
    both = {arm: there[arm] == told for arm, told in mine.items() if arm in there}
    if not both:
        raise ValueError(f"none of the arms {', '.join(mine)} is there")
    return both


def _told(run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes two sweeps comparable, and what makes two arms the same."""
    sweep, recipe = run["sweep"], dict(run["recipe"])
    usual = {name: one.default for name, one in Sweep.model_fields.items()}  # a page leaves them out
    measure = {"split": Measure().split, **dict(sweep.get("measure", {}))}
    seeds = list(sweep.get("seeds", usual["seeds"]))
    told = {"tasks": [*map(_task, sweep["tasks"])], "seeds": seeds, "limit": sweep.get("limit")}
    told |= {"tuned_on": sorted(sweep.get("tuned_on") or seeds), "axes": dict(sweep.get("axes", {}))}
    told |= {"split": measure["split"]}
    if "coalitions" in measure:
        told["draws"] = measure["coalitions"].get("draws", "usual")
    told |= {f"recipe's {key}": one for key, one in flat(recipe) if key != "train.learning_rate"}
    rates = {arm: sorted(keys.get("rates", sweep["rates"])) for arm, keys in sweep["arms"].items()}
    return told, {arm: {**dict(keys), "rates": rates[arm]} for arm, keys in sweep["arms"].items()}


def _task(name: object) -> str:
    """A task's name; a file counts by its own name, wherever it lies."""
    return Path(str(name)).name if str(name).endswith((".yaml", ".yml")) else str(name)


def _taken(sweep: Sweep, arm: str, found: Report, path: str, made: Known) -> str:
    """Take an arm from a page, or say what the page lacks.

    Raises:
        ValueError: a value in it is impossible.
    """
    asked = {one.name: one for one in (BASE, ALONE, *operations(sweep))}
    records = {key: record for key, record in _matched(sweep, arm, found.records).items() if key[1] in asked}
    accuracy = {(cell, name): _by_group(sweep, asked[name], record) for (cell, name), record in records.items()}
    alone = {cell: record for (cell, name), record in records.items() if name == ALONE.name}
    chosen = {cell.place: cell.rate for cell, record in alone.items() if record.get("chosen") is True}
    for cell in (cell for cell in cells(sweep) if cell.arm == arm):
        if cell.place not in chosen:
            return f"a chosen rate on {cell.task}"
        for one in (ALONE, *operations(sweep)):
            here = accuracy.get((cell, one.name), {})
            missing = [group for group in groups(sweep, one) if group not in here]
            if missing and (cell.rate == chosen[cell.place] or everywhere(sweep, one)):
                return f"{one.name!r} on {cell.task} for seeds {', '.join(map(str, missing[0]))}"
    made.source[arm] = path
    made.chosen |= chosen
    for cell, record in alone.items():
        made.validation[cell] = record["validation"] if is_number(record.get("validation")) else None
    made.accuracy |= accuracy
    made.records += records.values()
    for table in found.panels:
        if isinstance(table, Table) and table.title == TIMES[0]:
            rows = [{**_EARLIER, **dict(zip(table.columns, row, strict=True))} for row in table.rows]
            made.times += [tuple(map(row.get, TIMES[1])) for row in rows if row.get("arm") == arm]
    return ""


def _matched(sweep: Sweep, arm: str, records: Sequence[Mapping[str, Any]]) -> dict[tuple[Cell, str], Mapping[str, Any]]:
    """The records of an arm's places, by place and measurement."""

    def place(told: Mapping[str, Any]) -> tuple[str, ...]:
        axes = [name for name in where(sweep, next(cells(sweep))) if name != "task"]
        return (_task(told.get("task")), *(str(told.get(name)) for name in ("arm", "rate", *axes)))

    every = (cell for cell in cells(sweep) if cell.arm == arm)
    places = {place({"arm": arm, "rate": cell.rate, **where(sweep, cell)}): cell for cell in every}
    at = ((places.get(place(record)), record) for record in records)
    return {(cell, str(record.get("measurement"))): record for cell, record in at if cell is not None}


def _by_group(sweep: Sweep, operation: Operation, record: Mapping[str, Any]) -> dict[Group, float]:
    """Accuracies by the seeds that went into them; a record names each group by its first seed.

    Raises:
        ValueError: a value is not an accuracy.
    """
    together = {str(group[0]): group for group in groups(sweep, operation)}
    name, told = operation.name, record.get("by_seed")
    if not isinstance(told, dict) or not set(told) <= set(together):
        raise ValueError(f"by_seed of {name!r} must map seeds of {list(sweep.seeds)} to accuracies, got {short(told)}")
    for value in told.values():
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"an accuracy of {name!r} must be between 0 and 1, got {short(value)}")
    return {together[seed]: float(value) for seed, value in told.items()}
