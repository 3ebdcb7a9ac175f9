"""MokA's fast path: as its layers compute, in one node of the graph, with no more held for backward than LoRA holds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import loraloom as ll
from held import held
from loraloom.integrations import fast as paths
from loraloom.integrations.fast import FastMokA
from loraloom.integrations.gates import Gates
from loraloom.integrations.modality import MokAConfig, MokALinear
from loraloom.strategies.modality import MokA
from loraloom.strategies.rankspace import Routing, RoutingError, route
from tiny_multimodal import image_batch, lively, tiny_llava, without

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PLAN = MokA({"image": 1}, rank=2, alpha=4, dropout=0.0)
LAYERS = 2


def moka(plan: MokA = PLAN, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Tiny LLaVA with lively adapters, in training mode, with the layers' own code."""
    return lively(plan.wrap(tiny_llava(), **options)).to(dtype).train()


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    found = image_batch()
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


def text() -> dict[str, Tensor]:
    found = without(batch(), "pixel_values")
    return {**found, "input_ids": found["input_ids"] % 26 + 1}


def outcome(model: Any, given: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Logits and the gradients of the factors."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(**given)
    out.loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).norm() / (b[name].double().norm() + 1e-9)) for name in b)


@pytest.mark.parametrize("given", [batch(), text()], ids=["image", "text"])
@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        MokA({"image": 1}, rank=2, dropout=0.3),
        MokA({"image": 1}, rank={"text": 3, "image": 2}, dropout=0.0, attention="text-as-query", own="both"),
        MokA({"image": 1}, rank=2, dropout=0.0, own="B", logits="official", active=("image",)),
    ],
    ids=["plain", "dropout", "ranks", "several B"],
)
def test_results_and_gradients_are_the_layer_s(plan: MokA, given: dict[str, Tensor]) -> None:
    model = moka(plan)
    before, names = outcome(model, given), list(model.state_dict())
    assert ll.fast(model) is model and list(model.state_dict()) == names
    assert sum(isinstance(module, FastMokA) for module in model.modules()) == 7 * LAYERS
    for _ in range(2):
        assert worst(outcome(model, given), before) < 1e-10
    assert worst(outcome(copy.deepcopy(model), given), before) < 1e-10
    assert worst(outcome(ll.fast(model, on=False), given), before) == 0
    with torch.no_grad():
        wanted = model.eval()(**given).logits
        assert torch.equal(ll.fast(model)(**given).logits, wanted)


