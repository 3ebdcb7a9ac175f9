"""A table described in YAML: which runs are trained, what is done to their adapters, and the list of jobs that follows.

    recipe: ../demo/lora.yaml
    arms:
      LoRA: {}
      CoTo: {strategy.name: coto}
    seeds: [0, 1, 2]
    rates: [5e-4, 1e-3, 2e-3]
    measure:
      interpolate: {at: [0.5]}
      prune: [{keep: every-other}]

A job is known by what it computes, so that a sweep that was changed finds the jobs that it still shares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from loraloom.adapter import Adapter, Factors
from loraloom.ops.interpolate import interpolate
from loraloom.ops.merge import merge
from loraloom.ops.prune import prune
from loraloom.recipe import Recipe, explain, read_task
from loraloom.recipe import read as read_recipe

Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Points(_Strict):
    """Points between the adapters of two seeds."""

    at: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.5,)
    spaces: tuple[Literal["factors", "delta"], ...] = ("factors", "delta")


class Tasks(_Strict):
    """A merge of one adapter of each task, equally weighted; ``options`` are arguments of `loraloom.merge`."""

    method: str = "linear"
    space: str | None = None
    options: dict[str, Any] = {}


class Merge(Tasks):
    """A merge of adapters of one task and as many seeds as there are weights."""

    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2)]


class Prune(_Strict):
    """One way to prune, as `loraloom.prune` takes it."""

    keep: str | None = None
    modules: str | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    unit: Literal["entry", "rank", "layer", "module"] = "entry"
    space: Literal["factors", "balanced", "delta"] = "factors"


class Measure(_Strict):
    """What is measured beside each adapter alone, at the ``chosen`` learning rates or at ``all``."""

    rates: Literal["chosen", "all"] = "chosen"
    split: Literal["validation", "test"] = "test"
    interpolate: Points | None = None
    merge: tuple[Merge, ...] = ()
    tasks: tuple[Tasks, ...] = ()
    prune: tuple[Prune, ...] = ()


class Sweep(_Strict):
    """A table of runs and measurements. The first arm is the one that the others are compared with.

    Attributes:
        recipe: of all runs; a path from the folder of the sweep's file.
        arms: a name, and the keys that the arm sets in the recipe (``section.key: value``).
        tasks: names or files that describe a data set; by default the recipe's own.
        seeds: of every run.
        rates: the learning rates; every arm has its own choice among them, by its mean accuracy on validation.
        tuned_on: the seeds that choose; by default all. The others are trained at the chosen rate alone.
        axes: further keys with their values; every combination is a table of its own.
        limit: at most so many examples of validation and of test.
        threads: of each process; by default the machine's share. The same bits need the same number.
        measure: see there.
    """

    title: str = "Sweep"
    recipe: Path
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    tasks: tuple[str, ...] = ()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    tuned_on: tuple[Seed, ...] = ()
    axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    limit: Count | None = None
    threads: Count | None = None
    measure: Measure = Measure()
    _runs: dict[Any, Recipe] = PrivateAttr(default_factory=dict)  # made once, asked for often

    @field_validator("rates", "seeds", "tasks", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return tuple(float(one) if isinstance(one, str) and _is_number(one) else one for one in value or ())

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in ("seeds", "rates", "tasks", "tuned_on"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} has a value twice: {list(values)}")
        if stray := [seed for seed in self.tuned_on if seed not in self.seeds]:
            raise ValueError(f"tuned_on has seed {stray[0]}, which is not one of seeds {list(self.seeds)}")
        most = max([2 * bool(self.measure.interpolate), *(len(one.weights) for one in self.measure.merge)])
        if most > len(self.seeds):
            raise ValueError(f"measure needs {most} seeds for what it combines; there are {len(self.seeds)}")
        if self.measure.tasks and len(self.tasks) < 2:
            raise ValueError("measure.tasks merges the adapters of several tasks; tasks has fewer than two")
        return self


@dataclass(frozen=True)
class Operation:
    """What is done to adapters before they are scored: nothing (``alone``), or an operator with its arguments."""

    name: str
    how: Literal["base", "alone", "interpolate", "merge", "tasks", "prune"] = "alone"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, adapters: Sequence[Adapter]) -> Adapter:
        """The adapter that is scored."""
        if self.how == "interpolate":
            return interpolate(adapters[0], adapters[1], **self.arguments)
        if self.how in ("merge", "tasks"):
            return merge(adapters, **self.arguments)
        return prune(adapters[0], **self.arguments) if self.how == "prune" else adapters[0]


BASE, ALONE = Operation("frozen model", "base"), Operation("alone")


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


def read(path: str | Path) -> Sweep:
    """Read a sweep and check all that can be known before the first run: every recipe, every merge.

    Raises:
        FileNotFoundError: no such file, or its recipe is not there.
        ValueError: not YAML, an unknown key or an impossible value; one line says which and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sweep {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"sweep {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"sweep {path}: a mapping of keys is needed, got {type(content).__name__}")
    try:
        found = Sweep.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"sweep {path}: {explain(error, Sweep)}") from None
    files = [str(path.parent / task) if task.endswith((".yaml", ".yml")) else task for task in found.tasks]
    found = found.model_copy(update={"recipe": path.parent / found.recipe, "tasks": tuple(files)})
    if not files:
        own = read_recipe(found.recipe).task
        if not isinstance(own, str):
            raise ValueError(f"sweep {path}: tasks is missing; the recipe's own has no name")
        found = found.model_copy(update={"tasks": (own,)})
    for cell in cells(found):
        try:
            run_of(found, cell, found.seeds[0])
        except ValueError as error:
            raise ValueError(f"sweep {path}, arm {cell.arm}: {error}") from None
    kinds: dict[str, str] = {}  # with the first arm of each
    for cell in cells(found):
        kinds.setdefault(run_of(found, cell, found.seeds[0]).adapter.kind, cell.arm)
    for (kind, arm), operation in product(kinds.items(), operations(found)):
        try:
            _try(operation, kind, len(found.tasks))
        except (ValueError, TypeError) as error:
            raise ValueError(f"sweep {path}: {operation.name}, arm {arm} ({kind}): {error}") from None
    return found


