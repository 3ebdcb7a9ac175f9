"""CoTo and progressive dropout: the schedule, the draws and their exact distribution."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.registry import UnknownName
from loraloom.strategies.dropout import ProgressiveDropout
from loraloom.strategies.progressive import NESTINGS, CoTo, draw
from loraloom.strategies.schedules import schedules

laws = settings(derandomize=True, deadline=None, max_examples=60)
seeds = st.integers(0, 2**64 - 1)
steps = st.integers(0, 2**63 - 1)
curves = st.sampled_from(sorted(schedules))
nestings = st.sampled_from(NESTINGS)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{at}" for at in range(count))


def exact(probabilities: tuple[float, ...]) -> dict[tuple[bool, ...], float]:
    """The slow obvious oracle: every non-empty set with its probability, in exact arithmetic."""
    p = [Fraction(x) for x in probabilities]
    weights = {}
    for state in itertools.product([False, True], repeat=len(p)):
        weights[state] = math.prod(x if on else 1 - x for x, on in zip(p, state, strict=True))
    del weights[(False,) * len(p)]
    total = sum(weights.values())
    return {state: float(weight / total) for state, weight in weights.items()}


def chi_square_is_plausible(counts: dict, expected: dict, draws: int) -> bool:
    """Pearson's statistic below its mean plus five standard deviations."""
    assert all(expected[state] > 0 for state in counts), "something impossible was drawn"
    cells = [state for state, p in expected.items() if p * draws >= 5]
    rest_seen = draws - sum(counts.get(state, 0) for state in cells)
    rest = draws - sum(expected[state] * draws for state in cells)
    statistic = sum(
        (counts.get(state, 0) - expected[state] * draws) ** 2 / (expected[state] * draws) for state in cells
    )
    if rest > 1:
        statistic += (rest_seen - rest) ** 2 / rest
    free = max(1, len(cells) - (0 if rest > 1 else 1))
    return statistic < free + 5 * math.sqrt(2 * free)


# --------------------------------------------------------------------------------------------------- probability


@laws
@given(total=st.integers(1, 10**7), ramp=st.floats(0.001, 1), start=st.floats(0, 1), step=st.integers(0, 2 * 10**7))
def test_linear_probability_is_its_definition(total, ramp, start, step):
    expected = start + (1 - start) * min(Fraction(1), Fraction(step) / (Fraction(ramp) * total))
    assert CoTo(total, ramp=ramp, start=start).probability(step) == pytest.approx(float(expected), abs=2e-12)


def test_the_papers_line():
    plan = CoTo(total_steps=1000)
    assert [plan.probability(t) for t in range(1001)] == pytest.approx([min(1, 4 * t / 3000) for t in range(1001)])


@laws
@given(total=st.integers(1, 10**6), hundredths=st.integers(1, 100), curve=st.sampled_from(["linear", "sine", "step"]))
def test_one_exactly_at_the_end_of_a_ramp_that_is_a_whole_number_of_steps(total, hundredths, curve):
    plan = CoTo(100 * total, ramp=hundredths / 100, curve=curve)
    assert plan.probability(hundredths * total) == 1.0  # though hundredths / 100 * (100 * total) may round up
    assert plan.probability(hundredths * total - 1) <= 1.0


def test_without_a_ramp_everything_is_active_from_the_first_step():
    assert CoTo(10, ramp=0).probability(0) == 1.0
    assert CoTo(10, ramp=0).active(0, names(5)) == (True,) * 5
    assert CoTo(10, ramp=0, curve="constant", start=0.25).probability(0) == 0.25


def test_stochastic_depth_keeps_its_probability_to_the_end():
    plan = CoTo(100, curve="constant", start=0.5)
    assert {plan.probability(step) for step in range(200)} == {0.5}
    late = [plan.active(step, 6) for step in range(80, 100)]
    assert not all(all(state) for state in late)