def test_what_is_done_to_outputs_and_to_parts_is_done_here_too() -> None:
    model, own = ll.fast(moka()), moka()
    for one in (model, own):
        layer = next(module for module in one.modules() if isinstance(module, MokALinear))
        layer.register_forward_hook(lambda module, inputs, out: out.mul_(0.5))
        layer.lora_B["default"].forward = lambda x, part=layer.lora_B["default"]: x @ part.weight.T / 2
    assert worst(outcome(model, batch()), outcome(own, batch())) < 1e-10


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each node of the graph computes, as it comes."""
    calls: list[int] = []
    run = paths.routed
    monkeypatch.setattr(paths, "routed", lambda x, layers, **o: calls.append(len(layers)) or run(x, layers, **o))
    return calls


def test_layers_of_one_input_are_one_node_and_a_closed_gate_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model, own = ll.fast(moka()), moka()
    model(**batch())
    assert calls == [3, 1, 2, 1] * LAYERS
    seen = set()
    for step in (1, 3, 5, 7):
        calls.clear()
        coto = ll.CoTo(total_steps=8, start=0.0, seed=1)
        with coto.applied(model, step) as gates, coto.applied(own, step):
            assert worst(outcome(model, batch()), outcome(own, batch())) < 1e-10
            seen.add(sum(gates.state()))
            assert calls == [3, 1, 2, 1] * sum(gates.state())
    assert len(seen) > 1


def three(routing: Routing | None, seed: int = 0) -> Any:
    """Three layers by themselves, that have one input."""
    config = MokAConfig(r=2, lora_alpha=4, target_modules=["q", "k", "v"], moka=PLAN.to_json())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: Any = get_peft_model(nn.ModuleDict({name: nn.Linear(6, 6) for name in "qkv"}), config)  # type: ignore[arg-type]
    layers = lively(parts, seed).train().base_model.model
    for layer in layers.values():
        layer.stream = routing
    return layers


def test_two_passes_over_the_same_tensor_have_each_its_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    own = three(None).double()
    fast = ll.fast(copy.deepcopy(own))
    x = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for types in ([[1, 1, 0, 0]], [[0, 1, 0, 1]]):
        routing = route(PLAN, torch.tensor(types))
        for model in (fast, own):
            for layer in model.values():
                layer.stream = routing
        for name in "qkv":
            torch.testing.assert_close(fast[name](x), own[name](x))
    assert calls == [3, 3]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_more_is_held_for_backward_than_by_peft_s_lora(dropout: float) -> None:
    plan = MokA({"image": 1}, rank=2, alpha=4, dropout=dropout)
    model = moka(plan)
    config = LoraConfig(r=2, lora_dropout=dropout, target_modules=model.peft_config["default"].target_modules)
    theirs = get_peft_model(tiny_llava().double(), config).train()
    theirs = held(theirs.double(), **batch())
    assert held(ll.fast(model), **batch()) <= theirs < held(ll.fast(model, on=False), **batch())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_both_kinds(reentrant: bool) -> None:
    model, wanted = (
        ll.fast(moka(MokA({"image": 1}, rank=2, dropout=0.2))),
        moka(MokA({"image": 1}, rank=2, dropout=0.2)),
    )
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        assert worst(outcome(model, batch()), outcome(wanted, batch())) < 1e-10


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "mixed"])
def test_rounding_in_16_bits_is_no_worse_than_the_layer_s(autocast: bool) -> None:
    routing, sums = route(PLAN, torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)), [0.0, 0.0]

    def run(model: Any, x: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and x.dtype == torch.float32):
            outs = [layer(x) for layer in model.values()]
        sum(out.float().square().sum() for out in outs).backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        values = {name: out.detach() for name, out in zip("qkv", outs, strict=True)}
        return {"input": x.grad, **values, **grads}  # type: ignore[dict-item]

    for seed in range(10):
        x = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(seed))
        own = three(routing, seed)
        exact = run(own.double(), x.double())
        own.float()
        for name, weight in own.named_parameters():  # weights in bfloat16, factors in float32, as PEFT has them
            weight.data = weight.data if autocast or "lora_" in name else weight.data.bfloat16()
        given = x if autocast else x.bfloat16()
        wanted, found = run(own, given), run(ll.fast(own), given)
        assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in wanted.items()}
        for at, one in enumerate((found, wanted)):
            sums[at] += sum(worst({name: one[name]}, {name: exact[name]}) for name in exact)
    assert 0 < sums[0] < 1.1 * sums[1]


def _two(model: Any) -> None:
    names = model.peft_config["default"].target_modules
    config = MokAConfig(r=2, lora_alpha=4, target_modules=names, moka=PLAN.to_json(), task_type="CAUSAL_LM")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    lively(model.double())


def _hook(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, FastMokA) or hasattr(module, "lora_A"):
            module.base_layer.register_forward_hook(lambda module, inputs, out: 2 * out)


def _trained(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.base_layer.weight.requires_grad_()


@pytest.mark.parametrize(
    ("change", "told"),
    [(_two, "several adapters"), (_hook, "something hooks into"), (_trained, "trained weight or bias")],
)
def test_what_is_not_covered_takes_the_layer_s_code_and_says_so_once(
    change: Callable[[Any], None], told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths._say.cache_clear()
    calls, (model, own) = counted(monkeypatch), (ll.fast(moka()), moka())
    for one in (model, own):
        change(one)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert worst(outcome(model, batch()), outcome(own, batch())) == 0
    assert calls == [] and sum(told in record.message for record in caplog.records) == 1


def test_without_routing_it_refuses_as_the_layer_does() -> None:
    model = ll.fast(moka())
    layer = next(module for module in model.modules() if isinstance(module, FastMokA))
    with pytest.raises(RoutingError, match="no routing"):
        layer(torch.ones(1, 3, 16, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # both are of torch's compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_gates_and_contents_change_with_four_compiled_graphs_for_all_layers() -> None:
    """Adapters on and off, for inputs that require a gradient and those that do not."""
    counter = CompileCounter()
    config = MokAConfig(r=2, lora_alpha=4, target_modules=r"\d+\.\d+", moka=PLAN.to_json())
    bare = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(3))
    model: Any = lively(ll.fast(get_peft_model(bare, config))).train()
    own = ll.fast(copy.deepcopy(model), on=False)
    torch._dynamo.reset()
    for part in model.base_model.model:
        part.compile(backend=counter, fullgraph=True)
    draw = torch.Generator().manual_seed(0)
    for state in ([True] * 3, [False, True, False], [False, False, True], [True, False, True]):
        routing = route(PLAN, torch.tensor([[0, 1, 1, 0]])[:, torch.randperm(4, generator=draw)])
        x, found = torch.randn(1, 4, 6, generator=draw), []
        for one in (model, own):
            for layer in one.modules():
                if isinstance(layer, MokALinear):
                    layer.stream = routing
            Gates(one, "^[0-9]+").set(state)
            one.zero_grad()
            out = x
            for part in one.base_model.model:
                out = part(out)
            out.square().sum().backward()
            grads = {name: weight.grad for name, weight in one.named_parameters() if weight.grad is not None}
            found.append({"output": out.detach(), **grads})
        assert worst(*found) < 1e-4
    assert counter.frame_count == 4
