"""How a probe asks a real model: the score of one task, the model loaded when it is first called."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from loraloom.adapter import Adapter
from loraloom.registry import edge


class Asked:
    """A score for probes, made by :func:`asked`."""

    def __init__(self, adapter: Adapter, task: Any, split: str, limit: int | None, **bench: Any) -> None:
        self._of = (adapter, task)
        self._options = bench
        self.split, self.limit = split, limit

    @cached_property
    def bench(self) -> Any:
        """The model set up for the task; loaded when it is first needed."""
        return edge("statistics").bench_for(*self._of, **self._options)

    @property
    def task(self) -> str:
        """The name of the task."""
        return str(self.bench.task.name)

    def __call__(self, adapter: Adapter | None) -> float:
        """Of one adapter; None is the base."""
        return float(self.bench.evaluate(adapter, self.split, self.limit).value)


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
    """The scores of several tasks by their names, of one model that is loaded here; arguments as of :func:`asked`."""
    bench_for = edge("statistics").bench_for
    first = bench_for(adapter, tasks[0], model)
    told = {"family": first.family, "processor": first.processor}
    benches = [first, *(bench_for(adapter, task, first.model, **told) for task in tasks[1:])]
    return {made.task.name: Asked(adapter, made, split, limit) for made in benches}
