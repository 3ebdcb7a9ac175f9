"""Searching merge weights: a few tens of merges, scored, by an optimiser that needs no gradient (LoraHub)."""

from __future__ import annotations

import importlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loraloom.adapter import Adapter
from loraloom.ops.merge import merge
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.spaces import SPACES
from loraloom.registry import UnknownName
from loraloom.strategies.units import KINDS, group

Weights = tuple[float, ...] | Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Trial:
    """One merge that was scored.

    Attributes:
        weights: one per adapter and unit: those of the first unit, of the second, ...
        score: what the score said.
        objective: the score less the penalty on the weights.
    """

    weights: tuple[float, ...]
    score: float
    objective: float


@dataclass(frozen=True, eq=False)
class Search:
    """The best merge that was found.

    Attributes:
        weights: as ``merge`` takes them: one per adapter, or such a tuple for every module path.
        score: of the best merge.
        evaluations: how often the score was asked.
        trace: every trial, in order.
        adapter: the best merge, lazy.
    """

    weights: Weights
    score: float
    evaluations: int
    trace: tuple[Trial, ...]
    adapter: Adapter

    def to_json(self) -> dict[str, Any]:
        """Weights, score, number of evaluations and trace."""
        by_module = isinstance(self.weights, Mapping)
        weights: Any = {k: list(v) for k, v in self.weights.items()} if by_module else list(self.weights)  # type: ignore[union-attr]
        trace = [{**vars(trial), "weights": list(trial.weights)} for trial in self.trace]
        return {"weights": weights, "score": self.score, "evaluations": self.evaluations, "trace": trace}


