"""Statistics of adapters on tasks: Gram matrices by hand, Fisher information by finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_llava
from loraloom.adapter import Adapter, Factors, UnsupportedKind
from loraloom.integrations.peft import attached
from loraloom.integrations.scoring import Bench, bench
from loraloom.integrations.statistics import _rows, _Sums, bench_for, measure
from loraloom.measured import Statistics
from loraloom.ops.merge import merge
from loraloom.registry import UnknownName
from tiny import tiny_llama
from tiny_text import VOCAB, Letters, text_task
from tiny_vision import tiny_model  # noqa: F401

EMBED = "model.embed_tokens"
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def adapter_on(model: nn.Module, names, seed: int = 0, scale: float = 0.5, turned: bool = False) -> Adapter:
    """A random adapter of rank 2; ``turned`` where the model stores its weights in x out."""
    generator, modules = torch.Generator().manual_seed(seed), {}
    for name in names:
        weight = model.get_submodule(name).weight
        out, in_ = weight.T.shape if turned else weight.shape
        b = 0.5 * torch.randn(out, 2, generator=generator, dtype=weight.dtype)
        a = 0.5 * torch.randn(2, in_, generator=generator, dtype=weight.dtype)
        modules[name] = Factors(B=b, A=a, scale=scale)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": scale * 2, "target_modules": list(names)}
    return Adapter({**config, "fan_in_fan_out": turned, "inference_mode": True}, modules)


def causal() -> Bench:
    return bench(tiny_llama(vocab=VOCAB), text_task(()), family="causal", processor=Letters(), max_length=30)


def precise() -> Bench:
    """A model that computes in float64 throughout (Llama's norms do not), and stores its weights in x out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.3)
        model = GPT2LMHeadModel(config).double().eval()
    return bench(model, text_task(()), family="causal", processor=Letters(), max_length=30)


def encoder() -> Bench:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        model = BertModel(BertConfig(vocab_size=VOCAB, **size)).eval()
    return bench(model, text_task(), family="encoder", processor=Letters())


# ---- Gram matrices ----


def test_gram_of_a_causal_model_counts_every_token_once_and_no_padding():
    made = causal()
    adapter = adapter_on(made.model, [Q, UP])
    found = measure(adapter, made, limit=7)
    rows = {Q: [], UP: []}
    with attached(made.model, adapter) as model, torch.no_grad():
        base = model.get_base_model().model
        for example in made.training[:7]:  # one at a time: no padding
            batch = made.collate([example])
            states = base(batch["input_ids"], output_hidden_states=True).hidden_states
            rows[Q].append(base.layers[0].input_layernorm(states[0])[0])
            second = base.layers[1]
            normed = second.input_layernorm(states[1])
            rotary = base.rotary_emb(states[1], torch.arange(states[1].shape[1])[None])
            attended = second.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
            rows[UP].append(second.post_attention_layernorm(states[1] + attended)[0])
    assert len({len(row) for row in rows[Q]}) > 1  # padding would be there in a batch
    for name, parts in rows.items():
        x = torch.cat(parts)
        torch.testing.assert_close(found[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert found.kind == "gram" and found.about == {"task": "made-up", "model": made.name, "examples": "7"}


def test_gram_of_an_encoder_and_of_its_embedding():
    made = encoder()
    name = "encoder.layer.0.attention.self.query"
    adapter = adapter_on(made.model, [name])
    found = measure(adapter, made, modules=[name, "embeddings.word_embeddings"])
    tokens = [Letters()(str(example.content))["input_ids"] for example in made.training]
    with torch.no_grad():
        x = torch.cat([made.model.embeddings(torch.tensor([ids]))[0] for ids in tokens])
    torch.testing.assert_close(found[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    flat = [token for ids in tokens for token in ids]
    shares = torch.tensor([flat.count(token) / len(flat) for token in range(VOCAB)])
    torch.testing.assert_close(found["embeddings.word_embeddings"], shares)


def test_gram_of_a_convolution_is_of_its_patches(tiny_model):  # noqa: F811
    made = bench(str(tiny_model), "digits", image_size=28, train_limit=20)
    name = "embeddings.patch_embeddings.projection"
    generator = torch.Generator().manual_seed(0)
    factors = Factors(
        torch.randn(16, 2, generator=generator), torch.randn(2, 588, generator=generator), kernel=(3, 14, 14)
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["projection"]}
    found = measure(Adapter(config, {name: factors}), made)[name]
    pixels = made.collate(made.training)["pixel_values"]
    patches = F.unfold(pixels, 14, stride=14).mT.flatten(0, 1)
    torch.testing.assert_close(found, patches.T @ patches / len(patches), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"},
                                     {"padding": 1, "padding_mode": "circular"}])  # fmt: skip
def test_rows_of_a_convolution_are_what_its_weight_multiplies(kind, options):
    dimensions = int(kind.__name__[4])
    layer = kind(3, 5, (2, 3, 2)[:dimensions], bias=False, **options)
    x = torch.randn(2, 3, *(7, 6, 5)[:dimensions])
    expected = layer(x).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(_rows(x, layer) @ layer.weight.flatten(1).T, expected)


def test_rows_that_are_no_tokens_all_count():
    """Pooled features may have as many entries as there are tokens."""
    sums, x = _Sums(), torch.randn(3, 4)
    sums.mask = torch.tensor([[1, 1, 1, 0]] * 3)
    sums.see("pooled", nn.Linear(4, 2), (x,), {})
    sums.see("pooled", nn.Linear(4, 2), (), {"input": x})
    torch.testing.assert_close(sums.sums["pooled"], 2 * x.T @ x)
    assert sums.rows == {"pooled": 6}


@pytest.mark.parametrize("layer", [nn.Linear(4, 2), nn.Embedding(5, 2)])
def test_tokens_that_a_layer_sees_flat_count_without_padding_too(layer):
    """As a shared expert of a mixture sees them."""
    flat, seen = _Sums(), _Sums()
    flat.mask = seen.mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    x = torch.arange(12).reshape(3, 4) % 5 if isinstance(layer, nn.Embedding) else torch.randn(3, 4, 4)
    flat.see("expert", layer, (x.flatten(0, 1),), {})
    seen.see("expert", layer, (x,), {})
    torch.testing.assert_close(flat.sums, seen.sums)
    assert flat.rows == seen.rows == {"expert": 8}


def test_a_module_that_the_task_does_not_reach():
    made = causal()
    made.model.add_module("unused", nn.Linear(4, 3))
    made.model.add_module("words", nn.Embedding(5, 3))
    adapter = adapter_on(made.model, [Q, "unused"])
    words = Factors(torch.ones(3, 2), torch.ones(2, 5), embedding=True)
    found = measure(replace(adapter, modules={**adapter.modules, "words": words}), made, limit=2)
    assert torch.equal(found["unused"], torch.zeros(4, 4)) and found[Q].any()
    assert torch.equal(found["words"], torch.zeros(5))
    with pytest.raises(ValueError, match="unused: task made-up does not reach this module"):
        measure(adapter_on(made.model, [Q]), made, limit=2, modules=["unused"])


def test_regmean_keeps_the_outputs_of_both_better_than_the_mean():
    made = causal()
    adapters = [adapter_on(made.model, [Q, UP], seed=seed) for seed in (1, 2)]
    tasks = [replace(made.task, prompt=prompt) for prompt in ("Q {content} A", "mmmooouuu {content} www")]
    grams = [
        measure(a, task, model=made.model, family="causal", processor=Letters(), max_length=30)
        for a, task in zip(adapters, tasks, strict=True)
    ]
    merged = merge(adapters, "regmean", statistics=grams, alpha=1.0)
    mean = merge(adapters)

    def error(result: Adapter, name: str) -> float:
        away = [result.modules[name].delta() - a.modules[name].delta() for a in adapters]
        return sum(float((d @ gram[name] * d).sum()) for d, gram in zip(away, grams, strict=True))

    for name in (Q, UP):
        assert error(merged, name) < 0.8 * error(mean, name)


# ---- Fisher information ----


def log_p(made: Bench, adapter: Adapter, example) -> torch.Tensor:
    """log of the model's distribution over the choices, from the mean log-likelihood of each, the slow way."""
    means = []
    with attached(made.model, adapter) as model, torch.no_grad():
        for choice in example.choices:
            prompt = Letters()(f"Q {example.content} A")["input_ids"]
            answer = Letters()(f" {choice}", add_special_tokens=False)["input_ids"]
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
            scores = [F.log_softmax(logits[len(prompt) - 1 + i], -1)[token] for i, token in enumerate(answer)]
            means.append(torch.stack(scores).mean())
    return torch.stack(means).log_softmax(0)


def moved(adapter: Adapter, name: str, part: str, at: tuple[int, int], by: float) -> Adapter:
    """The adapter with one entry of sqrt(scale) B or sqrt(scale) A moved."""
    factors = adapter.modules[name]
    changed = getattr(factors, part).clone()
    changed[at] += by / factors.scale**0.5
    return replace(adapter, modules={**adapter.modules, name: replace(factors, **{part: changed})})


ATTN, FC, PROJ = "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.0.mlp.c_proj"
ENTRIES = [(ATTN, "B", (3, 1)), (ATTN, "B", (40, 0)), (ATTN, "A", (0, 7)), (FC, "B", (5, 0)), (FC, "A", (1, 9))]
STEP = 1e-5


@pytest.mark.parametrize("labels", ["model", "given"])
@pytest.mark.parametrize("told", [True, False])
def test_fisher_of_factors_is_the_mean_squared_derivative(labels, told):
    made = precise()
    adapter = adapter_on(made.model, [ATTN, FC], scale=0.5, turned=True)
    adapter = replace(adapter, modules={**adapter.modules, FC: replace(adapter.modules[FC], scale=3.0)})
    if told:  # otherwise PEFT gets it multiplied into B
        adapter = replace(adapter, config={**adapter.config, "alpha_pattern": {"c_fc": 6.0}})
    found = measure(adapter, made, kind="fisher", limit=3, labels=labels)
    ratios = []
    for name, part, at in ENTRIES:
        total = 0.0
        for example in made.training[:3]:
            up, down = (log_p(made, moved(adapter, name, part, at, by), example) for by in (STEP, -STEP))
            squared = ((up - down) / (2 * STEP)) ** 2
            p = log_p(made, adapter, example).exp()
            total += float((p * squared).sum() if labels == "model" else squared[example.label])
        factors = adapter.modules[name]
        b = factors.B.numel()
        place = at[0] * getattr(factors, part).shape[1] + at[1] + (b if part == "A" else 0)
        ratios.append(float(found[name][place]) / (total / 3))
        assert found[name].shape == (b + factors.A.numel(),) and (found[name] >= 0).all()
    # Known up to one factor: they are brought to one size.
    torch.testing.assert_close(torch.tensor(ratios), torch.full((len(ratios),), ratios[0]), rtol=1e-4, atol=0)
    every = torch.cat(list(found.values()))
    assert float(every.square().mean()) == pytest.approx(1.0)
    assert found.kind == "fisher" and found.about["labels"] == labels and found.about["space"] == "factors"


@pytest.mark.parametrize("labels", ["model", "given"])
def test_fisher_of_the_weight_is_the_mean_squared_derivative(labels):
    made = precise()
    adapter = adapter_on(made.model, [ATTN, FC], turned=True)
    found = measure(adapter, made, kind="fisher", space="delta", limit=3, labels=labels, modules=[ATTN, FC, PROJ])
    ratios = []
    for name, at in [(ATTN, (3, 4)), (ATTN, (40, 15)), (FC, (20, 3)), (FC, (1, 1)), (PROJ, (2, 22))]:
        weight, total = made.model.get_submodule(name).weight, 0.0
        for example in made.training[:3]:
            values = []
            for by in (STEP, -2 * STEP, STEP):
                with torch.no_grad():
                    weight.T[at] += by
                values.append(log_p(made, adapter, example))
            squared = ((values[0] - values[1]) / (2 * STEP)) ** 2
            total += float((values[2].exp() * squared).sum() if labels == "model" else squared[example.label])
        ratios.append(float(found[name][at]) / (total / 3))
        assert found[name].shape == weight.T.shape
    torch.testing.assert_close(torch.tensor(ratios), torch.full((len(ratios),), ratios[0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_fisher_of_the_weights_of_a_model_in_16_bits_is_summed_in_32(kind):
    """Squares of small gradients are 0 in float16, and a sum in bfloat16 stands still after some hundred examples."""
    found = []
    for dtype in (torch.float32, kind):
        made = causal()
        adapter = adapter_on(made.model, [Q, UP])
        made.model.to(dtype)
        found.append(measure(adapter, made, kind="fisher", space="delta", labels="given", limit=6))
    whole, half = found
    for name in (Q, UP):
        assert half[name].dtype == torch.float32
        assert (half[name] - whole[name]).norm() < 0.05 * whole[name].norm()


def test_fisher_of_an_encoder_is_that_of_its_training_loss():
    made = encoder()
    names = ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"]
    adapter = adapter_on(made.model, names, scale=1.0)
    found = measure(adapter, made, kind="fisher", labels="given", limit=4)
    loss = made.loss
    sums = dict.fromkeys(names, 0)
    with attached(made.model, adapter) as model:
        for example in made.training[:4]:
            batch = made.collate([example])
            labels = batch.pop("labels")
            live = dict(model.named_parameters())
            keys = [f"base_model.model.{n}.lora_{part}.default.weight" for n in names for part in "BA"]
            wanted = [live[key].requires_grad_() for key in keys]
            gradients = torch.autograd.grad(loss(model(**batch), labels), wanted)
            for at, name in enumerate(names):
                sums[name] = sums[name] + torch.cat([g.flatten() for g in gradients[2 * at : 2 * at + 2]]).square()
    size = torch.cat(list(sums.values())).square().mean().sqrt()
    for name in names:
        torch.testing.assert_close(found[name], sums[name] / size, rtol=1e-3, atol=1e-4)


def test_a_multimodal_model_is_measured_as_a_causal_one():
    made = bench(tiny_llava.tiny_llava(), tiny_llava.task(), processor=tiny_llava.processor(), max_length=40)
    name = "model.language_model.layers.1.self_attn.q_proj"
    adapter = adapter_on(made.model, [name])
    assert measure(adapter, made, limit=4)[name].shape == (16, 16)
    found = measure(adapter, made, kind="fisher", labels="given", limit=3)[name]
    sums = torch.zeros(())
    with attached(made.model, adapter) as model:
        live = dict(model.named_parameters())
        pair = [live[f"base_model.model.{name}.lora_{part}.default.weight"].requires_grad_() for part in "BA"]
        for example in made.training[:3]:
            losses = []
            for choice in range(len(example.choices)):
                losses.append(model(**made.collate([replace(example, label=choice)])).loss)
            gradients = torch.autograd.grad((-torch.stack(losses)).log_softmax(0)[example.label], pair)
            sums = sums + torch.cat([gradient.flatten() for gradient in gradients]).square()
    torch.testing.assert_close(found, sums / sums.square().mean().sqrt(), rtol=1e-3, atol=1e-4)


def test_the_head_is_that_of_frozen_features_whatever_is_asked_first():
    name, first, second = "encoder.layer.0.attention.self.query", encoder(), encoder()
    adapter = adapter_on(first.model, [name], scale=4.0)
    _ = second.head
    asked = [measure(adapter, made, kind="fisher", limit=4)[name] for made in (first, second)]
    assert torch.equal(*asked)


def test_a_bias_of_b_is_scaled_as_its_update():
    made = causal()
    one = adapter_on(made.model, [Q], scale=4.0)
    one = replace(one, config={**one.config, "lora_bias": True})
    b, a, bias = one.modules[Q].B, one.modules[Q].A, torch.linspace(-1, 1, 16)
    parts = [Factors(b, a, scale=4.0, bias=bias), Factors(2 * b, 2 * a, scale=1.0, bias=4 * bias)]
    same = [measure(replace(one, modules={Q: part}), made, kind="fisher", limit=3)[Q] for part in parts]
    torch.testing.assert_close(*same)


def test_fisher_goes_through_merge():
    made = causal()
    adapters = [adapter_on(made.model, [Q, UP], seed=seed) for seed in (1, 2)]
    for space in ("factors", "delta"):
        known = [measure(a, made, kind="fisher", space=space, limit=2) for a in adapters]
        merged = merge(adapters, "fisher", statistics=known, space=space)
        assert all(torch.isfinite(merged.modules[name].delta()).all() for name in (Q, UP))
        assert not torch.allclose(merged.modules[Q].delta(), merge(adapters, space=space).modules[Q].delta())


# ---- what measuring leaves behind, and what it refuses ----


@pytest.mark.parametrize("arguments", [{}, {"kind": "fisher"}, {"kind": "fisher", "space": "delta"}])
@pytest.mark.parametrize("setup", [causal, encoder])
def test_the_base_and_chance_stay_as_they_were(setup, arguments):
    made = setup()
    name = Q if setup is causal else "encoder.layer.0.attention.self.query"
    adapter = adapter_on(made.model, [name])
    flags = {key: parameter.requires_grad for key, parameter in made.model.named_parameters()}
    before = {key: tensor.clone() for key, tensor in made.model.state_dict().items()}
    stream = torch.get_rng_state()
    with torch.no_grad():  # whatever mode the caller is in
        first = measure(adapter, made, limit=3, **arguments)
    assert torch.equal(first[name], measure(adapter, made, limit=3, **arguments)[name])
    assert not first[name].requires_grad and not first[name].is_inference()
    after = made.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert {key: parameter.requires_grad for key, parameter in made.model.named_parameters()} == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.model.modules())
    assert torch.equal(stream, torch.get_rng_state())


def test_the_bench_is_that_of_training(tiny_model):  # noqa: F811
    config = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": str(tiny_model)}
    past = {"operation": "train", "arguments": {"data": {"image_size": 28, "max_length": 64, "train_limit": 9}}}
    adapter = Adapter(config, {"fc": Factors(torch.ones(1, 1), torch.ones(1, 1))}, provenance=past)
    made = bench_for(adapter, "digits")
    assert (made.image_size, made.max_length, made.train_limit) == (28, 64, None)
    assert bench_for(adapter, "digits", image_size=42).image_size == 42
    assert bench_for(adapter, made) is made
    with pytest.raises(ValueError, match="a bench has its own model and options"):
        bench_for(adapter, made, image_size=42)
    with pytest.raises(ValueError, match="no base model is named; say which with --model"):
        bench_for(replace(adapter, config={}), "digits")


REFUSED = [
    ({"kind": "grams"}, UnknownName, "kind 'grams' is not known .did you mean 'gram'"),
    ({"kind": "fisher", "labels": "true"}, UnknownName, "labels 'true' is not known"),
    ({"kind": "fisher", "space": "core"}, UnknownName, "space 'core' is not known"),
    ({"limit": 0}, ValueError, "limit must be at least 1, got 0"),
    ({"modules": ["model.layers.9"]}, UnknownName, "module 'model.layers.9' is not known"),
    ({"modules": [UP], "kind": "fisher"}, UnknownName, f"module '{UP}' is not known.*allowed: {Q}"),
    (
        {"modules": ["model.embed_tokens"], "kind": "fisher", "space": "delta"},
        UnsupportedKind,
        "embed_tokens: no .* whole Embedding",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED)
def test_refused_in_one_line(arguments, kind, message):
    made = causal()
    with pytest.raises(kind, match=message) as caught:
        measure(adapter_on(made.model, [Q]), made, **arguments)
    assert "\n" not in str(caught.value)


def test_a_task_without_training_examples_is_refused():
    made = causal()
    empty = replace(made, task=replace(made.task, splits={"train": []}))
    with pytest.raises(ValueError, match="task made-up: no training examples to measure on"):
        measure(adapter_on(made.model, [Q]), empty)


def test_what_is_measured_says_its_kind():
    made = causal()
    assert isinstance(measure(adapter_on(made.model, [Q]), made, limit=1), Statistics)
