"""Gates on every PEFT tuner with adapter layers: off is the base bit for bit, on is as before."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraloom.integrations.gates import Gates

WIDTH = 16


class Layer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Net(nn.Module):
    """Three layers ``layers.N.inner`` of one kind, each of them necessary for the output."""

    def __init__(self, make, call=lambda inner, x, h: inner(h)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(make()) for _ in range(3))
        self.call = call

    def forward(self, x):
        h = x if x.is_floating_point() else torch.zeros(())
        for layer in self.layers:
            h = h + torch.tanh(self.call(layer.inner, x, h))
        return h


class Stacked(nn.Module):
    """Two bare parameters in one module, as fused experts have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 4)

    def forward(self, x):
        return torch.einsum("bti,eij,ejk->btk", x, self.up, self.down)


KINDS = {
    "linear": lambda: Net(lambda: nn.Linear(WIDTH, WIDTH)),
    "transposed": lambda: Net(lambda: Conv1D(WIDTH, WIDTH)),
    "conv1d": lambda: Net(lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "conv2d": lambda: Net(lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1)),
    "conv3d": lambda: Net(lambda: nn.Conv3d(WIDTH, WIDTH, 3, padding=1)),
    "embedding": lambda: Net(lambda: nn.Embedding(20, WIDTH), lambda inner, x, h: inner(x)),
    "norm": lambda: Net(lambda: nn.LayerNorm(WIDTH)),
    "parameters": lambda: Net(Stacked),
    "attention": lambda: Net(
        lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), lambda inner, x, h: inner(h, h, h)[0]
    ),
}
INPUTS = {"conv1d": (2, WIDTH, 5), "conv2d": (2, WIDTH, 4, 4), "conv3d": (2, WIDTH, 3, 3, 3)}

L, T, C1, C2, C3, E, N = "linear", "transposed", "conv1d", "conv2d", "conv3d", "embedding", "norm"

# What every tuner supports, and what it must be told for layers of width 16. Kinds that are not listed must be refused
# by PEFT itself (or leave the model without a layer), so that the table cannot hide a case.
TUNERS: dict[str, tuple[tuple[str, ...], dict]] = {
    "LORA": ((L, T, C1, C2, C3, E), {}),
    "ADALORA": ((L, T, C2), {"total_step": 10}),
    "ADAMSS": ((L,), {}),
    "BEFT": ((L,), {}),
    "BOFT": ((L, C2), {"boft_block_size": 4}),
    "C3A": ((L,), {"block_size": 4}),
    "DEFT": ((L, T), {}),
    "DELORA": ((L,), {}),
    "FOURIERFT": ((L, T), {"n_frequency": 10}),
    "FROD": ((L, T), {}),
    "GLORA": ((L,), {}),
    "GRALORA": ((L, T), {"r": 8, "gralora_k": 2}),
    "HIRA": ((L, T, C1, C2, C3, E), {}),
    "HRA": ((L, C2), {}),
    "IA3": ((L, T, C2, C3), {"feedforward_modules": []}),
    "LILY": ((L,), {}),
    "LN_TUNING": ((L, T, C1, C2, C3, E, N), {}),
    "LOHA": ((L, C1, C2), {}),
    "LOKR": ((L, C1, C2), {}),
    "MISS": ((L,), {"r": 4}),
    "OFT": ((L, C2, E), {"oft_block_size": 4}),
    "OSF": ((L,), {}),
    "PEANUT": ((L,), {}),
    "POLY": ((L,), {"n_tasks": 1}),
    "PSOFT": ((L,), {"r": 4}),
    "PVERA": ((L, T), {"r": 4}),
    "RANDLORA": ((L, T), {"r": 4}),
    "ROAD": ((L,), {"group_size": 4}),
    "SHIRA": ((L,), {"r": 2}),
    "SUPERTUNING": ((L,), {}),
    "TINYLORA": ((L, T, E), {}),
    "TRAINABLE_TOKENS": ((L, E), {"token_indices": [0, 1, 2]}),
    "UNILORA": ((L, T), {}),
    "VBLORA": ((L, T), {"vector_length": 4, "num_vectors": 8}),
    "VERA": ((L, T), {"r": 4}),
    "WAVEFT": ((L, T), {"n_frequency": 20}),
}
VARIANTS = {
    "dora": ("LORA", (L, T, C1, C2, E), {"use_dora": True}),
    "rslora": ("LORA", (L,), {"use_rslora": True}),
    "lora_bias": ("LORA", (L,), {"lora_bias": True}),
    "ia3_feedforward": ("IA3", (L, T, C2, C3), {"feedforward_modules": ["inner"]}),
    "lora_parameters": (
        "LORA",
        ("parameters",),
        {"target_modules": [], "target_parameters": ["inner.up", "inner.down"]},
    ),
}
NOT_SWITCHED = {
    "ADAPTION_PROMPT": "swaps whole attention modules and has no adapter layer",
    "CARTRIDGE": "prompt learning: no adapter layer",
    "CPT": "prompt learning: no adapter layer",
    "MULTITASK_PROMPT_TUNING": "prompt learning: no adapter layer",
    "PREFIX_TUNING": "prompt learning: no adapter layer",
    "PROMPT_TUNING": "prompt learning: no adapter layer",
    "P_TUNING": "prompt learning: no adapter layer",
    "SHADOW": "refused: one state through all layers (test_gates.py: test_shadow_is_refused)",
    "XLORA": "refused: forward re-enables all layers (test_gates.py: test_xlora_is_refused)",
}
CASES = [(name, name, kind, extra) for name, (kinds, extra) in TUNERS.items() for kind in kinds] + [
    (variant, name, kind, {**TUNERS[name][1], **extra})
    for variant, (name, kinds, extra) in VARIANTS.items()
    for kind in kinds
]
every_case = pytest.mark.parametrize(
    ("label", "tuner", "kind", "extra"), CASES, ids=[f"{case[0]}-{case[2]}" for case in CASES]
)


