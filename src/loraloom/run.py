"""Run a recipe: train its adapter, safely against kills, into a PEFT folder with its provenance."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from loraloom.adapter import Adapter
from loraloom.calibration import plan_of, told_of, trained_entries
from loraloom.experts import as_stored
from loraloom.folders import alone, whole_folder, write_text
from loraloom.masks import MASK, Mask, save_mask
from loraloom.recipe import Recipe, TrainRecipe
from loraloom.registry import edge
from loraloom.report import replace_file
from loraloom.store import RECORD, load, save, written_as
from loraloom.strategies.dropout import ProgressiveDropout
from loraloom.untrusted import read_json


@dataclass(frozen=True)
class Trained:
    """What a run gave: the saved adapter (None: a model, of ``kind: none``), the seconds of training, and the log."""

    adapter: Adapter | None
    path: Path
    seconds: float
    log: tuple[Mapping[str, Any], ...]


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, progress: bool = False) -> Trained:
    """Train the adapter that a recipe describes and save it as a PEFT folder with its provenance.

    While it runs, checkpoints lie in ``<output>.training``; the output folder appears whole at the end. A killed run
    goes on with ``resume=True`` and ends in the same bits as one that was never interrupted. Under ``accelerate
    launch`` every process calls this and gets the same result; the first one writes (see docs/distributed.md).

    Raises:
        FileExistsError: the output exists, or an unfinished run is in the way.
        BlockingIOError: another process trains it.
        ValueError: the unfinished run was made from another recipe.

    Example:
        >>> trained = train(read_recipe("recipes/demo/coto.yaml", ["output=runs/coto-0"]))  # doctest: +SKIP
        >>> trained.adapter.kind                                                               # doctest: +SKIP
        'lora'
    """
    processes = edge("processes")
    if resume and processes.first(lambda: _finished(recipe) is not None) and (finished := _finished(recipe)):
        return finished
    processes.first(lambda: check_output(recipe.output, overwrite))
    bench = bench_of(recipe)
    with contextlib.ExitStack() as held:  # the lock; the first process has it
        work = processes.first(lambda: held.enter_context(_working_folder(recipe, resume=resume, overwrite=overwrite)))
        try:
            trained = train_on(bench, recipe, work=work, resume=resume, progress=progress, overwrite=overwrite)
        except (ValueError, OSError):
            # refused before the first step: nothing to go on with
            if processes.is_first() and not any(work.rglob("checkpoint-*")) and not (work / MASK).exists():
                shutil.rmtree(work)
            raise
        processes.first(lambda: shutil.rmtree(work))
    return trained


def bench_of(recipe: Recipe, task: str | None = None) -> Any:
    """The recipe's model set up for its task, or for another one."""
    return edge("scoring").bench(recipe.model, task or recipe.task, dtype=recipe.dtype, **recipe.data.model_dump())


def train_on(bench: Any, recipe: Recipe, *, work: Path, resume: bool, progress: bool, overwrite: bool) -> Trained:
    """Train on a model and task that are already loaded; the base is as before afterwards."""
    if recipe.adapter.kind == "none":
        return _train_whole(bench, recipe, work=work, resume=resume, progress=progress, overwrite=overwrite)
    earlier = None if recipe.continue_from is None else load(recipe.continue_from)
    strategy, fit, adapting = recipe.plan(), edge("fit"), edge("adapting")
    loss = bench.loss

    def attached() -> Any:
        return adapting.training(bench.model, **adapting.told_by(recipe), seed=recipe.seed, start=earlier)

    def fitted(model: Any, folder: Path, examples: Any, changes: Mapping[str, Any]) -> Any:
        chosen = recipe.train.model_copy(update=dict(changes))
        plan = None if strategy is None else replace(strategy, total_steps=chosen.steps)
        options = _fit_options(chosen, recipe.seed, folder, resume=resume, progress=progress)
        return fit.fit(model, examples, collate=bench.collate, options=options, plan=plan, loss=loss)

    lori = plan_of(recipe, earlier, bench, attached, fitted, work)
    record: dict[str, Any] = {}
    mask: Mask | None = None
    with attached() as model:
        if lori is not None:
            start = as_stored(edge("peft").from_model(model))
            shapes = {name: (start.shape(name).out, start.shape(name).rank) for name in start.modules}
            mask = trained_entries(lori, shapes)
            lori.attach(model)
            record["lori"] = told_of(lori, recipe, earlier, mask)
        done = fitted(model, work, bench.training, {})
        if done.balance is not None:
            record["balance"] = done.balance.to_json()
        adapter = edge("peft").from_model(model)
    provenance = {
        "operation": "train",
        "arguments": _arguments(recipe),
        "seed": recipe.seed,
        "record": {**record, "seconds": done.seconds, "log": [dict(entry) for entry in done.log_history]},
        **({} if earlier is None else {"inputs": [earlier.provenance]}),
    }
    # PEFT knew the model by its folder on this machine; the adapter names it as the user did.
    config = {**_ended(adapter.config, recipe), "base_model_name_or_path": bench.name}
    made = Adapter(config, adapter.modules, adapter.extras, provenance)
    beside = None if mask is None else lambda folder: save_mask(mask, folder / MASK)
    edge("processes").first(lambda: save(made, recipe.output, overwrite=overwrite, beside=beside))
    return Trained(load(recipe.output), recipe.output, done.seconds, done.log_history)


