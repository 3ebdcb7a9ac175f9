"""How a probe asks a real model: scores that remember, are kept on the disk as they come, and are shared by processes.

Whoever makes a page asks through :func:`asked`. Inside :func:`kept` what is asked is also written down, shown as
progress, and split over the processes of ``accelerate launch``; a probe knows nothing of it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from loraloom.adapter import Adapter
from loraloom.contents import of_adapter, of_data, of_model
from loraloom.probes.game import Work
from loraloom.probing.journal import SUFFIX, Journal
from loraloom.probing.naming import apart
from loraloom.probing.progress import Progress
from loraloom.registry import edge


class Asked:
    """A score for probes, made by :func:`asked`.

    Attributes:
        work, why: as of :class:`loraloom.integrations.prefix.Scores`.
    """

    def __init__(self, adapter: Adapter, task: Any, split: str, limit: int | None, **bench: Any) -> None:
        self._of = (adapter, task)
        self._options = bench
        self.split, self.limit = split, limit
        self.work, self.why = Work(), ""
        self._known: dict[str, float] = {}
        self._noted: tuple[Kept | None, str] = (None, "")

    @cached_property
    def bench(self) -> Any:
        """The model set up for the task; loaded when it is first needed."""
        return edge("statistics").bench_for(*self._of, **self._options)

    @cached_property
    def scores(self) -> Any:
        """The plain score of the model."""
        return edge("prefix").Scores(self.bench, self.split, self.limit)

    @property
    def task(self) -> str:
        """The name of the task."""
        return str(self.bench.task.name)

    def __call__(self, adapter: Adapter | None) -> float:
        """Of one adapter; None is the base."""
        return self.many([adapter])[0]

    def many(self, adapters: Sequence[Adapter | None]) -> list[float]:
        """Of several, in the order given; none is scored twice."""
        held = _kept.get()
        if held is None:
            found: list[float] = self.scores.many(adapters)
            self.work, self.why = self.scores.work, self.scores.why
            return found
        keys = [of_adapter(adapter) for adapter in adapters]
        new = {key: adapter for key, adapter in zip(keys, adapters, strict=True) if key not in self._known}
        if new:
            plan = self.scores.plan(list(new.values()))
            self.work, self.why = plan.added_to(self.work, len(new)), plan.why
            self._known |= held.scores(self._name(held), new, plan.runs, self.scores.stream)
        return [self._known[key] for key in keys]

    def _name(self, held: Kept) -> str:
        """What the scores are of, noted once with all that they depend on beside the adapter."""
        if self._noted[0] is held:
            return self._noted[1]
        of = f"{self.task}, {self.split}" + (f", the first {self.limit}" if self.limit else "")
        made = self.bench
        held.mark(f"model ({made.name})", partial(of_model, made.model.named_parameters()))
        task = made.task
        examples = made.ready(self.split, self.limit), task.splits["train"][: max(160, 16 * len(task.labels))]
        sizes = (made.image_size, made.max_length, task.prompt)  # an encoder's head is made from the first to train on
        held.mark(f"task ({of})", lambda: of_data([examples, sizes]))
        self._noted = held, of
        return of


class Kept:
    """Where scores are kept while a probe runs, and who else scores.

    Args:
        out: the result; the journal lies beside it.
        request: tells what is asked for, plain JSON.
        name: of the probe.
        fresh: forget a journal of another request, model or other examples instead of refusing it.

    Attributes:
        rank: number of this process; 0 reads and writes.
    """

    def __init__(self, out: Path, request: Callable[[], Mapping[str, Any]], name: str, *, fresh: bool) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = edge("processes").join().process_index if self.size > 1 else 0
        self.progress = Progress(name, shown=self.rank == 0)
        self.out, self._request, self._fresh = out, request, fresh
        self._journal: Journal | None = None

    @cached_property
    def known(self) -> dict[str, float]:
        """Scores of a run before this one; opens the journal."""
        found: dict[str, float] = self.first(self._open)
        return found

    def _open(self) -> dict[str, float]:
        path = self.out.with_name(self.out.name + SUFFIX)
        self._journal = Journal(path, self._request(), fresh=self._fresh)
        if self._journal.known:
            self.progress.say(f"goes on; {len(self._journal.known)} scores are known from an earlier run")
        return dict(self._journal.known)

    def first(self, work: Callable[[], Any]) -> Any:
        """What the first process finds, or that it failed, in all of them."""
        return work() if self.size == 1 else edge("processes").first(work)

    def mark(self, name: str, value: Callable[[], str]) -> None:
        """Refuse to go on where what scores depend on has changed, or forget the scores."""
        _ = self.known
        if self.first(lambda: self._journal is not None and self._journal.mark(name, value())):
            self.known.clear()
            self.progress.say(f"begins anew; what was kept is of another {name}")

    def scores(
        self,
        of: str,
        adapters: Mapping[str, Adapter | None],
        runs: Sequence[Sequence[int]],
        stream: Callable[[list[Adapter | None], Sequence[Sequence[int]]], Generator[tuple[int, float]]],
    ) -> dict[str, float]:
        """The scores of adapters by key, those of an earlier run taken from it.

        Each process does a part of the rest, run by run, and hands over every score as it comes. Runs of which not all
        is known are done again as a whole, for the same bits; what is known of them stays.
        """
        keys, held = list(adapters), list(adapters.values())
        found = {key: self.known[name] for key in keys if (name := f"{of}: {key}") in self.known}
        rest = [run for run in runs if any(keys[at] not in found for at in run)]
        self.progress.expect(len(keys), len(found))
        ends = [len(rest) * rank // self.size for rank in range(self.size + 1)]
        parts = [rest[low:high] for low, high in pairwise(ends)]
        mine = stream(held, parts[self.rank])
        with contextlib.closing(mine):
            for _ in range(max(sum(map(len, part)) for part in parts)):
                for at, score in self._exchanged(next(mine, None)):
                    if keys[at] in found:
                        continue
                    found[keys[at]] = score
                    if self._journal is not None and math.isfinite(score):
                        self._journal.add(f"{of}: {keys[at]}", score)
                    self.progress.advance()
        self.known.update({f"{of}: {key}": score for key, score in found.items()})
        return found

    def _exchanged(self, mine: tuple[int, float] | None) -> list[tuple[int, float]]:
        """What each process has just found, in all of them."""
        all_of_us: list[Any] = [mine]
        if self.size > 1:
            from torch.distributed import all_gather_object

            all_of_us = [None] * self.size
            all_gather_object(all_of_us, mine)
        return [one for one in all_of_us if one is not None]

    def close(self, *, done: bool) -> None:
        """Let go of the journal; one whose result is written, or that holds nothing, goes."""
        self.progress.close()
        if self._journal is not None:
            (self._journal.remove if done or not self._journal.known else self._journal.close)()


_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def kept(
    out: Path, request: Callable[[], Mapping[str, Any]], name: str = "probe", *, fresh: bool = False
) -> Iterator[Kept]:
    """Inside, all that is asked is kept in a journal beside ``out``, which goes when the block ends well.

    A journal of the same request is gone on from. It is opened when the first score is asked for.

    Raises:
        ValueError: the journal is of another request, or of another model or other examples, or damaged.

    Example:
        >>> with kept(Path("runs/s.json"), lambda: {"adapter": "runs/a"}):   # doctest: +SKIP
        ...     shapley_report({"a": ll.load("runs/a")}, "digits")
    """
    held = Kept(out, request, name, fresh=fresh)
    token = _kept.set(held)
    done = False
    try:
        yield held
        done = True
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("what was scored is kept, and the same command goes on from there") from stop
    finally:
        _kept.reset(token)
        held.close(done=done)


def asked(adapter: Adapter, task: Any, model: str = "", split: str = "test", limit: int | None = None) -> Asked:
    """The score of a task for variants of an adapter; the model is loaded when it is first called.

    So what is wrong with a request is found before a model is read.

    Args:
        adapter: tells the model, its image size and its text length.
        task: what to score.
        model: base model; by default what the adapter names.
        split: train, validation or test.
        limit: only the first so many examples.

    Example:
        >>> score = asked(ll.load("runs/a"), "digits")      # doctest: +SKIP
        >>> score(ll.load("runs/a")) > score(None)          # doctest: +SKIP
        True
    """
    return Asked(adapter, task, split, limit, model=model)


def asked_all(
    adapter: Adapter, tasks: Sequence[Any], model: str = "", split: str = "test", limit: int | None = None
) -> dict[str, Asked]:
    """The scores of several tasks by their names, of one model that is loaded here; arguments as of :func:`asked`.

    Tasks of one name get a number.
    """
    bench_for = edge("statistics").bench_for
    first = bench_for(adapter, tasks[0], model)
    told = {"family": first.family, "processor": first.processor}
    benches = [first, *(bench_for(adapter, task, first.model, **told) for task in tasks[1:])]
    names = apart([made.task.name for made in benches])
    return {name: Asked(adapter, made, split, limit) for name, made in zip(names, benches, strict=True)}
