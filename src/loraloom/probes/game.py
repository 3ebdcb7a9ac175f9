"""Games: players that are on or off, and what they score together; no coalition is scored twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from loraloom.adapter import Adapter, Modules, UnsupportedKind
from loraloom.registry import UnknownName
from loraloom.strategies.units import KINDS, group, tower

Score = Callable[[Adapter | None], float]
Coalition = frozenset[int]


class Game:
    """Players by number, and the value of every coalition of them, asked for once.

    Attributes:
        players: their names.
        evaluations: how many coalitions have been scored.
        saved: how many times a value was known already.

    Example:
        >>> game = Game(["a", "b"], lambda on: float(len(on)))
        >>> game.value([1]), game.value([0, 1]), game.value([1]), game.evaluations, game.saved
        (1.0, 2.0, 1.0, 2, 1)
    """

    def __init__(self, players: Sequence[str], worth: Callable[[Coalition], float]) -> None:
        self.players = tuple(players)
        self.evaluations = self.saved = 0
        self._worth = worth
        self._known: dict[Coalition, float] = {}

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
        if coalition in self._known:
            self.saved += 1
            return self._known[coalition]
        names = ", ".join(self.players[i] for i in sorted(coalition))
        self._known[coalition] = finite(self._worth(coalition), f"with {names or 'nothing'} on")
        self.evaluations += 1
        return self._known[coalition]


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

    def worth(on: Coalition) -> float:
        off = switched.difference(*(of[i] for i in on))
        kept = [name for name in held.modules if name not in off]
        if not kept:
            return score(None)
        if not off:
            return score(adapter)
        config = {**held.config, "inference_mode": True}
        return score(replace(held, config=config, modules=Modules(kept, held.modules.__getitem__, held.shape)))

    return Game(list(units), worth)


def game_of_merge(adapters: Mapping[str, Adapter], score: Score, merge: Callable[[list[Adapter]], Adapter]) -> Game:
    """Whole adapters: a coalition scores as the merge of its members, in order; the empty one is the base.

    Raises:
        ValueError: there are no adapters.
    """
    if not adapters:
        raise ValueError("there are no adapters; at least one is needed")
    held = [adapter.loaded() for adapter in adapters.values()]
    return Game(list(adapters), lambda on: score(merge([held[i] for i in sorted(on)]) if on else None))


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
