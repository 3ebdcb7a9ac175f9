"""Bootstrap intervals: against plain resampling of rows, and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from loraloom.tasks.metrics import Estimate, accuracy, difference


def resampled(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile interval by drawing rows, one resample after the other."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_against_drawing_rows(share: float) -> None:
    correct = np.random.default_rng(1).random(300) < share
    found = accuracy(correct, resamples=4000)
    low, high = resampled(correct.astype(float), 4000, seed=2)
    assert found.value == correct.mean()
    assert abs(found.low - low) < 0.008
    assert abs(found.high - high) < 0.008


def test_difference_against_drawing_rows() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(300) < 0.8, rng.random(300) < 0.7
    found = difference(a, b, resamples=4000)
    low, high = resampled(a.astype(float) - b, 4000, seed=4)
    assert abs(found.low - low) < 0.01
    assert abs(found.high - high) < 0.01


@pytest.mark.parametrize(("n", "share"), [(100, 0.5), (100, 0.8), (400, 0.7)])
def test_coverage(n: int, share: float) -> None:
    rng = np.random.default_rng(5)
    trials = 1000
    found = [accuracy(rng.random(n) < share, seed=i) for i in range(trials)]
    covered = sum(one.low <= share <= one.high for one in found) / trials
    assert 0.91 <= covered <= 0.975


def test_coverage_of_a_difference() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for i in range(1000):
        hard = rng.random(200)
        noise = rng.random((2, 200)) < 0.1
        a, b = (hard < 0.8) ^ noise[0], (hard < 0.7) ^ noise[1]
        truth = 0.8 * (0.8 - 0.7)  # a flip of either answer takes 0.9 - 0.1 = 0.8 of the gap
        found = difference(a, b, seed=i)
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / 1000 <= 0.975


def test_pairing_narrows() -> None:
    a = np.random.default_rng(7).random(500) < 0.5
    b = a.copy()
    b[:20] = ~b[:20]
    paired = difference(a, b)
    alone = accuracy(a)
    assert paired.high - paired.low < 0.7 * (alone.high - alone.low)


def test_a_and_b_change_places() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.random(50) < 0.5, rng.random(50) < 0.6
    assert difference(a, b).value == -difference(b, a).value
    assert difference(a, a) == Estimate(0.0, 0.0, 0.0, 50)


def test_edges() -> None:
    assert accuracy([True]) == Estimate(1.0, 1.0, 1.0, 1)
    assert accuracy([0]) == Estimate(0.0, 0.0, 0.0, 1)
    assert accuracy(np.ones(10, dtype=bool)) == Estimate(1.0, 1.0, 1.0, 10)
    assert difference([1], [0]) == Estimate(1.0, 1.0, 1.0, 1)


def test_order_and_global_generator_do_not_matter() -> None:
    correct = [1, 0, 0, 1, 1, 0, 1]
    np.random.seed(0)
    first = accuracy(correct)
    np.random.seed(1)
    assert accuracy(sorted(correct)) == first
    assert accuracy(correct, seed=1) != first or accuracy(correct, seed=2) != first
    wide, narrow = accuracy(correct, level=0.99), accuracy(correct, level=0.5)
    assert wide.high - wide.low > narrow.high - narrow.low


def test_to_json() -> None:
    assert Estimate(0.5, 0.25, 0.75, 4).to_json() == {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}


@pytest.mark.parametrize(
    ("correct", "more", "message"),
    [
        ([], {}, r"shape \(0,\); a vector of at least one"),
        ([[1, 0]], {}, r"shape \(1, 2\)"),
        ([1.5], {}, r"outside \[0, 1\]"),
        ([float("nan")], {}, r"outside \[0, 1\]"),
        ([1], {"level": 1.0}, r"level must lie in \(0, 1\), got 1.0"),
        ([1], {"resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_refusals(correct: list, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(correct, **more)


def test_pairs_must_fit() -> None:
    with pytest.raises(ValueError, match="2 and 1 answers do not pair"):
        difference([1, 0], [1])
