"""CoTo: units of an adapter take part in training at random, more and more often, until all do."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraloom.registry import UnknownName, edge
from loraloom.strategies import Switches
from loraloom.strategies.schedules import schedules
from loraloom.strategies.units import check_unit, depths

NESTINGS = ("uniform", "high-to-low", "low-to-high")
_STREAM = 0x436F546F  # the upper half of the generator's key: other draws of the same seed are another stream


@dataclass(frozen=True)
class CoTo:
    """Progressive random activation (CoTo, ICML 2025, arXiv 2506.05713, section 3), as a plan that knows no model.

    In step t each unit is active with probability p(t), independently of the others but for one condition: at least
    one unit is (see :meth:`active`). p rises from ``start`` to 1 over the first ``ramp`` of the run and stays there.

    Attributes:
        total_steps: optimizer steps of the whole run; None until a Trainer's callback fills it in.
        ramp: share of the run after which all units are active, in [0, 1]; 0 is plain training.
        start: p at step 0, in [0, 1].
        curve: name of a registered schedule. ``constant`` keeps p at ``start`` for the whole run (stochastic depth).
        unit: what is switched together: layer, module, projection or a regular expression (``units.group``).
        nesting: which units are dropped more: uniform, high-to-low (higher layers are) or low-to-high.
        seed: of the draws, in [0, 2**64).

    Raises:
        ValueError: a value is out of its range, or p would be 0 for the whole run; UnknownName for ``curve``, ``unit``
            and ``nesting``.

    Example:
        >>> coto = CoTo(total_steps=1000)
        >>> coto.probability(375), coto.probability(750)
        (0.5, 1.0)
        >>> coto.active(375, ["layers.0", "layers.1", "layers.2", "layers.3"])
        (True, True, False, True)
        >>> CoTo(total_steps=10, ramp=1.5)
        Traceback (most recent call last):
        ValueError: ramp must be in [0, 1], got 1.5
    """

    total_steps: int | None = None
    ramp: float = 0.75
    start: float = 0.0
    curve: str = "linear"
    unit: str = "layer"
    nesting: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        check_total(self.total_steps)
        check_share("ramp", self.ramp)
        check_share("start", self.start)
        check_unit(self.unit)
        if self.nesting not in NESTINGS:
            raise UnknownName("nesting", self.nesting, list(NESTINGS))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number in [0, 2**64), got {self.seed!r}")
        if schedules[self.curve](1.0) == 0.0 and self.start == 0.0:
            raise ValueError(f"curve {self.curve!r} with start 0 never activates a unit; start must be in (0, 1]")

    @property
    def skips_parameters(self) -> bool:
        """True: in most steps some trainable parameters get no gradient."""
        return True

    def probability(self, step: int) -> float:
        """p(step) = start + (1 - start) f(x) with x = min(1, step / (ramp * total_steps)) and f the curve.

        Raises:
            ValueError: ``step`` is negative, or ``total_steps`` is not known yet.
        """
        rise = schedules[self.curve](progress(step, self.total_steps, self.ramp))
        return self.start * (1 - rise) + rise  # rearranged so that both ends are exact

    def probabilities(self, step: int, units: Sequence[str] | int) -> tuple[float, ...]:
        """p of every unit, before the condition that at least one is active.

        With ``high-to-low``, p_i = p ** (2 ** (2 d_i - 1)) where d_i in [0, 1] is how high the unit lies in its tower:
        sqrt(p) for the lowest layer, p half-way up, p squared for the highest. ``low-to-high`` has 1 - d_i in place
        of d_i. p = 0 and p = 1 stay what they are.

        Args:
            step: optimizer step, from 0.
            units: their names in order (``units.group``), or how many there are if they form one tower.
        """
        p = self.probability(step)
        return tuple(p**exponent for exponent in self._exponents(units))

    def active(self, step: int, units: Sequence[str] | int) -> tuple[bool, ...]:
        """Which units take part in this step: a pure function of (seed, step) and the units.

        The set S of active units has the distribution of independent draws, given that it is not empty:

            P(S) = prod_{i in S} p_i * prod_{i not in S} (1 - p_i) / (1 - prod_i (1 - p_i))

        so the marginals are p_i / (1 - prod_j (1 - p_j)); for n units of equal p that is p / (1 - (1 - p)^n): 1/n as p
        goes to 0 and 1 at p = 1. At p = 0 the limit is drawn: one unit, uniformly (with nesting, among the units whose
        p_i vanishes slowest). Nothing is drawn again and again: the first active unit comes by inversion of
        P(first = i) = p_i prod_{j < i} (1 - p_j) / (1 - prod_j (1 - p_j)), the units after it are independent.

        The generator is counter-based (Philox, Salmon et al. 2011): equal on all machines and ranks and after a
        resume; no other random stream is touched.

        Raises:
            ValueError: there are no units, ``step`` is negative or at least 2**63, or ``total_steps`` is not known yet.
        """
        probabilities = self.probabilities(step, units)
        if all(p == 1.0 for p in probabilities):
            return (True,) * len(probabilities)
        if not any(probabilities):
            exponents = self._exponents(units)
            probabilities = tuple(1e-300 if e == min(exponents) else 0.0 for e in exponents)
        return draw(probabilities, _uniforms(self.seed, step, len(probabilities) + 1))

    def expected_share(self) -> float:
        """Mean of p over the run: about the share of adapter work that is done, for estimates of speed.

        Taken over at most 10 000 evenly spaced steps. The units that are active only because one must be are left out.

        Example:
            >>> CoTo(total_steps=1000).expected_share()
            0.6245
        """
        total = check_known(self.total_steps)
        points = min(total, 10_000)
        return math.fsum(self.probability(at * total // points) for at in range(points)) / points

    def apply(self, switches: Switches, step: int) -> None:
        """Set the gates of a model as drawn for ``step``."""
        switches.set(self.active(step, switches.units))

    def applied(self, peft_model: Any, step: int) -> AbstractContextManager:
        """``with coto.applied(model, step):`` gates as drawn inside, as they were before afterwards.

        Raises:
            ValueError: the model has no PEFT layers, or merged ones.
        """
        return edge("gates").applied(self, peft_model, step)

    def _exponents(self, units: Sequence[str] | int) -> tuple[float, ...]:
        names = tuple(str(at) for at in range(units)) if isinstance(units, int) else units
        if isinstance(names, str) or not names:
            raise ValueError(f"units must be a sequence of at least one name, got {units!r}")
        if self.nesting == "uniform":
            return (1.0,) * len(names)
        up = self.nesting == "high-to-low"
        return tuple(2.0 ** (2 * (depth if up else 1 - depth) - 1) for depth in depths(tuple(names)))


def draw(probabilities: Sequence[float], uniforms: Sequence[float]) -> tuple[bool, ...]:
    """Independent draws given that one succeeds, without rejection; see :meth:`CoTo.active` for the distribution.

    Right down to probabilities of 1e-300: products of 1 - p are taken in logarithms.

    Args:
        probabilities: n of them, in [0, 1], not all 0.
        uniforms: n + 1 numbers in [0, 1): the first chooses the first active unit, number i + 1 decides unit i.
    """
    logs = [math.log1p(-p) if p < 1.0 else -math.inf for p in probabilities]
    within, total = [], 0.0  # within[i]: chance that one of the units 0..i is active
    for log in logs:
        total += log
        within.append(-math.expm1(total))
    first = next(at for at, p in enumerate(within) if p > uniforms[0] * within[-1] or p == within[-1])
    return tuple(
        at == first or (at > first and uniform < p)
        for at, (p, uniform) in enumerate(zip(probabilities, uniforms[1:], strict=True))
    )


def _uniforms(seed: int, step: int, count: int) -> list[float]:
    """``count`` numbers in [0, 1) of 53 bits, from (seed, step) alone; raw bits, which NumPy never changes."""
    bits = np.random.Philox(key=seed | _STREAM << 64, counter=operator.index(step) << 128).random_raw(count)
    return [float(x) for x in (bits >> np.uint64(11)) * 2.0**-53]


def progress(step: int, total_steps: int | None, ramp: float) -> float:
    """Share of the ramp that is done, x = min(1, step / (ramp * total_steps)); 1 throughout if there is no ramp."""
    total, step = check_known(total_steps), operator.index(step)
    if not 0 <= step < 2**63:
        raise ValueError(f"step must be in [0, 2**63), got {step!r}")
    if ramp == 0.0:
        return 1.0
    x = step / (ramp * total)
    # ramp * total may come out a rounding error above the whole number that it is: x is 1 there all the same
    return x if x < 1 - 1e-12 else 1.0


def check_total(total_steps: int | None) -> None:
    """Refuse a number of steps that is not None or a whole number from 1 on."""
    if total_steps is None:
        return
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or not 1 <= total_steps < 2**63:
        raise ValueError(f"total_steps must be a whole number in [1, 2**63) or None, got {total_steps!r}")


def check_known(total_steps: int | None) -> int:
    """The number of steps, which must be known by now."""
    if total_steps is None:
        raise ValueError("total_steps is not known yet: give it, or let the Trainer's callback fill it in")
    return total_steps


def check_share(name: str, value: float) -> None:
    """Refuse a value outside [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
