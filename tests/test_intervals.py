"""Student's intervals against tables and against chance."""

from __future__ import annotations

import numpy as np
import pytest

from loraloom.intervals import half_width, interval


def test_quantiles_are_those_of_the_tables():
    for count, quantile in ((2, 12.7062), (3, 4.3027), (11, 2.2281), (10**6, 1.96)):
        assert half_width(2.0, count) == pytest.approx(2 * quantile, rel=1e-4)
    assert half_width(1.0, 5, level=0.99) == pytest.approx(4.6041, rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_intervals_of_few_values_cover_the_mean_as_often_as_they_say(count):
    drawn = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, count))
    ends = np.array([interval(list(row)) for row in drawn])
    assert np.mean((ends[:, 0] <= 3) & (ends[:, 1] >= 3)) == pytest.approx(0.95, abs=0.015)


def test_equal_values_are_a_point():
    assert interval([0.1] * 3) == pytest.approx((0.1, 0.1), abs=1e-12)
