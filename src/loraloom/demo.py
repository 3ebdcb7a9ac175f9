"""The main job on real weights and data: train LoRA and CoTo adapters, take them apart, put them together, report.

Two seeds of each method on one task, one adapter each on two more; then the path between the seeds, a merge of the
three tasks, and pruning. The learning rates (``recipes/demo``) were tuned on validation splits; all that is measured
here is measured on test.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraloom import report
from loraloom.adapter import Adapter
from loraloom.ops.interpolate import interpolate
from loraloom.ops.merge import merge
from loraloom.ops.prune import prune
from loraloom.recipe import Recipe, bundled_recipe, parse
from loraloom.run import bench_of, check_output, train_on
from loraloom.store import load
from loraloom.tasks.metrics import Estimate, accuracy, difference

METHODS = {"LoRA": "demo/lora.yaml", "CoTo": "demo/coto.yaml"}
STRUCTURED = ("every-other", "low", "middle", "high")
Say = Callable[[str], None]
_BENCHES: dict[str, Any] = {}  # of a process that trains: that of the task of its last run


@dataclass(frozen=True)
class Settings:
    """How much of everything; the tests run a smaller one."""

    seeds: tuple[int, ...] = (0, 1)
    others: tuple[str, ...] = ("easy-vqa-shape", "easy-vqa-colour")
    points: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    limit: int | None = 400
    overrides: tuple[tuple[str, Any], ...] = ()


@dataclass
class Study:
    """The adapters and measurements of one demo run, as they come."""

    settings: Settings
    recipes: Mapping[str, Recipe]
    say: Say
    adapters: dict[tuple[str, str, int], Adapter] = field(default_factory=dict)
    seconds: dict[tuple[str, str, int], float] = field(default_factory=dict)
    outcomes: dict[tuple, list[np.ndarray]] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The task with several seeds."""
        return str(self.recipes["LoRA"].task)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The main task first."""
        return (self.main, *self.settings.others)

    def measure(self, key: tuple, bench: Any, adapter: Adapter | None) -> float:
        """Evaluate and file the outcome of every example under ``key``; seeds of one key are pooled."""
        found = bench.evaluate(adapter, "test", self.settings.limit)
        self.outcomes.setdefault(key, []).append(np.array(found.correct))
        return found.value

    def estimate(self, *key: Any) -> Estimate:
        """Mean over the seeds of a key, with the interval over test examples."""
        return accuracy(np.mean(self.outcomes[key], axis=0))

    def advantage(self, *key: Any) -> Estimate:
        """CoTo minus LoRA on the same examples; ``key`` is without the method."""
        coto, lora = (np.mean(self.outcomes[(method, *key)], axis=0) for method in ("CoTo", "LoRA"))
        return difference(coto, lora)


def run(out: Path, *, overwrite: bool = False, settings: Settings | None = None, say: Say = print) -> report.Report:
    """Run the demo and write adapters, ``results.json``, ``report.html`` and ``report.md`` below ``out``.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is off.
    """
    began = time.perf_counter()
    check_output(out, overwrite)
    settings = settings or Settings()
    recipes = {method: _adjusted(bundled_recipe(name), settings) for method, name in METHODS.items()}
    study = Study(settings, recipes, say)
    plain = recipes["LoRA"]
    say(f"{plain.model} on {', '.join(study.tasks)}; LoRA and CoTo, {plain.train.steps} steps each")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _measure_all(study, work)
        made = report.ran(_report(study, time.perf_counter() - began), "loraloom demo")
        report.write(made, work)
        work.chmod(0o755)
        _put_in_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(made.summary)
    say(f"report {out / 'report.html'}; results {out / 'results.json'}; {time.perf_counter() - began:.0f} s")
    return made


def _put_in_place(work: Path, out: Path) -> None:
    """Rename; what was there goes only when the new folder stands, and comes back if it does not."""
    before = work.with_name(f"{work.name}.replaced")
    if out.exists():
        out.rename(before)
    try:
        work.rename(out)
    except OSError:
        if before.exists():
            before.rename(out)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _measure_all(study: Study, work: Path) -> None:
    benches = {task: bench_of(study.recipes["LoRA"], task) for task in study.tasks}
    for task, bench in benches.items():
        study.measure(("base", "alone", task), bench, None)
    _train(study, benches, work)
    _path(study, benches[study.main])
    _merge(study, benches)
    _prune(study, benches[study.main])


def _adjusted(recipe: Recipe, settings: Settings) -> Recipe:
    content = recipe.model_dump(mode="json")
    for key, value in settings.overrides:
        section, _, name = key.partition(".")
        content[section] = {**content[section], name: value} if name else value
    return parse(content, source="demo")


# --- measurements ------------------------------------------------------------------------------------------------


def _train(study: Study, benches: Mapping[str, Any], work: Path) -> None:
    """Two runs at a time, one of each method, so that a slow minute of the machine falls on both."""
    seeds, folder, several = study.settings.seeds, work / "adapters", len(study.recipes)
    runs = {
        (method, task, seed): recipe.model_copy(
            update={"task": task, "seed": seed, "output": folder / f"{method.lower()}-{task}-{seed}"}
        )
        for task in study.tasks
        for seed in (seeds if task == study.main else seeds[:1])
        for method, recipe in study.recipes.items()
    }
    folder.mkdir()
    threads = max(1, (os.cpu_count() or 1) // several)
    with ProcessPoolExecutor(several, multiprocessing.get_context("spawn"), _alone, (threads,)) as pool:
        try:
            for key, seconds in zip(runs, pool.map(_trained, runs.values()), strict=True):
                method, task, seed = key
                study.adapters[key], study.seconds[key] = load(runs[key].output).loaded(), seconds
                value = study.measure((method, "alone", task), benches[task], study.adapters[key])
                study.say(f"{method:5} {task:16} seed {seed}: {value:.3f} in {seconds:.0f} s")
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _alone(threads: int) -> None:
    """A process that trains: Ctrl-C is for the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _trained(one: Recipe) -> float:
    """Train and save; the seconds of training."""
    task = str(one.task)
    bench = _BENCHES.get(task) or bench_of(one)
    _BENCHES.clear()
    _BENCHES[task] = bench
    with tempfile.TemporaryDirectory(dir=one.output.parent) as scratch:
        return train_on(bench, one, work=Path(scratch), resume=False, progress=False, overwrite=False).seconds


