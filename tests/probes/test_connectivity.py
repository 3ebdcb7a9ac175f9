"""Connectivity on paths whose scores and barriers are known in closed form."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.adapter import Adapter, AdapterMismatch, Factors
from loraloom.probes import probes
from loraloom.probes.connectivity import connectivity

LAWS = settings(derandomize=True, deadline=None, max_examples=25)


def adapter(seed, rank=2, out=4, names=("layers.0.q", "layers.1.q")):
    draw = torch.Generator().manual_seed(seed)
    modules = {
        name: Factors(
            B=torch.randn(out, rank, generator=draw, dtype=torch.float64),
            A=torch.randn(rank, 3, generator=draw, dtype=torch.float64),
        )
        for name in names
    }
    return Adapter({"peft_type": "LORA", "r": rank, "lora_alpha": rank}, modules)


def deltas(one):
    return torch.cat([factors.delta().flatten() for factors in one.modules.values()])


@LAWS
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_a_score_linear_in_delta_has_no_barrier(seed, points):
    a, b = adapter(seed), adapter(seed + 1)
    weights = torch.randn(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = connectivity(a, b, lambda one: float(weights @ deltas(one)), points=points)
    assert found.barrier == pytest.approx(0, abs=1e-9)
    ends = float(weights @ deltas(a)), float(weights @ deltas(b))
    assert found.scores == pytest.approx([(1 - t) * ends[0] + t * ends[1] for t in found.at], abs=1e-9)


@LAWS
@given(st.integers(0, 10_000), st.sampled_from([3, 5, 7, 11]))
def test_a_quadratic_score_has_the_barrier_of_the_parabola(seed, points):
    """s = |delta|^2 sinks below its chord by t (1 - t) |delta_a - delta_b|^2: a quarter of it at the middle."""
    a, b = adapter(seed), adapter(seed + 1)
    found = connectivity(a, b, lambda one: float(deltas(one).square().sum()), points=points)
    assert found.barrier == pytest.approx(0.25 * float((deltas(a) - deltas(b)).square().sum()), rel=1e-9)
    upside_down = connectivity(a, b, lambda one: -float(deltas(one).square().sum()), points=points)
    assert upside_down.barrier == 0.0


def test_the_chord_counts_and_not_the_mean_or_the_best_end():
    """Scores 1, 0.5, 0 lie on their chord: no barrier, though the path falls below either the best end or the mean."""
    one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))
    a, b = Adapter({"r": 1}, {"fc": one}), Adapter({"r": 1}, {"fc": one.scaled(0.0)})
    found = connectivity(a, b, lambda adapter: float(adapter.modules["fc"].delta()), points=3)
    assert found.scores == (1.0, 0.5, 0.0)
    assert found.barrier == 0.0


def test_factor_space_is_another_path():
    """b is a in another gauge (B and A both negated): equal deltas, yet half-way in factor space everything cancels."""
    a = adapter(0)
    b = Adapter(a.config, {name: Factors(B=-f.B, A=-f.A, scale=f.scale) for name, f in a.modules.items()})
    whole = float(deltas(a).norm())
    same = connectivity(a, b, lambda one: float(deltas(one).norm()), points=5)
    sagging = connectivity(a, b, lambda one: float(deltas(one).norm()), points=5, space="factors")
    assert (same.space, sagging.space) == ("delta", "factors")
    assert same.barrier == pytest.approx(0, abs=1e-9)
    assert sagging.barrier == pytest.approx(whole)
    assert sagging.scores == pytest.approx([whole * (1 - 2 * t) ** 2 for t in sagging.at], abs=1e-9)


@pytest.mark.parametrize("points", [2, 3, 11])
def test_score_is_called_once_a_point_in_order_from_a_to_b(points):
    a, b = adapter(0), adapter(1)
    seen = []
    found = connectivity(a, b, lambda one: seen.append(deltas(one)) or float(len(seen)), points=points)
    assert len(seen) == points
    assert found.scores == tuple(float(i + 1) for i in range(points))
    assert (found.at[0], found.at[-1], len(found.at)) == (0.0, 1.0, points)
    for t, met in zip(found.at, seen, strict=True):
        torch.testing.assert_close(met, (1 - t) * deltas(a) + t * deltas(b))


def test_two_points_have_no_inside_and_no_barrier():
    assert connectivity(adapter(0), adapter(1), lambda one: float(deltas(one)[0]), points=2).barrier == 0.0


def test_a_crafted_valley_is_found_at_its_depth():
    scores = iter([0.9, 0.8, 0.3, 0.85, 0.7])
    found = connectivity(adapter(0), adapter(1), lambda _: next(scores), points=5)
    assert found.barrier == pytest.approx(0.8 - 0.3)
    whole = {"scores": [0.9, 0.8, 0.3, 0.85, 0.7], "barrier": found.barrier, "space": "delta"}
    path = {**whole, "name": "delta", "align": None, "bent": False, "drop": 0.5, "lowest": 0.5, "centre": None}
    told = json.loads(json.dumps(found.to_json()))
    assert told.pop("paths") == [path | {"drop": pytest.approx(0.5)}]
    assert told == {"at": [0.0, 0.25, 0.5, 0.75, 1.0], **whole, "evaluations": 5}


@pytest.mark.parametrize("points", [1, 0, -3, 2.0, True])
def test_impossible_points_are_refused(points):
    with pytest.raises(ValueError, match="points must be a whole number of at least 2"):
        connectivity(adapter(0), adapter(1), lambda _: 1.0, points=points)


def test_wrong_pairs_and_spaces_are_refused_before_anything_is_scored():
    def never(_):
        raise AssertionError("scored")

    with pytest.raises(AdapterMismatch):
        connectivity(adapter(0), adapter(1, out=5), never)
    with pytest.raises(ValueError, match="nowhere"):
        connectivity(adapter(0), adapter(1), never, space="nowhere")


def test_a_score_that_is_not_finite_is_named():
    scores = iter([1.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match=r"the score at t = 0\.5 is nan"):
        connectivity(adapter(0), adapter(1), lambda _: next(scores), points=3)


def test_the_two_heights_differ_where_the_ends_do():
    """Below the chord by 0.1 at the middle; below the mean of the ends by 0.4, at the worse end itself."""
    scores = iter([1.0, 0.5, 0.2])
    (path,) = connectivity(adapter(0), adapter(1), lambda _: next(scores), points=3).paths
    assert (path.barrier, path.drop, path.lowest) == (pytest.approx(0.1), pytest.approx(0.4), 1.0)


def turned(a, seed=3):
    """The same updates in other factors."""
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name, held in a.modules.items():
        p = torch.randn(held.rank, held.rank, generator=draw, dtype=torch.float64)
        modules[name] = Factors(B=held.B @ torch.linalg.inv(p), A=p @ held.A, scale=held.scale)
    return Adapter(a.config, modules)


def size(one):
    return float(deltas(one).norm())


def test_alignment_flattens_the_path_to_the_same_update_in_another_gauge():
    a = adapter(0)
    aligns = [None, "orthogonal", "invertible"]
    near = lambda one: -float((deltas(one) - deltas(a)).norm())  # noqa: E731
    found = connectivity(a, turned(a), near, points=5, space=["delta", "factors"], align=aligns)
    assert [path.name for path in found.paths] == ["delta", "factors", "factors, orthogonal", "factors, invertible"]
    heights = [path.barrier for path in found.paths]
    assert heights[0] == pytest.approx(0, abs=1e-9) and heights[3] == pytest.approx(0, abs=1e-6)
    assert heights[1] > heights[2] > 0.01 * size(a)
    assert found.barrier == heights[0] and found.space == "delta"


def test_several_paths_are_what_each_is_alone_and_score_the_ends_once():
    a, b, via = adapter(0), adapter(1), adapter(2)
    calls = []
    score = lambda one: calls.append(one) or size(one)  # noqa: E731
    every = connectivity(a, b, score, points=4, space=("factors", "delta"), via=via, align=("invertible", None))
    names = ["factors, invertible", "factors, invertible, bent", "factors", "factors, bent", "delta", "delta, bent"]
    assert [path.name for path in every.paths] == names
    assert len(calls) == every.evaluations == 2 + 6 * 2 + 3
    for path in every.paths:
        alone = connectivity(a, b, size, points=4, space=path.space, via=via, align=path.align).paths[path.bent]
        assert path == alone


def test_the_bent_path_is_the_parabola_of_the_control_point():
    a, b, via = adapter(0), adapter(1), adapter(2)
    met = []
    found = connectivity(a, b, lambda one: met.append(deltas(one)) or size(one), points=5, via=via)
    straight, bent = found.paths
    inner = [(1 - t) ** 2 * deltas(a) + 2 * t * (1 - t) * deltas(via) + t**2 * deltas(b) for t in found.at]
    torch.testing.assert_close(torch.stack(met[5:8]), torch.stack(inner[1:4]))
    assert bent.scores == pytest.approx([float(each.norm()) for each in inner])
    mean = float(((deltas(a) + deltas(via) + deltas(b)) / 3).norm())
    assert (straight.centre, bent.centre) == (pytest.approx(mean), pytest.approx(mean))
    factors = connectivity(a, b, size, points=2, via=via, space="factors").paths[0]
    mean = torch.cat(
        [
            (sum(one.modules[name].B for one in (a, b, via)) / 3 @ sum(one.modules[name].A for one in (a, b, via)) / 3)
            for name in a.modules
        ]
    ).norm()
    assert factors.centre == pytest.approx(float(mean))


def test_a_score_that_takes_many_is_asked_for_all_points_at_once():
    class Score:
        asked = ()

        def many(self, adapters):
            self.asked = (*self.asked, len(adapters))
            return [size(one) for one in adapters]

    a, b, via = adapter(0), adapter(1), adapter(2)
    score = Score()
    assert connectivity(a, b, score, points=4, via=via) == connectivity(a, b, size, points=4, via=via)
    assert score.asked == (6, 1)


def test_what_makes_no_path_is_refused_before_anything_is_scored():
    def never(_):
        raise AssertionError("scored")

    a, b = adapter(0), adapter(1)
    with pytest.raises(ValueError, match="needs space='factors'"):
        connectivity(a, b, never, align="orthogonal")
    with pytest.raises(ValueError, match="at least one entry"):
        connectivity(a, b, never, space=[])
    with pytest.raises(ValueError, match="invertible"):
        connectivity(a, b, never, space="factors", align="sideways")
    with pytest.raises(AdapterMismatch):
        connectivity(a, b, never, via=adapter(2, out=5))


def test_it_is_registered_with_its_paper():
    assert probes["connectivity"].function is connectivity
    assert probes["connectivity"].paper.startswith("https://")
