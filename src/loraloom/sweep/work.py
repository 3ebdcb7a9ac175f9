"""Jobs done by any number of processes that share a folder, each job once, whatever dies in between.

A process claims a job by a lock on a file. The system lets go of the lock when the process ends, however it ends, so no
claim outlives its owner. What a job found is a file of the journal, written whole or not at all; nothing in the journal
is ever changed.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from loraloom.adapter import Adapter
from loraloom.checkpoint import base_weights
from loraloom.models import resolve
from loraloom.recipe import Recipe, read_task
from loraloom.registry import edge
from loraloom.report import replace_file
from loraloom.run import bench_of, train_on
from loraloom.store import load
from loraloom.sweep.operations import Base, operations
from loraloom.sweep.plan import Cell, Job, phases, run_key, training
from loraloom.sweep.table import Sweep
from loraloom.untrusted import is_number, read_json, short

_PAUSE = 0.5  # seconds between looks at the journal while others do the last jobs of a part
Say = Callable[[str], None]


class Journal:
    """What jobs found, one file each, by the key of the job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._read: dict[str, Mapping[str, Any]] = {}

    def get(self, job: Job) -> Mapping[str, Any] | None:
        """What a job found, or None if it is not done.

        Raises:
            ValueError: the file is damaged.
        """
        if job.key not in self._read:
            path = self.folder / f"{job.key}.json"
            if not path.is_file():
                return None
            try:
                self._read[job.key] = _checked(read_json(path), job)
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); remove it, and the job is done again") from None
        return self._read[job.key]

    def put(self, job: Job, found: Mapping[str, Any]) -> None:
        """Keep what a job found."""
        replace_file(self.folder / f"{job.key}.json", json.dumps(found) + "\n")

    def correct(self, job: Job, split: str) -> np.ndarray:
        """Which examples of a split were right, as 0 and 1.

        Raises:
            ValueError: the job is not done.
        """
        found = self.get(job)
        if found is None:
            raise ValueError(f"{self.folder / job.key}.json is gone; go on with --resume, and the job is done again")
        return np.frombuffer(found["scores"][split].encode(), dtype=np.uint8) - ord("0")


def _checked(found: Any, job: Job) -> Mapping[str, Any]:
    """What a job found, if it can be that.

    Raises:
        ValueError: a value is not there, or of another kind.
    """
    scores = found.get("scores") if isinstance(found, dict) else None
    if not isinstance(scores, dict):
        raise ValueError("no scores")
    for split in job.splits:
        if not isinstance(scores.get(split), str) or not re.fullmatch("[01]+", scores[split]):
            raise ValueError(f"scores of {split} must be a text of 0 and 1, got {short(scores.get(split))}")
    if not isinstance(found.get("broken"), bool):
        raise ValueError(f"broken must be true or false, got {short(found.get('broken'))}")
    for name in ("took", "seconds"):
        value = found.get(name)
        if not is_number(value) and not (name == "seconds" and value is None):
            raise ValueError(f"{name} must be a number, got {short(value)}")
    return found


def chooser(sweep: Sweep, journal: Journal) -> Callable[[Cell], float]:
    """The learning rate of an arm on a task: of the best mean accuracy on validation; of equal ones the smallest."""
    seeds = sweep.tuned_on or sweep.seeds

    @cache
    def best() -> dict[Any, dict[float, float]]:
        means: dict[Any, dict[float, float]] = defaultdict(lambda: defaultdict(float))
        for job in next(phases(sweep, lambda cell: cell.rate)):
            if job.operation.how == "alone" and job.seed in seeds:
                means[job.cell.place][job.cell.rate] += journal.correct(job, "validation").mean() / len(seeds)
        return means

    def choose(cell: Cell) -> float:
        found = best()[cell.place]
        return max(sorted(found), key=lambda rate: round(found[rate], 9))

    return choose


