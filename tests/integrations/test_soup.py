"""Learned merge weights: exact gradients, a harmful adapter left out, the base as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from integrations.test_statistics import ATTN, FC, UP, Q, adapter_on, causal, encoder, precise
from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.integrations.adapting import training
from loraloom.integrations.peft import attached, from_model
from loraloom.integrations.scoring import Bench
from loraloom.integrations.soup import learn_weights, loss_of, mixed
from loraloom.ops.merge import merge
from loraloom.registry import UnknownName
from tiny import tiny_llama
from tiny_text import VOCAB, Letters, text_task


def exact(outputs, labels):
    """The model's own loss, which Transformers rounds to 32 bits."""
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def height(made: Bench, adapter: Adapter | None, loss=None) -> float:
    """The loss of training on all examples, with one adapter on the model the ordinary way."""
    batch, loss = made.collate(made.training), loss or made.loss
    labels = batch["labels"] if loss is None else batch.pop("labels")
    with attached(made.model, adapter) as model, torch.no_grad():
        outputs = model(**batch)
        return float(outputs.loss if loss is None else loss(outputs, labels))


def trained(made: Bench, steps: int = 40) -> Adapter:
    """An adapter that lowers the loss of a bench."""
    loss = made.loss
    with training(made.model, rank=2, alpha=4, target_modules=["up_proj", "down_proj"]) as model:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
        for _ in range(steps):
            batch = made.collate(made.training)
            value = loss_of(lambda weights, model=model, **inputs: model(**inputs), {}, batch, loss)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return from_model(model).loaded()


def noise(like: Adapter, size: float = 4.0) -> Adapter:
    """An adapter of the same modules that spoils the model."""
    generator = torch.Generator().manual_seed(9)

    def random(f: Factors) -> Factors:
        b, a = (torch.randn(part.shape, generator=generator) for part in (f.B, f.A))
        return Factors(B=b, A=a, scale=size * f.norm() / Factors(B=b, A=a).norm())

    return replace(like, modules={name: random(factors) for name, factors in like.modules.items()})


@pytest.fixture(scope="module")
def case() -> tuple[Bench, Adapter, Adapter]:
    made = causal()
    with torch.no_grad():
        made.model.lm_head.weight.mul_(20)  # so that the layers below have a say
    good = trained(made)
    return made, good, noise(good)


def test_a_harmful_adapter_is_left_out(case):
    made, good, bad = case
    alone, base, mean = (height(made, adapter) for adapter in (good, None, merge([good, bad])))
    assert alone < 0.7 * base and mean > 1.2 * alone
    weights = learn_weights([good, bad], made)
    assert list(weights) == list(good.modules)
    own, other = (torch.tensor([pair[at] for pair in weights.values()]) for at in (0, 1))
    assert own.mean() > 0.8 and other.abs().max() < 0.1
    assert height(made, merge([good, bad], weights=weights)) < 1.05 * alone
    turned = learn_weights([bad, good], made)
    assert all(
        torch.allclose(torch.tensor(turned[name]), torch.tensor(weights[name][::-1]), atol=0.02) for name in weights
    )


def test_convex_weights_add_up_to_one(case):
    made, good, bad = case
    weights = learn_weights([good, bad], made, convex=True, steps=40, lr=0.2)
    for pair in weights.values():
        assert sum(pair) == pytest.approx(1.0, abs=1e-5) and min(pair) >= 0
    assert sum(pair[1] for pair in weights.values()) / len(weights) < 0.2


def test_modules_of_a_layer_share_their_weights(case):
    made, good, bad = case
    weights = learn_weights([good, bad], made, per="layer", steps=5)
    layers: dict[str, set] = {}
    for name, pair in weights.items():
        layers.setdefault(name.split(".")[2], set()).add(tuple(pair))
    assert [len(pairs) for pairs in layers.values()] == [1, 1] and layers["0"] != layers["1"]
    assert len({tuple(pair) for pair in learn_weights([good, bad], made, steps=5).values()}) == len(weights)


def test_one_seed_one_result(case):
    made, good, bad = case
    stream = torch.get_rng_state()
    first, second, other = (learn_weights([good, bad], made, steps=3, limit=10, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(stream, torch.get_rng_state())


# ---- exactness ----


def numbers(adapters, seed: int = 0) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(len(adapters), generator=generator, dtype=torch.float64) for name in names}


def lists(weights) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in weights.items()}


def exact_is_the_models_own(made: Bench) -> bool:
    return height(made, None, exact) == pytest.approx(height(made, None), rel=1e-6)


def test_gradients_are_those_of_the_merge_by_finite_differences():
    made = precise()
    adapters = [adapter_on(made.model, names, seed=len(names), turned=True) for names in ([ATTN, FC], [FC])]
    weights, batch, step = numbers(adapters), made.collate(made.training), 1e-5
    for value in weights.values():
        value.requires_grad_()
    with mixed(made.model, adapters) as forward:
        value = loss_of(forward, weights, batch, exact)
        value.backward()
    plain = {name: value.detach() for name, value in weights.items()}
    assert exact_is_the_models_own(made)
    assert value.item() == pytest.approx(height(made, merge(adapters, weights=lists(plain)), exact), rel=1e-10)
    for name in (ATTN, FC):
        for at in range(2):
            ends = []
            for by in (step, -step):
                there = {**plain, name: plain[name] + by * torch.eye(2, dtype=torch.float64)[at]}
                ends.append(height(made, merge(adapters, weights=lists(there)), exact))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert weights[name].grad[at].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)
    assert weights[ATTN].grad[1] == 0 and weights[ATTN].grad[0] != 0  # the second adapter has no such module


