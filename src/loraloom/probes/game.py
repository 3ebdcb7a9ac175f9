"""Games: players that are on or off, and what they score together; no coalition is scored twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from loraloom.adapter import Adapter, Modules, UnsupportedKind
from loraloom.registry import UnknownName
from loraloom.strategies.units import KINDS, group, tower

Score = Callable[[Adapter | None], float]
Coalition = frozenset[int]
AtOnce = Callable[[list[Coalition]], list[float]] | None


class Game:
    """Players by number, and the value of every coalition of them, asked for once.

    Args:
        players: their names.
        worth: what a coalition scores.
        at_once: what several score, where that is better than one by one.

    Attributes:
        players: their names.
        evaluations: how many coalitions have been scored.
        saved: how many times a value was known already.

    Example:
        >>> game = Game(["a", "b"], lambda on: float(len(on)))
        >>> game.value([1]), game.value([0, 1]), game.value([1]), game.evaluations, game.saved
        (1.0, 2.0, 1.0, 2, 1)
    """

    def __init__(self, players: Sequence[str], worth: Callable[[Coalition], float], at_once: AtOnce = None) -> None:
        self.players = tuple(players)
        self.evaluations = self.saved = 0
        self._at_once = at_once or (lambda coalitions: [worth(on) for on in coalitions])
        self._known: dict[Coalition, float] = {}
        self._unread: set[Coalition] = set()  # asked for beforehand

    @property
    def everyone(self) -> Coalition:
        """The coalition of all players."""
        return frozenset(range(len(self.players)))

    def value(self, on: Iterable[int]) -> float:
        """What a coalition scores.

        Raises:
            ValueError: the score is not finite; says of which coalition.
        """
        coalition = frozenset(on)
        self.ask([coalition])
        self.saved += coalition not in self._unread
        self._unread.discard(coalition)
        return self._known[coalition]

    def ask(self, coalitions: Iterable[Iterable[int]]) -> None:
        """Score coalitions whose values will be needed, all that are not known at once.

        Raises:
            ValueError: as :meth:`value`.
        """
        new = [on for on in dict.fromkeys(map(frozenset, coalitions)) if on not in self._known]
        for on, value in zip(new, self._at_once(new) if new else (), strict=True):
            names = ", ".join(self.players[i] for i in sorted(on))
            self._known[on] = finite(value, f"with {names or 'nothing'} on")
        self._unread.update(new)
        self.evaluations += len(new)


def finite(value: float, where: str) -> float:
    """The score as a float.

    Raises:
        ValueError: it is not finite.

    Example:
        >>> finite(float("nan"), "at 0.5")
        Traceback (most recent call last):
        ValueError: the score at 0.5 is nan
    """
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"the score {where} is {found}")
    return found


def many(score: Score, adapters: Sequence[Adapter | None]) -> list[float]:
    """Scores of several adapters, in order; asked for at once where the score has a method ``many`` for that.

    Such a score may answer in any order, share work between them, or let several processes each do a part. So a probe
    that knows beforehand what it will ask gains by asking for all of it here.

    Example:
        >>> many(lambda adapter: 0.0 if adapter is None else 1.0, [None, Adapter({}, {})])
        [0.0, 1.0]
    """
    at_once = getattr(score, "many", None)
    return [float(value) for value in (at_once(adapters) if at_once else map(score, adapters))]


class Work(NamedTuple):
    """What a score had to do so far; one made by ``ll.score`` counts in ``work``.

    Attributes:
        passes: blocks of the model to run, each once over all examples.
        whole: how many that is where every evaluation runs all blocks.
        unknown: evaluations of which neither is known.
    """

    passes: int = 0
    whole: int = 0
    unknown: int = 0

    def since(self, before: Work) -> dict[str, int]:
        """``passes`` and ``passes_saved`` for a result, where they are known of all that was done.

        Example:
            >>> Work(30, 120).since(Work(10, 20)), Work(30, 120, 1).since(Work())
            ({'passes': 20, 'passes_saved': 80}, {})
        """
        passes, whole, unknown = (now - then for now, then in zip(self, before, strict=True))
        return {"passes": passes, "passes_saved": whole - passes} if passes and not unknown else {}


def work_of(score: Score) -> Work:
    """What a score has counted; nothing of a plain function."""
    return Work(*getattr(score, "work", ()))


def units_of(adapter: Adapter, unit: str) -> dict[str, tuple[str, ...]]:
    """Module paths by unit: a kind of ``strategies.units.group``, or ``tower`` (text, vision, ...).

    Example:
        >>> names = ["text.layers.0.q", "text.layers.1.q", "vision.layers.0.q"]
        >>> list(units_of(Adapter({}, dict.fromkeys(names)), "tower"))
        ['text.layers', 'vision.layers']
    """
    if unit == "adapter":
        raise UnknownName("unit of one adapter", unit, [*KINDS, "tower", "a regular expression"])
    if unit != "tower":
        return group(list(adapter.modules), unit)
    found: dict[str, list[str]] = {}
    for layer, names in group(list(adapter.modules), "layer").items():
        found.setdefault(tower(layer) or layer, []).extend(names)
    return {label: tuple(names) for label, names in found.items()}


def game_of_units(adapter: Adapter, score: Score, unit: str) -> Game:
    """The units of one adapter: a coalition scores as the adapter with the modules of all other units dropped.

    Modules in no unit (of a regular expression) are always on. If there are none, the empty coalition is the base,
    ``score(None)``.

    Raises:
        ValueError, UnknownName: no modules, or no such unit.
    """
    units = units_of(adapter, unit)
    held = adapter.loaded()
    switched = {name for names in units.values() for name in names}
    of = list(units.values())

    def with_only(on: Coalition) -> Adapter | None:
        off = switched.difference(*(of[i] for i in on))
        kept = [name for name in held.modules if name not in off]
        if not kept:
            return None
        if not off:
            return held
        config = {**held.config, "inference_mode": True}
        return replace(held, config=config, modules=Modules(kept, held.modules.__getitem__, held.shape))

    return _game(list(units), score, with_only)


def game_of_merge(adapters: Mapping[str, Adapter], score: Score, merge: Callable[[list[Adapter]], Adapter]) -> Game:
    """Whole adapters: a coalition scores as the merge of its members, in order; the empty one is the base.

    Raises:
        ValueError: there are no adapters.
    """
    if not adapters:
        raise ValueError("there are no adapters; at least one is needed")
    held = [adapter.loaded() for adapter in adapters.values()]
    return _game(list(adapters), score, lambda on: merge([held[i] for i in sorted(on)]) if on else None)


def _game(players: Sequence[str], score: Score, of: Callable[[Coalition], Adapter | None]) -> Game:
    return Game(players, lambda on: score(of(on)), lambda coalitions: many(score, [of(on) for on in coalitions]))


def check_extras(adapter: Adapter, unit: str) -> None:
    """Refuse whole tensors beside the factors where all modules can be off: what those are worth would go to a unit.

    Raises:
        UnsupportedKind: says which tensor.
    """
    every = sum(map(len, units_of(adapter, unit).values())) == len(adapter.modules)
    if adapter.extras and every:
        raise UnsupportedKind(
            f"the adapter holds whole tensors beside its factors (the first is {next(iter(adapter.extras))}); they are"
            " in no unit, so what units are worth cannot be told from what those are"
        )


def uniforms(seed: int, index: int, count: int, stream: int) -> list[float]:
    """``count`` numbers in [0, 1) of 53 bits, from (seed, index) alone: the same in runs of any length.

    Philox (Salmon et al. 2011), counter-based, as in :class:`loraloom.CoTo`; ``stream`` tells uses of a seed apart.

    Raises:
        ValueError: ``seed`` is outside [0, 2**64).

    Example:
        >>> uniforms(0, 1, 2, stream=7) == uniforms(0, 1, 3, stream=7)[:2] != uniforms(0, 2, 2, stream=7)
        True
    """
    check_seed(seed)
    bits = np.random.Philox(key=seed | stream << 64, counter=index << 128).random_raw(count)
    return [float(x) for x in (bits >> np.uint64(11)) * 2.0**-53]


def check_whole(name: str, value: int, least: int) -> None:
    """Refuse a value that is not a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_seed(seed: int) -> None:
    """Refuse a seed that is not a whole number in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number in [0, 2**64), got {seed!r}")
