"""Balance: how training shared its work out over layers and projections, from what was noted while it ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes import probes
from loraloom.strategies.units import group, layer, tower
from loraloom.untrusted import is_number, short

WHAT = ("gradient", "update", "distance")
Row = tuple[float | None, ...]
_MOST_STEPS, _MOST_NORM = 2**53, 1e100  # of a file: what squares and sums of can be told


@dataclass(frozen=True)
class Balance:
    """Norms by module over a training run; row t is of optimizer step ``steps[t]``.

    Attributes:
        steps: optimizer steps that were done; 0 is the start.
        modules: paths in the base model.
        gradient: norm of the gradient of the module's trained weights as the optimizer got it, that is after clipping;
            None where there was none (a closed gate, the start) or it was not finite.
        update: Frobenius norm of the update ``scale * B @ A`` after the step; of HiRA that of ``B @ A``; None where an
            adapter is no product of factors.
        distance: norm of the difference of the trained weights from those of step ``since``.
        since: 0, or the step at which a run was taken up whose start is not known.

    Raises:
        ValueError: rows and columns do not fit.
    """

    steps: tuple[int, ...]
    modules: tuple[str, ...]
    gradient: tuple[Row, ...]
    update: tuple[Row, ...]
    distance: tuple[Row, ...]
    since: int = 0

    def __post_init__(self) -> None:
        for name in WHAT:
            rows = tuple(map(tuple, getattr(self, name)))
            object.__setattr__(self, name, rows)
            if len(rows) != len(self.steps) or any(len(row) != len(self.modules) for row in rows):
                size = f"{len(self.steps)} steps x {len(self.modules)} modules"
                raise ValueError(f"balance: {name} is not {size}")
        for name in ("steps", "modules"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def by(self, what: str, unit: str = "layer") -> tuple[tuple[str, ...], tuple[Row, ...]]:
        """Names of units and a row of norms a step: of all modules of a unit as one vector.

        A unit is None where any of its modules is, but for the gradient, where those without one count 0.

        Args:
            what: gradient, update or distance.
            unit: as in :func:`loraloom.strategies.units.group`.

        Example:
            >>> b = Balance((1,), ("layers.0.q", "layers.0.v"), ((3.0, 4.0),), ((3.0, None),), ((0.0, 0.0),))
            >>> b.by("gradient"), b.by("update")
            ((('layers.0',), ((5.0,),)), (('layers.0',), ((None,),)))
        """
        if what not in WHAT:
            raise ValueError(f"what must be one of {', '.join(WHAT)}, got {what!r}")
        place = {name: at for at, name in enumerate(self.modules)}
        units = {name: [place[one] for one in members] for name, members in group(self.modules, unit).items()}
        rows = tuple(
            tuple(_joined([row[at] for at in members], what == "gradient") for members in units.values())
            for row in getattr(self, what)
        )
        return tuple(units), rows

    def spread(self, what: str = "update") -> tuple[Spread | None, ...]:
        """How evenly the layers share the squared norm, after each step; None where one is unknown or all are 0.

        A layer without a gradient in a step has a share of 0 of it.
        """
        units, rows = self.by(what)
        known = [row if what != "gradient" or set(row) == {None} else [x or 0.0 for x in row] for row in rows]
        return tuple(spread(units, row) for row in known)

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists, norms with six digits."""
        return {
            "steps": list(self.steps),
            "modules": list(self.modules),
            **{what: [[_six(x) for x in row] for row in getattr(self, what)] for what in WHAT},
            "since": self.since,
        }


def _six(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.6g}")


def _joined(norms: Sequence[float | None], skip: bool) -> float | None:
    known = [x for x in norms if x is not None]
    return math.hypot(*known) if known and (skip or len(known) == len(norms)) else None


@dataclass(frozen=True)
class Spread:
    """How layers share a quantity.

    Attributes:
        top_third: share that the upper third of each tower's layers has (rounded, at least one); None without layers.
        even: what it would be if all layers had the same.
        centre: mean height of the quantity, 0 in the lowest layer and 1 in the highest; 0.5 if even. None as above.
        gini: Gini coefficient over the layers: 0 if all have the same, towards 1 if one has all.
    """

    top_third: float | None
    even: float | None
    centre: float | None
    gini: float


