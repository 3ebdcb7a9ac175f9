"""The arithmetic of adapted layers: against obvious formulas, and gradients against differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom import fused
from loraloom.fused import Adapted, hira, lora, row_norms

DOUBLE = {"dtype": torch.float64}


def layer(out: int, ins: int, rank: int, *, bias: bool = True, dora: bool = False, scale: float = 0.7) -> Adapted:
    a, b = torch.randn(rank, ins, **DOUBLE), torch.randn(out, rank, **DOUBLE)
    magnitude = torch.rand(out, **DOUBLE).requires_grad_() if dora else None
    rest = torch.randn(out, **DOUBLE) if bias else None
    return Adapted(torch.randn(out, ins, **DOUBLE), rest, a.requires_grad_(), b.requires_grad_(), scale, magnitude)


def learned(layers: list[Adapted]) -> list[Tensor]:
    return [part for one in layers for part in (one.a, one.b, one.magnitude) if part is not None]


def plain(x: Tensor, one: Adapted) -> Tensor:
    z = x @ one.weight.T + one.scale * x @ one.a.T @ one.b.T
    if one.magnitude is not None:
        z = z * one.magnitude / (one.weight + one.scale * one.b @ one.a).norm(dim=1).detach()
    return z if one.bias is None else z + one.bias


def plain_hira(x: Tensor, one: Adapted, whole: bool) -> Tensor:
    return F.linear(x, one.weight * (one.b @ one.a + whole), one.bias if whole else None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(fused.BLOCK, "cpu", 11)


def test_gradients_are_those_of_differences():
    x = torch.randn(2, 3, 5, **DOUBLE, requires_grad=True)
    layers = [layer(4, 5, 2), layer(6, 5, 3, bias=False, scale=1.0)]
    weights = learned(layers)
    assert torch.autograd.gradcheck(lambda *_: lora(x, layers), (x, *weights))
    for whole in (True, False):
        assert torch.autograd.gradcheck(lambda *_, whole=whole: hira(x, layers, whole=whole), (x, *weights))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 5), (2, 3, 5)])
def test_layers_together_are_each_by_its_formula(shape):
    x = torch.randn(*shape, **DOUBLE, requires_grad=True)
    layers = [layer(4, 5, 2), layer(6, 5, 3, dora=True), layer(1, 5, 1, bias=False, dora=True), layer(4, 5, 2)]
    for run, formula in (
        (lora, plain),
        (hira, lambda x, one: plain_hira(x, one, True)),
        (lambda x, layers: hira(x, layers, whole=False), lambda x, one: plain_hira(x, one, False)),
    ):
        found, wanted = run(x, layers), [formula(x, one) for one in layers]
        factors = [torch.randn_like(out) for out in wanted]
        parts = [x, *(part for one in layers for part in ((one.a, one.b) if run is not lora else learned([one])))]
        sums = [sum((out * by).sum() for out, by in zip(outs, factors, strict=True)) for outs in (found, wanted)]
        grads = [torch.autograd.grad(each, parts) for each in sums]
        for one, other in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", [lora, hira])
def test_a_layer_that_nobody_used_has_no_gradient_and_frozen_parts_hold_no_input(run):
    x = torch.randn(3, 5, **DOUBLE, requires_grad=True)
    layers = [layer(4, 5, 2), layer(4, 5, 2)]
    run(x, layers)[0].sum().backward()
    assert layers[0].a.grad is not None and layers[1].a.grad is layers[1].b.grad is None
    for one in layers:
        one.a.requires_grad_(False)
        one.b.requires_grad_(run is lora)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        run(x, layers)
    assert x.data_ptr() not in held


def test_dropout_is_drawn_as_torch_draws_it():
    x, one = torch.randn(3, 5, **DOUBLE, requires_grad=True), layer(4, 5, 2)
    torch.manual_seed(3)
    (found,) = lora(x, [one], dropout=0.4)
    torch.manual_seed(3)
    wanted = F.linear(x, one.weight, one.bias) + one.scale * F.dropout(x, 0.4) @ one.a.T @ one.b.T
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.sum(), [x, one.a, one.b]) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_norms_of_updated_weights(dtype):
    weight, a, b = (torch.randn(*shape, **DOUBLE).to(dtype) for shape in ((7, 5), (3, 5), (7, 3)))
    wanted = (weight.double() + 0.3 * b.double() @ a.double()).norm(dim=1)
    error = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(row_norms(weight, a, b, 0.3).double(), wanted, rtol=error, atol=error)
    assert row_norms(torch.zeros_like(weight), a, torch.zeros_like(b), 0.3).eq(0).all()
