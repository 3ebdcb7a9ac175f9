"""MokA's layers on live models: equal to LoRA where they must be, right in every way that a model is run."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import loraloom as ll
from loraloom.adapter import UnsupportedKind
from loraloom.integrations import modality
from loraloom.integrations.modality import MokAConfig, MokALinear, is_multimodal
from loraloom.strategies.modality import MokA
from loraloom.strategies.rankspace import Routing, RoutingError, route
from tiny import tiny_llama
from tiny_multimodal import image_batch, lively, tiny_llava, without

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PLAN = MokA({"image": 1}, rank=2, alpha=4, dropout=0.0)
THREE = MokA({"image": 1, "audio": 2}, rank=2, alpha=4, dropout=0.0)
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN, OUT = 6, 5
TYPES = torch.tensor([[0, 1, 1, 0, 0], [0, 2, 0, 0, -1]])


def moka(plan: MokA = PLAN, **options: Any) -> Any:
    """Tiny LLaVA with lively MokA adapters, in training mode."""
    return lively(plan.wrap(tiny_llava(), **options)).train()


def layer(plan: MokA, routing: Routing | None = None, base: nn.Module | None = None, **options: Any) -> Any:
    """One layer by itself with lively factors; routed by hand."""
    config = MokAConfig(r=plan.width, lora_alpha=plan.alpha, lora_dropout=plan.dropout, moka=plan.to_json(), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MokALinear(base or nn.Linear(IN, OUT), "default", config, r=plan.width, lora_alpha=plan.alpha)
    made.base_layer.requires_grad_(False)
    made.stream = routing
    return lively(made)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def gradients(model: nn.Module, work: Callable[[Any], Any]) -> dict[str, Tensor]:
    model.zero_grad()
    work(model)
    return {name: parameter.grad.clone() for name, parameter in adapters(model).items()}  # type: ignore[union-attr]


def backward(batch: dict[str, Tensor]) -> Callable[[Any], Any]:
    return lambda model: model(**batch).loss.backward()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def text_batch() -> dict[str, Tensor]:
    batch = without(image_batch(), "pixel_values")
    batch["input_ids"] = batch["input_ids"] % 26 + 1
    return batch


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Routing]]:
    """The routings that layers ask the rank space with."""
    seen: list[Routing] = []
    real = modality.hidden

    def spy(plan: MokA, stacked: Tensor, routing: Routing) -> Tensor:
        seen.append(routing)
        return real(plan, stacked, routing)

    with monkeypatch.context() as patched:
        patched.setattr(modality, "hidden", spy)
        yield seen


# --- equal to LoRA ----------------------------------------------------------------------------------------------------
def lora(dtype: torch.dtype = torch.float32, dropout: float = 0.0, a_of: int = 0, beside: Any = None) -> Any:
    """PEFT's own LoRA on tiny LLaVA, with B and one of the A's of a MokA model."""
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=beside.peft_config["default"].target_modules
    )
    model: Any = get_peft_model(tiny_llava().to(dtype), config).train()
    theirs = adapters(beside)
    for name, parameter in adapters(model).items():
        value = theirs[name]
        parameter.data.copy_(value[2 * a_of : 2 * a_of + 2] if "lora_A" in name else value)
    return model


def with_equal_a(model: Any) -> Any:
    for name, parameter in adapters(model).items():
        if "lora_A" in name:
            parameter.data.copy_(parameter.data[:2].repeat(len(parameter) // 2, 1))
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_weight_and_with_equal_a_it_is_pefts_lora(dropout: float, dtype: torch.dtype, autocast: bool) -> None:
    plan = MokA({"image": 1}, rank=2, alpha=4, dropout=dropout, weight=0.0)
    ours = with_equal_a(lively(plan.wrap(tiny_llava().to(dtype))).train())
    theirs = lora(dtype, dropout, beside=ours)
    batch = image_batch()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    got = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**batch)
        out.loss.backward()
        got.append(out.logits)
    exact = dtype == torch.float32 and not autocast
    assert got[0].dtype == got[1].dtype
    assert torch.allclose(got[0].float(), got[1].float(), atol=1e-5 if exact else 0.1, rtol=1e-5 if exact else 0.1)
    wanted = adapters(theirs)
    for name, parameter in adapters(ours).items() if exact else ():
        parts = parameter.grad.split(2) if "lora_A" in name else [parameter.grad]  # type: ignore[union-attr]
        assert torch.allclose(sum(parts), wanted[name].grad, atol=1e-5, rtol=1e-4), name  # type: ignore[arg-type]


def test_one_layer_is_pefts_layer_to_the_last_digits() -> None:
    plan = MokA({"image": 1, "audio": 2}, rank=2, alpha=4, dropout=0.0, weight=0.0)
    ours = with_equal_a(layer(plan, route(plan, TYPES)))
    theirs = LoraLinear(ours.base_layer, "default", LoraConfig(r=2, lora_alpha=4), r=2, lora_alpha=4)
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A["default"].weight[:2])
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B["default"].weight)
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_text_alone_is_a_lora_of_the_texts_a() -> None:
    ours = moka(THREE)
    theirs, batch = lora(beside=ours), text_batch()
    assert torch.allclose(ours(**batch).logits, theirs(**batch).logits, atol=1e-5)
    got, wanted = gradients(ours, backward(batch)), gradients(theirs, backward(batch))
    for name, gradient in got.items():
        mine = gradient[:2] if "lora_A" in name else gradient
        assert torch.allclose(mine, wanted[name], atol=1e-6, rtol=1e-4), name
        assert "lora_B" in name or not gradient[2:].any()


def test_the_update_is_scaled_after_b() -> None:
    """So that alpha does not sharpen the attention; the official code's does."""
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(0))

    def update(logits: str, alpha: float) -> Tensor:
        plan = MokA({"image": 1, "audio": 2}, rank=2, alpha=alpha, dropout=0.0, logits=logits)
        one = layer(plan, route(plan, TYPES))
        return one(x) - one.base_layer(x)

    assert torch.allclose(update("paper", 8), 2 * update("paper", 4), atol=1e-5)
    assert not torch.allclose(update("official", 8), 2 * update("official", 4), atol=1e-2)


