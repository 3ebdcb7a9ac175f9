"""The jobs that a table asks for.

A job is known by what it computes, so that a sweep that was changed finds the jobs that it still shares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loraloom.recipe import Recipe, explain, read_task
from loraloom.recipe import read as read_recipe
from loraloom.sweep.operations import ALONE, BASE, Operation, groups, operations, tried
from loraloom.sweep.table import Sweep
from loraloom.tasks import tasks
from loraloom.untrusted import read_mapping, short

Group = tuple[int, ...]  # seeds that are taken together


@dataclass(frozen=True)
class Cell:
    """A place in the table.

    Attributes:
        arm: its name.
        axes: values of the further axes, in their order, as JSON.
        task: as the sweep names it.
        rate: learning rate.
    """

    arm: str
    axes: tuple[str, ...]
    task: str
    rate: float

    @property
    def place(self) -> tuple[str, tuple[str, ...], str]:
        """What a learning rate is chosen for."""
        return self.arm, self.axes, self.task


@dataclass(frozen=True, eq=False)
class Job:
    """One piece of work: adapters, trained or read, an operation on them, and scores of the outcome on ``cell.task``.

    Attributes:
        sources: the recipes of its adapters; a job that operates on ``alone`` trains its one.
        splits: which parts are scored.
    """

    cell: Cell
    sources: tuple[Recipe, ...]
    operation: Operation
    splits: tuple[str, ...]
    limit: int | None

    @property
    def seed(self) -> int:
        """Of the first source."""
        return self.sources[0].seed

    @property
    def group(self) -> Group:
        """The seeds of the sources; those of several tasks are alike."""
        return tuple(dict.fromkeys(one.seed for one in self.sources))

    @cached_property
    def key(self) -> str:
        """Known by what is computed: the recipes, the operation, what is scored."""
        told = [run_key(one) for one in self.sources]
        how = [self.operation.how, dict(self.operation.arguments), self.splits, self.limit]
        return _digest([told, how, self.cell.task if self.operation.how == "tasks" else ""])


def run_key(recipe: Recipe) -> str:
    """Short name of a training run: a digest of its recipe without the output."""
    return _digest(recipe.model_dump(mode="json", exclude={"output"}))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def read(path: str | Path, arms: Sequence[str] = ()) -> Sweep:
    """Read a sweep and check all that can be known before the first run: every recipe, every merge.

    Args:
        path: of the YAML file.
        arms: only these, in this order; by default all.

    Raises:
        FileNotFoundError: no such file, or its recipe is not there.
        ValueError: not YAML, an unknown key or an impossible value; one line says which and what is allowed.
    """
    path = Path(path)
    content = read_mapping(path, "sweep")
    try:
        found = Sweep.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"sweep {path}: {explain(error, Sweep)}") from None
    if stray := [arm for arm in arms if arm not in found.arms]:
        raise ValueError(_line(f"sweep {path}: there is no arm {short(stray[0])}; allowed: {', '.join(found.arms)}"))
    if arms:
        found = found.model_copy(update={"arms": {arm: found.arms[arm] for arm in arms}})
    files = [str(path.parent / task) if task.endswith((".yaml", ".yml")) else task for task in found.tasks]
    found = found.model_copy(update={"recipe": path.parent / found.recipe, "tasks": tuple(files)})
    if not files:
        own = read_recipe(found.recipe).task
        if not isinstance(own, str):
            raise ValueError(f"sweep {path}: tasks is missing; the recipe's own has no name")
        found = found.model_copy(update={"tasks": (own,)})
    _check(found, path)
    return found


def _check(found: Sweep, path: Path) -> None:
    """Refuse what would be refused in the middle of the work.

    Raises:
        ValueError: a recipe, a task or an operation is wrong; the message says of which arm.
    """
    kinds: dict[str, str] = {}  # with the first arm of each
    for cell in cells(found):
        if (cell.task, cell.rate) != (found.tasks[0], found.grid(cell.arm)[0]):
            continue  # the same but for a name and a positive number
        try:
            kinds.setdefault(run_of(found, cell, found.seeds[0]).adapter.kind, cell.arm)
        except ValueError as error:
            raise ValueError(_line(f"sweep {path}, arm {cell.arm}: {error}")) from None
    for task in map(read_task, found.tasks):
        if isinstance(task, str) and not task.startswith("hub:"):
            tasks[task]  # refuses a name that is none
    for (kind, arm), operation in product(kinds.items(), operations(found)):
        try:
            tried(operation, kind, len(found.tasks))
        except (ValueError, TypeError) as error:
            raise ValueError(_line(f"sweep {path}: {operation.name}, arm {arm} ({kind}): {error}")) from None


def _line(text: str) -> str:
    """Names out of the file may have line ends in them."""
    return " ".join(text.split())


def cells(sweep: Sweep) -> Iterator[Cell]:
    """Every place of the table, in order."""
    values = product(*([json.dumps(one) for one in axis] for axis in sweep.axes.values()))
    rates = dict.fromkeys(rate for arm in sweep.arms for rate in sweep.grid(arm))
    for axes, task, rate, arm in product(values, sweep.tasks, rates, sweep.arms):
        if rate in sweep.grid(arm):
            yield Cell(arm, axes, task, rate)


def run_of(sweep: Sweep, cell: Cell, seed: int) -> Recipe:
    """The training run of a cell and a seed."""
    known = (cell, seed, str((sweep.recipe, list(sweep.axes), sweep.arms[cell.arm])))
    if known not in sweep._runs:
        told = {key: json.dumps(value) for key, value in sweep.arms[cell.arm].items() if key != "rates"}
        keys = {**dict(zip(sweep.axes, cell.axes, strict=True)), **told, "train.learning_rate": str(cell.rate)}
        keys |= {"seed": str(seed), "output": "runs/sweep"}
        made = read_recipe(sweep.recipe, [f"{key}={value}" for key, value in keys.items()])
        sweep._runs[known] = made.model_copy(update={"task": read_task(cell.task)})
    return sweep._runs[known]


def where(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """The place of a cell in words: the values of its axes and its task."""
    told = {}
    for key, text in zip(sweep.axes, cell.axes, strict=True):
        value = json.loads(text)
        plain = isinstance(value, str | int | float) and not isinstance(value, bool)
        told[column(sweep, key)] = value if plain else text
    return told | {"task": cell.task}


def column(sweep: Sweep, axis: str) -> str:
    """What tables call an axis: the last part of its key, or all of it where that is another one's too."""
    last = axis.rsplit(".", 1)[-1]
    taken = ["task", "arm", "rate", "measurement", *(key.rsplit(".", 1)[-1] for key in sweep.axes if key != axis)]
    return axis if last in taken else last


