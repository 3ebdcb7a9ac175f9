"""Gates: what they refuse, what is restored when, and how far the backward pass reaches."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loraloom.adapter import UnsupportedKind
from loraloom.integrations.gates import Gates, applied, set_dropout
from loraloom.integrations.peft import attach
from loraloom.strategies.dropout import ProgressiveDropout
from loraloom.strategies.progressive import CoTo
from loraloom.strategies.sparse import LoRI

WIDTH = 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer.inner(x))
        return x


def lora(dropout: float = 0.0, **extra) -> nn.Module:
    torch.manual_seed(0)
    config = {"init_lora_weights": False, "r": 2, "lora_dropout": dropout, **extra}
    return peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["inner"], **config))


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_without_peft_layers():
    with pytest.raises(ValueError, match=r"Linear.*no PEFT layers"):
        Gates(nn.Linear(2, 2))


def test_merged_layers_are_refused_by_name():
    model = lora()
    gates = Gates(model)
    model.merge_adapter()
    with pytest.raises(UnsupportedKind, match=r"layers\.0\.inner is merged"):
        gates.set([True, False, True])
    with pytest.raises(UnsupportedKind, match=r"layers\.0\.inner is merged"):
        Gates(model)
    model.unmerge_adapter()
    gates.set([True, False, True])


def test_the_number_of_gates_must_fit():
    gates = Gates(lora())
    with pytest.raises(ValueError, match="2 values for 3 units"):
        gates.set([True, False])


@pytest.mark.parametrize(
    ("unit", "units"),
    [
        ("module", ("layers.0.inner", "layers.1.inner", "layers.2.inner")),
        ("projection", ("inner",)),
        (r"layers\.[02]", ("layers.0", "layers.2")),
    ],
)
def test_units_and_what_is_in_none(unit, units):
    gates = Gates(lora(), unit)
    assert gates.units == units
    gates.set([False] * len(units))
    state = Gates(lora()).state()
    assert state == (True, True, True)
    closed = [layer for layers in gates._layers.values() for layer in layers if layer.disable_adapters]
    assert len(closed) == sum(len(names) for names in gates.modules.values())


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "mica", "gaussian", True])
def test_starts_that_change_the_base_are_refused(start):
    net = Net()
    weight = net.layers[0].inner.weight.detach().clone()
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["inner"], r=2, init_lora_weights=start))
    kept = torch.equal(model.base_model.model.layers[0].inner.base_layer.weight, weight)
    gates = Gates(model)
    gates.set([True, True, True])
    if kept:
        gates.set([True, False, True])
        return
    with pytest.raises(UnsupportedKind, match=f"init_lora_weights='{start}'"):
        gates.set([True, False, True])


def test_kasa_is_refused():
    """It cuts the base weight to its largest singular values, and needs no start of its own for that."""
    model = lora(kasa_config=peft.KasaConfig())
    with pytest.raises(UnsupportedKind, match="kasa_config"):
        Gates(model).set([True, False, True])
    with pytest.raises(UnsupportedKind, match="kasa_config"):
        LoRI().attach(model)


def test_shadow_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), peft.ShadowConfig(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedKind, match="ShadowLayer"):
        Gates(model)


def test_xlora_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
        base = llama()
        base.config.use_cache = False
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=WIDTH, adapters={"a": str(tmp_path / "a")})
        model = peft.get_peft_model(base, config)
    with pytest.raises(UnsupportedKind, match="XLoraModel"):
        Gates(model)


def test_modules_saved_whole_have_no_gate():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 2]}
        )
        model = peft.get_peft_model(llama(), config)
    assert Gates(model).units == tuple(f"model.layers.{at}" for at in range(3))


def test_a_wrapped_model_has_the_same_units():
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = lora()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations on the first use of its compiler
        compiled = torch.compile(model)
    assert Gates(Parallel(model)).modules == Gates(model).modules == Gates(compiled).modules


# ---------------------------------------------------------------------------------------------------- applied


def test_applied_opens_afterwards_even_after_an_exception():
    model, plan = lora(), CoTo(total_steps=100, seed=3)
    trainable = flags(model)
    with pytest.raises(KeyError), applied(plan, model, 0) as gates:
        assert gates.state() == plan.active(0, gates.units)
        assert not all(gates.state())
        raise KeyError
    assert Gates(model).state() == (True,) * 3
    assert flags(model) == trainable


def test_plan_applied_is_the_same():
    model, plan = lora(), CoTo(total_steps=100)
    for step in (0, 20, 40, 80):
        with plan.applied(model, step):
            assert Gates(model).state() == plan.active(step, Gates(model).units)


def test_nested_applied_restores_the_outer_state():
    model, plan = lora(), CoTo(total_steps=100, seed=1)
    units = Gates(model).units
    with plan.applied(model, 0):
        outer = Gates(model).state()
        for step in range(1, 100, 9):
            with plan.applied(model, step):
                assert Gates(model).state() == plan.active(step, units)
            assert Gates(model).state() == outer == plan.active(0, units)
    assert Gates(model).state() == (True,) * 3


def test_adapters_that_the_user_disabled_stay_so():
    model, plan = lora(), CoTo(total_steps=100)
    model.base_model.model.layers[1].inner._disable_adapters = True
    with plan.applied(model, 100) as gates:
        assert gates.state() == (True, False, True)
    assert Gates(model).state() == (True, False, True)


def test_other_passes_inside_see_all_adapters_and_training_goes_on_as_drawn():
    model = lora(dropout=0.1)
    layers, x, seen = model.base_model.model.layers, torch.ones(1, WIDTH), []
    layers[0].inner.register_forward_pre_hook(lambda *_: seen.append(gates.settings()))
    for plan in (CoTo(total_steps=100), ProgressiveDropout(total_steps=100)):
        with plan.applied(model, 10) as gates:
            wanted = gates.settings()
            model.train()(x)
            with torch.no_grad():
                model(x)
            model.eval()(x)
            model.train()(x)
        assert seen == [wanted, ((True,) * 3, [0.1] * 3), ((True,) * 3, [0.1] * 3), wanted]
        seen.clear()
    with CoTo(total_steps=100).applied(model, 0):
        loss = model(x).sum()
    loss.backward()  # outside
    assert Gates(model).state() == (True,) * 3
    assert not any(module._forward_hooks for module in (layers, model.base_model.model))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_any_sequence_of_sets_ends_as_the_last_and_opens(states):
    model = lora()
    gates, trainable = Gates(model), flags(model)
    for state in states:
        gates.set(state)
        assert gates.state() == state
    gates.open()
    assert gates.state() == (True,) * 3 and flags(model) == trainable


# ---------------------------------------------------------------------------------------------------- dropout


def dropouts(model: nn.Module) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


def test_progressive_dropout_is_set_inside_and_restored():
    model, plan = lora(dropout=0.05), ProgressiveDropout(total_steps=100, start=0.8, end=0.25)
    with plan.applied(model, 0):
        assert dropouts(model) == [0.8] * 3
        with plan.applied(model, 100):
            assert dropouts(model) == [0.25] * 3
        assert dropouts(model) == [0.8] * 3
        assert Gates(model).state() == (True,) * 3
    assert dropouts(model) == [0.05] * 3


def test_dropout_needs_a_dropout():
    with pytest.raises(ValueError, match="no input dropout"):
        set_dropout(lora(), 0.5)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        set_dropout(lora(dropout=0.1), 1.0)
    model = lora(dropout=0.1)
    set_dropout(model, 0.5)
    assert dropouts(model) == [0.5] * 3


# ------------------------------------------------------------------------------------- backward and checkpointing


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def llama_with_lora(checkpointing: bool, reentrant: bool = False) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks Transformers by a name that is deprecated
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(llama(), config)
    if checkpointing:
        # twice, as TRL and the Trainer do: Transformers forgets the hooks of the first call
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


@pytest.mark.parametrize(
    ("checkpointing", "reentrant"),
    [(False, False), (True, False), (True, True)],
    ids=["plain", "checkpointed", "checkpointed, reentrant"],
)
@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_nothing_below_the_lowest_active_unit_is_back_propagated(checkpointing, reentrant, lowest):
    model = llama_with_lora(checkpointing, reentrant)
    ids = torch.arange(12).reshape(2, 6)
    gates = Gates(model)
    gates.set([at >= lowest for at in range(3)])
    runs, reached = [0, 0, 0], [0, 0, 0]

    def count_forward(at):
        def hook(module, args):
            runs[at] += 1

        return hook

    def count_backward(at):
        def hook(module, args, out):
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: reached.__setitem__(at, reached[at] + 1))

        return hook

    for at, layer in enumerate(model.base_model.model.model.layers):
        layer.register_forward_pre_hook(count_forward(at))
        layer.register_forward_hook(count_backward(at))
    model(input_ids=ids, labels=ids).loss.backward()
    assert [count > 0 for count in reached] == [at >= lowest for at in range(3)]
    if not checkpointing:
        assert runs == [1, 1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_nothing_below_the_lowest_active_unit_is_computed_again(lowest, reentrant, monkeypatch):
    model = llama_with_lora(True, reentrant)
    gates = Gates(model)
    gates.set([at >= lowest for at in range(3)])
    runs = [0, 0, 0]
    for at, layer in enumerate(model.base_model.model.model.layers):
        norm = layer.input_layernorm  # the first thing that a layer's forward does
        norm.register_forward_pre_hook(lambda module, args, at=at: runs.__setitem__(at, runs[at] + 1))
    model(input_ids=torch.arange(12).reshape(2, 6), labels=torch.arange(12).reshape(2, 6)).loss.backward()
    assert runs == [2 if at >= lowest else 1 for at in range(3)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("state", [(True, False, True), (False, True, False), (True, True, True)])
def test_checkpointed_gradients_are_the_plain_ones(state, reentrant):
    ids = torch.arange(12).reshape(2, 6)
    found = []
    for checkpointing in (False, True):
        model = llama_with_lora(checkpointing, reentrant)
        Gates(model).set(state)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = found
    for name, grad in plain.items():
        assert (grad is None) == (checkpointed[name] is None) == (not state[int(name.split("layers.")[1][0])])
        assert grad is None or torch.equal(grad, checkpointed[name])


@pytest.mark.filterwarnings("ignore:The model contains some adapter layers that are enabled:UserWarning")
@pytest.mark.parametrize(("checkpointing", "reentrant"), [(False, False), (True, False), (True, True)])
def test_a_reference_pass_in_a_step_changes_nothing(checkpointing, reentrant):
    ids, plan, found = torch.arange(12).reshape(2, 6), CoTo(total_steps=10), []
    for reference in (False, True):
        model = llama_with_lora(checkpointing, reentrant)
        with plan.applied(model, 2) as gates:
            wanted = gates.state()
            loss = model(input_ids=ids, labels=ids).loss
            if reference:
                with torch.no_grad(), model.disable_adapter():
                    off = model(input_ids=ids).logits
                    assert torch.equal(off, llama()(input_ids=ids).logits)
            loss.backward()
            assert gates.state() == wanted != (True,) * 3
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_as_before_afterwards(reentrant):
    model = llama_with_lora(True, reentrant)
    layers, hooks = model.base_model.model.model.layers, model.get_input_embeddings()._forward_hooks
    before, runs = list(hooks.values()), [layer._gradient_checkpointing_func for layer in layers]
    with CoTo(total_steps=10).applied(model, 2):
        assert before and not hooks
        with CoTo(total_steps=10).applied(model, 3):
            pass
        assert not hooks
    assert list(hooks.values()) == before
    assert [layer._gradient_checkpointing_func for layer in layers] == runs


def test_what_else_is_trained_below_still_learns_through_reentrant_checkpoints():
    model = llama_with_lora(True, reentrant=True)
    norm = model.base_model.model.model.layers[0].input_layernorm.weight.requires_grad_()
    Gates(model).set((False, False, True))
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    assert norm.grad is not None and norm.grad.abs().sum() > 0


@pytest.mark.parametrize("made", ["get_peft_model", "attach"])
def test_a_base_model_in_evaluation_mode_is_trained_as_drawn(made, tmp_path):
    """As ``from_pretrained`` gives it; what PEFT has just made or attached to be trained is in training mode."""
    model = lora()
    if made == "attach":
        model.save_pretrained(tmp_path)
        model = attach(Net().eval(), tmp_path, trainable=True)
    else:
        model = peft.get_peft_model(
            Net().eval(), peft.LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
        )
    plan = CoTo(total_steps=100, seed=1)
    step = next(step for step in range(20) if not all(plan.active(step, 3)))
    with applied(plan, model, step):
        model(torch.ones(1, WIDTH)).sum().backward()
    layers = [model.get_submodule(f"base_model.model.layers.{at}.inner") for at in range(3)]
    assert tuple(layer.lora_A["default"].weight.grad is not None for layer in layers) == plan.active(step, 3)


def test_a_pass_in_evaluation_mode_that_is_differentiated_is_told():
    model = lora().eval()
    with applied(CoTo(total_steps=100, seed=1), model, 0):
        assert model(torch.ones(1, WIDTH)).requires_grad  # looked at only: fine
        with pytest.warns(UserWarning, match=r"evaluation mode is differentiated.*model\.train\(\)"):
            model(torch.ones(1, WIDTH)).sum().backward()


def test_layers_where_nothing_learns_have_no_gate():
    """Of two adapters the active one, on the upper layers, is trained: each step has one of them, and a gradient."""
    model = lora()
    upper = peft.LoraConfig(r=2, target_modules=r"layers\.[12]\.inner", init_lora_weights=False)
    model.add_adapter("new", upper)
    model.set_adapter("new")
    plan = CoTo(total_steps=100, seed=0)
    for step in range(10):
        with applied(plan, model, step) as gates:
            assert gates.units == ("layers.1", "layers.2")
            model(torch.ones(1, WIDTH)).sum().backward()
    assert Gates(model).units == ("layers.0", "layers.1", "layers.2")  # probes switch all
    model.requires_grad_(False)
    assert Gates(model, trained=True).units == ("layers.0", "layers.1", "layers.2")


def test_a_frozen_adapter_beside_the_trained_one_is_not_switched_off():
    model = lora()
    model.add_adapter("new", peft.LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "new"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".new." in name)
    plan, said = CoTo(total_steps=100, seed=0), r"'default' is active and frozen in layers\.0\.inner.*merge"
    with pytest.raises(UnsupportedKind, match=said), applied(plan, model, 0):
        pass
    with applied(plan, model, 99) as gates:  # all are on: nothing is lost
        assert all(gates.state())


def test_a_single_unit_is_told():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(r=1, target_modules=["0"]))
    said = r"one unit \(0\), which is always on: CoTo does nothing"
    with pytest.warns(UserWarning, match=said), applied(CoTo(total_steps=9), model, 0):
        pass