class Worker:
    """One process's part of a sweep; the model and the data of each task are loaded once."""

    def __init__(self, sweep: Sweep, folder: Path, *, processes: int = 1, say: Say | None = None) -> None:
        self.sweep, self.folder, self.processes, self.say = sweep, folder, processes, say
        self.journal = Journal(folder / "journal")
        self._benches: dict[Any, Any] = {}
        self._named: list[Job] = []  # all jobs that can be named so far
        self._all = Counter(_kind(job) for jobs in phases(sweep, lambda cell: sweep.grid(cell.arm)[0]) for job in jobs)

    def complete(self) -> None:
        """Work until every job of the sweep is done, here or elsewhere."""
        for jobs in phases(self.sweep, chooser(self.sweep, self.journal)):
            self._named += jobs
            left = list(jobs)
            while left:
                before = len(left)
                left = [job for job in left if not self._done(job)]
                if len(left) == before:
                    time.sleep(_PAUSE)

    def _done(self, job: Job) -> bool:
        """Whether a job is done, after trying to do it."""
        if self.journal.get(job) is not None:
            return True
        with claimed(self.folder / "claims" / job.key) as mine:
            if not mine:
                return False
            if self.journal.get(job) is None:  # else another one was faster, between the look and the claim
                began = time.perf_counter()
                found = self._do(job)
                self.journal.put(job, {**found, "took": time.perf_counter() - began})
                if self.say is not None:
                    self.say(self._progress(job))
        return True

    def _do(self, job: Job) -> dict[str, Any]:
        """Train or combine, and score. Where weights are no longer finite, no answer is right."""
        bench = self._bench(job.sources[0].model_copy(update={"task": read_task(job.cell.task)}))
        adapter, seconds, broken = self._adapter(bench, job)
        scores = {}
        for split in job.splits:
            count = len(bench.task.splits[split][: job.limit])
            correct = [False] * count if broken else bench.evaluate(adapter, split, job.limit).correct
            scores[split] = "".join(str(int(one)) for one in correct)
        cell, seeds = job.cell, [one.seed for one in job.sources]
        told = {"operation": job.operation.name, "arm": cell.arm, "task": cell.task, "rate": cell.rate, "seeds": seeds}
        device = edge("processes").device_name()
        return {**told, "device": device, "seconds": seconds, "broken": broken, "scores": scores}

    def _adapter(self, bench: Any, job: Job) -> tuple[Adapter | None, float | None, bool]:
        """What is scored, the seconds of its training, and whether training broke down."""
        if job.operation.how == "base":
            return None, None, False
        if job.operation.how == "alone":
            try:
                adapter, seconds = self._train(bench, job.sources[0])
            except ValueError as error:
                if "NaN or infinite" not in str(error):
                    raise
                return None, None, True
            for one in operations(self.sweep):  # names that only the model can tell, before hours go by
                if one.how == "prune":
                    one.applied([adapter], self._base(job))
            return adapter, seconds, False
        if any(self._broke(job, one) for one in job.sources):
            return None, None, True
        places = [self._place(one) for one in job.sources]
        return job.operation.applied([load(place) for place in places], self._base(job)).loaded(), None, False

    def _broke(self, job: Job, recipe: Recipe) -> bool:
        """Whether the training of a source broke down, so that it left no adapter.

        Raises:
            ValueError: it left one, and that is gone.
        """
        before = training(job.cell, recipe, job.limit)
        broke = bool((self.journal.get(before) or {}).get("broken"))
        if not broke and not (place := self._place(recipe)).exists():
            entry = self.journal.folder / f"{before.key}.json"
            raise ValueError(f"{place} is gone; put it back, or remove {entry} and it is trained again")
        return broke

    @staticmethod
    def _base(job: Job) -> Base:
        """Where the weights of a job's base model are found."""
        return lambda *adapters: base_weights(resolve(job.sources[0].model), *adapters)

    def _place(self, recipe: Recipe) -> Path:
        return self.folder / "adapters" / run_key(recipe)

    def _train(self, bench: Any, recipe: Recipe) -> tuple[Adapter, float]:
        one = recipe.model_copy(update={"output": self._place(recipe)})
        work = self.folder / "work" / run_key(recipe)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        trained = train_on(bench, one, work=work, resume=False, progress=False, overwrite=True)
        shutil.rmtree(work)
        if trained.adapter is None:
            raise ValueError("a sweep is over adapters; adapter.kind none trains none")
        return trained.adapter.loaded(), trained.seconds

    def _bench(self, recipe: Recipe) -> Any:
        """The model, set up for the recipe's task; of one model there is one copy."""
        model, data = (recipe.model, recipe.dtype), recipe.data.model_dump()
        key = (*model, str(recipe.task), str(data))
        if model not in self._benches:
            self._benches[model] = self._benches[key] = bench_of(recipe)
        if key not in self._benches:
            first = self._benches[model]
            live = {"family": first.family, "processor": first.processor}
            made = edge("scoring").bench(first.model, recipe.task, **live, **data)
            self._benches[key] = replace(made, name=first.name)
        return self._benches[key]

    def _progress(self, job: Job) -> str:
        """A line on a finished job: how many are done, what it found, how long all may take yet."""
        times: dict[Any, list[float]] = defaultdict(list)
        for one in self._named:
            if found := self.journal.get(one):
                times[_kind(one)].append(found["took"])
        done = [took for kind in times.values() for took in kind]
        left = sum((count - len(times[kind])) * np.mean(times[kind] or done) for kind, count in self._all.items())
        untried = any(is_training and not times[is_training, axes] for is_training, axes in self._all)
        rest = "time left not known yet" if untried else f"about {timedelta(seconds=round(left / self.processes))} left"
        where = [job.cell.arm, *job.cell.axes, job.cell.task, f"rate {job.cell.rate:g}", f"seed {job.seed}"]
        value = self.journal.correct(job, job.splits[-1]).mean()
        return (
            f"[{len(done)}/{self._all.total()}] {' '.join(where)}, {job.operation.name}: "
            f"{value:.3f} on {job.splits[-1]}; {rest}"
        )


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether a job is ours while the block runs; False where another process, on any machine, has it.

    Raises:
        OSError: the folder's file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _kind(job: Job) -> Any:
    """Jobs of one kind take about the same time."""
    return job.operation.how == "alone", job.cell.axes


def finished(sweep: Sweep, journal: Journal) -> list[Job]:
    """All jobs of a sweep that is done.

    Raises:
        ValueError: jobs on the same examples have not as many scores.
    """
    jobs = [job for jobs in phases(sweep, chooser(sweep, journal)) for job in jobs]
    counts: dict[Any, int] = {}
    for job in jobs:
        for split in job.splits:
            count = len(journal.correct(job, split))
            if counts.setdefault((job.cell.axes, job.cell.task, split), count) != count:
                raise ValueError(f"{journal.folder / job.key}.json is damaged: {count} scores of {split}; remove it")
    return jobs
