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

from loraloom.report import Table, files
from loraloom.sweep.operations import ALONE, BASE, Operation, groups, operations
from loraloom.sweep.plan import Cell, Group, about, cells, where
from loraloom.sweep.table import Sweep
from loraloom.untrusted import is_number, short

TIMES = ("Training time", ("arm", "device", "runs", "seconds a run", "jobs without finite weights"))  # of a page
_ALIKE = ("tasks", "seeds", "tuned_on", "limit", "axes", "split", "recipe")  # what makes results comparable


@dataclass(frozen=True)
class Known:
    """Results of arms from elsewhere.

    Attributes:
        source: the file that each arm is read from.
        chosen: the learning rate that validation chose, by arm, axes and task.
        validation: the mean accuracy that a rate was chosen by; None where the file does not tell.
        accuracy: by place and operation, of each group of seeds.
        records: as they stand in the file, of the places that the sweep has.
        times: rows of the table of training times.
    """

    source: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[Any, float] = field(default_factory=dict)
    validation: dict[Cell, float | None] = field(default_factory=dict)
    accuracy: Mapping[tuple[Cell, str], Mapping[Group, float]] = field(default_factory=dict)
    records: tuple[Mapping[str, Any], ...] = ()
    times: tuple[tuple[Any, ...], ...] = ()

    def own(self, sweep: Sweep) -> Sweep:
        """The sweep without these arms: what is to be run."""
        return sweep.model_copy(update={"arms": {k: v for k, v in sweep.arms.items() if k not in self.source}})


NOTHING = Known()


def known(sweep: Sweep, paths: Sequence[Path | str]) -> Known:
    """The arms of a sweep that finished sweeps have; of several files that have an arm the first one counts.

    Args:
        sweep: the table.
        paths: ``results.json`` files, or folders that hold one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no sweep's, it has none of the arms, other seeds, rates, examples or runs, or lacks a
            measurement; one line says which.

    Example:
        >>> from loraloom.sweep import read
        >>> known(read("recipes/small/sweep-images.yaml"), ["docs/results/images"]).source   # doctest: +SKIP
        {'LoRA': 'docs/results/images', 'CoTo': 'docs/results/images', ...}
    """
    asked = {one.name: one for one in (BASE, ALONE, *operations(sweep))}
    source: dict[str, str] = {}
    chosen: dict[Any, float] = {}
    validation: dict[Cell, float | None] = {}
    accuracy: dict[tuple[Cell, str], Mapping[Group, float]] = {}
    kept: list[Mapping[str, Any]] = []
    times: list[tuple[Any, ...]] = []
    for path in map(str, paths):
        found = files.read([path])
        try:
            arms = _arms(sweep, found.run)
            new = [arm for arm in arms if arm not in source]
            for (cell, name), record in _matched(sweep, new, found.records).items():
                if name not in asked:
                    continue
                kept.append(record)
                if name == ALONE.name:
                    validation[cell] = record["validation"] if is_number(record.get("validation")) else None
                    if record.get("chosen") is True:
                        chosen[cell.place] = cell.rate
                accuracy[cell, name] = _by_group(sweep, asked[name], record)
            for table in found.panels:
                if isinstance(table, Table) and (table.title, table.columns) == TIMES:
                    times += [row for row in table.rows if row[0] in new]
            source |= dict.fromkeys(new, path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    made = Known(source, chosen, validation, accuracy, tuple(kept), tuple(times))
    _check_whole(sweep, made)
    return made


def _arms(sweep: Sweep, run: Mapping[str, Any]) -> list[str]:
    """The arms that a finished sweep and this one both have.

    Raises:
        ValueError: there is none, or they are not comparable.
    """
    ours = _told(about(sweep))
    try:
        theirs = _told(run)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("not the results of a sweep") from None
    for name in _ALIKE:
        if theirs[name] != ours[name]:
            raise ValueError(f"{name} is {short(theirs[name])} there and {short(ours[name])} in this sweep")
    arms = [arm for arm in sweep.arms if theirs["arms"].get(arm) == ours["arms"][arm]]
    if not arms:
        raise ValueError(f"none of the arms {', '.join(sweep.arms)} is there as it is in this sweep")
    return arms


def _told(run: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two sweeps comparable, and each arm with its rates."""
    sweep = run["sweep"]
    usual = {name: field.default for name, field in Sweep.model_fields.items()}  # a page leaves them out
    usual |= {name: list(value) for name, value in usual.items() if isinstance(value, tuple)}
    told = {name: sweep.get(name, usual.get(name)) for name in _ALIKE}
    told |= {"split": dict(sweep.get("measure", {})).get("split", usual["measure"].split), "recipe": run["recipe"]}
    return told | {"arms": {arm: {"rates": sweep["rates"], **dict(keys)} for arm, keys in sweep["arms"].items()}}


def _matched(
    sweep: Sweep, arms: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> dict[tuple[Cell, str], Mapping[str, Any]]:
    """The records of the arms' places, by place and measurement."""

    def place(told: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(told.get(name)) for name in ("arm", "rate", *where(sweep, next(cells(sweep)))))

    every = (cell for cell in cells(sweep) if cell.arm in arms)
    places = {place({"arm": cell.arm, "rate": cell.rate, **where(sweep, cell)}): cell for cell in every}
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


def _check_whole(sweep: Sweep, made: Known) -> None:
    """Refuse an arm of which something is missing.

    Raises:
        ValueError: it says what.
    """
    chosen_only = sweep.measure.rates == "chosen"
    for cell in cells(sweep):
        if cell.arm not in made.source:
            continue
        rate = made.chosen.get(cell.place)
        if rate is None:
            raise ValueError(f"{made.source[cell.arm]}: no chosen rate of arm {cell.arm} on {cell.task}")
        for one in [ALONE, *operations(sweep)] if cell.rate == rate or not chosen_only else []:
            here = made.accuracy.get((cell, one.name), {})
            if missing := [group for group in groups(sweep, one) if group not in here]:
                raise ValueError(
                    f"{made.source[cell.arm]}: {one.name!r} of arm {cell.arm} on {cell.task} is missing for seeds "
                    f"{list(missing[0])}; leave the arm to be run"
                )


def outcomes(known: Known) -> dict[tuple[Cell, str], dict[Group, np.ndarray]]:
    """As outcomes of a single example each, whose mean is the accuracy: enough for all but intervals over examples."""
    return {key: {group: np.array([one]) for group, one in each.items()} for key, each in known.accuracy.items()}