# --- the start --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [True, "gaussian"])
@pytest.mark.parametrize("own", ["A", "B", "both"])
def test_every_a_starts_as_peft_starts_one(start: Any, own: str) -> None:
    plan = MokA({"image": 1, "audio": 2}, rank=64, own=own)
    torch.manual_seed(0)
    config = MokAConfig(r=64, lora_alpha=16, moka=plan.to_json(), init_lora_weights=start)
    made: Any = MokALinear(nn.Linear(400, 8), "default", config, r=64, lora_alpha=16)
    torch.manual_seed(0)
    plain: Any = LoraLinear(
        nn.Linear(400, 8), "default", LoraConfig(r=64, init_lora_weights=start), r=64, lora_alpha=16
    )
    like = plain.lora_A["default"].weight
    parts = made.lora_A["default"].weight.split(64)
    assert len(parts) == (1 if own == "B" else 3)
    for part in parts:
        assert part.std().item() == pytest.approx(like.std().item(), rel=0.03)
        assert part.abs().max().item() == pytest.approx(like.abs().max().item(), rel=0.25)
        if start is True:  # kaiming_uniform(a=sqrt(5)): 1 / sqrt(in), whatever the number of rows
            assert part.abs().max() <= 1 / math.sqrt(400)
    if own != "B":
        together = torch.corrcoef(torch.stack([part.flatten() for part in parts]))
        assert (together - torch.eye(3)).abs().max() < 0.03
    assert not made.lora_B["default"].weight.any()
    assert made.lora_A["default"].weight.requires_grad and made.lora_B["default"].weight.requires_grad


def test_at_the_start_nothing_changes() -> None:
    base = tiny_llava()
    batch = image_batch()
    with torch.no_grad():
        before = base(**batch).logits
        model = THREE.wrap(base)
        assert torch.equal(model(**batch).logits, before)
        assert not torch.equal(lively(model)(**batch).logits, before)


# --- every layer ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_linear_of_every_layer_sees_the_routing(monkeypatch: pytest.MonkeyPatch, use_cache: bool) -> None:
    """In the official visual-text code only layer 0 does: the others took their tokens for text."""
    model = moka()
    layers = [module for module in model.modules() if isinstance(module, MokALinear)]
    assert len(layers) == 2 * len(NAMES)
    with counted(monkeypatch) as seen:
        model(**image_batch(), use_cache=use_cache).loss.backward()
    assert len(seen) == len(layers) and all(routing is seen[0] for routing in seen)
    assert not seen[0].plain and len(seen[0].lookups) == 1
    for name, parameter in adapters(model).items():
        # in the last layer, only keys and values of image tokens reach the text
        if "lora_A" in name and (".layers.0." in name or "k_proj" in name or "v_proj" in name):
            assert parameter.grad[2:].any(), name  # type: ignore[index]


