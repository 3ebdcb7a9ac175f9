"""align(): the update stays, the factors come near; planted gauges are found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraloom.adapter import Adapter, AdapterMismatch, Factors
from loraloom.ops.align import GAUGES, align
from loraloom.ops.interpolate import interpolate
from loraloom.registry import UnknownName
from oracles.ops_dense import random_adapter, random_factors

Q, V = "layers.0.q", "layers.0.v"
SIZES = {Q: (20, 15, 4), V: (9, 15, 3)}


def distance(left: Factors, right: Factors) -> float:
    """In words: both factors with the root of the scale in them."""
    b = left.scale**0.5 * left.B - right.scale**0.5 * right.B
    a = left.scale**0.5 * left.A - right.scale**0.5 * right.A
    return float((b.square().sum() + a.square().sum()).sqrt())


def turned(factors: Factors, seed: int, orthogonal: bool) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(factors.rank, factors.rank, generator=generator, dtype=torch.float64)
    p = torch.linalg.qr(p).Q if orthogonal else p + 2 * torch.eye(factors.rank, dtype=torch.float64)
    return replace(factors, B=factors.B @ torch.linalg.inv(p), A=p @ factors.A)


@pytest.mark.parametrize("by", GAUGES)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 0.5)])
def test_the_update_stays_and_the_factors_come_nearer(by, scales):
    a, b = (random_adapter(seed, SIZES, scale) for seed, scale in enumerate(scales))
    near = align(b, to=a, by=by)
    for name in SIZES:
        got = near.modules[name]
        assert torch.allclose(got.delta(), b.modules[name].delta(), atol=1e-10)
        before, after = near.provenance["record"]["distance"][name]
        assert before == pytest.approx(distance(b.modules[name], a.modules[name]))
        assert after == pytest.approx(distance(got, a.modules[name])) and after < before


def test_invertible_is_at_least_as_near_as_orthogonal_and_stationary():
    a, b = (random_adapter(seed, SIZES, 2.0) for seed in (1, 2))
    after = {by: {} for by in GAUGES}
    for by in GAUGES:
        near = align(b, to=a, by=by)
        for name in SIZES:
            after[by][name] = distance(near.modules[name], a.modules[name])
            if by == "invertible":  # no small step of the gauge comes nearer
                for seed in range(20):
                    generator = torch.Generator().manual_seed(seed)
                    rank = SIZES[name][2]
                    step = 1e-3 * torch.randn(rank, rank, generator=generator, dtype=torch.float64)
                    p = torch.eye(rank, dtype=torch.float64) + step
                    got = near.modules[name]
                    moved = replace(got, B=got.B @ torch.linalg.inv(p), A=p @ got.A)
                    assert distance(moved, a.modules[name]) >= after[by][name] - 1e-9
    assert all(after["invertible"][name] <= after["orthogonal"][name] + 1e-12 for name in SIZES)


@pytest.mark.parametrize("by", GAUGES)
def test_a_planted_gauge_is_found_again(by):
    a = random_adapter(3, SIZES, 2.0)
    hidden = replace(a, modules={n: turned(f, 7, by == "orthogonal") for n, f in a.modules.items()})
    near = align(hidden, to=a, by=by)
    for name in SIZES:
        assert torch.allclose(near.modules[name].B, a.modules[name].B, atol=1e-6)
        assert torch.allclose(near.modules[name].A, a.modules[name].A, atol=1e-6)
    # What factor space makes of the two is then the update itself.
    middle = interpolate(a, hidden, 0.5, space="factors", align=by)
    assert torch.allclose(middle.modules[Q].delta(), a.modules[Q].delta(), atol=1e-5)


def test_orthogonal_is_the_best_of_many():
    a, b = (random_adapter(seed, SIZES) for seed in (1, 2))
    best = distance(align(b, to=a, by="orthogonal").modules[V], a.modules[V])
    for seed in range(50):
        assert distance(turned(b.modules[V], seed, True), a.modules[V]) >= best - 1e-12


@pytest.mark.parametrize("by", GAUGES)
def test_a_fresh_adapter_with_B_of_zeros(by):
    a, b = random_adapter(1, SIZES), random_adapter(2, SIZES)
    fresh = replace(b, modules={n: replace(f, B=torch.zeros_like(f.B)) for n, f in b.modules.items()})
    near = align(fresh, to=a, by=by)
    for name in SIZES:
        assert not near.modules[name].B.any() and torch.isfinite(near.modules[name].A).all()
        assert distance(near.modules[name], a.modules[name]) <= distance(fresh.modules[name], a.modules[name])


def test_what_does_not_depend_on_the_gauge_stays():
    part = random_factors(1, 6, 5, 2, bias=torch.ones(6), magnitude=torch.ones(6))
    b = Adapter({"r": 2, "use_dora": True}, {Q: part, V: part})
    near = align(b, to=Adapter({"r": 2}, {Q: random_factors(2, 6, 5, 2)}))
    assert near.modules[V] is part
    assert near.modules[Q].bias is part.bias and near.modules[Q].magnitude is part.magnitude
    half = Adapter({"r": 2}, {Q: Factors(B=part.B.bfloat16(), A=part.A.bfloat16())})
    assert align(half, to=b).modules[Q].dtype == torch.bfloat16


def test_refusals():
    a = random_adapter(1, SIZES)
    with pytest.raises(AdapterMismatch, match=r"layers\.0\.q.*rank=4.*rank=2"):
        align(a, to=random_adapter(2, {Q: (20, 15, 2)}))
    with pytest.raises(UnknownName, match="orthogonal"):
        align(a, to=a, by="ortogonal")
