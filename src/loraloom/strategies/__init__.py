"""Strategies: training-time policies as pure functions of the step and a seed; no framework is known here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Switches(Protocol):
    """What a strategy may do to a model; ``integrations.gates.Gates`` does it to one with PEFT layers."""

    units: tuple[str, ...]

    def set(self, active: Sequence[bool]) -> None:
        """Open the gates of the units that are active and close all others."""

    def set_dropout(self, p: float) -> None:
        """Give every adapter's input dropout this probability."""


class Strategy(Protocol):
    """A policy over the steps of training: CoTo, ProgressiveDropout and what comes after them.

    Attributes:
        total_steps: optimizer steps of the whole run; None until an integration fills it in.
        unit: what is switched together (see ``units.group``).
        skips_parameters: whether some trainable parameters get no gradient in some steps (DDP must be told).
    """

    total_steps: int | None
    unit: str

    @property
    def skips_parameters(self) -> bool:
        """Whether some trainable parameters get no gradient in some steps."""

    def probability(self, step: int) -> float:
        """The scheduled number of this step, for logs."""

    def apply(self, switches: Switches, step: int) -> None:
        """Put the model into the state of this step."""

    def applied(self, peft_model: Any, step: int) -> AbstractContextManager:
        """The same for the length of a ``with`` block; afterwards the model is as before."""