def test_the_head_and_the_encoder_are_left_alone() -> None:
    model = moka()
    names = [name for name, module in model.named_modules() if isinstance(module, MokALinear)]
    assert all("language_model.layers" in name for name in names)
    assert is_multimodal(tiny_llava()) and not is_multimodal(tiny_llama())
    with pytest.raises(
        ValueError, match=r"'fc1' is no linear layer of the language model \(model.language_model\); .*"
    ):
        PLAN.wrap(tiny_llava(), ["q_proj", "fc1"])
    with pytest.raises(ValueError, match="'qq_proj' is no linear layer"):
        PLAN.wrap(tiny_llava(), "qq_proj")


# --- gradients --------------------------------------------------------------------------------------------------------
def test_the_gradients_of_a_layer_are_those_of_finite_differences() -> None:
    plan = MokA({"image": 1, "audio": 2}, rank={"text": 2, "image": 1, "audio": 2}, alpha=4, dropout=0.0)
    one = layer(plan, route(plan, TYPES)).double()
    a, b = one.lora_A["default"], one.lora_B["default"]
    x = torch.randn(2, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def work(x: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
        stacked = {"lora_A.default.weight": wa, "lora_B.default.weight": wb}
        return torch.func.functional_call(one, stacked, (x,))

    assert torch.autograd.gradcheck(work, (x, a.weight, b.weight))


def test_an_absent_modality_has_a_gradient_of_zeros() -> None:
    found = gradients(moka(THREE), backward(image_batch()))  # no audio
    for name, gradient in found.items():
        if "lora_A" in name and ".layers.0." in name:
            text, image, audio = gradient.split(2)
            assert text.any() and image.any() and not audio.any(), name


def test_the_texts_a_learns_from_the_other_modalities_outputs() -> None:
    """As keys and as values: nothing is cut off."""
    one = layer(THREE, route(THREE, TYPES))
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(0))
    one(x)[TYPES > 0].sum().backward()
    assert all(part.any() for part in one.lora_A["default"].weight.grad.split(2))
    bare = MokA({"image": 1, "audio": 2}, rank=2, alpha=4, dropout=0.0, attention="none")
    one = layer(bare, route(bare, TYPES))
    one(x)[TYPES > 0].sum().backward()
    assert not one.lora_A["default"].weight.grad[:2].any()


def checkpointed(reentrant: bool) -> Any:
    model = moka()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def paired(model: Any) -> None:
    """Two forward passes of other tokens before one backward pass, as preference training has them."""
    first, second = image_batch(seed=1), image_batch(rows=3, text=8, seed=2)
    first["labels"][:, :-4] = -100
    (model(**first).loss - 2 * model(**second).loss).backward()


def in_a_thread(model: Any) -> None:
    loss = model(**image_batch()).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("work", [backward(image_batch()), backward(text_batch()), paired, in_a_thread])
def test_checkpoints_change_no_gradient(reentrant: bool, work: Callable[[Any], Any]) -> None:
    assert same(gradients(checkpointed(reentrant), work), gradients(moka(), work))


# --- gates ------------------------------------------------------------------------------------------------------------
def test_a_closed_gate_is_the_base_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = moka(), image_batch()
    with model.disable_adapter(), torch.no_grad():
        base = model(**batch).logits
    units = ["model.language_model.layers.0", "model.language_model.layers.1"]
    for step in range(20):
        model.zero_grad()
        with ll.CoTo(total_steps=100, seed=3).applied(model, step) as gates, counted(monkeypatch) as seen:
            assert list(gates.units) == units
            state = gates.state()
            model(**batch).loss.backward()
        trained = {name for name, parameter in adapters(model).items() if parameter.grad is not None}
        assert len(seen) == sum(state) * len(NAMES)
        assert [any(unit + "." in name for name in trained) for unit in units] == list(state)
        if not all(state):
            break
    assert sum(state) == 1  # the draws had a closed gate, or nothing would be shown
    with counted(monkeypatch) as seen, torch.no_grad():
        gates.set([False, False])
        assert torch.equal(model(**batch).logits, base) and seen == []
        gates.open()
        assert not torch.equal(model(**batch).logits, base) and len(seen) == 2 * len(NAMES)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gates_after_a_first_pass_with_checkpoints_free_the_inputs_too(reentrant: bool) -> None:
    model, batch = checkpointed(reentrant), image_batch()
    layers, plan = model.base_model.model.model.language_model.layers, ll.CoTo(total_steps=100, seed=3)
    wanted = gradients(model, lambda model: model(**batch).loss.backward())
    hooks = model.get_input_embeddings()._forward_hooks
    run = layers[0]._gradient_checkpointing_func
    with plan.applied(model, 100), plan.applied(model, 100):
        model.zero_grad()
        assert not hooks and same(gradients(model, lambda model: model(**batch).loss.backward()), wanted)
    assert hooks and layers[0]._gradient_checkpointing_func is run


def test_without_adapters_the_base_asks_for_no_routing() -> None:
    base = tiny_llava()
    batch = image_batch()
    with torch.no_grad():
        wanted = base(**batch).logits
    model = lively(PLAN.wrap(base)).train()
    embeds = without(batch, "input_ids", "pixel_values", "labels")
    embeds["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, wanted)
        model(**embeds)  # nobody can tell its tokens apart
    with torch.no_grad(), pytest.raises(RoutingError):
        model(**embeds)
    bare = model.unload()
    assert not [module for module in bare.modules() if isinstance(module, MokALinear)]
    with torch.no_grad():
        assert torch.equal(bare(**batch).logits, wanted)
        bare(**embeds)


# --- numbers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "factors", "error"),
    [
        (torch.bfloat16, torch.float32, 0.02),
        (torch.bfloat16, torch.bfloat16, 0.02),
        (torch.float16, torch.float16, 0.003),
        (torch.float32, torch.bfloat16, 0.02),
    ],
)
def test_half_precision(base: torch.dtype, factors: torch.dtype, error: float) -> None:
    one = layer(THREE, route(THREE, TYPES))
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(0))
    wanted = one(x)
    one.base_layer.to(base)
    one.lora_A.to(factors), one.lora_B.to(factors)
    got = one(x.to(base))
    assert got.dtype == base and (got.float() - wanted).abs().max() < error * wanted.abs().max()
    got.float().sum().backward()
    assert one.lora_A["default"].weight.grad.dtype == factors


