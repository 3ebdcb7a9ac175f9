"""The algebra on factors against the same thing done on dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraloom.adapter import (
    Adapter,
    AdapterMismatch,
    Factors,
    Modules,
    Shape,
    UnsupportedKind,
    basis,
    concat,
    is_finite,
    truncate,
)

LAW = settings(derandomize=True, deadline=None, max_examples=80)
SCALES = st.sampled_from([0.0, -2.0, 0.3, 1.0, 4.0])


def drawn(out: int, in_: int, rank: int, scale: float, seed: int, true_rank: int | None = None) -> Factors:
    """Random factors in float64; ``true_rank`` makes their product of smaller rank than they are wide."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, in_, generator=generator, dtype=torch.float64)
    if true_rank is not None:
        b[:, true_rank:] = 0
    return Factors(b, a, scale)


@st.composite
def factors(draw: Callable, out: int | None = None, in_: int | None = None) -> Factors:
    out, in_ = out or draw(st.integers(1, 7)), in_ or draw(st.integers(1, 7))
    rank = draw(st.integers(1, 9))  # also more than out and in
    return drawn(out, in_, rank, draw(SCALES), draw(st.integers(0, 10**6)), draw(st.none() | st.integers(0, rank)))


@st.composite
def several(draw: Callable) -> list[Factors]:
    out, in_ = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    return draw(st.lists(factors(out, in_), min_size=1, max_size=4))


def dense(f: Factors) -> Tensor:
    """The oracle: every entry by the definition, in plain loops."""
    total = torch.zeros(f.B.shape[0], f.A.shape[1], dtype=torch.float64)
    for k in range(f.B.shape[1]):
        for i in range(total.shape[0]):
            for j in range(total.shape[1]):
                total[i, j] += f.scale * float(f.B[i, k]) * float(f.A[k, j])
    return total


def close(a: Tensor | float, b: Tensor | float) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-9, check_dtype=False)


@LAW
@given(factors())
def test_delta_and_shape(f: Factors) -> None:
    close(f.delta(), dense(f))
    assert f.shape == Shape(f.B.shape[0], f.A.shape[1], f.B.shape[1]) and f.rank == f.shape.rank
    assert f.dtype == torch.float64


@LAW
@given(several())
def test_inner_product_is_the_dense_one(fs: list[Factors]) -> None:
    f, g = fs[0], fs[-1]
    close(f.inner(g), float((dense(f) * dense(g)).sum()))
    close(f.inner(g), g.inner(f))
    close(f.norm(), float(torch.linalg.norm(dense(f))))


@LAW
@given(factors())
def test_svd_is_the_dense_one(f: Factors) -> None:
    u, s, vh = f.svd()
    k = len(s)
    assert k <= min(f.shape) and (u.shape, vh.shape) == ((f.shape.out, k), (k, f.shape.in_))
    close((u * s) @ vh, dense(f))
    close(u.T @ u, torch.eye(k))
    close(vh @ vh.T, torch.eye(k))
    values = torch.linalg.svdvals(dense(f))
    close(s, values[:k])
    close(values[k:], torch.zeros(len(values) - k))
    close(f.singular_values(), s)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_a_basis_of_badly_scaled_and_dependent_columns(dtype, tolerance) -> None:
    """Columns of lengths 1e-6 to 1e6, one of zeros and one twice: Q is orthonormal and gives the columns back."""
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype) * torch.logspace(-6, 6, 6).to(dtype)
    x = torch.cat([x, torch.zeros(50, 1, dtype=dtype), x[:, :1]], dim=1)
    found = basis(x)
    q = x.double() @ found.map
    assert q.shape == (50, 6)
    assert (q.T @ q - torch.eye(6)).abs().max() < tolerance
    assert ((q @ found.root - x.double()).norm(dim=0) <= tolerance * x.double().norm(dim=0)).all()


@LAW
@given(factors(), st.sampled_from([-1.5, 0.0, 0.5, 1.0]))
def test_scaled_and_baked(f: Factors, weight: float) -> None:
    f = replace(f, bias=f.B[:, 0].clone())
    scaled = f.scaled(weight)
    close(scaled.delta(), weight * dense(f))
    assert scaled.A is f.A and scaled.B is f.B
    baked = scaled.baked()
    assert baked.scale == 1.0
    close(baked.delta(), scaled.delta())
    close(baked.bias, scaled.scale * f.bias)  # the bias of B is scaled with it
    assert baked.baked() is baked


@LAW
@given(several(), st.data())
def test_concat_is_the_weighted_sum(fs: list[Factors], data: st.DataObject) -> None:
    weights = data.draw(st.lists(SCALES, min_size=len(fs), max_size=len(fs)))
    total = concat(fs, weights)
    close(total.delta(), sum(w * dense(f) for w, f in zip(weights, fs, strict=True)))
    assert total.rank == sum(f.rank for f in fs) and total.scale == 1.0


