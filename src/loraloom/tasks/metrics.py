"""Accuracy and differences of accuracy, with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over examples with its confidence interval.

    Attributes:
        value: the mean itself.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of examples.
    """

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """The four numbers by name."""
        return asdict(self)


def accuracy(
    correct: Sequence[bool] | np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Share of right answers with a percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    With one example, or with all answers alike, every resample is the sample: the interval is a point.

    Args:
        correct: one truth value an example; where several runs are pooled, the share of runs that got it right.
        level: share of intervals that are to cover the truth, in (0, 1).
        resamples: number of bootstrap samples.
        seed: seed of the resampling; nothing else is drawn from.

    Raises:
        ValueError: there are no examples, a value is outside [0, 1], or ``level`` or ``resamples`` make no sense.

    Example:
        >>> accuracy([True] * 80 + [False] * 20)
        Estimate(value=0.8, low=0.71, high=0.88, n=100)
    """
    return _bootstrap(_answers(correct, "correct"), level, resamples, seed)


def difference(
    correct_a: Sequence[bool] | np.ndarray,
    correct_b: Sequence[bool] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Accuracy of a minus that of b on the same examples, paired: examples are resampled, not answers.

    Pairing takes the difficulty of the examples out of the interval, so that it is narrower than two separate ones.

    Args:
        correct_a: as in ``accuracy``.
        correct_b: the same examples in the same order.
        level: as in ``accuracy``.
        resamples: as in ``accuracy``.
        seed: as in ``accuracy``.

    Raises:
        ValueError: the two differ in length, or as in ``accuracy``.

    Example:
        >>> difference([1, 1, 1, 0], [1, 0, 1, 0]).value
        0.25
    """
    a, b = _answers(correct_a, "correct_a"), _answers(correct_b, "correct_b")
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} answers do not pair; both must be on the same examples")
    return _bootstrap(a - b, level, resamples, seed)


def _answers(correct: Sequence[bool] | np.ndarray, name: str) -> np.ndarray:
    """Answers as a vector of numbers in [0, 1]."""
    values = np.asarray(correct, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} has shape {values.shape}; a vector of at least one answer is needed")
    if not ((values >= 0) & (values <= 1)).all():  # false for NaN too
        raise ValueError(f"{name} holds values outside [0, 1]; an answer is false or true, or a share of several runs")
    return values


def _bootstrap(values: np.ndarray, level: float, resamples: int, seed: int) -> Estimate:
    """Percentile interval of the mean.

    A resample of n values is a draw of how often each distinct value occurs: a multinomial, exactly. That costs the
    number of distinct values (here a few) instead of n.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    n = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.Generator(np.random.Philox(seed))
    means = rng.multinomial(n, counts / n, size=resamples) @ distinct / n
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return Estimate(float(values.mean()), float(low), float(high), n)