def _ended(config: Mapping[str, Any], recipe: Recipe) -> Mapping[str, Any]:
    """The configuration of a trained adapter, with the dropout that its strategy ended with."""
    strategy = recipe.plan()
    if not isinstance(strategy, ProgressiveDropout):
        return config
    return edge("adapting").with_dropout(config, strategy.probability(recipe.train.steps))


def _train_whole(bench: Any, recipe: Recipe, *, work: Path, resume: bool, progress: bool, overwrite: bool) -> Trained:
    """Train the modules that ``modules_to_save`` names, in place, and save the whole model as a folder of its own."""
    fit = edge("fit")
    options = _fit_options(recipe.train, recipe.seed, work, resume=resume, progress=progress)
    marked: Any = {"overwrite": overwrite, "mark": RECORD, "what": "a folder that loraloom wrote"}
    with edge("adapting").whole(bench.model, recipe.adapter.modules_to_save) as model:
        done = fit.fit(model, bench.training, collate=bench.collate, options=options, loss=bench.loss)
        record = {"seconds": done.seconds, "log": [dict(entry) for entry in done.log_history]}
        made = {"operation": "train", "arguments": _arguments(recipe), "seed": recipe.seed, "record": record}

        def write() -> None:
            with whole_folder(recipe.output.resolve(), **marked) as folder:
                with edge("backbones").without_bars():
                    model.save_pretrained(folder)
                if isinstance(bench.processor, Mapping):  # of a vision model: mean and deviation of pixels
                    write_text(folder / "preprocessor_config.json", json.dumps(dict(bench.processor)) + "\n")
                else:
                    bench.processor.save_pretrained(folder)
                told = written_as(Adapter({}, {}, provenance=made), "", {})
                write_text(folder / RECORD, json.dumps(told, indent=2, sort_keys=True) + "\n")

        edge("processes").first(write)
    return Trained(None, recipe.output, done.seconds, done.log_history)


def _fit_options(chosen: TrainRecipe, seed: int, folder: Path, *, resume: bool, progress: bool) -> Any:
    told = chosen.model_dump(exclude={"learning_rate", "schedule", "warmup"})
    warmup = round(chosen.warmup * chosen.steps)
    optimiser = {"lr": chosen.learning_rate, "scheduler": chosen.schedule, "warmup": warmup}
    return edge("fit").FitOptions(output=folder, seed=seed, resume=resume, progress=progress, **optimiser, **told)


def _finished(recipe: Recipe) -> Trained | None:
    """The result of this very recipe if it is there already: the run may have been killed just after it was saved."""
    try:
        adapter = None if recipe.adapter.kind == "none" else load(recipe.output)
        made = read_json(recipe.output / RECORD) if adapter is None else adapter.provenance
    except (ValueError, OSError):  # nothing there, or something else
        return None
    if not isinstance(made, Mapping) or made.get("arguments") != _arguments(recipe):
        return None
    work, record = _work(recipe), made["record"]
    with contextlib.suppress(OSError), alone(work, busy=""):
        shutil.rmtree(work)
    return Trained(adapter, recipe.output, record["seconds"], tuple(record["log"]))


def _arguments(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"output"})


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an existing output before any work is done.

    Raises:
        FileExistsError: it exists and ``overwrite`` is off.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"output {path} exists; choose another or add --overwrite")


def _work(recipe: Recipe) -> Path:
    return recipe.output.with_name(recipe.output.name + ".training")


@contextlib.contextmanager
def _working_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The folder of an unfinished run, which no other process has meanwhile."""
    work = _work(recipe)
    work.mkdir(parents=True, exist_ok=True)
    with alone(work, busy=f"{recipe.output} is being trained by another process"):
        check_output(recipe.output, overwrite)  # another process may have ended just now
        _prepare(work, recipe, resume=resume, overwrite=overwrite)
        yield work


def _prepare(work: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Empty it, or leave in it what is gone on from; it holds the recipe, so that that cannot silently change."""
    kept = work / "recipe.yaml"
    described = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    if resume and kept.is_file():
        if kept.read_text(encoding="utf-8") != described:
            before, now = yaml.safe_load(kept.read_text(encoding="utf-8")), yaml.safe_load(described)
            raise ValueError(f"{work}: that run had another recipe ({_changed(before, now)}); resume with the same one")
        return
    left = list(work.iterdir())
    if left and not (overwrite or resume):
        raise FileExistsError(f"{work} holds an unfinished run; go on with --resume, or start again with --overwrite")
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    replace_file(kept, described)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old != new:
            return _changed(old, new, f"{prefix}{key}.")
        if old != new:
            return f"{prefix}{key}: {old!r} then, {new!r} now"
    return "written differently"
