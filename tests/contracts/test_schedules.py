"""Laws that every registered curve keeps, unless it declares that it breaks one."""

from __future__ import annotations

import inspect
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.registry import UnknownName
from loraloom.strategies.progressive import CoTo
from loraloom.strategies.schedules import schedules, sketch

curves = pytest.mark.parametrize("name", list(schedules))
shares = st.floats(0, 1)
LAWS = ("monotone", "starts_at_zero", "reaches_one", "bounded")


def test_the_curves_of_the_paper_are_there():
    assert {"linear", "exponential", "sine", "cosine", "constant", "step"} <= set(schedules)


@curves
def test_has_a_paper_a_docstring_with_its_formula_and_its_own_file(name):
    technique = schedules[name]
    assert technique.paper.startswith("https://")
    assert "f(x) = " in technique.function.__doc__ and ">>> " in technique.function.__doc__
    assert technique.function.__name__ == name == inspect.getmodule(technique.function).__name__.rsplit(".", 1)[1]
    assert set(technique.breaks) <= set(LAWS)


@curves
@settings(derandomize=True, deadline=None, max_examples=100)
@given(x=shares, y=shares)
def test_never_falls(name, x, y):
    if "monotone" not in schedules[name].breaks:
        low, high = sorted((x, y))
        assert schedules[name](low) <= schedules[name](high) + 1e-12


@curves
@settings(derandomize=True, deadline=None, max_examples=100)
@given(x=shares)
def test_stays_in_zero_to_one(name, x):
    if "bounded" not in schedules[name].breaks:
        assert 0 <= schedules[name](x) <= 1


@curves
def test_ends(name):
    technique = schedules[name]
    assert (technique(0.0) == 0.0) == ("starts_at_zero" not in technique.breaks)
    assert (technique(1.0) == 1.0) == ("reaches_one" not in technique.breaks)


@curves
@settings(derandomize=True, deadline=None, max_examples=40)
@given(start=st.floats(0.01, 1), ramp=shares, total=st.integers(1, 10**6))
def test_a_plan_goes_from_start_to_one(name, start, ramp, total):
    plan = CoTo(total_steps=total, ramp=ramp, start=start, curve=name)
    end = start if "reaches_one" in schedules[name].breaks else 1.0
    assert plan.probability(total) == end
    assert plan.probability(0) == (start if ramp else end)
    for step in range(0, total, max(1, total // 20)):
        assert start - 1e-12 <= plan.probability(step) <= 1


@curves
def test_sketch_is_a_small_picture_that_needs_nothing_else(name):
    text = sketch(name, 300, 200)
    picture = ET.fromstring(text)
    assert picture.attrib["width"] == "300" and picture.attrib["height"] == "200" and len(text) < 6000
    assert name in "".join(picture.itertext())
    assert text.count("http") == 1  # the name space
    line = next(child for child in picture if child.tag.endswith("polyline")).attrib["points"]
    points = [tuple(float(number) for number in point.split(",")) for point in line.split(" ")]
    heights = [y for _, y in points]
    assert heights == sorted(heights, reverse=True)  # p never falls, y points down
    reaches = "reaches_one" not in schedules[name].breaks
    assert (heights[-1] < heights[0]) == reaches
    assert all(0 <= x <= 300 and 0 <= y <= 200 for x, y in points)


def test_sketch_refuses():
    with pytest.raises(UnknownName, match="did you mean 'linear'"):
        sketch("linaer")
    with pytest.raises(ValueError, match="80 x 60"):
        sketch("linear", 20, 20)