@laws
@given(step=st.integers(0, 120), curve=curves, start=st.floats(0.01, 1), count=st.integers(2, 8))
def test_nesting_moves_units_around_the_middle(step, curve, start, count):
    plans = {nesting: CoTo(100, curve=curve, start=start, nesting=nesting) for nesting in NESTINGS}
    units = names(count)
    p = plans["uniform"].probability(step)
    assert plans["uniform"].probabilities(step, units) == (p,) * count
    down, up = (plans[name].probabilities(step, units) for name in ("high-to-low", "low-to-high"))
    assert list(down) == sorted(down, reverse=True) and up == pytest.approx(down[::-1])
    assert down[0] == pytest.approx(math.sqrt(p)) and down[-1] == pytest.approx(p * p)
    if count % 2:
        assert down[count // 2] == p


def test_nesting_is_by_tower():
    units = ("text.layers.0", "text.layers.1", "vision.layers.0", "vision.layers.1", "vision.layers.2", "head")
    plan = CoTo(100, nesting="high-to-low")
    p = plan.probability(30)
    assert plan.probabilities(30, units) == pytest.approx((p**0.5, p**2, p**0.5, p, p**2, p))


# -------------------------------------------------------------------------------------------------------- draws


@laws
@given(seed=seeds, step=st.integers(0, 99), count=st.integers(1, 40), curve=curves, nesting=nestings)
def test_at_least_one_and_the_same_every_time(seed, step, count, curve, nesting):
    plan = CoTo(100, curve=curve, nesting=nesting, start=0.1 if curve == "constant" else 0.0, seed=seed)
    state = plan.active(step, names(count))
    assert len(state) == count and any(state) and all(type(on) is bool for on in state)
    assert state == replace(plan).active(step, list(names(count)))


@laws
@given(seed=seeds, order=st.permutations(range(12)))
def test_the_order_of_steps_does_not_matter(seed, order):
    plan = CoTo(16, seed=seed)
    forwards = [plan.active(step, names(8)) for step in range(12)]
    shuffled = {step: plan.active(step, names(8)) for step in order}
    assert forwards == [shuffled[step] for step in range(12)]


@laws
@given(seed=seeds, step=steps, total=st.integers(1, 2**63 - 1))
def test_any_step_and_any_length(seed, step, total):
    state = CoTo(total, seed=seed).active(step, names(5))
    assert any(state)
    if step >= total:
        assert all(state)


@laws
@given(count=st.integers(1, 60), step=st.integers(75, 1000))
def test_all_active_after_the_ramp(count, step):
    assert CoTo(100).active(step, names(count)) == (True,) * count


def test_uniform_draws_depend_on_the_number_of_units_alone():
    plan = CoTo(100, seed=5)
    for step in range(0, 80, 7):
        assert plan.active(step, names(6)) == plan.active(step, [f"x{at}" for at in range(6)]) == plan.active(step, 6)


def test_seeds_and_steps_differ():
    by_seed = {CoTo(100, seed=seed).active(30, names(30)) for seed in (0, 1, 2, 2**32, 2**63, 2**64 - 1)}
    by_step = {CoTo(10**6, ramp=1.0, start=0.5).active(step, names(30)) for step in (0, 1, 2, 2**16, 2**19)}
    assert len(by_seed) == 6 and len(by_step) == 5


def test_these_bits_never_change():
    """Runs that were started with an earlier version must resume as they began."""
    plan = CoTo(total_steps=40, seed=2024)
    drawn = ["".join("01"[on] for on in plan.active(step, 8)) for step in range(0, 30, 5)]
    assert drawn == ["00000100", "00010000", "00011101", "00011100", "11101111", "11011111"]


def test_no_other_random_stream_is_touched():
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    CoTo(100).active(10, names(10))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist() and states[2] == random.getstate()


DRAWS = 8_000


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize(("count", "p"), [(1, 0.3), (2, 0.05), (3, 0.4), (4, 0.1), (4, 0.7), (5, 0.95)])
def test_distribution_of_the_draws_is_exact(count, p, nesting):
    plan = CoTo(total_steps=DRAWS, curve="constant", start=p, nesting=nesting, seed=7)
    units = names(count)
    counts: dict[tuple[bool, ...], int] = {}
    for step in range(DRAWS):
        state = plan.active(step, units)
        counts[state] = counts.get(state, 0) + 1
    expected = exact(plan.probabilities(0, units))
    assert chi_square_is_plausible(counts, expected, DRAWS)


@pytest.mark.parametrize("p", [0.0, 1e-300, 1e-18, 1e-3, 0.5, 1.0])
def test_marginals(p):
    count = 6
    plan = CoTo(total_steps=DRAWS, ramp=0.5, start=p, seed=11) if p in (0.0,) else None
    if plan is None:
        plan = CoTo(total_steps=DRAWS, curve="constant", start=p, seed=11)
        states = [plan.active(step, count) for step in range(DRAWS)]
    else:
        states = [replace(plan, seed=seed).active(0, count) for seed in range(DRAWS)]
    expected = 1 / count if p == 0 else p / -math.expm1(count * math.log1p(-p)) if p < 1 else 1.0
    deviation = math.sqrt(max(expected * (1 - expected), 1e-12) / DRAWS)
    for unit in range(count):
        assert abs(sum(state[unit] for state in states) / DRAWS - expected) < 5 * deviation


def test_tiny_probabilities_keep_their_proportions():
    rng = np.random.Generator(np.random.PCG64(0))
    weights = (1.0, 2.0, 0.0, 5.0)
    counts = [0] * 4
    for _ in range(8000):
        state = draw([w * 1e-300 for w in weights], rng.random(5).tolist())
        assert sum(state) == 1
        counts[state.index(True)] += 1
    assert counts[2] == 0
    for at in (0, 1, 3):
        assert abs(counts[at] / 8000 - weights[at] / 8) < 0.03


@laws
@given(
    p=st.lists(st.sampled_from([0.0, 5e-324, 1e-300, 1e-16, 0.3, 1 - 1e-16, 1.0]), min_size=1, max_size=6).filter(any),
    u=st.floats(0, 1, exclude_max=True),
)
def test_draw_at_the_edges(p, u):
    state = draw(p, [u] * (len(p) + 1))
    assert any(state)
    for on, chance in zip(state, p, strict=True):
        assert not (on and chance == 0.0)
        assert on or chance < 1.0


@pytest.mark.parametrize("nesting", ["high-to-low", "low-to-high"])
def test_at_zero_the_limit_of_a_small_p_is_drawn(nesting):
    units = ("a.layers.0", "a.layers.1", "b.layers.0", "b.layers.1")
    plan = CoTo(100, nesting=nesting)
    lasting = {0, 2} if nesting == "high-to-low" else {1, 3}
    seen = {tuple(np.flatnonzero(replace(plan, seed=seed).active(0, units))) for seed in range(50)}
    assert seen == {(at,) for at in lasting}


def test_expected_share():
    assert CoTo(10_000).expected_share() == pytest.approx(1 - 0.75 / 2, abs=1e-3)
    assert CoTo(10**12).expected_share() == pytest.approx(1 - 0.75 / 2, abs=1e-3)
    assert CoTo(4).expected_share() == pytest.approx((0 + 1 / 3 + 2 / 3 + 1) / 4)
    assert CoTo(7, curve="constant", start=0.3).expected_share() == pytest.approx(0.3)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"total_steps": -5}, "total_steps"),
        ({"total_steps": 2.5}, "total_steps"),
        ({"total_steps": True}, "total_steps"),
        ({"ramp": -0.1}, r"ramp must be in \[0, 1\], got -0.1"),
        ({"ramp": 1.01}, "ramp"),
        ({"ramp": math.nan}, "ramp"),
        ({"start": 2}, "start"),
        ({"start": "0"}, "start"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"curve": "linaer"}, "did you mean 'linear'"),
        ({"nesting": "high-to-lo"}, "did you mean 'high-to-low'"),
        ({"unit": "layers"}, "did you mean 'layer'"),
        ({"unit": "("}, "regular expression"),
        ({"curve": "constant"}, "never activates a unit"),
    ],
)
def test_impossible_plans_are_refused_in_one_line(wrong, says):
    with pytest.raises(ValueError, match=says) as error:
        CoTo(**{"total_steps": 100, **wrong})
    assert "\n" not in str(error.value)