def _path(study: Study, bench: Any) -> None:
    a, b = study.settings.seeds[:2]
    for method in study.recipes:
        ends = (study.adapters[method, study.main, a], study.adapters[method, study.main, b])
        alone = study.outcomes[method, "alone", study.main]
        for space in ("factors", "delta"):
            for at in study.settings.points:
                if at in (0, 1):
                    study.outcomes[method, "path", space, at] = [alone[int(at)]]
                else:
                    study.measure((method, "path", space, at), bench, interpolate(*ends, at=at, space=space))
        middle = {space: study.estimate(method, "path", space, 0.5).value for space in ("factors", "delta")}
        study.say(
            f"{method:5} half way between the seeds: {middle['factors']:.3f} factors, {middle['delta']:.3f} delta"
        )


def _merge(study: Study, benches: Mapping[str, Any]) -> None:
    seed = study.settings.seeds[0]
    for method in study.recipes:
        parts = [study.adapters[method, task, seed] for task in study.tasks]
        for space in ("factors", "delta"):
            merged = merge(parts, space=space).loaded()
            values = [study.measure((method, "merged", space, task), benches[task], merged) for task in study.tasks]
            study.say(f"{method:5} three tasks merged, {space}: {', '.join(f'{value:.3f}' for value in values)}")


def _prune(study: Study, bench: Any) -> None:
    for method in study.recipes:
        for seed in study.settings.seeds:
            adapter = study.adapters[method, study.main, seed]
            for keep in STRUCTURED:
                study.measure((method, "kept", keep), bench, prune(adapter, keep=keep))
            for density in study.settings.densities:
                study.measure((method, "density", density), bench, prune(adapter, density=density))
        kept = ", ".join(f"{keep} {study.estimate(method, 'kept', keep).value:.3f}" for keep in STRUCTURED)
        study.say(f"{method:5} pruned to {kept}")


