"""Fast paths: the same results, gradients and files as PEFT's own code, in fewer passes and with less held."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import loraloom as ll
from held import held
from loraloom import fused
from loraloom.integrations import fast as paths
from loraloom.integrations.gates import Gates

KINDS: dict[str, Callable[..., Any]] = {
    "lora": lambda **more: LoraConfig(**{"r": 3, "lora_alpha": 5, **more}),
    "rslora": lambda **more: LoraConfig(**{"r": 3, "lora_alpha": 5, "use_rslora": True, **more}),
    "dora": lambda **more: LoraConfig(**{"r": 3, "lora_alpha": 5, "use_dora": True, **more}),
    "hira": lambda lora_dropout=0.0, **more: HiraConfig(**{"r": 3, "hira_dropout": lora_dropout, **more}),
}


class Attention(nn.Module):
    """Three layers on one input, one on another."""

    def __init__(self, width: int, kind: type) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (kind(width, width) for _ in range(4))
        self.odd = False

    def forward(self, x: Tensor) -> Tensor:
        if self.odd:
            return x + self.o(self.q(x) * self.v(2 * x))
        return x + self.o(torch.softmax(self.q(x) * self.k(x), -1) * self.v(x))


def linear(ins: int, outs: int) -> nn.Linear:
    return nn.Linear(ins, outs)


def adapted(config: Any, kind: Any = linear, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    base = nn.Sequential(Attention(8, kind), Attention(8, kind))
    config.target_modules = ["q", "k", "v", "o"]
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            nn.init.normal_(weight, std=0.3)
    return model.to(dtype).train()


def outcome(model: Any, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Output and all gradients."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out.float() if out.dtype == torch.bfloat16 else out).square().sum().backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"output": out.detach(), "input": x.grad, **grads}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).norm() / b[name].double().norm()) for name in b)


X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("base", [linear, lambda ins, outs: Conv1D(outs, ins)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_peft_s(kind, dropout, base, monkeypatch):
    monkeypatch.setitem(fused.BLOCK, "cpu", 24)  # several blocks a weight
    config = KINDS[kind](lora_dropout=dropout, **({} if base is linear else {"fan_in_fan_out": True}))
    model = adapted(config, base)
    wanted = outcome(model, X)
    assert ll.fast(model) is model
    for _ in range(2):
        assert worst(outcome(model, X), wanted) < 1e-12
    ll.fast(model, on=False)
    assert worst(outcome(model, X), wanted) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input_are_one_node_of_the_graph(kind, monkeypatch):
    model = ll.fast(adapted(KINDS[kind]()))
    calls = []
    for name in ("lora", "hira"):
        run = getattr(fused, name)
        monkeypatch.setattr(
            fused, name, lambda x, layers, run=run, **o: calls.append(len(layers)) or run(x, layers, **o)
        )
    model(X)
    assert calls == [3, 1] * 2
    model.base_model.model[0].odd = True  # k has no part, v another input
    wanted = outcome(ll.fast(copy.deepcopy(model), on=False), X)
    for _ in range(2):
        assert worst(outcome(model, X), wanted) < 1e-12
    calls.clear()
    model(X)
    assert calls == [3, 1, 1, 3, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_gate_leaves_a_layer_out_and_its_siblings_in(kind):
    model, own = ll.fast(adapted(KINDS[kind]())), adapted(KINDS[kind]())
    for step in range(12):
        coto = ll.CoTo(total_steps=12, unit="module", seed=3)
        with coto.applied(model, step), coto.applied(own, step):
            assert worst(outcome(model, X), outcome(own, X)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_less_is_held_for_backward_than_by_peft(kind):
    model = adapted(KINDS[kind]())
    own = held(model, X)
    ll.fast(model)(X)
    assert held(model, X) <= own


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_of_both_kinds(kind, reentrant):
    model = adapted(KINDS[kind](lora_dropout=0.0))
    wanted = outcome(model, X)
    ll.fast(model)
    for layer in model.base_model.model:
        layer.forward = lambda x, run=layer.forward: checkpoint(run, x, use_reentrant=reentrant)
    for _ in range(2):
        assert worst(outcome(model, X), wanted) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_like_names_on_several_inputs(kind, caplog):
    """With a checkpoint, and in the same bits as in a run that begins now."""
    paths._say.cache_clear()
    model = adapted(KINDS[kind]())
    for layer in model.base_model.model:
        layer.odd = True
    wanted = outcome(model, X)
    ll.fast(model)
    found = outcome(model, X)
    assert worst(found, wanted) < 1e-12
    assert [r.message for r in caplog.records] == [
        "What is computed ahead is in vain for layers of like names that do not see one input"
    ]
    assert worst(outcome(model, X), found) == worst(outcome(ll.fast(model), X), found) == 0
    for layer in model.base_model.model:
        layer.forward = lambda x, run=layer.forward: checkpoint(run, x, use_reentrant=False)
    for _ in range(2):
        assert worst(outcome(model, X), found) == 0


def test_a_pass_that_was_interrupted_is_let_go_and_the_next_is_as_before():
    model = ll.fast(adapted(KINDS["lora"]()))
    wanted = outcome(model, X)
    layer = model.base_model.model[0]
    fails = layer.k.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    assert layer.q._siblings.ahead == {}
    fails.remove()
    assert worst(outcome(model, X), wanted) == 0
    assert not any(module._forward_hooks for module in ll.fast(model, on=False).modules())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_peft_s_where_the_input_is_no_block_of_memory(kind):
    """A reentrant checkpoint computes by PEFT's code first, and by ours again."""
    model, turned = adapted(KINDS[kind](lora_dropout=0.5)), X.transpose(0, 1)
    wanted = outcome(model, turned)
    ll.fast(model)
    assert worst(outcome(model, turned), wanted) < 1e-12
    for layer in model.base_model.model:
        layer.forward = lambda x, run=layer.forward: checkpoint(run, x, use_reentrant=True)
    assert worst(outcome(model, turned), wanted) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_can_be_changed_in_place(kind):
    model, own = ll.fast(adapted(KINDS[kind]())), adapted(KINDS[kind]())
    for one in (model, own):
        for name in ("q", "o"):
            getattr(one.base_model.model[0], name).register_forward_hook(lambda module, inputs, out: out.mul_(0.5))
    assert worst(outcome(model, X), outcome(own, X)) < 1e-12


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_in_16_bits_is_no_worse_than_peft_s(kind, autocast):
    ours, theirs = 0.0, 0.0
    for seed in range(10):
        exact = outcome(adapted(KINDS[kind](), seed=seed), X)
        model = adapted(KINDS[kind](), dtype=torch.float32, seed=seed)
        if not autocast:  # weights in bfloat16, factors in float32, as PEFT has them
            for name, weight in model.named_parameters():
                weight.data = weight.data.bfloat16() if "base_layer" in name else weight.data
        x = X.float() if autocast else X.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted = outcome(model, x)
            found = [outcome(ll.fast(model), x) for _ in range(2)][-1]
        assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in wanted.items()}
        ours, theirs = ours + worst(found, exact), theirs + worst(wanted, exact)
    assert 0 < ours < 1.25 * theirs