def test_autocast() -> None:
    one = layer(THREE, route(THREE, TYPES))
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = one(x)
    assert got.dtype == torch.bfloat16 and torch.allclose(got.float(), one(x), atol=0.05)
    got.float().sum().backward()
    assert one.lora_A["default"].weight.grad.dtype == torch.float32


class Quantised(nn.Linear):
    """Whole numbers and a step, as 8-bit layers hold their weights."""

    def __init__(self, given: nn.Linear) -> None:
        super().__init__(given.in_features, given.out_features, bias=given.bias is not None)
        self.step = float(given.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((given.weight / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


def test_a_quantised_base_is_only_called() -> None:
    base = tiny_llava()
    for module in list(base.model.language_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Quantised(child))
    batch = image_batch()
    wanted = base(**batch).logits
    model = PLAN.wrap(base)
    assert torch.equal(model(**batch).logits, wanted)
    weights = [m.base_layer.weight for m in model.modules() if isinstance(m, MokALinear)]
    assert len(weights) == 2 * len(NAMES) and {weight.dtype for weight in weights} == {torch.int8}
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(lively(model), backward(batch)).values())


# --- compiled ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_layer_compiles_to_one_graph_that_other_contents_do_not_break(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    one = layer(THREE)
    compiled = torch.compile(one, backend=counter, fullgraph=True)

    def both(types: Tensor, labels: Tensor | None = None) -> None:
        x = torch.randn(*types.shape, IN, generator=torch.Generator().manual_seed(0)).requires_grad_()
        one.stream = route(THREE, types, labels=labels)
        wanted, got = one(x), compiled(x)
        assert torch.allclose(got, wanted, atol=1e-6)
        (mine,) = torch.autograd.grad(got.sum(), x)
        (theirs,) = torch.autograd.grad(wanted.sum(), x)
        assert torch.allclose(mine, theirs, atol=1e-6)

    both(TYPES)
    assert counter.frame_count == 1
    both(TYPES.flip(0))
    both(torch.tensor([[1, 1, 0, 0, 0], [0, -1, 0, 2, 0]]))  # the same size, and as many keys
    assert counter.frame_count == 1
    both(torch.zeros_like(TYPES))  # text alone is another graph
    both(TYPES)
    both(torch.zeros_like(TYPES))
    assert counter.frame_count == 2
    one._disable_adapters = True  # a closed gate is a third
    compiled(torch.randn(2, 5, IN, requires_grad=True))
    one._disable_adapters = False
    both(TYPES)
    one._disable_adapters = True
    compiled(torch.randn(2, 5, IN, requires_grad=True))
    one._disable_adapters = False
    assert counter.frame_count == 3
    both(torch.tensor([[0, 1, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0]]))  # other lengths make one for all lengths
    seen = counter.frame_count
    assert seen <= 5
    for length in (9, 10, 12):
        both(torch.tensor([[0, 1, *[0] * length], [1, 2, *[0] * length]]))
    assert counter.frame_count == seen


# --- options of PEFT's ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not for MokA; allowed are modules_to_save, bias"),
        ({"use_rslora": True}, "use_rslora=True is not for MokA"),
        ({"lora_bias": True}, "lora_bias=True is not for MokA"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\] is not for MokA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not for MokA; allowed are"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"rank_pattern": {"q_proj": 1}}, "rank 1 for .*q_proj: MokA has 2 in every layer"),
        ({"r": 4}, "r is told by the plan"),
        ({"lora_dropout": 0.1}, "lora_dropout is told by the plan"),
        ({"modules_to_sav": []}, r"option 'modules_to_sav' is not known \(did you mean 'modules_to_save'\?\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True:UserWarning")
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLAN.wrap(tiny_llava(), **options)


def test_options_that_fit() -> None:
    llama = tiny_llama()  # its attention has biases
    plan = MokA({"image": 1}, rank=2, dropout=0.0, tokens={"image": 30})
    model = plan.wrap(llama, ["q_proj", "k_proj"], bias="lora_only", modules_to_save=["lm_head"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("base_layer.bias" in name for name in trained) == 4 and any("lm_head" in name for name in trained)
    ids = torch.tensor([[3, 30, 30, 4, 5, 6]])
    model(input_ids=ids, labels=ids.masked_fill(torch.arange(6) < 4, -100)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_single_tokens_can_be_trained_beside_it() -> None:
    model = PLAN.wrap(tiny_llava(), trainable_token_indices=[5, 6])
    model(**image_batch()).loss.backward()
    assert any("token" in name and p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


def test_only_linear_layers_of_a_bare_model() -> None:
    model = moka()
    with pytest.raises(ValueError, match="already has adapters"):
        PLAN.wrap(model)
    with pytest.raises(ValueError, match="already has adapters"):
        PLAN.wrap(model.get_base_model())


# --- what cannot be ---------------------------------------------------------------------------------------------------
def test_merging_is_refused_and_nothing_is_changed() -> None:
    model = moka()
    batch = image_batch()
    wanted = model(**batch).logits
    one = next(module for module in model.modules() if isinstance(module, MokALinear))
    for refused in (
        model.merge_adapter,
        model.unmerge_adapter,
        model.merge_and_unload,
        one.merge,
        one.unmerge,
        lambda: one.get_delta_weight("default"),
    ):
        with pytest.raises(UnsupportedKind, match=r"depends on each token's modality; .*fold --text-only"):
            refused()
    assert torch.equal(model(**batch).logits, wanted)
    with pytest.raises(UnsupportedKind, match="adapter_names"):
        one(torch.ones(1, 1, 16), adapter_names=["default"])
    assert not model.base_model.supports_lora_conversion()


def test_without_routing_and_with_that_of_other_tokens_a_layer_refuses() -> None:
    one = layer(PLAN)
    with pytest.raises(RoutingError, match="no routing"):
        one(torch.ones(1, 3, IN))


# --- several, copies --------------------------------------------------------------------------------------------------
def other(plan: MokA, model: Any) -> MokAConfig:
    return MokAConfig(
        r=plan.width,
        lora_alpha=plan.alpha,
        target_modules=model.peft_config["default"].target_modules,
        moka=plan.to_json(),
        task_type="CAUSAL_LM",
    )


def test_several_adapters_of_one_plan() -> None:
    model = moka().eval()
    batch = image_batch()
    first = model(**batch).logits
    model.add_adapter("second", other(PLAN, model))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data.copy_(dict(model.named_parameters())[name.replace(".second.", ".default.")] * 0.7)
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("second")
    alone = model(**batch).logits
    assert not torch.allclose(alone, first, atol=1e-3)
    one = layer(PLAN, route(PLAN, TYPES.clamp(max=1)))
    one.update_layer("second", 2, lora_alpha=4, config=other(PLAN, model))
    lively(one, seed=5)
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(0))
    base, parts = one.base_layer(x), []
    for names in (["default"], ["second"], ["default", "second"]):
        one.set_adapter(names)
        parts.append(one(x) - base)
    assert torch.allclose(parts[0] + parts[1], parts[2], atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(**batch).logits, first)


def test_adapters_of_another_plan_or_kind_are_refused() -> None:
    model = moka().eval()
    batch = image_batch()
    wanted = model(**batch).logits
    with pytest.raises(UnsupportedKind, match="second has another plan"):
        model.add_adapter("second", other(MokA({"image": 1}, rank=2, alpha=4, dropout=0.0, weight=0.5), model))
    with pytest.raises(UnsupportedKind, match="third is a LoraConfig; a MokA layer takes MokA adapters only"):
        model.add_adapter("third", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**batch).logits, wanted)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = moka().eval()
    batch = image_batch()
    wanted = model(**batch).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**batch).logits, wanted)
    for parameter in adapters(copied).values():
        parameter.data.mul_(2)
    assert torch.equal(model(**batch).logits, wanted)
    changed = copied(**batch).logits
    assert not torch.allclose(changed, wanted, atol=1e-3)
    prompt = without(batch, "labels")
    tokens = [m.generate(**prompt, max_new_tokens=3, do_sample=False) for m in (copied, model)]
    assert tokens[0].shape == tokens[1].shape
    with model.disable_adapter():
        assert torch.equal(copied(**batch).logits, changed)


# --- the host never waits ---------------------------------------------------------------------------------------------
class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("own", ["A", "both"])
@pytest.mark.parametrize("attention", ["cross", "text-as-query"])
def test_layers_never_wait_for_the_device(own: str, attention: str) -> None:
    plan = MokA(
        {"image": 1, "audio": 2},
        rank={"text": 2, "image": 1, "audio": 3},
        dropout=0.1,
        own=own,
        attention=attention,
        tokens={"image": 30, "audio": 29},
    )
    ids = torch.tensor([[3, 30, 30, 29, 5, 6, 7]] * 2)
    found = []
    for layers in (2, 4):
        model = lively(plan.wrap(tiny_llama(layers=layers))).train()
        bare = tiny_llama(layers=layers).train()
        counts = []
        for one in (model, bare):
            with Waits() as waits:
                one(input_ids=ids, labels=ids.masked_fill(torch.arange(7) < 5, -100)).loss.backward()
            counts.append(waits.count)
        found.append(counts[0] - counts[1])
    assert found[0] == found[1]


# --- the Trainer ------------------------------------------------------------------------------------------------------
class Images(Dataset):
    """A few images with one answer."""

    def __init__(self) -> None:
        self.batch = image_batch(rows=8, text=5)
        for name in ("input_ids", "labels"):
            self.batch[name][:, -2:] = 5

    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {name: value[at] for name, value in self.batch.items()}


def trained(folder: Any, steps: int, resume: bool = False, coto: bool = False, **more: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    model = MokA({"image": 1}, rank=2, dropout=0.1).wrap(tiny_llava())
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=6,
        seed=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    callbacks = [ll.CoToCallback(ll.CoTo(total_steps=steps, start=0.3, seed=1))] if coto else []
    trainer = Trainer(model, arguments, train_dataset=Images(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_trains_it_and_goes_on_where_it_was(tmp_path: Any) -> None:
    whole, losses = trained(tmp_path / "whole", 12)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    trained(tmp_path / "parted", 6)
    again, _ = trained(tmp_path / "parted", 12, resume=True)
    wanted = adapters(whole)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in adapters(again).items())


@pytest.mark.parametrize("checkpoint", [True, False])
def test_coto_over_moka_in_the_trainer(tmp_path: Any, checkpoint: bool) -> None:
    model, losses = trained(tmp_path, 12, coto=True, gradient_checkpointing=checkpoint)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(not module.disable_adapters for module in model.modules() if isinstance(module, MokALinear))
