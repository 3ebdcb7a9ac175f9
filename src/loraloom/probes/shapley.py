"""Attribution: what each unit of an adapter, or each adapter of a merge, is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from loraloom.adapter import Adapter
from loraloom.intervals import half_width
from loraloom.ops.merge import merge as merge_adapters
from loraloom.probes import probes
from loraloom.probes.attribution import (
    MOST,
    STRATA,
    Block,
    Estimated,
    averaged,
    banzhaf,
    banzhaf_weight,
    exact,
    left_out,
    multilinear,
    needed,
    permutations,
    shapley_weight,
)
from loraloom.probes.game import (
    Game,
    Score,
    check_extras,
    check_seed,
    check_whole,
    game_of_merge,
    game_of_units,
    work_of,
)
from loraloom.registry import UnknownName

BY = ("auto", "multilinear", "permutations", "exact", "banzhaf", "leave-one-out")
Merge = Callable[[list[Adapter]], Adapter]
_BLOCK = {"multilinear": 2 * STRATA, "permutations": 2, "banzhaf": 2}  # draws that depend on each other
_BEYOND = 0.99994  # how often a sum without bias is within its slack: 4 standard errors of many blocks


@dataclass(frozen=True)
class Shapley:
    """What each unit is worth, with standard errors.

    Attributes:
        units: their names, in the order of ``strategies.units.group``, or those of the adapters.
        values: one a unit, in the unit of the score.
        stderr: standard errors of the values; 0 where they are exact, and where no draw told another from the rest.
        by: ``exact``, ``multilinear``, ``permutations``, ``banzhaf``, ``banzhaf-exact`` or ``leave-one-out``.
        unit: what was switched.
        samples: coalitions or orders that were drawn; 0 where nothing was.
        evaluations: calls of the score.
        saved: calls that were not needed as the coalition had been scored.
        whole: score with all units on.
        base: score with all units off.
        slack: by how much the values may miss ``whole - base`` in sum: by chance (4 standard errors of many blocks,
            more of few), what truncation leaves and rounding. None of Banzhaf and leave-one-out, whose values need not
            add up.
        passes: blocks of the model to run for that, each once over all examples, where the score tells
            (``ll.score``); None where it does not. It is the plan of one process that starts with nothing known.
        passes_saved: how many more it were if each evaluation ran all blocks; None likewise.
    """

    units: tuple[str, ...]
    values: tuple[float, ...]
    stderr: tuple[float, ...]
    by: str
    unit: str
    samples: int
    evaluations: int
    saved: int
    whole: float
    base: float
    slack: float | None
    passes: int | None = None
    passes_saved: int | None = None

    @property
    def blocks(self) -> int:
        """Independent blocks of draws that the values are means of; 0 where nothing was drawn."""
        return self.samples // _BLOCK.get(self.by, 1)

    @property
    def half_widths(self) -> tuple[float, ...]:
        """How far the 95 % intervals of the values reach to either side, by Student's t over the blocks."""
        return tuple(half_width(error, self.blocks) if error else 0.0 for error in self.stderr)

    @property
    def gap(self) -> float:
        """Sum of the values less ``whole - base``: 0 but for chance, where they are Shapley values."""
        return math.fsum([*self.values, -self.whole, self.base])

    @property
    def adds_up(self) -> bool | None:
        """Whether the gap is within its slack; None where there is none."""
        return None if self.slack is None else abs(self.gap) <= self.slack

    @property
    def top_third(self) -> float | None:
        """Share of the sum of the values above 0 that the third of the units with the highest has; None where none is.

        Of n units that is ``round(n / 3)``, at least one.
        """
        above = sorted(self.worth.values(), reverse=True)
        total = math.fsum(above)
        return math.fsum(above[: max(1, round(len(above) / 3))]) / total if total > 0 else None

    @property
    def worth(self) -> dict[str, float]:
        """Values by unit, those below 0 as 0: what :func:`loraloom.compress` takes as ``scores``."""
        return {unit: max(value, 0.0) for unit, value in zip(self.units, self.values, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists; :func:`loraloom.prune` takes it as ``by``."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@probes.register("shapley", paper="https://arxiv.org/abs/2506.05713")
def shapley(
    a: Adapter | Sequence[Adapter] | Mapping[str, Adapter],
    score: Score,
    unit: str = "layer",
    samples: int = 200,
    seed: int = 0,
    *,
    by: str = "auto",
    error: float | None = None,
    truncate: float = 0.0,
    merge: str | Merge = "linear",
) -> Shapley:
    """Shapley values of units: how the gain of an adapter over its base is shared out (Shapley 1953; CoTo, section 3).

    Players are the units of one adapter; a coalition scores as the adapter with the modules of all others dropped. With
    ``unit="adapter"`` they are whole adapters, and a coalition scores as the merge of its members. With nobody on it is
    the base, ``score(None)``. No coalition is scored twice.

    - ``multilinear``: phi_i is the mean over p in [0, 1] of what i adds when every other unit is on with probability p:
      the games that CoTo plays while p rises. Drawn in independent blocks of 8 coalitions, stratified in p and in
      antithetic pairs; each takes up to n + 1 evaluations.
    - ``permutations``: units come one by one, in random orders and their reverses; up to n - 1 evaluations each.
    - ``exact``: all 2^n coalitions, at most 12 units.
    - ``auto``: ``exact`` where it may and asks no more than the draws would, ``samples * n``; else ``multilinear``.
    - ``banzhaf``: what i adds when all others are on by a fair coin (exact as for ``auto``). ``leave-one-out``: what is
      lost without i. Neither adds up to the gain.

    Standard errors are those of the mean of the blocks; few blocks make wide intervals. Draws depend on (seed, block)
    alone: more samples go on where fewer stopped.

    Args:
        a: an adapter; with ``unit="adapter"`` several, in a list or by name.
        score: called with adapters and with None for the base; higher is better.
        unit: layer, projection, module, tower, a regular expression (``strategies.units.group``), or adapter.
        samples: coalitions or orders to draw, at most; rounded up to whole blocks (of 8; of 2 for ``permutations`` and
            ``banzhaf``), at least 2.
        seed: of the draws, in [0, 2**64).
        by: see above.
        error: stop once every standard error is at most this, though not before 8 blocks.
        truncate: with ``permutations``: units that come once the score is this near to the whole add nothing.
        merge: name of a merge method, with its defaults and equal weights, or a function of the adapters that are on.

    Raises:
        ValueError: a number out of range, more than 12 units for ``exact``, or a score that is not finite.
        UnknownName: no such unit, method or way to compute.
        UnsupportedKind: the adapter holds whole tensors (a trained head), which are in no unit.

    Example:
        >>> from loraloom.adapter import Factors
        >>> import torch
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))
        >>> a = Adapter({"r": 1}, {f"layers.{n}.q": one.scaled(n + 1.0) for n in range(3)})
        >>> r = shapley(a, lambda on: 0.0 if on is None else sum(f.norm() for f in on.modules.values()))
        >>> r.units, [round(value, 6) for value in r.values], r.by, r.evaluations
        (('layers.0', 'layers.1', 'layers.2'), [1.0, 2.0, 3.0], 'exact', 8)
    """
    _check(samples, seed, by, error, truncate)
    game = _game(a, score, unit, merge)
    n = len(game.players)
    if by == "exact" and n > MOST:
        raise ValueError(
            f"by='exact' scores 2^n coalitions, at most {MOST} units; here are {n}: draw, by='multilinear'"
        )
    affordable = n <= MOST and 2**n <= samples * n
    before, ends = work_of(score), (game.everyone, frozenset[int]())
    drawn = 0
    if by == "leave-one-out":
        found = Estimated(tuple(left_out(game)), (0.0,) * n, 0.0, 0)
    elif by == "exact" or (affordable and by in ("auto", "banzhaf")):
        weight = banzhaf_weight if by == "banzhaf" else shapley_weight
        found = Estimated(tuple(exact(game, weight)), (0.0,) * n, 0.0, 0)
        by = "banzhaf-exact" if by == "banzhaf" else "exact"
    else:
        by = "multilinear" if by == "auto" else by

        def ask(blocks: range) -> None:
            known = [] if truncate else [on for block in blocks for on in needed(by, n, seed, block)]
            game.ask([*ends, *known])

        size = _BLOCK[by]
        found = averaged(_DRAWS[by](game, seed, truncate), -(-samples // size), error, ask)
        drawn = size * found.blocks
    everyone, nobody = (game.value(on) for on in ends)
    rounding = 1e-9 * max(1.0, abs(everyone), abs(nobody))
    adds = not by.startswith("banzhaf") and by != "leave-one-out"
    chance = half_width(found.sum_stderr, found.blocks, _BEYOND) if drawn else 0.0
    slack = chance + truncate + rounding if adds else None
    told: dict[str, Any] = work_of(score).since(before)
    facts: tuple[Any, ...] = (by, unit, drawn, game.evaluations, game.saved, everyone, nobody, slack)
    return Shapley(game.players, found.values, found.stderr, *facts, **told)


_DRAWS: dict[str, Callable[[Game, int, float], Block]] = {
    "multilinear": lambda game, seed, truncate: partial(multilinear, game, seed),
    "banzhaf": lambda game, seed, truncate: partial(banzhaf, game, seed),
    "permutations": lambda game, seed, truncate: partial(permutations, game, seed, truncate=truncate),
}


def _check(samples: int, seed: int, by: str, error: float | None, truncate: float) -> None:
    check_whole("samples", samples, 1)
    check_seed(seed)
    if by not in BY:
        raise UnknownName("by", by, list(BY))
    for name, value, least in (("error", error, "above 0"), ("truncate", truncate, "at least 0")):
        if value is None or (name == "truncate" and value == 0):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number {least}, got {value!r}")
    if truncate and by != "permutations":
        raise ValueError(f"truncate goes with by='permutations', not {by!r}")


def _game(a: Adapter | Sequence[Adapter] | Mapping[str, Adapter], score: Score, unit: str, merge: str | Merge) -> Game:
    if isinstance(a, Adapter):
        if merge != "linear":
            raise ValueError(f"a way to merge goes with several adapters; here is one, and merge={merge!r}")
        check_extras(a, unit)
        return game_of_units(a, score, unit)
    if unit != "adapter":
        raise ValueError(f"several adapters are players as they are: unit='adapter', not {unit!r}")
    named = dict(a) if isinstance(a, Mapping) else {f"adapter {at + 1}": one for at, one in enumerate(a)}
    merged: Merge = (lambda some: merge_adapters(some, merge)) if isinstance(merge, str) else merge
    return game_of_merge(named, score, merged)
