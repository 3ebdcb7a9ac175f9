"""A fresh adapter comes from its seed alone, and the base is bare and unchanged when it goes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertModel

from loraloom.integrations import backbones
from loraloom.integrations.adapting import training
from loraloom.integrations.backbones import load_backbone
from loraloom.integrations.peft import from_model
from loraloom.strategies.modality import MokA
from tiny import tiny_llama


def start(seed, **options):
    with training(tiny_llama(), seed=seed, rank=2, alpha=4, **options) as model:
        return {name: factors.A.clone() for name, factors in from_model(model).modules.items()}


def test_the_start_depends_on_the_seed_alone_and_touches_no_other_stream():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = start(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = start(seed=5), start(seed=6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("kind", "scale"), [("lora", 2.0), ("rslora", 4 / 2**0.5), ("dora", 2.0), ("hira", 1.0)])
def test_kinds_and_scales(kind, scale):
    with training(tiny_llama(), kind=kind, rank=2, alpha=4) as model:
        made = from_model(model)
    assert made.kind == {"rslora": "lora"}.get(kind, kind)
    assert all(factors.scale == pytest.approx(scale) for factors in made.modules.values())
    assert {factors.rank for factors in made.modules.values()} == {2}


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_bare_again(fails):
    base = tiny_llama().requires_grad_(False)
    names = [name for name, _ in base.named_modules()]
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    inputs = torch.arange(6)[None]
    expected = base(input_ids=inputs).logits
    with pytest.raises(RuntimeError) if fails else pytest.MonkeyPatch.context(), training(base, rank=2) as model:
        assert any(weight.requires_grad for weight in model.parameters())
        if fails:
            raise RuntimeError("in the middle of training")
    assert [name for name, _ in base.named_modules()] == names
    assert all(torch.equal(weight, weights[name]) for name, weight in base.state_dict().items())
    assert not any(weight.requires_grad for weight in base.parameters())
    assert not base.training
    assert torch.equal(base(input_ids=inputs).logits, expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("targets", ["all-linear", ["dense"], r".*dense"])
@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_the_pooler_of_an_encoder_gets_no_adapter(kind, targets, tmp_path):
    """Answers are scored by the last hidden state, so that nothing would come back to the pooler."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    base = BertModel(BertConfig(num_hidden_layers=1, **size))
    with training(base, kind=kind, rank=2, alpha=4, target_modules=targets) as model:
        assert not any("pooler" in name for name in from_model(model).modules)
        model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(base, tmp_path)  # it would warn of missing weights, which is an error here


def test_a_module_that_is_not_there_is_named():
    with (
        pytest.raises(ValueError, match=r"adapter\.target_modules: .*no_such"),
        training(tiny_llama(), target_modules=["no_such"]),
    ):
        pass


@pytest.mark.parametrize("kind", ["lora", "hira", "moka"])
def test_a_module_to_save_that_is_not_there_is_named_and_nothing_is_changed(kind):
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    given = {"moka": MokA({"image": 1}), "kind": kind} if kind == "moka" else {"kind": kind}
    with (
        pytest.raises(ValueError, match=r"^adapter\.modules_to_save: the model has no module 'lm_haed'$"),
        training(base, **given, modules_to_save=["norm", "lm_haed"]),
    ):
        pass
    with pytest.raises(ValueError, match=r"^modules_to_save: the model has no module 'lm_haed'$"):
        MokA({"image": 1}).wrap(base, modules_to_save=["lm_haed"])
    assert [name for name, _ in base.named_modules()] == names


def test_further_modules_are_trained_beside_an_adapter_that_is_continued():
    base = tiny_llama()
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    with training(base, rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"]) as model:
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1)
        first = from_model(model)
    with training(base, start=first, modules_to_save=["lm_head", "embed_tokens"]) as model:
        trained = [weight for name, weight in model.named_parameters() if weight.requires_grad and "lora" not in name]
        assert {tuple(weight.shape) for weight in trained} == {(32, 16)} and len(trained) == 2
        with torch.no_grad():
            model.get_base_model().model.embed_tokens.modules_to_save["default"].weight.add_(2)
        made = from_model(model)
    assert made.config["modules_to_save"] == ["lm_head", "embed_tokens"]
    assert torch.equal(made.extras["lm_head.weight"], weights["lm_head.weight"] + 1)
    assert torch.equal(made.extras["model.embed_tokens.weight"], weights["model.embed_tokens.weight"] + 2)
    assert all(torch.equal(weight, weights[name]) for name, weight in base.state_dict().items())


@pytest.mark.parametrize(
    ("name", "said"), [("no_such", "has no module 'no_such'"), ("q_proj", r"is on model\.layers\.0\.self_attn\.q_proj")]
)
def test_further_modules_that_cannot_be_trained(name, said):
    with training(tiny_llama(), rank=2, target_modules=["q_proj"]) as model:
        first = from_model(model)
    with (
        pytest.raises(ValueError, match=rf"^adapter\.modules_to_save: .*{said}"),
        training(tiny_llama(), start=first, modules_to_save=[name]),
    ):
        pass


def test_families_are_told_from_the_configuration(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    loaded = load_backbone(str(tmp_path / "llama"), processor=object())
    assert loaded.family == "causal"
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert load_backbone(tiny_llama(), processor=object()).family == "causal"
    with pytest.raises(ValueError, match=r"family 'audio' has no score here; allowed: causal"):
        load_backbone(tiny_llama(), family="audio")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_backbone("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model folder"):
        load_backbone(str(tmp_path / "empty"))


def test_a_model_that_is_loaded_goes_where_the_process_computes(tmp_path: Path, monkeypatch) -> None:
    """No accelerator is at hand: one is told of, whose tensors have no content."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(backbones, "join", lambda: SimpleNamespace(device=torch.device("meta")))

    def device() -> str:
        model = load_backbone(str(tmp_path / "llama"), processor=object()).model
        return "+".join({held.device.type for held in (*model.parameters(), *model.buffers())})

    assert device() == "meta"
    assert load_backbone(tiny_llama(), processor=object()).model.device.type == "cpu"  # the caller has placed it
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert device() == "cpu"  # it is taken apart from there


def test_a_model_without_a_language_head_is_an_encoder():
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    assert load_backbone(BertModel(BertConfig(vocab_size=8, **size)), processor=object()).family == "encoder"


def test_a_causal_model_by_another_name_is_no_encoder(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, bos_token_id=1, eos_token_id=2, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    )
    assert load_backbone(model, processor=object()).family == "causal"
    model.save_pretrained(tmp_path / "gpt2")
    loaded = load_backbone(str(tmp_path / "gpt2"), processor=object())
    assert loaded.family == "causal" and isinstance(loaded.model, GPT2LMHeadModel)


@pytest.mark.parametrize("mode", [True, False])
def test_an_adapter_that_is_continued_leaves_the_mode_of_the_base(mode: bool) -> None:
    base = nn.Sequential(nn.Linear(4, 3)).train(mode)
    with training(base, rank=2, target_modules=["0"]) as model:
        first = from_model(model)
    with training(base, start=first) as model:
        assert model.training == mode and [n for n, p in model.named_parameters() if p.requires_grad]
        again = from_model(model)
    assert base.training == mode
    assert all(torch.equal(again.modules[n].A, f.A) for n, f in first.modules.items())
