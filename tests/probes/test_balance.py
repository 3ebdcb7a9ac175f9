"""How layers share what training did: numbers that can be worked out by hand, and laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.adapter import Adapter
from loraloom.probes.balance import WHAT, Balance, balance, gini, spread

LAYERS = [f"layers.{at}" for at in range(6)]
EXACT = settings(derandomize=True, deadline=None, max_examples=60)
sizes = st.lists(st.floats(0, 100), min_size=6, max_size=6).filter(lambda norms: sum(norms) > 1e-3)


def test_all_in_one_layer():
    found = spread(LAYERS, [0, 0, 0, 0, 0, 7.0])
    assert (found.top_third, found.even, found.centre) == (1.0, 1 / 3, 1.0)
    assert found.gini == pytest.approx(5 / 6)
    assert spread(LAYERS, [7.0, 0, 0, 0, 0, 0]).centre == 0.0


def test_even_layers():
    found = spread(LAYERS, [2.0] * 6)
    assert (found.top_third, found.even, found.centre, found.gini) == pytest.approx((1 / 3, 1 / 3, 0.5, 0.0))


def test_layers_are_ordered_by_number_and_towers_by_themselves():
    """Layer 10 is above layer 9; the upper third is taken of each tower, and a head has no height."""
    numbered = [f"text.layers.{at}" for at in (10, 9, 8)] + ["vision.layers.0", "vision.layers.1", "head"]
    found = spread(numbered, [1.0, 0, 0, 0, 1.0, 5.0])
    assert (found.top_third, found.centre) == (1.0, 1.0)
    assert found.even == 2 / 5


def test_without_layers_there_is_no_height():
    found = spread(["head", "stem"], [1.0, 1.0])
    assert (found.top_third, found.centre, found.gini) == (None, None, 0.0)


def test_what_is_unknown_or_nothing_has_no_spread():
    assert spread(LAYERS, [1.0, None, 1, 1, 1, 1]) is None
    assert spread(LAYERS, [0.0] * 6) is None


@EXACT
@given(sizes, st.floats(0.01, 100))
def test_the_unit_of_the_norms_does_not_matter(norms, factor):
    one, other = spread(LAYERS, norms), spread(LAYERS, [factor * x for x in norms])
    assert (one.top_third, one.centre, one.gini) == pytest.approx((other.top_third, other.centre, other.gini))
    assert 0 <= one.top_third <= 1
    assert 0 <= one.centre <= 1
    assert -1e-12 <= one.gini < 1


@EXACT
@given(sizes)
def test_gini_is_the_mean_difference_of_pairs(norms):
    mean = sum(norms) / 6
    pairs = sum(abs(x - y) for x in norms for y in norms) / 36
    assert gini(norms) == pytest.approx(pairs / (2 * mean), abs=1e-9)


MODULES = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
TOLD = Balance(
    (0, 5),
    MODULES,
    gradient=((None,) * 4, (None, None, 3.0, 4.0)),
    update=((0.0,) * 4, (1.0, 1.0, 2.0, None)),
    distance=((0.0,) * 4, (3.0, 4.0, 6.0, 8.0)),
)


def test_a_closed_layer_counts_nothing_and_an_unknown_module_makes_its_units_unknown():
    assert TOLD.by("gradient")[1] == ((None, None), (None, 5.0))
    assert TOLD.by("update")[1] == ((0.0, 0.0), (math.sqrt(2), None))
    assert TOLD.by("distance", "projection") == (("q", "v"), ((0.0, 0.0), (math.hypot(3, 6), math.hypot(4, 8))))
    assert TOLD.spread("gradient")[0] is None
    assert TOLD.spread("gradient")[1].top_third == 1.0
    assert TOLD.spread("update") == (None, None)
    assert TOLD.spread("distance")[1].top_third == 0.8


def test_it_comes_back_from_json_and_from_an_adapter():
    assert balance(TOLD.to_json()) == TOLD
    assert balance(Adapter({}, {}, provenance={"record": {"balance": TOLD.to_json()}})) == TOLD


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Adapter({}, {}), "train it with train.balance_every: 10"),
        ({"steps": [1]}, "its keys are steps, modules"),
        (TOLD.to_json() | {"update": [[1.0]]}, "update is not 2 steps x 4 modules"),
        (
            TOLD.to_json() | {"steps": [], **{key: [] for key in WHAT}},
            "steps must rise, and be at least one, got \\[\\]",
        ),
        (TOLD.to_json() | {"steps": [5, 0]}, "steps must rise"),
        (TOLD.to_json() | {"steps": None}, "steps must be a list of whole numbers in .*, got None"),
        (TOLD.to_json() | {"steps": [True, 5]}, "steps must hold whole numbers in .*, got True"),
        (TOLD.to_json() | {"steps": [0, 10**400]}, "steps must hold whole numbers in .*, got 1000"),
        (TOLD.to_json() | {"since": "0"}, "since must hold a whole number in .*, got '0'"),
        (TOLD.to_json() | {"modules": [1, 2]}, "modules must hold texts, got 1"),
        (TOLD.to_json() | {"modules": "abcd"}, "modules must be a list of texts, got 'abcd'"),
        (TOLD.to_json() | {"update": 5}, "update must be a list of lists, got 5"),
        (TOLD.to_json() | {"update": [5, 5]}, "update must hold lists, got 5"),
        (TOLD.to_json() | {"update": [["x", 1], [1, 1]]}, r"update\[0\] must hold null or numbers in .*, got 'x'"),
        (
            TOLD.to_json() | {"distance": [[1e200] * 4] * 2},
            r"distance\[0\] must hold null or numbers in .*, got 1e\+200",
        ),
        (TOLD.to_json() | {"gradient": [[-1.0] * 4] * 2}, r"gradient\[0\] must hold null or numbers in .*, got -1.0"),
        (Adapter({}, {}, provenance={"record": ["x"]}), "train it with train.balance_every: 10"),
    ],
)
def test_what_is_none_is_refused_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as told:
        balance(given)
    assert "\n" not in str(told.value)


def test_an_unknown_measure_is_named():
    with pytest.raises(ValueError, match="gradient, update, distance, got 'norm'"):
        TOLD.by("norm")