def spread(layers: Sequence[str], norms: Sequence[float | None]) -> Spread | None:
    """How layers share the sum of their squared norms, which is the squared norm of the whole.

    Modules outside of stacks of layers (a head) have no height: they count for ``gini`` alone.

    Args:
        layers: paths as :func:`loraloom.strategies.units.layer` gives them.
        norms: one a layer.

    Returns:
        None where a norm is None or all are 0.

    Example:
        >>> spread(["layers.0", "layers.1", "layers.2"], [1.0, 1.0, 2.0])
        Spread(top_third=0.666..., even=0.333..., centre=0.75, gini=0.333...)
    """
    if any(x is None for x in norms) or not any(norms):
        return None
    energy = [float(x) ** 2 for x in norms]  # type: ignore[arg-type]
    stacks: dict[str, list[int]] = {}
    for at, name in enumerate(layers):
        stacks.setdefault(tower(name), []).append(at)
    stacked = [sorted(held, key=lambda at: _height(layers[at])) for held in stacks.values() if len(held) > 1]
    upper = [at for held in stacked for at in held[-max(1, round(len(held) / 3)) :]]
    heights = {at: i / (len(held) - 1) for held in stacked for i, at in enumerate(held)}
    whole = sum(energy[at] for at in heights)
    top = even = centre = None
    if heights and whole > 0:
        top, even = sum(energy[at] for at in upper) / whole, len(upper) / len(heights)
        centre = sum(energy[at] * height for at, height in heights.items()) / whole
    return Spread(top, even, centre, gini(energy))


def _height(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in layer(name).split(".") if part.isdecimal())


def gini(values: Sequence[float]) -> float:
    """The Gini coefficient of values from 0 on: mean absolute difference of all pairs over twice the mean (Gini 1912).

    Example:
        >>> gini([1, 1, 1, 1]), gini([0, 0, 0, 1])
        (0.0, 0.75)
    """
    n, total = len(values), sum(values)
    ranked = sum((2 * (i + 1) - n - 1) * value for i, value in enumerate(sorted(values)))
    return ranked / (n * total)


@probes.register("balance", paper="https://arxiv.org/abs/2506.05713")
def balance(trained: Adapter | Mapping[str, Any]) -> Balance:
    """Gradient, update and distance from the start by layer and projection over training (CoTo, arXiv 2506.05713).

    What the recipe key ``train.balance_every`` or :class:`loraloom.BalanceCallback` noted. The paper's claim is that
    plain LoRA trains its upper layers most and CoTo trains all; :meth:`Balance.spread` puts it in numbers.

    Args:
        trained: an adapter whose provenance holds it, or what :meth:`Balance.to_json` gave.

    Raises:
        ValueError: nothing was noted, a key is missing or unknown, or a value is of no run.

    Example:
        >>> noted = {"steps": [5], "modules": ["layers.0.q", "layers.1.q"], "since": 0}
        >>> found = balance(noted | {name: [[1.0, 3.0]] for name in ("gradient", "update", "distance")})
        >>> found.spread()[-1].top_third
        0.9
    """
    told: Any = trained
    if isinstance(trained, Adapter):
        record = trained.provenance.get("record")
        told = record.get("balance") if isinstance(record, Mapping) else None
        if told is None:
            raise ValueError(
                "nothing was noted of this adapter's balance; train it with train.balance_every: 10 in the recipe"
            )
    names = [one.name for one in fields(Balance)]
    if not isinstance(told, Mapping) or set(told) != set(names):
        raise ValueError(f"this is no balance of a training run; its keys are {', '.join(names)}")
    _check(told)
    return Balance(**told)


def _check(told: Mapping[str, Any]) -> None:
    """Refuse values that no run notes; by name."""
    steps = _all(told["steps"], "steps", _is_step, f"whole numbers in [0, {_MOST_STEPS}]")
    if not steps or any(one >= then for one, then in pairwise(steps)):
        raise ValueError(f"balance: steps must rise, and be at least one, got {short(steps)}")
    _all([told["since"]], "since", _is_step, f"a whole number in [0, {_MOST_STEPS}]")
    _all(told["modules"], "modules", lambda one: isinstance(one, str), "texts")
    for what in WHAT:
        for at, row in enumerate(_all(told[what], what, lambda one: isinstance(one, list | tuple), "lists")):
            _all(row, f"{what}[{at}]", _is_norm, f"null or numbers in [0, {_MOST_NORM:g}]")


def _all(values: Any, where: str, good: Callable[[Any], bool], what: str) -> Any:
    if not isinstance(values, list | tuple):
        raise ValueError(f"balance: {where} must be a list of {what}, got {short(values)}")
    for value in values:
        if not good(value):
            raise ValueError(f"balance: {where} must hold {what}, got {short(value)}")
    return values


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_STEPS


def _is_norm(value: Any) -> bool:
    return value is None or (is_number(value) and 0 <= value <= _MOST_NORM)