def search(
    adapters: Sequence[Adapter],
    score: Callable[[Adapter], float],
    *,
    method: str = "linear",
    space: str | None = None,
    budget: int = 40,
    unit: str = "adapter",
    bounds: tuple[float, float] | None = None,
    l1: float = 0.05,
    seed: int = 0,
    **options: Any,
) -> Search:
    """The merge weights of the highest score, found without gradients (LoraHub: Huang et al. 2023).

    Maximises ``score(merge(w)) - l1 * sum_i |w_i|`` with CMA-ES (nevergrad); LoraHub minimises a few-shot loss in the
    same way, from 0 and in the space ``factors``. Here the search starts at equal shares 1/k. They and then every
    adapter alone are scored first, as far as the budget goes, so that the result is at least as good as the best of
    them in what is maximised. With several units the penalty is their mean.

    Args:
        adapters: at least one, as ``merge`` takes them.
        score: higher is better (``ll.score(model, task)``). Use other examples for it than for the final evaluation.
        method: a merge method.
        space: of the merge; by default the method's own. LoraHub's is ``factors``.
        budget: calls of ``score``, never more.
        unit: ``adapter`` for one weight per adapter; ``layer``, ``projection`` or ``module`` for one per adapter and
            such unit (:func:`loraloom.strategies.units.group`), which takes a larger budget.
        bounds: of every weight. By default (-1.5, 1.5) as LoraHub has it; from 0 where the space refuses negative
            weights.
        l1: price of a weight of 1.
        seed: of the search and of merge methods that draw; one seed, one result, as far as the score is deterministic.
        options: further arguments of ``merge`` (density, rank, statistics, ...).

    Raises:
        ValueError: nevergrad is not installed, a score is not finite, or an argument does not fit ``merge``.
        UnknownName: no such method, space or unit.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))
        >>> a, b = Adapter({"r": 1}, {"fc": one}), Adapter({"r": 1}, {"fc": one.scaled(-1.0)})
        >>> found = search([a, b], lambda m: -abs(m.modules["fc"].delta().item() - 0.5), budget=30)
        >>> found.evaluations, found.score > -0.1
        (30, True)
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be a whole number of at least 1, got {budget!r}")
    if not 0 <= l1 < math.inf:
        raise ValueError(f"l1 must be a finite number from 0 on, got {l1}")
    low, high = bounds if bounds is not None else _bounds(method, space)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"bounds must be two finite numbers, the lower first, got {bounds}")
    units = _units(adapters, unit)
    k, count = len(adapters), max(len(units), 1)
    spread = {name: at for at, names in enumerate(units) for name in names}

    def weights_of(vector: Sequence[float]) -> Weights:
        rows = [tuple(float(value) for value in vector[at * k : (at + 1) * k]) for at in range(count)]
        return {name: rows[at] for name, at in spread.items()} if units else rows[0]

    def merged(vector: Sequence[float]) -> Adapter:
        return merge(adapters, method, weights_of(vector), space=space, seed=seed, **options)

    merged([low, *[high] * (k * count - 1)])  # what a merge refuses (negative weights, knobs) is refused now
    trace: list[Trial] = []
    for vector, tell in _candidates(_starts(k, count, low, high), low, high, budget, seed):
        value = float(score(merged(vector)))
        if not math.isfinite(value):
            raise ValueError(f"the score of weights {list(vector)} is {value}; a search needs finite scores")
        trial = Trial(vector, value, value - l1 * sum(map(abs, vector)) / count)
        trace.append(trial)
        tell(-trial.objective)
    best = max(trace, key=lambda trial: trial.objective)  # of equal ones the first
    return Search(weights_of(best.weights), best.score, len(trace), tuple(trace), _recorded(merged, best, trace, unit))


def _bounds(method: str, space: str | None) -> tuple[float, float]:
    chosen = space or merge_methods[method].facts.get("space", "delta")
    return (0.0 if chosen in SPACES and SPACES[chosen].gauge else -1.5), 1.5


def _units(adapters: Sequence[Adapter], unit: str) -> list[tuple[str, ...]]:
    """The modules of each unit; none for one weight per adapter."""
    if not adapters:
        raise ValueError("there is nothing to merge: at least one adapter is needed")
    if unit == "adapter":
        return []
    if unit not in KINDS:
        raise UnknownName("unit", unit, ["adapter", *KINDS])
    return list(group([name for adapter in adapters for name in adapter.modules], unit).values())


def _starts(k: int, count: int, low: float, high: float) -> list[tuple[float, ...]]:
    """Equal shares, then every adapter alone, as far as the bounds allow; equal ones once."""
    rows = [[1 / k] * k, *([float(at == alone) for at in range(k)] for alone in range(k))]
    return list(dict.fromkeys(tuple(min(max(value, low), high) for value in row * count) for row in rows))


def _candidates(
    starts: Sequence[tuple[float, ...]], low: float, high: float, budget: int, seed: int
) -> Iterator[tuple[tuple[float, ...], Callable[[float], None]]]:
    """Weights to try, each with what to call with its loss; the starts come first."""
    with _undisturbed():
        try:
            ng = importlib.import_module("nevergrad")
        except ImportError:
            raise ValueError("the search needs nevergrad: pip install 'loraloom[search]'") from None
        place = ng.p.Array(init=np.array(starts[0])).set_bounds(low, high)
        place.random_state = np.random.RandomState(seed)
        # Not NGOpt, as LoraHub: some of what it chooses among runs in threads that can wait for each other for ever.
        optimizer = ng.optimizers.CMA(parametrization=place, budget=budget, num_workers=1)
    for at in range(budget):
        with _undisturbed():
            if at < len(starts):
                optimizer.suggest(np.array(starts[at]))  # what is asked next, to be learned from like all others
            candidate = optimizer.ask()
            asked = tuple(np.clip(candidate.value, low, high).tolist())
            vector = starts[at] if at < len(starts) else asked  # without the rounding of a way there and back

        def tell(loss: float, candidate: Any = candidate) -> None:
            with _undisturbed():
                optimizer.tell(candidate, loss)

        yield vector, tell


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nevergrad draws from the global random streams when it is imported, and warns of what it lacks for plots."""
    states = np.random.get_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def _recorded(merged: Callable[[Sequence[float]], Adapter], best: Trial, trace: Sequence[Trial], unit: str) -> Adapter:
    """The best merge, with the search in its record."""
    adapter = merged(best.weights)
    adapter.provenance["record"]["search"] = {"score": best.score, "evaluations": len(trace), "unit": unit}
    return replace(adapter, provenance={**adapter.provenance, "operation": "search"})
