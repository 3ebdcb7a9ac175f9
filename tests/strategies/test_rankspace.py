"""Routing and attention in the rank space, against the paper's equations token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraloom.strategies.modality import ATTENTION, LOGITS, OWN, MokA
from loraloom.strategies.rankspace import RoutingError, hidden, route
from oracles import moka as oracle

IN = 5
START, END = 90, 91


@st.composite
def plans(draw: st.DrawFn) -> MokA:
    numbers = draw(st.sampled_from([(1,), (1, 1), (1, 2), (2, 1), (1, 2, 1), (3, 1, 2)]))
    modalities = {f"m{at}": number for at, number in enumerate(numbers)}
    own = draw(st.sampled_from(OWN))
    several = own != "B" and draw(st.booleans())
    by_number = draw(st.lists(st.integers(1, 4), min_size=4, max_size=4))
    rank: Any = draw(st.sampled_from([1, 2, 4]))
    heads = draw(st.sampled_from([1, rank]))
    if several:
        rank = {"text": by_number[0], **{name: by_number[at] for name, at in modalities.items()}}
        heads = 1
    eighths = draw(st.lists(st.integers(-8, 16), min_size=4, max_size=4))
    weight: Any = {name: eighths[at] / 8 for name, at in modalities.items()} if draw(st.booleans()) else eighths[0] / 8
    sharing = [name for name, at in modalities.items() if at == 1]
    return MokA(
        modalities,
        rank=rank,
        alpha=draw(st.sampled_from([1.0, 3.0])),
        attention=draw(st.sampled_from(ATTENTION)),
        keys=draw(st.sampled_from(["prompt", "after-last-modality", "span", "explicit"])),
        span=(START, END),
        weight=weight,
        logits=draw(st.sampled_from(LOGITS)),
        own=own,
        heads=heads,
        active=draw(st.sampled_from([None, (), ("text",), tuple(sharing), ("text", *sharing)])),
    )


@st.composite
def tokens(draw: st.DrawFn, plan: MokA) -> dict[str, Any]:
    rows, length = draw(st.integers(1, 3)), draw(st.sampled_from([9, 6, 3, 1]))

    def table(values: st.SearchStrategy[int]) -> Tensor:
        line = st.lists(values, min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(line, min_size=rows, max_size=rows)))

    kinds = st.sampled_from([*range(len(plan.groups)), 0, -1])
    types = table(kinds)
    for row in types:  # padding on either side
        pads = draw(st.integers(-(length // 2), length // 2))
        row[slice(None, pads) if pads >= 0 else slice(pads, None)] = -1
    given: dict[str, Any] = {"types": types, "ids": table(st.sampled_from([5, 6, START, START, END]))}
    if draw(st.booleans()):
        given["labels"] = torch.where(table(st.integers(0, 9)) == 7, 7, -100)
    if plan.keys == "explicit" or draw(st.integers(0, 3)) == 0:
        given["question"] = table(st.integers(0, 1)).bool()
    if draw(st.booleans()):
        given["segments"] = table(st.integers(0, 1)).cumsum(1)
    if draw(st.booleans()):
        given["prompt"] = draw(st.integers(1, length))
    return given


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_route(plan: MokA, a: Tensor, x: Tensor, **given: Any) -> Tensor:
    return hidden(plan, x @ a.T, route(plan, **given))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_as_the_equations_say(data: st.DataObject) -> None:
    plan = data.draw(plans())
    told = data.draw(tokens(plan))
    types, segments = told["types"], told.get("segments")
    looked = oracle.looked_at(plan, **told)
    lonely = any(bool((row > 0).any()) and not any(seen) for row, seen in zip(types, looked, strict=True))
    a, x = numbers(0, plan.rows, IN), numbers(1, *types.shape, IN)
    if lonely and plan.keys == "span" and plan.attention != "none" and "question" not in told:
        with pytest.raises(RoutingError, match="no text between the markers"):
            route(plan, **told)
        return
    got = by_route(plan, a, x, **told)
    assert torch.allclose(got, oracle.hidden(plan, a, x, types, looked, segments), atol=1e-10, rtol=1e-10)


def test_the_drawn_plans_reach_every_kind() -> None:
    """The comparison above would prove little if its tokens hardly ever looked at anything."""
    seen: dict[str, int] = {}

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(st.data())
    def count(data: st.DataObject) -> None:
        plan = data.draw(plans())
        told = data.draw(tokens(plan))
        try:
            routing = route(plan, **told)
        except RoutingError:
            return
        if any(bool(lookup.gain.any()) for lookup in routing.lookups):
            for what in (plan.attention, plan.keys, plan.logits, f"own {plan.own}", f"{len(plan.groups)} groups"):
                seen[what] = seen.get(what, 0) + 1

    count()
    wanted = {"cross", "uniform", "text-as-query", "prompt", "after-last-modality", "span", "explicit"}
    wanted |= {*LOGITS, "own A", "own B", "own both", "2 groups", "3 groups", "4 groups"}
    assert {what: seen.get(what, 0) for what in wanted if seen.get(what, 0) < 3} == {}


# --- what follows from the equations ----------------------------------------------------------------------------------
TWO = MokA({"image": 1, "audio": 2}, rank=3)
TYPES = torch.tensor([[0, 1, 1, 2, 0, 0], [0, 2, 2, 0, 0, 0]])
LABELS = torch.tensor([[-100] * 5 + [3], [-100] * 4 + [3, 3]])


def test_text_alone_is_its_own_a() -> None:
    a, x = numbers(0, TWO.rows, IN), numbers(1, 2, 4, IN)
    routing = route(TWO, torch.zeros(2, 4, dtype=torch.long))
    assert routing.plain and torch.equal(hidden(TWO, x @ a.T, routing), (x @ a.T)[..., :3])


def test_without_weight_and_with_equal_a_modalities_do_not_matter() -> None:
    plan = MokA({"image": 1, "audio": 2}, rank=3, weight=0.0)
    one, x = numbers(0, 3, IN), numbers(1, 2, 6, IN)
    got = by_route(plan, one.repeat(3, 1), x, types=TYPES, labels=LABELS)
    assert torch.allclose(got, x @ one.T, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(attention: str, side: str) -> None:
    plan = MokA({"image": 1, "audio": 2}, rank=3, attention=attention, keys="after-last-modality")
    a, x = numbers(0, plan.rows, IN), numbers(1, 2, 6, IN)
    bare = by_route(plan, a, x, types=TYPES, labels=LABELS)
    pads = (2, 0) if side == "left" else (0, 2)
    here = slice(2, None) if side == "left" else slice(None, 6)
    padded = torch.nn.functional.pad
    types, labels = padded(TYPES, pads, value=-1), padded(LABELS, pads, value=-100)
    wide = torch.full((2, 8, IN), 1e3, dtype=x.dtype)
    wide[:, here] = x
    assert torch.allclose(by_route(plan, a, wide, types=types, labels=labels)[:, here], bare, atol=1e-12)


def test_packed_rows_are_the_same_samples_in_rows_of_their_own() -> None:
    a, x = numbers(0, TWO.rows, IN), numbers(1, 2, 6, IN)
    apart = by_route(TWO, a, x, types=TYPES, labels=LABELS)
    segments = torch.arange(2).repeat_interleave(6)[None]
    flat = {"types": TYPES.reshape(1, -1), "labels": LABELS.reshape(1, -1), "segments": segments}
    assert torch.allclose(by_route(TWO, a, x.reshape(1, 12, IN), **flat).reshape(apart.shape), apart, atol=1e-12)


def test_the_answer_is_never_looked_at() -> None:
    a, x = numbers(0, TWO.rows, IN), numbers(1, 2, 6, IN)
    before = by_route(TWO, a, x, types=TYPES, labels=LABELS)
    other = torch.where((LABELS != -100)[..., None], numbers(2, 2, 6, IN), x)
    after = by_route(TWO, a, other, types=TYPES, labels=LABELS)
    assert torch.equal(before[TYPES > 0], after[TYPES > 0]) and not torch.equal(before, after)


def test_rows_without_text_are_finite_and_so_are_their_gradients() -> None:
    types = torch.tensor([[1, 1, 1, -1], [1, 0, 0, 0], [-1, -1, -1, -1]])
    for segments in (None, torch.tensor([[0, 0, 1, 1]] * 3)):
        stacked = numbers(0, 3, 4, TWO.rows).requires_grad_()
        got = hidden(TWO, stacked, route(TWO, types, segments=segments))
        got.sum().backward()
        assert got.isfinite().all() and stacked.grad is not None and stacked.grad.isfinite().all()
        assert torch.equal(got[0, :3], stacked[0, :3, 3:6])  # nothing to look at: A alone


def test_a_stray_end_marker_closes_nothing() -> None:
    plan = MokA({"image": 1}, keys="span", span=(START, END))
    ids = torch.tensor([[END, 5, START, 6, 7, END, 8]])
    types = torch.tensor([[0, 1, 0, 0, 0, 0, 0]])
    assert route(plan, types, ids=ids).lookups[0].index.tolist() == [[3, 4]]


def test_a_span_in_an_answer_is_not_looked_at() -> None:
    plan = MokA({"image": 1}, keys="span", span=(START, END))
    ids = torch.tensor([[START, 5, END, 6, START, 7, END, 8]])
    types = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, START, 7, END, 8]])
    assert route(plan, types, ids=ids).lookups[0].index.tolist() == [[1, 5]]
    assert route(plan, types, ids=ids, labels=labels).lookups[0].index.tolist() == [[1]]


def test_lookups_are_taken_at_once_and_not_one_after_another() -> None:
    """Text that looks at images and at audio looks with the same query at both."""
    plan = MokA({"image": 1, "audio": 2}, rank=3, attention="text-as-query")
    swapped = MokA({"audio": 1, "image": 2}, rank=3, attention="text-as-query")
    stacked = numbers(0, 2, 6, 9)
    exchanged = stacked[..., [0, 1, 2, 6, 7, 8, 3, 4, 5]]
    one = hidden(plan, stacked, route(plan, TYPES))
    two = hidden(swapped, exchanged, route(swapped, torch.where(TYPES > 0, 3 - TYPES, 0)))
    assert torch.allclose(one, two, atol=1e-12)


# --- precision --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-6)])
def test_attention_is_no_coarser_than_what_it_is_given(dtype: torch.dtype, error: float) -> None:
    plan = MokA({"image": 1, "audio": 2}, rank=4, alpha=16.0, logits="official")  # steep: logits of 16
    types, stacked = TYPES.repeat(1, 4), numbers(0, 2, 24, plan.rows).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float16):
        got = hidden(plan, stacked, route(plan, types))
    exact = hidden(plan, stacked.double(), route(plan, types))
    assert got.dtype == dtype
    assert float((got.double() - exact).abs().max() / exact.abs().max()) < error


@pytest.mark.parametrize("attention", ["cross", "uniform", "text-as-query"])
@pytest.mark.parametrize("ranks", [2, {"text": 2, "image": 1, "audio": 3}])
def test_gradients_are_those_of_finite_differences(attention: str, ranks: Any) -> None:
    plan = MokA({"image": 1, "audio": 2}, rank=ranks, attention=attention)
    routing = route(plan, TYPES, labels=LABELS)
    stacked = numbers(0, 2, 6, plan.rows).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hidden(plan, x, routing), (stacked,))


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "told"), [("labels", "labels"), ("question", "question_mask"), ("segments", "segment_ids")]
)
def test_wrong_shapes_are_told(name: str, told: str) -> None:
    with pytest.raises(RoutingError, match=rf"{told} is \(2, 5\), the tokens are \(2, 6\)"):
        route(TWO, TYPES, **{name: torch.zeros(2, 5, dtype=torch.long)})


def test_what_keys_need_is_asked_for() -> None:
    with pytest.raises(RoutingError, match="question_mask"):
        route(MokA({"image": 1}, keys="explicit"), TYPES.clamp(max=1))
    with pytest.raises(RoutingError, match="input_ids"):
        route(MokA({"image": 1}, keys="span", span=(1, 2)), TYPES.clamp(max=1))


def test_modalities_apart_from_their_text_are_refused_where_they_would_look() -> None:
    with pytest.raises(RoutingError, match="after 4 cached ones"):
        route(TWO, TYPES, past=4)
    assert route(MokA({"image": 1, "audio": 2}, attention="none"), TYPES, past=4).lookups == ()
    assert route(TWO, torch.zeros(1, 1, dtype=torch.long), past=4).plain
    question = TYPES == 0
    assert len(route(TWO, TYPES, question=question, past=4).lookups) == 1
    with pytest.raises(RoutingError, match="apart"):
        route(TWO, TYPES, question=torch.zeros_like(question), past=4)


# --- devices ----------------------------------------------------------------------------------------------------------
def test_a_routing_is_copied_to_another_device_once() -> None:
    routing = route(MokA({"image": 1, "audio": 2}, active=("text",)), TYPES)
    assert routing.on(torch.device("cpu")) is routing
    moved = routing.on(torch.device("meta"))
    assert moved is routing.on(torch.device("meta")) is moved.on(torch.device("meta"))
    lookup = moved.lookups[0]
    assert {t.device.type for t in (moved.types, moved.live, lookup.index, lookup.bias, lookup.gain)} == {"meta"}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        moved = name == "_to_copy" and (kwargs or {}).get("device") not in (None, args[0].device)
        self.count += moved or name in ("_local_scalar_dense", "nonzero", "equal", "item", "is_nonzero")
        return func(*args, **(kwargs or {}))


def test_a_routing_waits_once_and_layers_never() -> None:
    with Waits() as waits:
        bool(torch.ones(1))
    assert waits.count == 1  # the instrument sees
    for plan in (TWO, MokA({"image": 1, "audio": 2}, rank={"text": 1, "image": 2, "audio": 3}, own="both")):
        with Waits() as waits:
            routing = route(plan, TYPES, labels=LABELS)
        # tolist() reads one number after another, of a tensor that is on the host by then
        assert waits.count <= 2 + len(plan.groups)
        stacked = numbers(0, 2, 6, plan.rows).requires_grad_()
        with Waits() as waits:
            hidden(plan, stacked, routing).sum().backward()
        assert waits.count == 0
    assert math.isfinite(float(stacked.grad.sum()))  # type: ignore[union-attr]