def _try(operation: Operation, kind: str, tasks: int) -> None:
    """Do an operation once on tiny adapters, so that what it refuses is known before anything is trained.

    Raises:
        ValueError, TypeError: the operation's own.
    """
    told = str(operation.arguments.get("keep") or "") + str(operation.arguments.get("modules") or "")
    if kind in ("moka", "none") or "modules" in operation.arguments or any(one.isdigit() for one in told):
        return  # what it names is the model's
    magnitude = torch.ones(4) if kind == "dora" else None
    factors = Factors(B=torch.eye(4)[:, :2], A=torch.eye(4)[:2], magnitude=magnitude)
    config = {"r": 2, "peft_type": "HIRA" if kind == "hira" else "LORA", "use_dora": kind == "dora"}
    tiny = Adapter(config, {f"layers.{layer}.q": factors for layer in range(6)})
    count = {"interpolate": 2, "merge": len(operation.arguments.get("weights", ())), "tasks": tasks}
    operation.applied([tiny] * count.get(operation.how, 1)).loaded()


def cells(sweep: Sweep) -> Iterator[Cell]:
    """Every place of the table, in order."""
    values = product(*([json.dumps(one) for one in axis] for axis in sweep.axes.values()))
    for axes, task, rate, arm in product(values, sweep.tasks, sweep.rates, sweep.arms):
        yield Cell(arm, axes, task, rate)


def run_of(sweep: Sweep, cell: Cell, seed: int) -> Recipe:
    """The training run of a cell and a seed."""
    known = (cell, seed)
    if known not in sweep._runs:
        told = {key: json.dumps(value) for key, value in sweep.arms[cell.arm].items()}
        keys = {**dict(zip(sweep.axes, cell.axes, strict=True)), **told, "train.learning_rate": str(cell.rate)}
        keys |= {"seed": str(seed), "output": "runs/sweep"}
        made = read_recipe(sweep.recipe, [f"{key}={value}" for key, value in keys.items()])
        sweep._runs[known] = made.model_copy(update={"task": read_task(cell.task)})
    return sweep._runs[known]


