"""The plane through three adapters: lengths and scores that are known in closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch

from loraloom.adapter import Adapter, AdapterMismatch, Factors
from loraloom.probes import probes
from loraloom.probes.plane import plane


def adapter(seed, rank=2, out=4, names=("layers.0.q", "layers.1.q")):
    draw = torch.Generator().manual_seed(seed)
    modules = {
        name: Factors(
            B=torch.randn(out, rank, generator=draw, dtype=torch.float64),
            A=torch.randn(rank, 3, generator=draw, dtype=torch.float64),
            scale=0.5,
        )
        for name in names
    }
    return Adapter({"peft_type": "LORA", "r": rank, "lora_alpha": rank / 2}, modules)


def dense(one):
    names = ("layers.0.q", "layers.1.q")
    parts = [one.modules[name].delta() if name in one.modules else torch.zeros(4, 3).double() for name in names]
    return torch.cat([part.flatten() for part in parts])


def never(_):
    raise AssertionError("scored")


def test_the_axes_are_those_of_gram_and_schmidt_on_the_dense_updates():
    three = [adapter(0), adapter(1, rank=3), adapter(2, names=("layers.1.q",))]  # other ranks, other modules
    a, b, c = map(dense, three)
    u = (b - a) / (b - a).norm()
    v = c - a - ((c - a) @ u) * u
    v = v / v.norm()
    met = []
    found = plane(*three, lambda one: met.append(dense(one)) or float(len(met)), grid=3)
    expected = [(0.0, 0.0), (float((b - a).norm()), 0.0), (float((c - a) @ u), float((c - a) @ v))]
    for place, other in zip(found.places, expected, strict=True):
        assert place == pytest.approx(other, abs=1e-9)
    torch.testing.assert_close(torch.stack(met[:4]), torch.stack([a, b, c, (a + b + c) / 3]))
    points = [(x, y) for y in found.y for x in found.x]
    torch.testing.assert_close(torch.stack(met[4:]), torch.stack([a + x * u + y * v for x, y in points]))
    assert (found.ends, found.centre) == ((1.0, 2.0, 3.0), 4.0)
    assert found.scores == ((5.0, 6.0, 7.0), (8.0, 9.0, 10.0), (11.0, 12.0, 13.0))
    assert found.evaluations == len(met) == 13


def test_a_round_score_is_round_on_the_map():
    """Minus the squared distance to a: on the map it is minus x^2 + y^2."""
    three = [adapter(0), adapter(1), adapter(2)]
    start = dense(three[0])
    found = plane(*three, lambda one: -float((dense(one) - start).square().sum()), grid=4, margin=0.5)
    for y, row in zip(found.y, found.scores, strict=True):
        assert row == pytest.approx([-(x * x) - y * y for x in found.x])


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_the_margin_is_a_share_of_the_longer_axis(margin):
    found = plane(adapter(0), adapter(1), adapter(2), lambda _: 1.0, grid=2, margin=margin)
    xs, ys = zip(*found.places, strict=True)
    pad = margin * max(max(xs) - min(xs), *ys)
    assert found.x == pytest.approx((min(xs) - pad, max(xs) + pad))
    assert found.y == pytest.approx((-pad, max(ys) + pad))
    told = json.loads(json.dumps(found.to_json()))
    assert told["places"][0] == [0.0, 0.0] and told["scores"] == [[1.0, 1.0], [1.0, 1.0]] and told["evaluations"] == 8


def test_what_has_no_plane_is_refused_before_anything_is_scored():
    a, b, c = adapter(0), adapter(1), adapter(2)
    half = Adapter(a.config, {name: factors.scaled(0.5) for name, factors in a.modules.items()})
    twice = Adapter(a.config, {name: factors.scaled(2.0) for name, factors in a.modules.items()})
    for three in ((a, half, twice), (a, a, b), (a, b, a), (a, a, a)):
        with pytest.raises(ValueError, match="lie on one line"):
            plane(*three, never)
    with pytest.raises(AdapterMismatch):
        plane(a, b, adapter(3, out=5), never)
    for grid in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match="grid must be a whole number of at least 2"):
            plane(a, b, c, never, grid=grid)
    for margin in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin must be a number of at least 0"):
            plane(a, b, c, never, margin=margin)


def test_a_score_that_is_not_finite_is_named():
    scores = iter([1.0] * 6 + [math.nan] * 2)
    with pytest.raises(ValueError, match="the score in row 2, column 1 is nan"):
        plane(adapter(0), adapter(1), adapter(2), lambda _: next(scores), grid=2)


def test_it_is_registered_with_its_paper():
    assert probes["plane"].function is plane
    assert probes["plane"].paper.startswith("https://")
