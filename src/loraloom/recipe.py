"""A run described in YAML, parsed into typed, validated values.

    model: vit-s14
    task: digits
    output: runs/coto-0
    seed: 0
    strategy: {name: coto}
    train: {steps: 240, learning_rate: 2.5e-3}

A wrong key or an impossible value is one line that names the key, what is allowed and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from loraloom.strategies.dropout import ProgressiveDropout
from loraloom.strategies.modality import MokA
from loraloom.strategies.progressive import CoTo
from loraloom.tasks.hub import HubTask
from loraloom.untrusted import parse_yaml, read_mapping, short, word

Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AdapterRecipe(_Strict):
    """Which adapter is trained, by PEFT's names; kind ``none`` trains ``modules_to_save`` alone and gives a model."""

    kind: Literal["lora", "rslora", "dora", "hira", "moka", "none"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()


class MokARecipe(_Strict):
    """What ``adapter.kind: moka`` is told beside rank, alpha and dropout (`loraloom.MokA`); values as there."""

    modalities: dict[str, int]
    rank: dict[str, Annotated[int, Field(ge=1)]] | None = None
    attention: str = "cross"
    keys: str = "prompt"
    weight: float | dict[str, float] = 1.0
    span: tuple[int, int] | None = None
    logits: str = "paper"
    tokens: dict[str, int] = {}
    own: str = "A"

    def plan(self, adapter: AdapterRecipe) -> MokA:
        """The plan of an adapter."""
        told = self.model_dump(exclude={"rank"})
        return MokA(rank=self.rank or adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, **told)


class PlainRecipe(_Strict):
    """Every adapter in every step."""

    name: Literal["none"] = "none"


class CoToRecipe(_Strict):
    """CoTo; see `loraloom.CoTo` for the meaning of each key."""

    name: Literal["coto"]
    ramp: Share = 0.75
    start: Share = 0.0
    curve: str = "linear"
    unit: str = "layer"
    nesting: Literal["uniform", "high-to-low", "low-to-high"] = "uniform"


class StochasticDepthRecipe(_Strict):
    """Each unit takes part with the same probability in the whole run."""

    name: Literal["stochastic-depth"]
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    unit: str = "layer"


class ProgressiveDropoutRecipe(_Strict):
    """The adapters' input dropout falls from ``start`` to ``end`` over the ramp."""

    name: Literal["progressive-dropout"]
    start: Annotated[float, Field(gt=0, lt=1)] = 0.9
    end: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ramp: Share = 0.75


StrategyRecipe = Annotated[
    PlainRecipe | CoToRecipe | StochasticDepthRecipe | ProgressiveDropoutRecipe, Field(discriminator="name")
]


class CalibrateRecipe(_Strict):
    """How a run makes its own LoRI mask: from a run of all of B before it, or from gradients at the start.

    ``steps`` and ``learning_rate`` are by default those of the run; ``examples`` takes the first ones only.
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    scope: Literal["model", "layer", "projection", "module"] = "model"
    by: Literal["training", "gradients"] = "training"
    steps: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    examples: Annotated[int, Field(ge=1)] | None = None
    exclude: tuple[Path, ...] = ()


class LoRIRecipe(_Strict):
    """LoRI: A frozen at random; of B what the mask keeps, or all of it without one (`loraloom.LoRI`).

    ``start`` is ``reuse``, ``fresh``, or the folder of an adapter whose A is taken.
    """

    mask: Path | None = None
    calibrate: CalibrateRecipe | None = None
    start: str = "reuse"
    shared: bool = False

    @model_validator(mode="after")
    def _one_mask(self) -> Self:
        if self.mask is not None and self.calibrate is not None:
            raise ValueError("mask and calibrate are two ways to the mask; give one")
        return self


class TrainRecipe(_Strict):
    """Optimisation: AdamW; one step is one optimizer step of ``batch_size * accumulate`` examples.

    ``warmup`` is a share of the steps; schedule ``constant`` has none.
    """

    steps: Annotated[int, Field(ge=1)] = 240
    batch_size: Annotated[int, Field(ge=1)] = 16
    accumulate: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup: Share = 0.06
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    save_every: Annotated[int, Field(ge=1)] | None = 100
    log_every: Annotated[int, Field(ge=1)] = 10
    bf16: bool = False
    gradient_checkpointing: bool = False
    fast: bool = True
    report_to: str = "none"
    balance_every: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _constant(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("schedule") != "constant":
            return given
        if given.get("warmup"):
            raise ValueError("schedule constant has no warmup; constant_with_warmup has")
        return {"warmup": 0.0, **given}


class DataRecipe(_Strict):
    """How examples become tensors, and how many of them are used for training."""

    image_size: Annotated[int, Field(ge=14)] = 98
    max_length: Annotated[int, Field(ge=4)] = 128
    train_limit: Annotated[int, Field(ge=1)] | None = None


def task_of(value: Any) -> Any:
    """A task as a recipe writes it: a name, or a mapping that says what a data set's columns mean (``HubTask``).

    Raises:
        ValueError: a key is not known, or ``dataset`` is missing.

    Example:
        >>> task_of({"dataset": "data/reviews", "label": "stars"}).content
        'text'
        >>> task_of({"dataset": "data/reviews", "lable": "stars"})
        Traceback (most recent call last):
        ...
        ValueError: lable is not known (did you mean 'label'?); allowed: dataset, content, label, ...
    """
    if not isinstance(value, Mapping):
        return value
    allowed = [field.name for field in dataclasses.fields(HubTask)]
    for key in value:
        if key not in allowed:
            raise ValueError(_unknown(word(key), str(key), allowed))
    if "dataset" not in value:
        raise ValueError("dataset is missing: a hub id or a local folder")
    try:
        return TypeAdapter(HubTask).validate_python({key: "" if held is None else held for key, held in value.items()})
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def read_task(text: str) -> Any:
    """A task as the command line writes it: a name, ``hub:<id or folder>``, or a YAML file that describes a data set.

    Raises:
        ValueError: the file describes no data set.
    """
    path = Path(text)
    if text.startswith("lm_eval:") or path.suffix not in (".yaml", ".yml"):
        return text
    return task_of(read_mapping(path, "task"))


class Recipe(_Strict):
    """One training run. ``model`` and ``task`` are bundled names, local paths or hub ids.

    A task may also be a mapping that describes a data set of the hub or of a local folder (``tasks.hub.HubTask``).

    Example:
        >>> run = Recipe(model="vit-s14", task="digits", output="runs/a", strategy={"name": "coto"})
        >>> run.plan().probability(step=90)
        0.5
    """

    model: str
    task: Annotated[str | HubTask, BeforeValidator(task_of)]
    output: Path
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = "float32"
    adapter: AdapterRecipe = AdapterRecipe()
    strategy: StrategyRecipe = PlainRecipe()
    train: TrainRecipe = TrainRecipe()
    data: DataRecipe = DataRecipe()
    moka: MokARecipe | None = None
    lori: LoRIRecipe | None = None
    continue_from: Path | None = None
    protect: tuple[Path, ...] = ()

    @field_validator("output")
    @classmethod
    def _named(cls, value: Path) -> Path:
        if not value.name:
            raise ValueError("a folder name is needed")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.lori is not None and self.adapter.kind not in ("lora", "rslora", "dora"):
            raise ValueError(f"lori goes with adapter.kind lora, rslora or dora, not {self.adapter.kind}")
        if (self.adapter.kind == "moka") != (self.moka is not None):
            raise ValueError("adapter.kind moka and a section moka, with its modalities, go together")
        if self.moka is not None:
            self.moka.plan(self.adapter)
        if self.adapter.kind == "none" and not self.adapter.modules_to_save:
            raise ValueError("adapter.kind none needs adapter.modules_to_save: the modules that are trained whole")
        of_an_adapter = (self.strategy.name != "none", self.continue_from, self.train.balance_every)
        if self.adapter.kind == "none" and any(of_an_adapter):
            raise ValueError("adapter.kind none has no adapter for a strategy, continue_from or train.balance_every")
        if self.protect and self.lori is None:
            raise ValueError("protect goes with lori: without it A is trained too, and nothing is protected")
        told = {"kind", "rank", "alpha", "target_modules"} & self.adapter.model_fields_set
        if self.continue_from is not None and told:
            keys = ", ".join(f"adapter.{key}" for key in sorted(told))
            raise ValueError(f"{keys}: the adapter of continue_from decides that; leave it out")
        return self

    def plan(self) -> CoTo | ProgressiveDropout | None:
        """The training-time policy, or None for plain training."""
        chosen, steps = self.strategy, self.train.steps
        if isinstance(chosen, CoToRecipe):
            return CoTo(total_steps=steps, seed=self.seed, **chosen.model_dump(exclude={"name"}))
        if isinstance(chosen, StochasticDepthRecipe):
            return CoTo(total_steps=steps, seed=self.seed, curve="constant", start=chosen.keep, unit=chosen.unit)
        if isinstance(chosen, ProgressiveDropoutRecipe):
            return ProgressiveDropout(total_steps=steps, **chosen.model_dump(exclude={"name"}))
        return None


def parse(content: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate a recipe.

    Raises:
        ValueError: one line: where, what, and what is allowed.

    Example:
        >>> parse({"model": "vit-s14", "task": "digits", "output": "runs/a", "train": {"step": 5}})
        Traceback (most recent call last):
        ...
        ValueError: recipe: train.step is not known (did you mean 'steps'?); allowed: steps, batch_size, ...
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: a mapping of keys is needed, got {type(content).__name__}")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{source}: {explain(error)}") from None
    try:
        recipe.plan()
    except ValueError as error:
        raise ValueError(f"{source}: strategy: {error}") from None
    return recipe


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, with ``a.b=value`` overrides on top.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an override without ``=``, or an invalid recipe.

    Example:
        >>> bundled_recipe("demo/coto.yaml").strategy.curve
        'linear'
    """
    content = read_mapping(path, "recipe")
    for override in overrides:
        _set(content, override)
    return parse(content, source=f"recipe {path}")


def bundled_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that comes with the package, such as ``demo/lora.yaml``, with overrides as in :func:`read`."""
    here = Path(__file__).parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parents[1] / "recipes"
    return read(folder / name, overrides)


def _set(content: dict[str, Any], override: str) -> None:
    """Apply ``a.b=value``; the value is read as YAML."""
    keys, equals, value = override.partition("=")
    if not equals or not keys:
        raise ValueError(f"--set {override}: written as key=value or section.key=value")
    *path, last = keys.split(".")
    for key in path:
        inner = content.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override}: {key} is not a section")
        content = inner
    content[last] = parse_yaml(value, f"--set {override}")


def explain(error: ValidationError, whole: type[BaseModel] | None = None) -> str:
    """The first error of a validation of ``whole`` (a recipe) as one line."""
    first = error.errors()[0]
    place = [word(part) for part in first["loc"] if str(part) not in _TAGS]
    where = ".".join(place)
    if first["type"] == "extra_forbidden":
        allowed = _fields(first["loc"][:-1], whole or Recipe)
        return _unknown(where, place[-1], allowed)
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}".removeprefix(": ")
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"].startswith("union_tag"):
        given = first["input"].get("name") if isinstance(first["input"], dict) else first["input"]
        near = difflib.get_close_matches(str(given), sorted(_TAGS), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{where}.name {given!r} is not known{hint}; allowed: {', '.join(sorted(_TAGS))}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{where}: {message}, got {short(first['input'])}"


def _unknown(where: str, key: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{where} is not known{hint}; allowed: {', '.join(allowed)}"


_STRATEGIES: dict[str, type[BaseModel]] = {
    "none": PlainRecipe,
    "coto": CoToRecipe,
    "stochastic-depth": StochasticDepthRecipe,
    "progressive-dropout": ProgressiveDropoutRecipe,
}
_TAGS = frozenset(_STRATEGIES)


def _fields(place: Sequence[str | int], model: Any) -> list[str]:
    """Names of the keys that are allowed at a place of the recipe."""
    for part in place:
        if str(part) in _STRATEGIES:
            model = _STRATEGIES[str(part)]
        elif part != "strategy" and isinstance(part, str):
            annotation = model.model_fields[part].annotation
            inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
            model = next((kind for kind in inner if issubclass(kind, BaseModel)), model)
    return list(model.model_fields)