def operations(sweep: Sweep) -> Iterator[Operation]:
    """What is done to finished adapters, in order."""
    asked = sweep.measure
    for space, at in product(asked.interpolate.spaces, asked.interpolate.at) if asked.interpolate else ():
        yield Operation(
            f"half way, {space}" if at == 0.5 else f"at {at:g}, {space}", "interpolate", {"at": at, "space": space}
        )
    for one in asked.merge:
        weights = [weight / sum(one.weights) for weight in one.weights]
        shares = ":".join(f"{weight:g}" for weight in one.weights)
        yield Operation(f"merge {shares}, {_told(one)}", "merge", {**_merge(one), "weights": weights})
    for several in asked.tasks:
        yield Operation(f"tasks merged, {_told(several)}", "tasks", _merge(several))
    for kept in asked.prune:
        arguments = kept.model_dump(exclude_defaults=True)
        told = ", ".join(str(value) if key == "keep" else f"{key} {value}" for key, value in arguments.items())
        yield Operation(f"kept: {told}", "prune", arguments)


def _merge(one: Tasks) -> dict[str, Any]:
    return {"method": one.method, "space": one.space, **one.options}


def _told(one: Tasks) -> str:
    options = [f"{key} {value}" for key, value in one.options.items()]
    return " ".join([one.method, *([one.space] if one.space else []), *options])


def phases(sweep: Sweep, choose: Callable[[Cell], float]) -> Iterator[list[Job]]:
    """The jobs in parts, each of which needs those before it.

    Args:
        sweep: the table.
        choose: the learning rate chosen for the arm, axes and task of a cell; asked once the first part is done.
    """
    asked, every = sweep.measure, list(cells(sweep))

    def made(cell: Cell, sources: Sequence[Recipe], operation: Operation, splits: tuple[str, ...]) -> Job:
        return Job(cell, tuple(sources), operation, splits, sweep.limit)

    def trained(chosen: Sequence[Cell], seeds: Sequence[int]) -> list[Job]:
        both = ("validation", "test")
        return [made(cell, [run_of(sweep, cell, seed)], ALONE, both) for cell in chosen for seed in seeds]

    tuned = sweep.seeds if asked.rates == "all" or not sweep.tuned_on else sweep.tuned_on
    frozen = [cell for cell in every if (cell.arm, cell.rate) == (next(iter(sweep.arms)), sweep.rates[0])]
    yield [made(cell, [run_of(sweep, cell, tuned[0])], BASE, ("test",)) for cell in frozen] + trained(every, tuned)
    chosen = [cell for cell in every if cell.rate == choose(cell)]
    yield trained(chosen, [seed for seed in sweep.seeds if seed not in tuned])
    beside = {cell.place: cell for cell in chosen}
    measured: list[Job] = []
    for operation in operations(sweep):
        several = operation.how == "tasks"
        for cell in chosen if several or asked.rates == "chosen" else every:
            for seeds in groups(sweep, operation):
                runs = [run_of(sweep, cell, seed) for seed in seeds]
                if several:
                    runs = [run_of(sweep, beside[cell.arm, cell.axes, task], seeds[0]) for task in sweep.tasks]
                measured.append(made(cell, runs, operation, (asked.split,)))
    yield measured


def groups(sweep: Sweep, operation: Operation) -> list[tuple[int, ...]]:
    """The seeds that an operation takes together: consecutive ones, around; each set once where order says nothing."""
    weights = operation.arguments.get("weights", ())
    size = 2 if operation.how == "interpolate" else len(weights) or 1
    seeds, count = sweep.seeds, len(sweep.seeds)
    around = [tuple(seeds[(at + k) % count] for k in range(size)) for at in range(count)]
    alike = operation.arguments.get("at") == 0.5 if operation.how == "interpolate" else len(set(weights)) <= 1
    return around[:1] if size == count and size > 1 and alike else around


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
