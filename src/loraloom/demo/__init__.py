"""The main job on real weights and data: train LoRA and CoTo adapters, take them apart, put them together, report.

Two seeds of each method on one task, one adapter each on two more; then the path between the seeds, a merge of the
three tasks, and pruning. The learning rates (``recipes/demo``) were tuned on validation splits; all that is measured
here is measured on test.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from loraloom import report
from loraloom.demo.page import TITLE, page_of
from loraloom.demo.study import STRUCTURED, Say, Settings, Study
from loraloom.folders import whole_folder
from loraloom.integrations.processes import end_with_parent
from loraloom.ops.interpolate import interpolate
from loraloom.ops.merge import merge
from loraloom.ops.prune import prune
from loraloom.recipe import Recipe, bundled_recipe, parse
from loraloom.run import bench_of, train_on
from loraloom.store import load

METHODS = {"LoRA": "demo/lora.yaml", "CoTo": "demo/coto.yaml"}
_WRITTEN = re.compile(r"results\.json|report\.(html|md)|adapters(/(lora|coto)-[^/]+-\d+(/[^/]+)?)?")
_BENCHES: dict[str, Any] = {}  # of a process that trains: that of the task of its last run


def run(out: Path, *, overwrite: bool = False, settings: Settings | None = None, say: Say = print) -> report.Report:
    """Run the demo and write adapters, ``results.json``, ``report.html`` and ``report.md`` below ``out``.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is off, or it is not just what a demo wrote.
    """
    began = time.perf_counter()
    settings = settings or Settings()
    target, kind = Path(os.path.realpath(out)), "what a demo wrote"
    with whole_folder(target, overwrite=overwrite, mark=_is_demo, what=kind) as work:
        recipes = {method: _adjusted(bundled_recipe(name), settings) for method, name in METHODS.items()}
        study = Study(settings, recipes, say)
        plain = recipes["LoRA"]
        say(f"{plain.model} on {', '.join(study.tasks)}; LoRA and CoTo, {plain.train.steps} steps each")
        _measure_all(study, work)
        made = report.ran(page_of(study, time.perf_counter() - began), "loraloom demo")
        report.write(made, work)
    say(made.summary)
    say(f"report {out / 'report.html'}; results {out / 'results.json'}; {time.perf_counter() - began:.0f} s")
    return made


def _is_demo(folder: Path) -> bool:
    """Whether a demo wrote a folder, and nothing was put to it."""
    if not all(_WRITTEN.fullmatch(path.relative_to(folder).as_posix()) for path in folder.rglob("*")):
        return False
    try:
        return report.read([folder]).title == TITLE
    except (ValueError, OSError):
        return False


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
    end_with_parent()
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