@pytest.mark.parametrize("sparse", [False, True])
def test_lori(sparse):
    model = adapted(LoraConfig(r=3))
    draw = torch.Generator().manual_seed(0)
    paths = [f"{layer}.{name}" for layer in (0, 1) for name in "qkvo"]
    mask = ll.Mask.of({path: torch.rand(8, 3, generator=draw) < 0.4 for path in paths})
    lori = ll.LoRI(mask=mask if sparse else None, start="fresh", seed=0)
    lori.attach(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    wanted = outcome(model, X)
    assert not any("lora_A" in name for name in wanted)
    for _ in range(2):
        assert worst(outcome(ll.fast(model), X), wanted) < 1e-12


def test_state_dict_copies_and_pickles():
    model = adapted(KINDS["dora"]())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ll.fast(model)(X)
    assert list(model.state_dict()) == list(before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = other.base_model.model[0]
        assert layer.q._siblings is layer.k._siblings is not model.base_model.model[0].q._siblings
        assert layer.q._siblings.members == [layer.q, layer.k, layer.v]
        assert worst(outcome(other, X), outcome(model, X)) < 1e-12


def test_dora_sees_that_its_base_has_changed():
    model, own = ll.fast(adapted(KINDS["dora"]())), adapted(KINDS["dora"]())
    for change in (lambda weight: weight.mul_(2.0), lambda weight: weight.data.mul_(3.0)):  # the second as PEFT does it
        outcome(model, X)
        for one in (model, own):
            with torch.no_grad():
                change(one.base_model.model[0].q.base_layer.weight)
        assert worst(outcome(model, X), outcome(own, X)) < 1e-12


def test_in_evaluation_and_without_gradients_peft_s_code_runs():
    model = adapted(KINDS["lora"]())
    with torch.no_grad():
        wanted = model(X)
    ll.fast(model)
    with torch.no_grad():
        assert torch.equal(model(X), wanted)
    assert torch.equal(model.eval()(X), wanted)


def _two(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q", "k", "v", "o"]))
    model.base_model.set_adapter(["default", "second"])


def _hook(model: Any) -> None:
    model.base_model.model[0].q.base_layer.register_forward_hook(lambda module, inputs, out: 2 * out)


def _trained(model: Any) -> None:
    model.base_model.model[0].q.base_layer.bias.requires_grad_()


def _pruned(model: Any) -> None:
    prune.l1_unstructured(model.base_model.model[0].q.base_layer, "weight", 0.5)


class Rounded(nn.Linear):
    """As torchao's training for quantisation swaps in."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * 4).round() / 4)


def _rounded(model: Any) -> None:
    part = model.base_model.model[0].q.lora_A
    rounded = Rounded(8, 3, bias=False)
    rounded.weight = part["default"].weight
    part["default"] = rounded


def _patched(model: Any) -> None:
    part = model.base_model.model[0].q.lora_B["default"]
    part.forward = lambda x: 2 * nn.functional.linear(x, part.weight)


def _other_dropout(model: Any) -> None:
    model.base_model.model[0].q.lora_dropout["default"] = nn.AlphaDropout(0.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_two, "several adapters"),
        (_hook, "something hooks into"),
        (_pruned, "something hooks into"),
        (_trained, "trained weight or bias"),
        (_rounded, "parts of other kinds"),
        (_patched, "parts of other kinds"),
        (_other_dropout, "dropout of another kind"),
    ],
)
def test_what_is_not_covered_takes_peft_s_code_and_says_so_once(change, told, caplog):
    paths._say.cache_clear()
    model, own = adapted(KINDS["lora"]()), adapted(KINDS["lora"]())
    ll.fast(model)
    for one in (model, own):
        torch.manual_seed(5)
        change(one)
        one.double()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert worst(outcome(model, X), outcome(own, X)) < 1e-12
    assert [record.message for record in caplog.records if told in record.message].__len__() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_evaluation_mode_does_nothing(kind):
    models = adapted(KINDS[kind](lora_dropout=0.5)), ll.fast(adapted(KINDS[kind](lora_dropout=0.5)))
    for module in [module for model in models for module in model.modules()]:
        if isinstance(module, nn.Dropout):
            module.eval()
    assert worst(outcome(models[1], X), outcome(models[0], X)) < 1e-12


def test_layers_without_a_fast_path_are_told_and_left(caplog):
    paths._say.cache_clear()
    model = get_peft_model(nn.Sequential(nn.Conv1d(3, 3, 1)), LoraConfig(target_modules=["0"]))
    with caplog.at_level(logging.WARNING):
        ll.fast(model)
    assert "Conv1d have no fast path" in caplog.text
    with pytest.raises(ValueError, match="no PEFT layers"):
        ll.fast(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # both are of torch's compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(("kind", "graphs"), [*((kind, 4) for kind in KINDS), ("lora", 2)])
def test_gates_change_every_step_with_four_compiled_graphs_for_all_layers(kind, graphs):
    """Two of them, adapters on and off, for inputs that require a gradient, two for those below the lowest gate.

    With an input of the model that requires one there are no others than the first two.
    """
    counter = CompileCounter()
    model, own = ll.fast(adapted(KINDS[kind](), dtype=torch.float32)), adapted(KINDS[kind](), dtype=torch.float32)
    model.base_model.model.extend(copy.deepcopy(model.base_model.model))
    own.base_model.model.extend(copy.deepcopy(own.base_model.model))
    torch._dynamo.reset()
    for layer in model.base_model.model:
        layer.compile(backend=counter, fullgraph=True)
    gates = Gates(model, "^[0-9]+"), Gates(own, "^[0-9]+")
    for step in range(16):
        for one in gates:
            ll.CoTo(16, start=0.0, unit="^[0-9]+", seed=1).apply(one, step)
        x = X.float().requires_grad_(graphs == 2)
        found, wanted = (({}, one(x)) for one in (model, own))
        for one, (grads, out) in zip((model, own), (found, wanted), strict=True):
            one.zero_grad()
            out.square().sum().backward()
            grads |= {name: weight.grad for name, weight in one.named_parameters() if weight.grad is not None}
        assert worst(found[0], wanted[0]) < 1e-4
    assert counter.frame_count == graphs