# --- the page ----------------------------------------------------------------------------------------------------


def _report(study: Study, seconds: float) -> report.Report:
    return report.Report(
        title="loraloom demo: LoRA and CoTo, taken apart and put together",
        summary=_summary(study),
        panels=(
            report.Table(
                "CoTo against LoRA",
                ("measurement", "LoRA", "CoTo", "CoTo - LoRA", "95 % interval"),
                tuple(_comparison(study)),
                note="Accuracy on test. The interval is a paired bootstrap over test examples for these runs; it does "
                f"not cover the spread over seeds, of which there are {len(study.settings.seeds)}.",
                command="loraloom demo",
            ),
            _path_panel(study),
            _merge_panel(study),
            _prune_panel(study),
            _density_panel(study),
            _plan_panel(study),
            _time_panel(study),
        ),
        run={
            "seconds": round(seconds, 1),
            "test examples a task": f"at most {study.settings.limit}" if study.settings.limit else "all",
            "recipe": study.recipes["LoRA"].model_dump(mode="json", exclude={"task", "output", "seed"}),
            "CoTo differs in": _difference(*(recipe.model_dump(mode="json") for recipe in study.recipes.values())),
        },
        records=tuple(_records(study)),
    )


def _difference(plain: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``other`` that ``plain`` does not have alike; the outputs aside."""
    found: dict[str, Any] = {}
    for key, value in other.items():
        before = plain.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            found |= {f"{key}.{inner}": held for inner, held in _difference(before, value).items()}
        elif value != before and key != "output":
            found[key] = value
    return found


def _measurements(study: Study) -> Iterator[tuple[str, tuple]]:
    """Title and key (without the method) of every measurement that both methods have."""
    for task in study.tasks:
        yield f"alone: {task}", ("alone", task)
    for space in ("factors", "delta"):
        if 0.5 in study.settings.points:
            yield f"half way between two seeds ({space})", ("path", space, 0.5)
    for space in ("factors", "delta"):
        for task in study.tasks:
            yield f"three tasks merged ({space}): {task}", ("merged", space, task)
    for keep in STRUCTURED:
        yield f"layers kept: {keep}", ("kept", keep)
    for density in study.settings.densities:
        yield f"entries kept: {density:.0%}", ("density", density)


def _comparison(study: Study) -> Iterator[tuple[str, float, float, float, str]]:
    for title, key in _measurements(study):
        lora, coto, gap = study.estimate("LoRA", *key), study.estimate("CoTo", *key), study.advantage(*key)
        interval = f"[{gap.low:+.3f}, {gap.high:+.3f}]"
        yield title, round(lora.value, 4), round(coto.value, 4), round(gap.value, 4), interval


def _summary(study: Study) -> str:
    """What came out, in words that follow from the numbers alone."""
    gaps = [study.advantage(*key) for _, key in _measurements(study)]
    better, worse = sum(gap.low > 0 for gap in gaps), sum(gap.high < 0 for gap in gaps)
    total = {m: sum(v for (method, *_), v in study.seconds.items() if method == m) for m in study.recipes}
    base = study.estimate("base", "alone", study.main).value

    def both(*keys: tuple) -> str:
        means = {m: np.mean([study.estimate(m, *key).value for key in keys]) for m in study.recipes}
        return ", ".join(f"{method} {mean:.3f}" for method, mean in means.items())

    return (
        f"Alone on {study.main}: {both(('alone', study.main))} (frozen model {base:.3f}). "
        f"Half way between two seeds, factors averaged: {both(('path', 'factors', 0.5))}. "
        f"Three tasks in one adapter, updates averaged, mean of the tasks: "
        f"{both(*[('merged', 'delta', task) for task in study.tasks])}. "
        f"Only a third of the layers kept, mean of low, middle and high: "
        f"{both(*[('kept', keep) for keep in ('low', 'middle', 'high')])}. "
        f"Of {len(gaps)} measurements CoTo is better than LoRA beyond the 95 % interval in {better}, worse in {worse}, "
        f"and not told apart in {len(gaps) - better - worse}. "
        f"CoTo trained in {total['CoTo'] / total['LoRA']:.2f} of LoRA's time."
    )


def _series(study: Study, name: str, x: Sequence[Any], keys: Sequence[tuple]) -> report.Series:
    found = [study.estimate(*key) for key in keys]
    return report.Series(
        name,
        x=tuple(x),
        y=tuple(one.value for one in found),
        low=tuple(one.low for one in found),
        high=tuple(one.high for one in found),
    )


def _path_panel(study: Study) -> report.Curve:
    points = study.settings.points
    series = tuple(
        _series(study, f"{method}, {space}", points, [(method, "path", space, at) for at in points])
        for method in study.recipes
        for space in ("factors", "delta")
    )
    return report.Curve(
        f"From seed {study.settings.seeds[0]} to seed {study.settings.seeds[1]} on {study.main}",
        "position between the two adapters",
        "accuracy",
        series,
        note="factors: (1-t) B_0 + t B_1 and the same for A; delta: (1-t) times one update plus t times the other.",
        command=f"loraloom interpolate adapters/coto-{study.main}-0 adapters/coto-{study.main}-1 --at 0.5 -o half",
    )


def _merge_panel(study: Study) -> report.Bars:
    series = [_series(study, "base", study.tasks, [("base", "alone", task) for task in study.tasks])]
    for method in study.recipes:
        series.append(
            _series(study, f"{method}, alone", study.tasks, [(method, "alone", task) for task in study.tasks])
        )
        for space in ("factors", "delta"):
            keys = [(method, "merged", space, task) for task in study.tasks]
            series.append(_series(study, f"{method}, merged ({space})", study.tasks, keys))
    return report.Bars(
        "Three tasks in one adapter",
        "accuracy",
        study.tasks,
        tuple(series),
        note="Equal weights of 1/3.",
        command="loraloom merge adapters/coto-*-0 -o merged --space delta",
    )


def _prune_panel(study: Study) -> report.Bars:
    names = ("all", *STRUCTURED)
    series = tuple(
        _series(study, method, names, [(method, "alone", study.main), *((method, "kept", keep) for keep in STRUCTURED)])
        for method in study.recipes
    )
    return report.Bars(
        f"Layers kept, {study.main}",
        "accuracy",
        names,
        series,
        note="The adapters of all other layers are dropped; nothing is trained again.",
        command=f"loraloom prune adapters/coto-{study.main}-0 --keep every-other -o pruned",
    )


def _density_panel(study: Study) -> report.Curve:
    densities = (1.0, *study.settings.densities)
    series = tuple(
        _series(
            study,
            method,
            densities,
            [(method, "alone", study.main), *((method, "density", d) for d in study.settings.densities)],
        )
        for method in study.recipes
    )
    return report.Curve(
        f"Entries kept by magnitude, {study.main}",
        "share of the factors' entries kept",
        "accuracy",
        series,
        command=f"loraloom prune adapters/coto-{study.main}-0 --density 0.25 -o pruned",
    )


def _plan_panel(study: Study) -> report.Curve:
    recipe = study.recipes["CoTo"]
    plan, steps = recipe.plan(), range(0, recipe.train.steps, max(1, recipe.train.steps // 60))
    series = (report.Series("CoTo", x=tuple(steps), y=tuple(plan.probability(step) for step in steps)),)  # type: ignore[union-attr]
    return report.Curve("Probability that a layer's adapter takes part", "optimizer step", "p(t)", series)


def _time_panel(study: Study) -> report.Table:
    rows = tuple(
        (f"{method}, {task}, seed {seed}", round(value, 1)) for (method, task, seed), value in study.seconds.items()
    )
    return report.Table("Training time", ("run", "seconds"), rows, note="Two runs at a time, one of each method.")


def _records(study: Study) -> Iterator[dict[str, Any]]:
    for key, outcomes in study.outcomes.items():
        names = dict(zip(("method", "measurement", "of", "at"), key, strict=False))
        yield {**names, "by_seed": [float(one.mean()) for one in outcomes], **study.estimate(*key).to_json()}
