"""MokA layers that keep only A x: values and gradients are those of the rank space under autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraloom.fused import Adapted
from loraloom.strategies import rankback
from loraloom.strategies.modality import ATTENTION, OWN, MokA
from loraloom.strategies.rankback import Between, routed
from loraloom.strategies.rankspace import Routing, hidden, route
from strategies.test_rankspace import plans, tokens

IN, OUT = 5, 4
TYPES = torch.tensor([[0, 1, 1, 2, 0, 0], [0, 2, 1, 0, 0, -1]])


def made(plan: MokA, between: Between, layers: int = 2) -> list[Adapted]:
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return [
        Adapted(
            some(OUT + i, IN),
            some(OUT + i) if i else None,
            some(plan.rows, IN).requires_grad_(),
            some(OUT + i, plan.columns).requires_grad_(),
            0.7 + i,
            between=between,
        )
        for i in range(layers)
    ]


def plain(x: Tensor, one: Adapted) -> Tensor:
    h = hidden(one.between.plan, x @ one.a.T, one.between.routing)
    return F.linear(x, one.weight, one.bias) + one.scale * h @ one.b.T


def compare(plan: MokA, routing: Routing, shape: torch.Size, used: int = 2) -> None:
    between = Between(plan, routing, shape)
    layers = made(plan, between)
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    found, wanted = routed(x, layers), [plain(x, one) for one in layers]
    parts = [x, *itertools.chain(*((one.a, one.b) for one in layers[:used]))]
    sums = [sum(out.square().sum() for out in outs[:used]) for outs in (found, wanted)]
    grads = [torch.autograd.grad(each, parts, materialize_grads=True) for each in sums]
    for one, other in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_as_autograd_has_it_for_every_plan(data: st.DataObject) -> None:
    plan = data.draw(plans())
    told = data.draw(tokens(plan))
    try:
        routing = route(plan, **told)
    except ValueError:
        return  # no such routing, and no layer that could ask for one
    compare(plan, routing, told["types"].shape)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_by_blocks_in_segments_and_with_layers_that_nobody_used(
    attention: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rankback, "BLOCK", 50)
    rank: Any = 4 if own == "B" else {"text": 3, "image": 2, "audio": 4}
    plan = MokA({"image": 1, "audio": 2}, rank=rank, attention=attention, own=own, active=("text", "audio"))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    routing = route(plan, TYPES, segments=segments)
    assert (attention == "none") == (not routing.lookups)
    for used in (1, 2):
        compare(plan, routing, TYPES.shape, used)


def test_gradients_are_those_of_differences() -> None:
    plan = MokA({"image": 1, "audio": 2}, rank=2, heads=2, weight=0.5)
    types = TYPES[:1, :5]
    layers = made(plan, Between(plan, route(plan, types), types.shape))
    x = torch.randn(*types.shape, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    learned = itertools.chain(*((one.a, one.b) for one in layers))
    assert torch.autograd.gradcheck(lambda *_: routed(x, layers), (x, *learned))


def test_dropout_is_drawn_as_torch_draws_it() -> None:
    plan = MokA({"image": 1, "audio": 2}, rank=2)
    (one,) = made(plan, Between(plan, route(plan, TYPES), TYPES.shape), 1)
    x = torch.randn(*TYPES.shape, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    torch.manual_seed(3)
    (found,) = routed(x, [one], dropout=0.4)
    torch.manual_seed(3)
    update = hidden(plan, F.dropout(x, 0.4) @ one.a.T, one.between.routing) @ one.b.T
    wanted = F.linear(x, one.weight, one.bias) + one.scale * update
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, one.a, one.b]) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("types", [TYPES, torch.zeros_like(TYPES), TYPES[:1, :1]], ids=["mixed", "text", "stream"])
def test_no_more_is_kept_than_by_lora(types: Tensor) -> None:
    """x, and for each token as many numbers as its rank; of one layer the text's part is not a view into all parts."""
    plan = MokA({"image": 1, "audio": 2}, rank=3, attention="none" if types.numel() == 1 else "cross")
    layers = made(plan, Between(plan, route(plan, types), TYPES.shape), 1)
    x = torch.randn(*TYPES.shape, IN, dtype=torch.float64, requires_grad=True)
    weights = {part.data_ptr() for one in layers for part in one if isinstance(part, Tensor)} | {x.data_ptr()}
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        (out,) = routed(x, layers)
    kept = {t.data_ptr(): t.untyped_storage().nbytes() for t in held if t.data_ptr() not in weights}
    assert list(kept.values()) == [8 * 3 * TYPES.numel()] and any(t.data_ptr() == x.data_ptr() for t in held)
    torch.testing.assert_close(out, plain(x, layers[0]), rtol=1e-12, atol=1e-12)
    layers[0].a.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        held.clear()
        routed(x, layers)
    assert not any(t.data_ptr() == x.data_ptr() for t in held)
