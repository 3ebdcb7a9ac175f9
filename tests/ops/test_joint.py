"""What types of 32 bits and less take: Gram matrices instead of SVDs, held to SVDs in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraloom.adapter import Adapter, Factors
from loraloom.ops.joint import Stacked
from loraloom.ops.merge import merge
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.spectrum import polar, triples
from loraloom.registry import Technique

Q = "layers.0.q"


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low(rows: int, columns: int, rank: int) -> torch.Tensor:
    return draw(rows, rank) @ draw(rank, columns, seed=1)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(6, 9, 6), (9, 6, 2), (90, 70, 70), (80, 120, 5), (120, 80, 30)])
def test_triples_are_those_of_the_svd(rows, columns, rank):
    matrix = low(rows, columns, rank).float()
    found, want = triples(matrix), torch.linalg.svd(matrix.double()).S[:rank]
    assert found.left.shape == (rows, rank) and found.right.shape == (columns, rank)
    assert torch.allclose(found.values, want, rtol=1e-6)
    assert (found.matrix() - matrix.double()).norm() < 1e-6 * matrix.norm()
    for side in (found.left, found.right):
        assert (side.T @ side - torch.eye(rank)).abs().max() < 1e-5
    near = polar(matrix)
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert (near - u[:, :rank] @ vh[:rank]).abs().max() < 1e-5


def test_a_small_direction_of_a_large_matrix_of_low_rank_is_not_lost():
    u, v = (torch.linalg.qr(draw(100, 30, seed=seed)).Q for seed in (1, 2))
    s = torch.logspace(0, -6.5, 30, dtype=torch.float64)
    found = triples((u * s @ v.T).float())
    assert len(found.values) == int((s > 1e-5).sum())
    assert torch.allclose(found.values, s[: len(found.values)], rtol=1e-2)
    assert len(triples(torch.zeros(70, 70)).values) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_joint_singular_vectors_in_a_gauge_with_very_unequal_columns(dtype):
    ranks, scales = [2, 3, 1], [2.0, -0.5, 1.0]
    gauge = 2.0 ** torch.tensor([9, -9, 0, 12, -12, 3])
    b, a = (draw(40, 6) * gauge).to(dtype), (draw(6, 30, seed=1) / gauge[:, None]).to(dtype)
    b[:, 1] = b[:, 0]  # dependent within one adapter
    updates = [
        scale * x.double() @ y.double()
        for scale, x, y in zip(scales, b.split(ranks, 1), a.split(ranks, 0), strict=True)
    ]
    of_b, of_a = Stacked(b), Stacked(a.T)
    left = of_b.singular([scale * root for scale, root in zip(scales, of_a.roots(ranks), strict=True)])
    right = of_a.singular([scale * root for scale, root in zip(scales, of_b.roots(ranks), strict=True)])
    for side, x, whole in ((left, b.double(), torch.hstack(updates)), (right, a.double().T, torch.vstack(updates).T)):
        u, s, _ = torch.linalg.svd(whole, full_matrices=False)
        assert len(side.values) == 5 and torch.allclose(side.values, s[:5], rtol=1e-6)
        got = x @ side.map
        assert (got @ got.T - u[:, :5] @ u[:, :5].T).abs().max() < 1e-6
        assert torch.allclose(side.rows, got.T @ x, atol=1e-6 * float(x.abs().max()))


def three(dtype: torch.dtype, rank: int = 4) -> list[Adapter]:
    made = []
    for seed in range(3):
        part = Factors(
            B=draw(40, rank, seed=seed).to(dtype), A=draw(rank, 30, seed=9 + seed).to(dtype), scale=1.0 + seed
        )
        made.append(Adapter({"r": rank, "lora_alpha": rank * (1 + seed)}, {Q: part}))
    return made


def doubled(adapters: list[Adapter]) -> list[Adapter]:
    parts = [one.modules[Q] for one in adapters]
    return [
        replace(one, modules={Q: replace(part, B=part.B.double(), A=part.A.double())})
        for one, part in zip(adapters, parts, strict=True)
    ]


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [None, 5])
def test_spaces_lose_nothing_on_the_way_there_and_back(monkeypatch, space, dtype, rank):
    """A sum that does not say that it is linear takes the long way; one that does takes the short one to the same."""
    spy = Technique("spy", lambda deltas, weights: torch.tensordot(weights, deltas, 1), facts={})
    monkeypatch.setattr("loraloom.ops.merge.merge_methods", {**merge_methods, "spy": spy})
    adapters, weights = three(dtype), [0.7, -0.4, 1.2]
    long, short = (merge(adapters, method, weights, space=space, rank=rank) for method in ("spy", "linear"))
    one, two = long.modules[Q], short.modules[Q]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert one.shape == two.shape == long.shape(Q) == short.shape(Q)
    assert (one.delta() - two.delta()).norm() < tolerance * two.norm()
    if rank is not None:
        for kind in ("error", "norm"):
            first, second = (merged.provenance["record"][kind][Q] for merged in (long, short))
            assert first == pytest.approx(second, rel=10 * tolerance)


@pytest.mark.parametrize("space", ["core", "knots"])
def test_a_sum_has_no_more_directions_than_the_module(space):
    wide = [
        Adapter({"r": 4, "lora_alpha": 4}, {Q: Factors(B=draw(5, 4, seed=seed), A=draw(4, 6, seed=3 + seed))})
        for seed in range(2)
    ]
    merged = merge(wide, weights=[1.0, 2.0], space=space)
    assert merged.shape(Q).rank == merged.modules[Q].rank == 5
    want = wide[0].modules[Q].delta() + 2 * wide[1].modules[Q].delta()
    assert torch.allclose(merged.modules[Q].delta(), want)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "cart", "karcher", "pico", "ctm", "model_stock"])
def test_spectral_methods_in_float32_are_those_in_float64(method):
    adapters, weights = three(torch.float32, 8), [0.5, 0.3, 0.4]
    single, double = (merge(some, method, weights).modules[Q].delta() for some in (adapters, doubled(adapters)))
    assert (single - double).norm() < 2e-5 * double.norm()
