"""Adapters in turn on one model: the bits of a fresh attachment whatever came before; layers are built once a shape."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import nn

from loraloom.adapter import Adapter
from loraloom.integrations import seat as seats
from loraloom.integrations.peft import attached, from_model
from loraloom.integrations.seat import Seat
from loraloom.modalities import as_moka
from loraloom.ops.merge import merge
from tiny import Convs, tiny_llama
from tiny_llava import tiny_llava

# PEFT 0.21 asks Transformers 5.23 for a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = torch.arange(12).reshape(2, 6)


def convs() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Convs().eval()


def adapter(seed: int, base=tiny_llama, kind=LoraConfig, **config) -> Adapter:
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], **config}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        live = get_peft_model(base(), kind(**config))
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        return from_model(live)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        given = model(IDS)
    return given if isinstance(given, torch.Tensor) else given.logits


def fresh(one: Adapter | None, base=tiny_llama) -> torch.Tensor:
    with attached(base(), one) as live:
        return outputs(live)


SWAPPED = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True},
    "hira": {"kind": HiraConfig},
    "convs": {"base": convs, "target_modules": ["embed", "conv1", "conv2", "point", "head"]},
}
BUILT = {
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize("name", [*SWAPPED, *BUILT])
def test_the_bits_are_those_of_a_fresh_attachment(name):
    config = {**SWAPPED, **BUILT}[name]
    base = config.get("base", tiny_llama)
    one, two = (adapter(seed, **config) for seed in (0, 1))
    want = {id(each): fresh(each, base) for each in (one, two, None)}
    model = base()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [key for key, _ in model.named_modules()]
    seat = Seat(model)
    for each in (one, two, two, None, one):
        with seat.attached(each) as live:
            assert torch.equal(outputs(live), want[id(each)])
            assert not live.training
        assert [key for key, _ in model.named_modules()] == names
        assert torch.equal(outputs(model), want[id(None)])
    assert (seat.injections, seat.swaps) == ((1, 3) if name in SWAPPED else (4, 0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_are_built_once_a_shape_in_any_order(monkeypatch):
    """Ranks, targets, types, kinds and whole saved modules mixed: PEFT's own calls are counted."""
    built = []
    real = seats.put_on
    monkeypatch.setattr(seats, "put_on", lambda model, ready: built.append(ready) or real(model, ready))
    halves = [adapter(seed) for seed in (0, 1)]
    half = {n: replace(f, A=f.A.bfloat16(), B=f.B.bfloat16()) for n, f in halves[1].loaded().modules.items()}
    shapes = {
        "plain": halves,
        "wide": [merge(halves), merge(halves, weights=[2.0, -1.0])],
        "16 bits": [Adapter(halves[0].config, half)],
        "targets": [adapter(seed, target_modules=["q_proj", "down_proj"]) for seed in (4, 5)],
    }
    others = [adapter(6, modules_to_save=["lm_head"]), adapter(7, bias="lora_only")]
    every = [one for group in shapes.values() for one in group] * 2 + others * 2
    random.Random(0).shuffle(every)
    want = {id(one): fresh(one) for one in every}
    built.clear()
    seat = Seat(tiny_llama())
    for one in every:
        with seat.attached(one) as live:
            assert torch.equal(outputs(live), want[id(one)])
    assert len(built) == seat.injections == len(shapes) + 2 * len(others)
    assert seat.swaps == len(every) - len(built)


def test_only_a_few_shapes_stay_built():
    seat, every = Seat(tiny_llama()), [adapter(0, r=rank) for rank in range(1, 6)]
    for one in [*every, every[-1], every[0]]:
        with seat.attached(one) as live:
            assert torch.equal(outputs(live), fresh(one))
    assert (seat.injections, seat.swaps) == (6, 1)


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, given, out: out * 2)


def replaced(model):
    model.lm_head = nn.Linear(16, 32, bias=False, device="cpu")
    nn.init.ones_(model.lm_head.weight)


def moved(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 3


def written(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)


def configured(model):
    model.config.use_cache = False


@pytest.mark.parametrize("change", [hooked, replaced, moved, written, configured, lambda model: model.train()])
def test_what_was_done_to_the_base_in_between_counts(change):
    one = adapter(0)
    model, other = tiny_llama(), tiny_llama()
    seat = Seat(model)
    with seat.attached(one):
        pass
    change(model)
    change(other)
    after, training = outputs(model.eval() if not model.training else model), model.training
    with seat.attached(one) as live, attached(other, one) as again:
        assert torch.equal(outputs(live), outputs(again))
    assert model.training == training and torch.equal(outputs(model), after)
    assert seat.swaps == (1 if change is written else 0)  # weights written in place are seen through the same memory


def test_what_is_done_inside_is_undone():
    one, two = adapter(0), adapter(1)
    seat = Seat(tiny_llama())
    with seat.attached(one) as live:
        live.train()
        live.register_forward_hook(lambda module, given, out: None)
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.data = torch.full_like(parameter, torch.nan)
    for each in (two, one):
        with pytest.raises(KeyboardInterrupt), seat.attached(each) as live:
            assert torch.equal(outputs(live), fresh(each)) and not live.training
            raise KeyboardInterrupt
    assert (seat.injections, seat.swaps) == (1, 2)


def test_moka_is_built_each_time():
    one = as_moka(adapter(0, tiny_llava, target_modules=r".*language.*q_proj"), {"image": 1})
    seat = Seat(tiny_llava())
    for _ in range(2):
        with seat.attached(one) as live:
            assert type(live.peft_config["default"]).__name__ == "MokAConfig"
    assert (seat.injections, seat.swaps) == (2, 0)


def test_training_what_is_attached_leaves_the_adapter_alone():
    one = adapter(0)
    before = {name: factors.A.clone() for name, factors in one.modules.items()}
    with attached(tiny_llama(), one) as live, torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.fill_(9.0)
    assert all(torch.equal(one.modules[name].A, value) for name, value in before.items())
