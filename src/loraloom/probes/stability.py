"""Stability: what an adapter still does when units of it are switched off at random, or pruned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraloom.adapter import Adapter
from loraloom.intervals import interval
from loraloom.ops.prune import prune
from loraloom.probes import probes
from loraloom.probes.game import Score, check_whole, finite, game_of_units, many, uniforms, units_of, work_of

_STREAM = 0x5374_6162  # the upper half of the generator's key: draws of one seed for other ends are another stream


@dataclass(frozen=True)
class Stability:
    """Scores with a part of the units off.

    Attributes:
        at: chances p of a unit to be off.
        mean: mean score over the draws, one a chance.
        low, high: ends of its 95 % interval (Student's t).
        scores: ``scores[k][j]`` is that of draw j at ``at[k]``.
        unit: what was switched.
        units: how many there are.
        whole: score with all units on.
        base: score with all units off.
        structured: score with the share p of the units pruned by the norm of their updates; None if not asked for.
        unstructured: score with the share p of the entries of the factors pruned by magnitude; None likewise.
        evaluations: calls of the score.
        saved: calls that were not needed as the same units had been on before.
        passes: blocks of the model to run for sets of units, as in :class:`loraloom.probes.shapley.Shapley`; what
            single entries were pruned from is not counted, and shares nothing.
        passes_saved: likewise.
        rest: how many modules are in no unit, and stay on.
    """

    at: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    unit: str
    units: int
    whole: float
    base: float
    structured: tuple[float, ...] | None
    unstructured: tuple[float, ...] | None
    evaluations: int
    saved: int
    passes: int | None = None
    passes_saved: int | None = None
    rest: int = 0

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists."""
        held = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return held | {"scores": [list(row) for row in self.scores]}


@probes.register("stability", paper="https://arxiv.org/abs/2506.05713")
def stability(
    a: Adapter,
    score: Score,
    at: Sequence[float] = (0.125, 0.25, 0.5, 0.75),
    draws: int = 8,
    seed: int = 0,
    *,
    unit: str = "layer",
    pruning: bool = False,
) -> Stability:
    """Score with every unit off with probability p, over a grid of p (CoTo, arXiv 2506.05713: layer-wise stability).

    Unit i is off in draw j where u_ij < p. The u depend on (seed, j) alone: with more draws the first ones stay, and in
    one draw what is off at some p is off at every higher one. Units that are all off are the base, ``score(None)``,
    where no module is in none of them; whole tensors beside the factors go with the last module. No set of units is
    scored twice.

    Args:
        a: the adapter.
        score: called with adapters and with None for the base; higher is better.
        at: chances to be off, each in [0, 1), at least one.
        draws: how many for each chance, at least 2.
        seed: of the draws, in [0, 2**64).
        unit: layer, projection, module, tower, or a regular expression (``strategies.units.group``).
        pruning: also prune, at each p: the ``round((1 - p) n)`` units of the largest update stay, at least one, as
            ``prune(density=1-p, unit=...)`` has it; and ``prune(density=1-p)``, of single entries.

    Raises:
        ValueError: a number out of range, an adapter without modules, or a score that is not finite.
        UnknownName: no such unit.
        UnsupportedKind: single entries of this kind of adapter cannot be pruned.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))
        >>> a = Adapter({"r": 1}, {f"layers.{n}.q": one for n in range(8)})
        >>> r = stability(a, lambda on: 0.0 if on is None else len(on.modules) / 8, at=[0.0, 0.5], pruning=True)
        >>> r.mean, r.structured, r.low[1] < 0.5 < r.high[1]
        ((1.0, 0.453125), (1.0, 0.5), True)
    """
    chances = _checked(at)
    check_whole("draws", draws, 2)
    game = game_of_units(a, score, unit)
    names = game.players
    drawn = [uniforms(seed, draw, len(names), _STREAM) for draw in range(draws)]
    small = [prune(a, density=1 - p) for p in chances] if pruning else []  # refused before anything is scored
    sets = [[frozenset(i for i, u in enumerate(row) if u >= p) for row in drawn] for p in chances]
    order = _by_norm(a, unit) if pruning else []
    largest = [frozenset(order[: max(1, round((1 - p) * len(names)))]) for p in chances if pruning]
    before, all_and_none = work_of(score), (game.everyone, frozenset[int]())
    game.ask([*all_and_none, *(on for row in sets for on in row), *largest])
    passes: dict[str, Any] = work_of(score).since(before)
    everyone, nobody = (game.value(on) for on in all_and_none)
    scores = [[game.value(on) for on in row] for row in sets]
    structured = unstructured = None
    if pruning:
        structured = tuple(game.value(on) for on in largest)
        parts = [(p, one) for p, one in zip(chances, small, strict=True) if p > 0]
        values = many(score, [one for _, one in parts])
        found = {p: finite(x, f"with {p:.4g} of the entries pruned") for (p, _), x in zip(parts, values, strict=True)}
        unstructured = tuple(found.get(p, everyone) for p in chances)
    ends = [interval(row) for row in scores]
    return Stability(
        at=chances,
        mean=tuple(math.fsum(row) / draws for row in scores),
        low=tuple(low for low, _ in ends),
        high=tuple(high for _, high in ends),
        scores=tuple(map(tuple, scores)),
        unit=unit,
        units=len(names),
        whole=everyone,
        base=nobody,
        structured=structured,
        unstructured=unstructured,
        evaluations=game.evaluations + sum(p > 0 for p in chances if pruning),
        saved=game.saved,
        rest=len(a.modules) - sum(map(len, units_of(a, unit).values())),
        **passes,
    )


def _checked(at: Sequence[float]) -> tuple[float, ...]:
    chances = tuple(at)
    for p in chances:
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"at must hold chances in [0, 1), got {p!r}; with all units off the score is the base's")
    if not chances or len(set(chances)) < len(chances):
        raise ValueError(f"at must hold at least one chance, none twice, got {list(chances)}")
    return tuple(float(p) for p in chances)


def _by_norm(adapter: Adapter, unit: str) -> list[int]:
    """Units by falling norm of their update, of equals the first."""
    units = units_of(adapter, unit)
    norms = [math.hypot(*(adapter.modules[name].norm() for name in names)) for names in units.values()]
    return sorted(range(len(norms)), key=lambda i: -norms[i])