def wrap(base: nn.Module, tuner: str, extra: dict) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(tuner)](**{"target_modules": ["inner"], **extra})
        return peft.get_peft_model(base, config)


def adapted(tuner: str, kind: str, extra: dict) -> tuple[nn.Module, nn.Module, dict]:
    """The base, the same under an adapter with non-zero weights, and an input for both."""
    torch.manual_seed(0)
    base = KINDS[kind]().requires_grad_(False)
    model = wrap(copy.deepcopy(base), tuner, extra)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.arange(10).reshape(2, 5) if kind == "embedding" else torch.randn(INPUTS.get(kind, (2, 5, WIDTH)))
    more = {"task_ids": torch.zeros(2, dtype=torch.long)} if tuner == "POLY" else {}
    return base.eval(), model.eval(), {"x": x, **more}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def run(model: nn.Module, inputs: dict) -> torch.Tensor:
    if "task_ids" in inputs:  # Poly's own forward hands them to its layers
        return model.base_model(inputs["x"], task_ids=inputs["task_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FRoD's sparse tensors
        return model(inputs["x"])


def test_every_tuner_is_in_the_table():
    known = {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING} | {kind.value for kind in peft.PeftType}
    assert known == set(TUNERS) | set(NOT_SWITCHED)
    assert not set(TUNERS) & set(NOT_SWITCHED)


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_table_lists_all_kinds_that_a_tuner_supports(tuner):
    kinds, extra = TUNERS[tuner]
    for kind, make in KINDS.items():
        if kind in kinds or kind in ("parameters", "attention"):  # LoRA's own, among the variants
            continue
        try:
            model = wrap(make(), tuner, extra)
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError):
            continue
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules()), kind


@every_case
def test_off_is_the_base_and_on_is_as_before(label, tuner, kind, extra):
    base, model, inputs = adapted(tuner, kind, extra)
    gates = Gates(model)
    assert gates.units == ("layers.0", "layers.1", "layers.2")
    before, trainable = run(model, inputs), flags(model)
    plain = base(inputs["x"])

    gates.set([False] * 3)
    assert torch.equal(run(model, inputs), plain)
    assert not torch.equal(before, plain), "the adapter does nothing: this test could not fail"
    assert flags(model) == trainable and gates.state() == (False,) * 3

    gates.set([True] * 3)
    assert torch.equal(run(model, inputs), before)
    assert flags(model) == trainable and gates.state() == (True,) * 3


@every_case
def test_one_unit_on_trains_that_unit_alone(label, tuner, kind, extra):
    _, model, inputs = adapted(tuner, kind, extra)
    removed = copy.deepcopy(model)  # the same with two layers' adapters taken out by hand
    gates = Gates(model)
    gates.set([False, True, False])
    out = run(model, inputs)
    for at in (0, 2):
        layer = removed.get_submodule(f"base_model.model.layers.{at}")
        layer.inner = layer.inner.get_base_layer()
    assert torch.equal(out, run(removed, inputs))

    out.square().sum().backward()
    weights = [
        [p for p in model.get_submodule(f"base_model.model.layers.{at}").parameters() if p.requires_grad]
        for at in range(3)
    ]
    own = gates.parameters()
    for at, unit in enumerate(gates.units):
        assert {id(p) for p in own[unit]} >= {id(p) for p in weights[at]}
    shared = {id(p) for p in own["layers.1"]} & {id(p) for p in own["layers.0"]}
    for at in (0, 2):
        assert all(p.grad is None for p in weights[at] if id(p) not in shared)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own["layers.1"])


def test_lora_on_attention():
    """PEFT adds and subtracts this one's update to the base weights in every forward, which rounds them a little."""
    base, model, inputs = adapted("LORA", "attention", {})
    gates, trainable, plain = Gates(model), flags(model), base(inputs["x"])
    assert gates.units == ("layers.0", "layers.1", "layers.2")  # with out_proj's own layer inside
    gates.set([False] * 3)
    assert torch.equal(run(model, inputs), plain)
    gates.set([True] * 3)
    on = run(model, inputs)
    assert (on - plain).abs().max() > 1e-2
    gates.set([False, True, False])
    run(model, inputs).square().sum().backward()
    for at, unit in enumerate(gates.units):
        assert all((weight.grad is None) == (at != 1) for weight in gates.parameters()[unit])
    gates.set([False] * 3)
    assert torch.allclose(run(model, inputs), plain, atol=1e-5)
    gates.open()
    assert torch.allclose(run(model, inputs), on, atol=1e-5) and flags(model) == trainable