def about(sweep: Sweep) -> dict[str, Any]:
    """What a page says of the sweep and of the recipe of all its runs."""
    told: dict[str, Any] = {"mode": "json", "exclude_defaults": True}
    return {
        "sweep": sweep.model_dump(**told, exclude={"recipe"}) | {"recipe": sweep.recipe.name},
        "recipe": read_recipe(sweep.recipe).model_dump(**told, exclude={"task", "seed", "output"}),
    }


def training(cell: Cell, recipe: Recipe, limit: int | None) -> Job:
    """The job that trains an adapter."""
    return Job(cell, (recipe,), ALONE, ("validation", "test"), limit)


def everywhere(sweep: Sweep, operation: Operation) -> bool:
    """Whether an operation is done with all seeds at every rate, not at the chosen ones alone."""
    return sweep.measure.rates == "all" and operation.how != "tasks"


def phases(sweep: Sweep, choose: Callable[[Cell], float]) -> Iterator[list[Job]]:
    """The jobs in parts, each of which needs those before it.

    Args:
        sweep: the table.
        choose: the learning rate chosen for the arm, axes and task of a cell; asked once the first part is done.
    """
    asked, every = sweep.measure, list(cells(sweep))
    if not every:
        return

    def made(cell: Cell, sources: Sequence[Recipe], operation: Operation, splits: tuple[str, ...]) -> Job:
        return Job(cell, tuple(sources), operation, splits, sweep.limit)

    def trained(chosen: Sequence[Cell], seeds: Sequence[int]) -> list[Job]:
        return [training(cell, run_of(sweep, cell, seed), sweep.limit) for cell in chosen for seed in seeds]

    tuned = sweep.seeds if asked.rates == "all" or not sweep.tuned_on else sweep.tuned_on
    first = next(iter(sweep.arms))
    frozen = [cell for cell in every if (cell.arm, cell.rate) == (first, sweep.grid(first)[0])]
    yield [made(cell, [run_of(sweep, cell, tuned[0])], BASE, ("test",)) for cell in frozen] + trained(every, tuned)
    chosen = [cell for cell in every if cell.rate == choose(cell)]
    yield trained(chosen, [seed for seed in sweep.seeds if seed not in tuned])
    beside = {cell.place: cell for cell in chosen}
    measured: list[Job] = []
    for operation in operations(sweep):
        several = operation.how == "tasks"
        for cell in every if everywhere(sweep, operation) else chosen:
            for seeds in groups(sweep, operation):
                runs = [run_of(sweep, cell, seed) for seed in seeds]
                if several:
                    runs = [run_of(sweep, beside[cell.arm, cell.axes, task], seeds[0]) for task in sweep.tasks]
                measured.append(made(cell, runs, operation, (asked.split,)))
    yield measured
