"""Progressive dropout: LoRA's own input dropout, falling along CoTo's schedule; a baseline of the CoTo paper."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from loraloom.registry import edge
from loraloom.strategies import Switches
from loraloom.strategies.progressive import check_share, check_total, progress
from loraloom.strategies.schedules import schedules


@dataclass(frozen=True)
class ProgressiveDropout:
    """Input dropout that falls as CoTo's p rises (CoTo, arXiv 2506.05713, table of stochastic baselines).

    The dropout probability is max(end, start (1 - f(x))) with x = min(1, step / (ramp * total_steps)) and f the curve:
    1 - p(t) of a CoTo plan that starts at 1 - ``start``, but never below ``end``. It acts on single inputs of every
    module, where CoTo switches whole units. Plain LoRA dropout is PEFT's ``lora_dropout`` alone.

    Attributes:
        total_steps: optimizer steps of the whole run; None until a Trainer's callback fills it in.
        start: dropout at step 0, in [0, 1): at 1 nothing would be learnt.
        end: dropout from the end of the ramp on, in [0, start]; the paper runs 0 and 0.25.
        ramp: share of the run after which it is ``end``, in [0, 1].
        curve: name of a registered schedule.

    Raises:
        ValueError: a value is out of its range; UnknownName for ``curve``.

    Example:
        >>> plan = ProgressiveDropout(total_steps=1000, start=0.8, end=0.25)
        >>> [round(plan.probability(step), 3) for step in (0, 375, 750)]
        [0.8, 0.4, 0.25]
    """

    total_steps: int | None = None
    start: float = 0.9
    end: float = 0.0
    ramp: float = 0.75
    curve: str = "linear"

    def __post_init__(self) -> None:
        check_total(self.total_steps)
        check_share("ramp", self.ramp)
        check_share("start", self.start)
        check_share("end", self.end)
        if self.start == 1.0:
            raise ValueError("start must be below 1 (a dropout of 1 learns nothing), got 1.0")
        if self.end > self.start:
            raise ValueError(f"end must be in [0, start = {self.start}], got {self.end}")
        schedules[self.curve]

    @property
    def unit(self) -> str:
        """Nothing is switched; the model is read by layers as it would be for CoTo."""
        return "layer"

    @property
    def skips_parameters(self) -> bool:
        """False: every parameter gets a gradient in every step."""
        return False

    def probability(self, step: int) -> float:
        """The dropout probability of this step.

        Raises:
            ValueError: ``step`` is negative, or ``total_steps`` is not known yet.
        """
        done = schedules[self.curve](progress(step, self.total_steps, self.ramp))
        return max(self.end, self.start * (1 - done))

    def apply(self, switches: Switches, step: int) -> None:
        """Give every adapter's input dropout the probability of ``step``."""
        switches.set_dropout(self.probability(step))

    def applied(self, peft_model: Any, step: int) -> AbstractContextManager:
        """``with plan.applied(model, step):`` dropout of this step inside, as it was before afterwards.

        Raises:
            ValueError: the adapter was made without input dropout (``lora_dropout=0``).
        """
        return edge("gates").applied(self, peft_model, step)
