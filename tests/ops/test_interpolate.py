"""interpolate(): the ends are the adapters, the path between them is the one that the space says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.adapter import AdapterMismatch, UnsupportedKind
from loraloom.ops.interpolate import interpolate
from loraloom.registry import UnknownName
from oracles.ops_dense import delta, ensemble, fusion, random_adapter

Q, V = "layers.0.q", "layers.0.v"
A = random_adapter(1, {Q: (6, 5, 2), V: (4, 5, 2)}, 2.0)
B = random_adapter(2, {Q: (6, 5, 2), V: (4, 5, 2)}, 0.5)
calm = settings(derandomize=True, deadline=None, max_examples=25)


@calm
@given(st.floats(0, 1), st.sampled_from(["factors", "delta"]))
def test_every_point_is_the_weighted_mean_in_its_space(at, space):
    point = interpolate(A, B, at, space=space)
    expected = fusion if space == "factors" else ensemble
    for name in (Q, V):
        assert np.allclose(delta(point.modules[name]), expected([A, B], [1 - at, at], name), atol=1e-12)


@calm
@given(st.floats(0, 1), st.sampled_from(["factors", "delta"]))
def test_the_way_back_is_the_same(at, space):
    there, back = interpolate(A, B, at, space=space), interpolate(B, A, 1 - at, space=space)
    assert torch.allclose(there.modules[Q].delta(), back.modules[Q].delta(), atol=1e-12)


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_the_ends_are_the_adapters_themselves(space):
    for at, end in ((0, A), (0.0, A), (1, B), (1.0, B)):
        point = interpolate(A, B, at, space=space)
        assert all(point.modules[name] is end.modules[name] for name in (Q, V))
        assert point.config == end.config
        assert point.provenance["operation"] == "interpolate" and len(point.provenance["inputs"]) == 2


def test_ranks_and_default_space():
    assert interpolate(A, B).shape(Q).rank == 4
    assert interpolate(A, B, space="factors").shape(Q).rank == 2
    assert interpolate(A, B).provenance["arguments"]["space"] == "delta"


def test_adapters_of_one_scale_keep_it_in_factors():
    same = random_adapter(3, {Q: (6, 5, 2), V: (4, 5, 2)}, 2.0)
    point = interpolate(A, same, 0.25, space="factors")
    assert torch.allclose(point.modules[Q].B, 0.75 * A.modules[Q].B + 0.25 * same.modules[Q].B, rtol=0, atol=1e-15)
    assert point.modules[Q].scale == 2.0 and point.config["lora_alpha"] == A.config["lora_alpha"]


def test_extras_are_interpolated_on_request():
    a, b = (replace(x, extras={"head.bias": torch.tensor([value])}) for x, value in ((A, 1.0), (B, 3.0)))
    with pytest.raises(AdapterMismatch, match="hold whole tensors"):
        interpolate(a, b)
    assert interpolate(a, b, 0.25, extras="average").extras["head.bias"].item() == 1.5
    assert interpolate(a, b, 1, extras="average").extras["head.bias"].item() == 3.0


@pytest.mark.parametrize("at", [-0.01, 1.01, math.nan, math.inf])
def test_outside_the_path_is_refused(at):
    with pytest.raises(ValueError, match=r"at must be in \[0, 1\]"):
        interpolate(A, B, at)


def test_what_does_not_merge_does_not_interpolate_even_at_the_ends():
    dora = replace(A, config={**A.config, "use_dora": True})
    other = replace(B, config={**B.config, "base_model_name_or_path": "org/other"})
    for at in (0, 0.5, 1):
        with pytest.raises(UnsupportedKind, match="DoRA"):
            interpolate(dora, dora, at)
        with pytest.raises(AdapterMismatch, match="same_base=False"):
            interpolate(A, other, at)
        with pytest.raises(UnknownName, match="space 'facters'"):
            interpolate(A, B, at, space="facters")
    assert interpolate(A, other, same_base=False).shape(Q).rank == 4


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_the_bezier_curve_against_its_formula(space):
    a, b, c = (random_adapter(seed, {Q: (6, 5, 2), V: (4, 5, 2)}, 2.0) for seed in (1, 2, 3))
    for t in (0.25, 0.5, 0.9):
        weights = [(1 - t) ** 2, 2 * t * (1 - t), t**2]
        got = interpolate(a, b, t, via=c, space=space)
        want = (ensemble if space == "delta" else fusion)([a, c, b], weights, Q)
        assert np.allclose(delta(got.modules[Q]), want)
    assert interpolate(a, b, 0, via=c).modules[Q] is a.modules[Q]
    assert interpolate(a, b, 1, via=c).modules[Q] is b.modules[Q]
    # In the space of the updates a control point in the middle makes the path straight.
    middle = interpolate(a, b, 0.5)
    bent, straight = interpolate(a, b, 0.3, via=middle), interpolate(a, b, 0.3)
    assert np.allclose(delta(bent.modules[Q]), delta(straight.modules[Q]))
