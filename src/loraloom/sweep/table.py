"""A table described in YAML: which runs are trained, and what is done to their adapters.

recipe: ../demo/lora.yaml
arms:
  LoRA: {}
  CoTo: {strategy.name: coto}
seeds: [0, 1, 2]
rates: [5e-4, 1e-3, 2e-3]
measure:
  interpolate: {at: [0.5]}
  prune: [{keep: every-other}]
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from loraloom.recipe import Recipe
from loraloom.untrusted import short

# What a sweep sets in every recipe, and what it sets it by.
_SET = {"train.learning_rate": "rates", "seed": "seeds", "task": "tasks", "output": "--out"}
MOST_RUNS, MOST_JOBS = 100_000, 1_000_000
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rates = Annotated[tuple[Rate, ...], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Points(_Strict):
    """Points between the adapters of two seeds."""

    at: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0.5,)
    spaces: Annotated[tuple[Literal["factors", "delta"], ...], Field(min_length=1)] = ("factors", "delta")

    @field_validator("at", "spaces")
    @classmethod
    def _differ(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return _once(values)


class Tasks(_Strict):
    """A merge of one adapter of each task, equally weighted; ``options`` are arguments of `loraloom.merge`."""

    method: str = "linear"
    space: str | None = None
    options: dict[str, Any] = {}


class Merge(Tasks):
    """A merge of adapters of one task and as many seeds as there are weights."""

    weights: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=2)]


class Prune(_Strict):
    """One way to prune, as `loraloom.prune` takes it."""

    keep: str | None = None
    modules: str | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    unit: Literal["entry", "rank", "layer", "module"] = "entry"
    space: Literal["factors", "balanced", "delta"] = "factors"


class Coalitions(_Strict):
    """Layers switched off at random: each with the chance ``off``, in so many draws, of which the mean is told."""

    off: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.25, 0.5)
    draws: Count = 4


class Measure(_Strict):
    """What is measured beside each adapter alone, at the ``chosen`` learning rates or at ``all``."""

    rates: Literal["chosen", "all"] = "chosen"
    split: Literal["validation", "test"] = "test"
    interpolate: Points | None = None
    merge: tuple[Merge, ...] = ()
    tasks: tuple[Tasks, ...] = ()
    prune: tuple[Prune, ...] = ()
    coalitions: Coalitions | None = None


class Sweep(_Strict):
    """A table of runs and measurements. The first arm is the one that the others are compared with.

    Attributes:
        recipe: of all runs; a path from the folder of the sweep's file.
        arms: a name, and the keys that the arm sets in the recipe (``section.key: value``); ``rates`` are the arm's own
            learning rates, where a method needs others.
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
    rates: Rates
    tuned_on: tuple[Seed, ...] = ()
    axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    limit: Count | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    measure: Measure = Measure()
    _runs: dict[Any, Recipe] = PrivateAttr(default_factory=dict)  # made once, asked for often

    @field_validator("rates", "seeds", "tasks", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return () if value is None else value
        return tuple(float(one) if isinstance(one, str) and _is_number(one) else one for one in value)

    def grid(self, arm: str) -> tuple[float, ...]:
        """The learning rates that an arm chooses from."""
        return tuple(self.arms[arm].get("rates", self.rates))

    @field_validator("arms")
    @classmethod
    def _own_rates(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for arm, keys in arms.items():
            if "rates" not in keys:
                continue
            try:
                keys["rates"] = [*_once(TypeAdapter(Rates).validate_python(keys["rates"]), f"rates of arm {arm} ")]
            except ValidationError:
                raise ValueError(f"rates of arm {arm} must be numbers above 0, got {short(keys['rates'])}") from None
        return arms

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in ("seeds", "rates", "tasks", "tuned_on"):
            _once(getattr(self, name), f"{name} ")
        if stray := [seed for seed in self.tuned_on if seed not in self.seeds]:
            raise ValueError(f"tuned_on has seed {stray[0]}, which is not one of seeds {list(self.seeds)}")
        most = max([2 * bool(self.measure.interpolate), *(len(one.weights) for one in self.measure.merge)])
        if most > len(self.seeds):
            raise ValueError(f"measure needs {most} seeds for what it combines; there are {len(self.seeds)}")
        self._check_keys()
        self._check_size()
        if self.measure.tasks and len(self.tasks) < 2:
            raise ValueError("measure.tasks merges the adapters of several tasks; tasks has fewer than two")
        return self

    def _check_keys(self) -> None:
        """Refuse keys that would be set twice, of which one would count without a word."""
        by_axes = {name for key, values in self.axes.items() for one in values for name in _names(key, one)}
        for where, names in {
            "axes": by_axes,
            **{
                f"arm {arm}": {name for key in keys for name in _names(key, keys[key])}
                for arm, keys in self.arms.items()
            },
        }.items():
            if stray := sorted(names & _SET.keys()):
                raise ValueError(f"{where} sets {stray[0]}, which every run is given by {_SET[stray[0]]}")
            if where != "axes" and (twice := sorted(names & by_axes)):
                raise ValueError(f"{where} and axes both set {twice[0]}")

    def _check_size(self) -> None:
        trained = sum(len(self.grid(arm)) for arm in self.arms)
        parts = (self.seeds, self.tasks or (None,), *self.axes.values())
        runs, asked = trained * prod(map(len, parts)), self.measure
        if runs > MOST_RUNS:
            raise ValueError(f"arms, rates, seeds, tasks and axes make {runs} runs; at most {MOST_RUNS} are allowed")
        points = len(asked.interpolate.at) * len(asked.interpolate.spaces) if asked.interpolate else 0
        draws = len(asked.coalitions.off) * asked.coalitions.draws if asked.coalitions else 0
        each = 1 + points + draws + len(asked.merge) + len(asked.tasks) + len(asked.prune)
        if runs * each > MOST_JOBS:
            raise ValueError(f"measure makes up to {runs * each} jobs; at most {MOST_JOBS} are allowed")


def _once(values: tuple[Any, ...], whose: str = "") -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"{whose}has a value twice: {short(list(values))}")
    return values


def _names(key: str, value: Any) -> list[str]:
    """The keys that a value sets: its own, or those of a section.

    Raises:
        ValueError: it is no value of a recipe (YAML has dates).
    """
    if isinstance(value, dict):
        return [name for part, one in value.items() for name in _names(f"{key}.{part}", one)]
    if not isinstance(value, str | int | float | list | None):
        raise ValueError(f"{key} must be text, a number, true, false, null, a list or a map, got {short(value)}")
    return [key]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