class Mixed(nn.Module):
    """A model with an embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.fc = nn.Embedding(7, 4), nn.Conv1d(4, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, ids):
        return self.fc(self.conv(self.embed(ids).mT).mT.tanh())


def of_every_layer(seed: int, rank: int, kind: str = "LORA", **config) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def factors(out, in_, **more):
        b, a = torch.randn(out, rank, generator=generator), torch.randn(rank, in_, generator=generator)
        if config.get("lora_bias"):
            more["bias"] = torch.randn(out, generator=generator)
        return Factors(B=b, A=a, scale=0.5 if kind == "LORA" else 1.0, **more)

    modules = {"fc": factors(3, 5)}
    if not config.get("lora_bias"):
        modules |= {"embed": factors(4, 7, embedding=True), "conv": factors(5, 12, kernel=(4, 3))}
    size = {"lora_alpha": 0.5 * rank} if kind == "LORA" else {}
    return Adapter({"peft_type": kind, "r": rank, **size, "target_modules": list(modules), **config}, modules)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"kind": "HIRA"}])
@pytest.mark.parametrize("count", [1, 3])
def test_the_mixture_is_the_merge_for_every_kind_of_layer(options, count):
    torch.manual_seed(0)
    model, ids = Mixed().eval(), torch.tensor([[0, 1, 2, 6], [3, 3, 4, 5]])
    adapters = [of_every_layer(seed, 2 if "kind" in options else seed, **options) for seed in range(1, count + 1)]
    if len(adapters) > 1:  # not all have all modules
        adapters[1] = replace(adapters[1], modules={"fc": adapters[1].modules["fc"]})
    weights = numbers(adapters)
    with mixed(model, adapters) as forward:
        found = forward({name: value.float() for name, value in weights.items()}, ids=ids)
    with attached(model, merge(adapters, weights=lists(weights))) as live:
        expected = live(ids=ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model(ids), atol=0.1)


def test_an_encoder_learns_by_the_loss_of_its_bench():
    made = encoder()
    name = "encoder.layer.0.attention.self.query"
    pair = [adapter_on(made.model, [name], seed=seed) for seed in (1, 2)]
    weights = numbers(pair)
    loss = made.loss
    with mixed(made.model, pair) as forward, torch.no_grad():
        value = loss_of(forward, weights, made.collate(made.training), loss)
    assert float(value) == pytest.approx(height(made, merge(pair, weights=lists(weights))), rel=1e-4)
    before = height(made, merge(pair))
    assert height(made, merge(pair, weights=learn_weights(pair, made, steps=30, lr=0.1))) < before


# ---- what is left behind, and what is refused ----


@pytest.mark.parametrize("setup", [causal, encoder])
def test_the_base_stays_as_it_was(setup):
    made = setup()
    _ = made.loss  # an encoder's bench has a hook of its own on the model
    name = Q if setup is causal else "encoder.layer.0.attention.self.query"
    pair = [adapter_on(made.model, [name], seed=seed) for seed in (1, 2)]
    made.model.requires_grad_(True)
    before = {key: tensor.clone() for key, tensor in made.model.state_dict().items()}
    hooks = [dict(module._forward_hooks) for module in made.model.modules()]
    factors = [adapter.modules[name].B.clone() for adapter in pair]
    with torch.no_grad():  # whatever mode the caller is in
        learn_weights(pair, made, steps=2)
    after = made.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in made.model.parameters())
    assert [dict(module._forward_hooks) for module in made.model.modules()] == hooks
    assert all(torch.equal(adapter.modules[name].B, b) for adapter, b in zip(pair, factors, strict=True))


REFUSED = [
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"limit": 0}, ValueError, "limit must be at least 1, got 0"),
    ({"lr": 0.0}, ValueError, "lr must be a finite number above 0, got 0.0"),
    ({"per": "block"}, UnknownName, "unit 'block' is not known"),
    ({"image_size": 3}, ValueError, "a bench has its own model and options"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED)
def test_refused_in_one_line(arguments, kind, message):
    made = causal()
    with pytest.raises(kind, match=message) as caught:
        learn_weights([adapter_on(made.model, [Q])], made, **arguments)
    assert "\n" not in str(caught.value)


def test_adapters_that_do_not_add_up_or_fit_are_refused():
    made = causal()
    one = adapter_on(made.model, [Q])
    with pytest.raises(ValueError, match="at least one adapter is needed"):
        learn_weights([], made)
    for several in ([0], [0, 1]):
        dora = [replace(one, config={**one.config, "use_dora": True}) for _ in several]
        with pytest.raises(UnsupportedKind, match="DoRA"):
            learn_weights(dora, made)
    with pytest.raises(AdapterMismatch, match=f"module {UP}x is not in the model"):
        learn_weights([replace(one, modules={f"{UP}x": one.modules[Q]})], made)
    empty = replace(made, task=replace(made.task, splits={"train": []}))
    with pytest.raises(ValueError, match="task made-up: no training examples to learn on"):
        learn_weights([one], empty)
    nan = replace(one, modules={Q: replace(one.modules[Q], scale=1e38)})
    with pytest.raises(ValueError, match="the loss at step 0 is nan"):
        learn_weights([nan, nan], made)


def test_a_live_model_and_a_task():
    one = adapter_on(tiny_llama(vocab=VOCAB), [Q])
    live = {"model": tiny_llama(vocab=VOCAB), "family": "causal", "processor": Letters(), "max_length": 30}
    assert learn_weights([one], text_task(()), steps=1, **live) == learn_weights([one], causal(), steps=1)
