"""What each player of a game is worth: exactly, or as a mean of independent blocks of draws without bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from loraloom.probes.game import Coalition, Game, uniforms

MOST = 12  # players of a game that is asked for all its coalitions
STRATA = 4  # pairs of draws in a block of the multilinear extension: p in 8 equal parts of [0, 1]
FEWEST = 8  # blocks before an error is believed
_STREAM = 0x5368_6170  # the upper half of the generator's key: draws of one seed for other ends are another stream

Block = Callable[[int], list[float]]


class Estimated(NamedTuple):
    """Values with their standard errors, that of their sum, and how many blocks they are the mean of."""

    values: tuple[float, ...]
    stderr: tuple[float, ...]
    sum_stderr: float
    blocks: int


def exact(game: Game, weight: Callable[[int, int], float]) -> list[float]:
    """Sum over all coalitions with a player of ``weight(size without it, n)`` times what it adds.

    Example:
        >>> game = Game(["left", "right 1", "right 2"], lambda on: float(0 in on and len(on) > 1))
        >>> [round(value, 4) for value in exact(game, shapley_weight)]
        [0.6667, 0.1667, 0.1667]
    """
    n = len(game.players)
    subsets = [frozenset(on) for size in range(n + 1) for on in combinations(range(n), size)]
    game.ask(subsets)
    known = {on: game.value(on) for on in subsets}
    terms: list[list[float]] = [[] for _ in range(n)]
    for on, value in known.items():
        for i in on:
            terms[i].append(weight(len(on) - 1, n) * (value - known[on - {i}]))
    return [math.fsum(each) for each in terms]


def shapley_weight(size: int, n: int) -> float:
    """Share of the orders of n players in which just the given ``size`` come before a player (Shapley 1953)."""
    return 1 / (n * math.comb(n - 1, size))


def banzhaf_weight(size: int, n: int) -> float:
    """Every coalition of the others counts alike (Banzhaf 1965)."""
    return 0.5 ** (n - 1)


def left_out(game: Game) -> list[float]:
    """What is lost when one player is off and all others are on."""
    everyone = game.everyone
    game.ask([everyone, frozenset[int](), *(everyone - {i} for i in everyone)])  # nobody is told beside them
    return [game.value(everyone) - game.value(everyone - {i}) for i in range(len(game.players))]


def added(game: Game, on: Coalition) -> list[float]:
    """What every player adds to the others in a coalition."""
    here = game.value(on)
    return [here - game.value(on - {i}) if i in on else game.value(on | {i}) - here for i in range(len(game.players))]


def multilinear(game: Game, seed: int, block: int) -> list[float]:
    """Mean of what players add to 8 coalitions, those of p in 8 equal parts of [0, 1] (Owen 1972).

    Everybody is on with probability p, whatever p is: the mean over p is without bias for every player.

    Example:
        >>> game = Game(["a", "b"], lambda on: 1.0 * (0 in on) + 2.0 * (1 in on))
        >>> multilinear(game, seed=0, block=0)
        [1.0, 2.0]
    """
    return _mean([added(game, on) for on in stratified(len(game.players), seed, block)])


def stratified(n: int, seed: int, block: int) -> list[Coalition]:
    """Coalitions of n players, one for a p in each of 8 equal parts of [0, 1], that of 1 - p its complement.

    p is uniform in its part, so that over [0, 1] it is as well.

    Example:
        >>> [len(on) // 100 for on in stratified(800, seed=0, block=0)]
        [0, 7, 1, 6, 2, 5, 3, 4]
    """
    drawn = uniforms(seed, block, STRATA * (n + 1), _STREAM)
    found = []
    for j in range(STRATA):
        p = (j + drawn[j]) / (2 * STRATA)
        on = frozenset(i for i, u in enumerate(drawn[STRATA + j * n : STRATA + (j + 1) * n]) if u < p)
        found += [on, frozenset(range(n)) - on]
    return found


def banzhaf(game: Game, seed: int, block: int) -> list[float]:
    """Mean of what players add to a coalition of fair coins and to its complement."""
    return _mean([added(game, on) for on in coins(len(game.players), seed, block)])


def coins(n: int, seed: int, block: int) -> list[Coalition]:
    """A coalition of n players who throw fair coins, and its complement."""
    on = frozenset(i for i, u in enumerate(uniforms(seed, block, n, _STREAM)) if u < 0.5)
    return [on, frozenset(range(n)) - on]


def permutations(game: Game, seed: int, block: int, truncate: float = 0.0) -> list[float]:
    """Mean of what players add when they come one by one, in a random order and in its reverse.

    With ``truncate`` above 0, who comes after the value is within it of the whole adds nothing (Ghorbani and Zou 2019):
    fewer evaluations for an error of at most ``truncate`` in the sum.

    Example:
        >>> majority = Game("abc", lambda on: float(len(on) >= 2))
        >>> sum(permutations(majority, seed=0, block=0))
        1.0
    """
    n = len(game.players)
    end, rows = game.value(game.everyone), []
    for players in orders(n, seed, block):
        row, before = [0.0] * n, game.value(())
        for at, i in enumerate(players):
            if truncate and abs(end - before) <= truncate:
                break
            here = game.value(players[: at + 1])
            row[i], before = here - before, here
        rows.append(row)
    return _mean(rows)


def orders(n: int, seed: int, block: int) -> list[list[int]]:
    """A random order of n players and its reverse."""
    drawn = uniforms(seed, block, n, _STREAM)
    order = sorted(range(n), key=drawn.__getitem__)
    return [order, order[::-1]]


def needed(by: str, n: int, seed: int, block: int) -> list[Coalition]:
    """The coalitions that a block of ``multilinear``, ``banzhaf`` or ``permutations`` (without truncation) looks at.

    Example:
        >>> [sorted(on) for on in needed("banzhaf", 1, seed=0, block=0)]
        [[0], [], [], [0]]
    """
    if by == "permutations":
        return [frozenset(players[:at]) for players in orders(n, seed, block) for at in range(n + 1)]
    middles = stratified(n, seed, block) if by == "multilinear" else coins(n, seed, block)
    return [on for middle in middles for on in (middle, *(middle ^ {i} for i in range(n)))]


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def averaged(
    block: Block, blocks: int, error: float | None = None, ask: Callable[[range], None] = lambda blocks: None
) -> Estimated:
    """Mean of independent blocks with its standard error; at least 2, and fewer than asked for once ``error`` is met.

    Stopping by the error needs 8 blocks: a few may agree by chance. Before blocks are computed they are announced by
    ``ask``: all of them, or with ``error`` those that are needed for certain.

    Example:
        >>> averaged(lambda at: [float(at)], blocks=3).values
        (1.0,)
    """
    rows: list[list[float]] = []
    most, asked = max(2, blocks), 0
    for at in range(most):
        if at == asked:
            asked = most if error is None else max(at + 1, min(most, FEWEST))
            ask(range(at, asked))
        rows.append(block(at))
        if error is not None and len(rows) >= FEWEST and max(_stderr(np.array(rows))) <= error:
            break
    found = np.array(rows)
    spread = _stderr(np.column_stack([found, found.sum(axis=1)]))
    return Estimated(tuple(_mean(rows)), tuple(spread[:-1]), spread[-1], len(rows))


def _stderr(rows: np.ndarray) -> list[float]:
    found: list[float] = (rows.std(axis=0, ddof=1) / math.sqrt(len(rows))).tolist()
    return found
