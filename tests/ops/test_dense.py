"""low_rank() on matrices that are too large for a full SVD to be taken: against that SVD all the same."""

from __future__ import annotations

import pytest
import torch

from loraloom.ops import dense as module
from loraloom.ops.dense import low_rank


def with_spectrum(values: torch.Tensor, out: int, in_: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(in_, len(values), generator=generator, dtype=torch.float64)).Q
    return ((u * values) @ v.T).to(dtype)


SPECTRA = {
    "decaying": (torch.logspace(0, -4, 600), 1.001),
    "flat": (torch.ones(600), 1.001),
    "noisy": (torch.cat([torch.full((20,), 10.0), torch.ones(580)]), 1.02),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_matrices_come_near_the_best(spectrum, turned, dtype):
    values, most = SPECTRA[spectrum]
    wide = with_spectrum(values.double(), 640, 700, dtype)
    wide = wide.T if turned else wide
    assert min(wide.shape) > module._SMALL
    b, a, error = low_rank(wide, 24)
    values = values.double()
    best = float(values[24:].norm() / values.norm())
    assert (b.shape, a.shape, b.dtype) == ((wide.shape[0], 24), (24, wide.shape[1]), dtype)
    true = float((wide.double() - b.double() @ a.double()).norm() / wide.double().norm())
    assert error == pytest.approx(true, abs=1e-6)
    assert best - 1e-6 <= error <= best * most
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-3)
    again = low_rank(wide, 24)
    assert torch.equal(b, again[0]) and torch.equal(a, again[1])


def test_an_exact_rank_is_found_again_and_a_start_is_used():
    wide = with_spectrum(torch.linspace(1, 2, 10, dtype=torch.float64), 600, 650)
    b, a, error = low_rank(wide, 16)
    assert error < 1e-12 and torch.allclose(b @ a, wide, atol=1e-12) and b.shape == (600, 16)
    assert low_rank(wide, 10, start=wide[:, :10])[2] < 1e-12


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (700, 700)])
def test_zero_and_tiny(shape):
    b, a, error = low_rank(torch.zeros(shape), 3)
    assert (b.shape, a.shape, error) == ((shape[0], 3), (3, shape[1]), 0.0)
    assert not b.any() and not a.any()


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_small_ones_are_the_best(rank):
    dense = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(dense)
    b, a, error = low_rank(dense, rank)
    assert error == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-12)
    assert torch.linalg.norm(dense - b @ a) == pytest.approx(float(s[rank:].norm()), abs=1e-12)
