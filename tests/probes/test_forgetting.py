"""Forgetting: the three summaries against their definitions, who is asked what, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.adapter import Adapter
from loraloom.probes.forgetting import forgetting
from loraloom.probing import forgetting_report_of
from loraloom.report import Report


def made(matrix: np.ndarray) -> tuple[list[Adapter], dict]:
    """Adapters 0, 1, ... and scores that look up row i + 1; row 0 is the base."""
    phases = [Adapter({"r": i}, {}) for i in range(len(matrix) - 1)]

    def score(j: int):
        return lambda adapter: float(matrix[0 if adapter is None else adapter.config["r"] + 1, j])

    return phases, {f"t{j}": score(j) for j in range(matrix.shape[1])}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 999))
def test_the_summaries_are_their_definitions(count, seed):
    matrix = np.random.default_rng(seed).random((count + 1, count))
    found = forgetting(*made(matrix))
    base, r = matrix[0], matrix[1:]
    assert np.array_equal(found.scores, r) and np.array_equal(found.before, base)
    assert found.accuracy == pytest.approx(r[-1].mean())
    if count == 1:
        assert found.backward is None and found.forward is None
    else:
        assert found.backward == pytest.approx(np.mean([r[-1, j] - r[j, j] for j in range(count - 1)]))
        assert found.forward == pytest.approx(np.mean([r[j - 1, j] - base[j] for j in range(1, count)]))
    report = forgetting_report_of(found, [f"p{i}" for i in range(count)])
    assert Report.from_json(report.to_json()) == report and report.records[0] == found.to_json()


def test_what_is_lost_most_is_said():
    found = forgetting(*made(np.array([[0.5, 0.5], [0.9, 0.5], [0.6, 0.8]])))
    assert "most is lost on t0 (-0.300)" in forgetting_report_of(found, ["a", "b"]).summary
    kept = forgetting(*made(np.array([[0.5, 0.5], [0.9, 0.5], [0.9, 0.8]])))
    assert "no task lost anything" in forgetting_report_of(kept, ["a", "b"]).summary


def test_refusals():
    phases, scores = made(np.full((3, 2), 0.5))
    for some in (phases[:1], []):
        with pytest.raises(ValueError, match="one task a phase"):
            forgetting(some, scores)
    with pytest.raises(ValueError, match="the score of t1 after phase 0 is nan"):
        forgetting(phases, {**scores, "t1": lambda adapter: 0.5 if adapter is None else float("nan")})
