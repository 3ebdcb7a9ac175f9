"""The adapters and the measurements of one demo run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loraloom.adapter import Adapter
from loraloom.recipe import Recipe
from loraloom.tasks.metrics import Estimate, accuracy, difference

STRUCTURED = ("every-other", "low", "middle", "high")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How much of everything; the tests run a smaller one."""

    seeds: tuple[int, ...] = (0, 1)
    others: tuple[str, ...] = ("easy-vqa-shape", "easy-vqa-colour")
    points: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    limit: int | None = 250
    overrides: tuple[tuple[str, Any], ...] = ()


@dataclass
class Study:
    """The adapters and measurements of one demo run, as they come."""

    settings: Settings
    recipes: Mapping[str, Recipe]
    say: Say
    adapters: dict[tuple[str, str, int], Adapter] = field(default_factory=dict)
    seconds: dict[tuple[str, str, int], float] = field(default_factory=dict)
    outcomes: dict[tuple, list[np.ndarray]] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The task with several seeds."""
        return str(self.recipes["LoRA"].task)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The main task first."""
        return (self.main, *self.settings.others)

    def measure(self, key: tuple, bench: Any, adapter: Adapter | None) -> float:
        """Evaluate and file the outcome of every example under ``key``; seeds of one key are pooled."""
        found = bench.evaluate(adapter, "test", self.settings.limit)
        self.outcomes.setdefault(key, []).append(np.array(found.correct))
        return found.value

    def estimate(self, *key: Any) -> Estimate:
        """Mean over the seeds of a key, with the interval over test examples."""
        return accuracy(np.mean(self.outcomes[key], axis=0))

    def advantage(self, *key: Any) -> Estimate:
        """CoTo minus LoRA on the same examples; ``key`` is without the method."""
        coto, lora = (np.mean(self.outcomes[(method, *key)], axis=0) for method in ("CoTo", "LoRA"))
        return difference(coto, lora)