@pytest.mark.parametrize("by", [0.5, 1e-3, -1e-6])
def test_a_small_scale_does_not_take_b_below_the_numbers_of_float16(by: float) -> None:
    f = drawn(20, 10, 4, 1.0, 0)
    f = replace(f, B=(f.B / 1e3).half(), A=f.A.half(), bias=(f.B[:, 0] / 1e3).half())
    want = by * f.B.double() @ f.A.double()
    for made in (f.scaled(by).baked(), concat([f], [by]), concat([f, f], [by / 2, by / 2]), concat([f, f], [by, 0.0])):
        assert made.scale == 1.0 and made.A.dtype == made.B.dtype
        assert (made.B.double() @ made.A.double() - want).norm() < 1e-3 * want.norm()
    assert (f.scaled(by).baked().bias.double() - by * f.bias.double()).norm() < 1e-3 * abs(by) * f.bias.double().norm()
    assert f.scaled(0.5).baked().dtype == concat([f], [0.0]).dtype == torch.float16
    assert replace(f, B=f.B.bfloat16(), A=f.A.bfloat16()).scaled(by).baked().dtype == torch.bfloat16


@LAW
@given(factors(), st.integers(1, 9))
def test_truncate_is_the_best_of_its_rank(f: Factors, rank: int) -> None:
    cut, error = truncate(f, rank)
    assert cut.rank == rank and cut.scale == 1.0 and cut.dtype == f.dtype
    u, s, vh = torch.linalg.svd(dense(f), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    total = float(s.norm())
    close(torch.linalg.norm(dense(f) - cut.delta()), torch.linalg.norm(dense(f) - best))
    wanted = float(s[rank:].norm()) / total if total > 0 else 0.0
    assert error == pytest.approx(wanted, abs=1e-7) and 0.0 <= error <= 1.0
    close(cut.B.T @ cut.B, cut.A @ cut.A.T)  # the singular values are split evenly


def test_truncate_keeps_what_it_does_not_touch() -> None:
    f = replace(drawn(4, 6, 3, 2.0, 0), magnitude=torch.ones(4), kernel=(2, 3), embedding=False)
    cut, _ = truncate(f, 2)
    assert cut.magnitude is f.magnitude and cut.kernel == (2, 3)
    half = replace(f, B=f.B.bfloat16(), A=f.A.bfloat16())
    assert truncate(half, 2)[0].dtype == torch.bfloat16


def test_edges_are_refused_by_size() -> None:
    f, g = drawn(3, 4, 2, 1.0, 0), drawn(4, 3, 2, 1.0, 0)
    with pytest.raises(AdapterMismatch, match=r"B \(3, 2\) and A \(3, 4\) do not multiply"):
        Factors(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(AdapterMismatch, match="do not multiply"):
        Factors(torch.ones(3), torch.ones(1, 4))
    with pytest.raises(AdapterMismatch, match=r"sizes \(3, 4\) and \(4, 3\) have no inner product"):
        f.inner(g)
    with pytest.raises(AdapterMismatch, match="deltas of different sizes do not add"):
        concat([f, g], [1.0, 1.0])
    for parts, weights in (([], []), ([f], [1.0, 2.0])):
        with pytest.raises(AdapterMismatch, match="one weight per part"):
            concat(parts, weights)
    for rank in (0, -1):
        with pytest.raises(ValueError, match="rank must be at least 1"):
            truncate(f, rank)
    assert issubclass(UnsupportedKind, ValueError)
    with pytest.raises(FrozenInstanceError):
        f.scale = 2.0  # type: ignore[misc]


def test_modules_are_made_when_asked_for() -> None:
    made: list[str] = []

    def read(name: str) -> Factors:
        made.append(name)
        return drawn(3, 4, 2, 1.0, 0)

    lazy = Modules(["b", "a"], read, lambda name: Shape(3, 4, 2))
    adapter = Adapter({"peft_type": "LORA"}, lazy)
    assert list(lazy) == ["b", "a"] and len(lazy) == 2 and "a" in lazy and "c" not in lazy
    assert adapter.shape("a") == (3, 4, 2) and made == []
    with pytest.raises(KeyError):
        lazy["c"]
    assert lazy["a"] is not lazy["a"] and made == ["a", "a"]
    held = adapter.loaded()
    assert made == ["a", "a", "b", "a"] and held.modules["a"] is held.modules["a"]
    assert held.shape("a") == (3, 4, 2) and Modules(["a"], read).shape("a") == (3, 4, 2)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, "lora"),
        ({"peft_type": "LORA"}, "lora"),
        ({"peft_type": "LORA", "use_dora": True}, "dora"),
        ({"peft_type": "HIRA"}, "hira"),
    ],
)
def test_kind(config: dict, kind: str) -> None:
    assert Adapter(config, {}).kind == kind
    assert Adapter(config, {}).base == "" and Adapter({"base_model_name_or_path": "x"}, {}).base == "x"
    assert repr(Adapter(config, {})) == f"Adapter(kind='{kind}', base='', modules=0, extras=0)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_is_found_and_a_large_sum_is_not_one(dtype, bad) -> None:
    large = torch.full((5, 3), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(large) and is_finite(-large) and is_finite(torch.empty(0, 3, dtype=dtype))
    assert is_finite(torch.tensor([2**60]))
    for at in range(15):
        spoilt = torch.zeros(5, 3, dtype=dtype)
        spoilt.view(-1)[at] = bad
        assert not is_finite(spoilt)
    assert not is_finite(torch.tensor([bad, -bad], dtype=dtype))