def test_a_plan_without_its_length_waits():
    plan = CoTo()
    with pytest.raises(ValueError, match="total_steps is not known"):
        plan.probability(0)
    with pytest.raises(ValueError, match="total_steps is not known"):
        plan.expected_share()
    assert replace(plan, total_steps=10).probability(10) == 1.0


@pytest.mark.parametrize("units", [(), 0, "layers", ""])
def test_units_must_be_some(units):
    with pytest.raises(ValueError, match="at least one"):
        CoTo(10).active(0, units)


def test_a_step_of_numpy_is_a_step():
    plan = CoTo(100, seed=1)
    for step in np.arange(100):
        assert plan.active(step, 6) == plan.active(int(step), 6)
    with pytest.raises(TypeError):
        plan.active(0.5, 6)


@pytest.mark.parametrize("step", [-1, 2**63])
def test_steps_out_of_range(step):
    with pytest.raises(ValueError, match="step must be"):
        CoTo(10).active(step, 3)


def test_registered_names_are_what_errors_list():
    with pytest.raises(UnknownName) as error:
        CoTo(10, curve="sawtooth")
    assert all(name in str(error.value) for name in schedules)


# ----------------------------------------------------------------------------------------------- dropout baseline


@laws
@given(start=st.floats(0, 0.99), share=st.floats(0, 1), ramp=st.floats(0, 1), step=st.integers(0, 300), curve=curves)
def test_progressive_dropout_falls_to_its_end(start, share, ramp, step, curve):
    plan = ProgressiveDropout(200, start=start, end=start * share, ramp=ramp, curve=curve)
    now, later = plan.probability(step), plan.probability(step + 1)
    assert start * share <= later <= now + 1e-12 <= start + 1e-12 < 1
    if "reaches_one" not in schedules[curve].breaks:
        assert plan.probability(200) == start * share


@laws
@given(step=st.integers(0, 200), start=st.floats(0.01, 0.99))
def test_progressive_dropout_is_in_line_with_coto(step, start):
    dropout = ProgressiveDropout(200, start=start).probability(step)
    assert dropout == pytest.approx(1 - CoTo(200, start=1 - start).probability(step))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"start": 1.0}, "start must be below 1"),
        ({"end": 0.95}, "end must be in"),
        ({"curve": "cosin"}, "did you mean 'cosine'"),
        ({"total_steps": 0}, "total_steps"),
        ({"ramp": 3}, "ramp"),
    ],
)
def test_impossible_dropouts_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        ProgressiveDropout(**{"total_steps": 10, **wrong})


def test_what_an_integration_must_tell_ddp():
    assert CoTo().skips_parameters and not ProgressiveDropout().skips_parameters
    assert CoTo(unit="module").unit == "module" and ProgressiveDropout().unit == "layer"
