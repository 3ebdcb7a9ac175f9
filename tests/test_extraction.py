"""extract: which weights become modules, in which form, and what is left over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from loraloom.adapter import AdapterMismatch, UnsupportedKind
from loraloom.extraction import extract
from loraloom.folding import fold
from loraloom.registry import UnknownName
from loraloom.store import load, save
from test_checkpoint import sharded, single

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(2, 14).view(2, 6)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=tied, **SIZES))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=32, **SIZES))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes))


def output(model: nn.Module) -> Tensor:
    model.eval()
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result = model(input_ids=IDS, **more)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def tuned(model: nn.Module, folder: Path, *ends: str, rank: int | None = None) -> nn.Module:
    """Base and tuned model in folders; parameters whose names end so were changed, at a rank or fully."""
    torch.manual_seed(0)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ends):
                change = torch.randn(parameter.shape)
                if rank is not None and parameter.ndim == 2:
                    change = torch.randn(len(parameter), rank) @ torch.randn(rank, parameter.shape[1])
                parameter.add_(change, alpha=0.1)
    model.save_pretrained(folder / "tuned")
    return model


def on_base(model: nn.Module, folder: Path) -> Tensor:
    return output(PeftModel.from_pretrained(type(model).from_pretrained(folder / "base"), folder / "a"))


# model, what was changed, options of extract
WHOLE = {
    "llama": (llama, ("_proj.weight",), {}),
    "llama, all": (llama, ("",), {"rest": "keep"}),
    "llama, head by name": (llama, ("lm_head.weight", "q_proj.weight"), {"modules": "lm_head,q_proj"}),
    "gpt2": (gpt2, ("c_attn.weight", "c_proj.weight"), {}),
    "gpt2, biases": (gpt2, ("c_attn.weight", "c_attn.bias", "ln_1.bias", "mlp.c_proj.bias"), {"rest": "keep"}),
    "gpt2, positions": (gpt2, ("wpe.weight", "attn.c_proj.weight"), {"modules": ["wpe", "attn.c_proj"]}),
    "bert, embedding": (bert, ("word_embeddings.weight",), {"modules": "word_embeddings"}),
    "bert, all": (bert, ("",), {"rest": "keep"}),
    "t5": (t5, ("q.weight", "relative_attention_bias.weight"), {"rest": "keep"}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_the_adapter_on_the_base_is_the_tuned_model(case, tmp_path):
    make, ends, options = WHOLE[case]
    model = tuned(make(), tmp_path, *ends)
    adapter = extract(tmp_path / "tuned", tmp_path / "base", rank=16, **options)
    save(adapter, tmp_path / "a")
    wanted = output(model)
    assert (output(make()) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(on_base(model, tmp_path), wanted, rtol=1e-4, atol=2e-5)
    assert max(adapter.provenance["record"]["error"].values()) < 1e-6
    biases = [path for path in adapter.extras if path.removesuffix(".bias") in adapter.modules]
    assert adapter.config.get("bias", "none") == ("lora_only" if biases else "none")
    folded = type(model).from_pretrained(fold([load(tmp_path / "a")], tmp_path / "base", tmp_path / "folded"))
    torch.testing.assert_close(output(folded), wanted, rtol=1e-4, atol=2e-5)


def test_tables_are_no_modules_unless_they_are_named(tmp_path):
    tuned(t5(), tmp_path, "q.weight", "relative_attention_bias.weight", "shared.weight")
    adapter = extract(tmp_path / "tuned", tmp_path / "base", rest="ignore")
    assert all(name.endswith(".q") for name in adapter.modules)
    assert len([key for key in adapter.provenance["record"]["ignored"] if "relative_attention_bias" in key]) == 2
    named = extract(tmp_path / "tuned", tmp_path / "base", rest="ignore", modules="relative_attention_bias")
    assert all(factors.embedding for factors in named.modules.values()) and len(named.modules) == 2


def test_half_of_tied_weights_is_not_kept(tmp_path):
    tuned(gpt2(), tmp_path, "wte.weight", "c_attn.weight")
    with pytest.raises(UnsupportedKind, match=r"transformer\.wte\.weight cannot be kept: .*tied weights"):
        extract(tmp_path / "tuned", tmp_path / "base", rest="keep")
    assert list(extract(tmp_path / "tuned", tmp_path / "base", rest="ignore").extras) == []


def test_what_is_in_no_layer_of_its_own_is_not_kept(tmp_path):
    start = {"h.0.fc.weight": torch.ones(2, 3), "h.0.table": torch.ones(2), "top": torch.ones(2)}
    for key, message in (("h.0.table", r"but in h\.0"), ("top", "but in the model")):
        moved = start | {"h.0.fc.weight": torch.zeros(2, 3), key: torch.zeros(2)}
        (tmp_path / key).mkdir()
        for name, tensors in (("base", start), ("tuned", moved)):
            single(tmp_path / key / name, tensors)
        with pytest.raises(UnsupportedKind, match=f"{key} cannot be kept: .*{message}"):
            extract(tmp_path / key / "tuned", tmp_path / key / "base", rest="keep")


def test_a_head_that_only_one_file_repeats(tmp_path):
    model = tuned(llama(tied=True), tmp_path, "q_proj.weight", rank=1)
    held = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(held, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    assert len(extract(tmp_path / "tuned", tmp_path / "base").modules) == 2
    held["lm_head.weight"] = held["lm_head.weight"] + 1
    save_file(held, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterMismatch, match=r"lm_head\.weight is not in .*base"):
        extract(tmp_path / "tuned", tmp_path / "base")


def test_half_of_tied_weights_is_no_module(tmp_path):
    tuned(llama(tied=True), tmp_path, "embed_tokens.weight", "q_proj.weight")
    with pytest.raises(UnsupportedKind, match=r"embed_tokens\.weight cannot be a module: .*tied weights"):
        extract(tmp_path / "tuned", tmp_path / "base", modules="q_proj,embed_tokens")


def moved(folder: Path, start: dict[str, Tensor], config: dict | None = None) -> tuple[Path, Path]:
    """Tuned and base model of these weights, all of which differ."""
    folder.mkdir(exist_ok=True)
    base, new = single(folder / "base", start), single(folder / "tuned", {k: v + 1 for k, v in start.items()})
    for path in (base, new) if config else ():
        (path / "config.json").write_text(json.dumps(config))
    return new, base


def test_embeddings_in_a_list_are_embeddings_and_a_kernel_is_none(tmp_path):
    layer = {"layers.0.fc.weight": torch.ones(2, 3)}
    tables = {f"embed_tokens.{n}.weight": torch.ones(5, 2) for n in range(2)}
    adapter = extract(*moved(tmp_path / "list", layer | tables), rest="ignore")
    assert list(adapter.modules) == ["layers.0.fc"] and adapter.provenance["record"]["ignored"] == list(tables)
    named = extract(*moved(tmp_path / "named", tables), modules="embed_tokens.0", rest="ignore").modules
    assert named["embed_tokens.0"].embedding and named["embed_tokens.0"].shape[:2] == (2, 5)
    patches = extract(
        *moved(tmp_path / "patches", {"patch_embedding.weight": torch.ones(4, 3, 2, 2)}), modules=["patch_embedding"]
    )
    factors = patches.modules["patch_embedding"]
    assert factors.kernel == (3, 2, 2) and not factors.embedding and patches.shape("patch_embedding") == factors.shape


# weights beside an ordinary one, configuration
UNHELD = {
    "depthwise": ({f"layers.{n}.conv.weight": torch.ones(4, 1, 3) for n in range(2)}, {}, "grouped"),
    "router": ({"layers.0.mlp.gate.weight": torch.ones(4, 3)}, {"text_config": {"num_experts": 4}}, "router"),
    "mamba": ({"layers.0.mixer.out_proj.weight": torch.ones(4, 4)}, {"model_type": "mamba"}, "Mamba"),
}


@pytest.mark.parametrize("case", UNHELD)
def test_what_peft_cannot_adapt_is_no_module(case, tmp_path):
    weights, config, why = UNHELD[case]
    new, base = moved(tmp_path, {"layers.0.fc.weight": torch.ones(2, 3)} | weights, config)
    with pytest.raises(AdapterMismatch, match="parameters differ that no module holds"):
        extract(new, base)
    adapter = extract(new, base, rest="ignore")
    assert list(adapter.modules) == ["layers.0.fc"] and adapter.provenance["record"]["ignored"] == list(weights)
    with pytest.raises(UnsupportedKind, match=f"cannot be a module: .*{why}"):
        extract(new, base, modules=next(iter(weights)).split(".")[-2])


def test_a_convolution_of_the_only_input_channel_is_an_ordinary_one(tmp_path):
    new, base = moved(tmp_path, {f"layers.{n}.conv.weight": torch.ones(4, 4**n, 3) for n in range(2)})
    assert len(extract(new, base).modules) == 2


# --- sizes ------------------------------------------------------------------------------------------------------------
def pair(folder: Path, difference: Tensor, dtype: torch.dtype = torch.float32, start: Tensor | None = None) -> tuple:
    start = torch.zeros(difference.shape) if start is None else start
    names = ("tuned", start + difference), ("base", start)
    return tuple(single(folder / name, {"h.0.fc.weight": value.to(dtype)}) for name, value in names)


def test_certificate_and_rank(tmp_path):
    tail = pair(tmp_path, torch.diag(torch.tensor([4.0, 3.0, 0.0])))
    for options, rank, error in (({"rank": 1}, 1, 0.6), ({"rank": 2}, 2, 0.0), ({"energy": 0.6}, 1, 0.6), ({}, 3, 0.0)):
        adapter = extract(*tail, **options)
        assert adapter.shape("h.0.fc") == (3, 3, rank)
        assert adapter.modules["h.0.fc"].rank == rank
        record = adapter.provenance["record"]
        assert record["error"]["h.0.fc"] == pytest.approx(error, abs=1e-6)
        assert record["norm"]["h.0.fc"] == pytest.approx(5.0, rel=1e-5)
    assert extract(*tail, energy=1.0).shape("h.0.fc").rank == 2  # a third one would be rounding


def test_all_of_the_energy_is_not_rounding_too(tmp_path):
    values = torch.full((64,), 2.5e-7)
    values[0] = 1.0
    assert extract(*pair(tmp_path, torch.diag(values)), energy=1.0).shape("h.0.fc").rank == 1


def test_the_difference_is_not_taken_in_16_bits(tmp_path):
    """1.0078125 - 1 is one unit of bf16; at rank 1 it comes back exactly, not rounded once more."""
    torch.manual_seed(0)
    start = torch.randint(64, 128, (8, 8)).float()
    noise = 0.5 * torch.randint(-3, 4, (8, 1)) @ torch.ones(1, 8)
    adapter = extract(*pair(tmp_path, noise, torch.bfloat16, start), rank=1)
    assert adapter.modules["h.0.fc"].dtype == torch.float32
    torch.testing.assert_close(adapter.modules["h.0.fc"].delta(), noise)


def test_float64_is_kept(tmp_path):
    torch.manual_seed(0)
    noise = torch.randn(8, 1, dtype=torch.float64) @ torch.randn(1, 8, dtype=torch.float64)
    delta = extract(*pair(tmp_path, noise, torch.float64), rank=1).modules["h.0.fc"].delta()
    torch.testing.assert_close(delta, noise, rtol=1e-12, atol=1e-12)


def test_rounding_of_one_model_is_no_difference(tmp_path):
    torch.manual_seed(0)
    model = tuned(llama().bfloat16(), tmp_path, "q_proj.weight")
    LlamaForCausalLM.from_pretrained(tmp_path / "base").float().save_pretrained(tmp_path / "wide")
    torch.manual_seed(1)
    names = list(extract(tmp_path / "tuned", tmp_path / "wide", rest="refuse").modules)
    assert names == [f"model.layers.{n}.self_attn.q_proj" for n in range(2)] and model is not None
    fine = {"h.0.fc.weight": torch.randn(4, 4), "h.1.fc.weight": torch.randn(4, 4)}
    coarse = {"h.0.fc.weight": fine["h.0.fc.weight"].bfloat16(), "h.1.fc.weight": torch.randn(4, 4).bfloat16()}
    adapter = extract(single(tmp_path / "coarse", coarse), single(tmp_path / "fine", fine))
    assert list(adapter.modules) == ["h.1.fc"]


def test_shards_need_not_be_cut_alike(tmp_path):
    start = {f"h.{n}.fc.weight": torch.randn(4, 4) for n in range(3)}
    moved = {key: value + torch.ones(4, 4) for key, value in start.items()}
    keys = list(start)
    cut = {"a.safetensors": {keys[0]: moved[keys[0]]}, "b.safetensors": {key: moved[key] for key in keys[1:]}}
    adapter = extract(sharded(tmp_path / "tuned", cut), single(tmp_path / "base", start), rank=1)
    for factors in adapter.modules.values():
        torch.testing.assert_close(factors.delta(), torch.ones(4, 4))


# --- what is refused --------------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_named(tmp_path):
    base = single(tmp_path / "base", {"h.0.fc.weight": torch.ones(2, 3), "embed.weight": torch.ones(5, 2)})
    larger = {"h.0.fc.weight": torch.ones(2, 3) * 2, "embed.weight": torch.ones(6, 2)}
    with pytest.raises(AdapterMismatch, match=r"embed\.weight is \(6, 2\) in .*, \(5, 2\) in"):
        extract(single(tmp_path / "larger", larger), base)
    other = single(tmp_path / "other", {"h.0.fc.weight": torch.ones(2, 3), "extra.weight": torch.ones(5, 2)})
    with pytest.raises(AdapterMismatch, match=r"extra\.weight is not in .*base"):
        extract(other, base)
    nan = {"h.0.fc.weight": torch.full((2, 3), torch.nan), "embed.weight": torch.ones(5, 2)}
    with pytest.raises(ValueError, match=r"h\.0\.fc\.weight: the difference has NaN"):
        extract(single(tmp_path / "nan", nan), base).modules["h.0.fc"]
    for options, kind, message in (
        ({"energy": 1.5}, ValueError, r"energy must be in \(0, 1\]"),
        ({"rank": 0}, ValueError, "rank must be a whole number"),
        ({"rest": "drop"}, UnknownName, "allowed: refuse, ignore, keep"),
        ({"modules": "fd"}, UnknownName, "did you mean 'fc'"),
    ):
        with pytest.raises(kind, match=message):
            extract(tmp_path / "nan", base, **options)


@pytest.mark.parametrize(
    ("make", "task"),
    [(llama, "CAUSAL_LM"), (gpt2, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM"), (bert, None)],
)
def test_the_configuration_is_an_ordinary_one(make, task, tmp_path):
    tuned(make(), tmp_path, "q_proj.weight", "c_attn.weight", ".q.weight", "query.weight", rank=1)
    adapter = extract(tmp_path / "tuned", tmp_path / "base", rank=4)
    assert adapter.config["task_type"] == task and adapter.config["base_model_name_or_path"] == str(tmp_path / "base")
    assert adapter.config["r"] == adapter.config["lora_alpha"] == 4
    assert adapter.config["fan_in_fan_out"] is (make is gpt2)
    assert load(save(adapter, tmp_path / "a")).config["r"] == 4


def test_it_is_lazy(tmp_path, monkeypatch):
    adapter = extract(*pair(tmp_path, torch.eye(4)), rank=2)
    calls: list[str] = []
    from loraloom import extraction

    cut = extraction.low_rank
    monkeypatch.setattr(extraction, "low_rank", lambda *given: calls.append("cut") or cut(*given))
    assert adapter.shape("h.0.fc").rank == 2 and not calls
    assert adapter.modules["h.0.fc"].rank == 2 and len(calls) == 1


def test_adapters_trained_by_peft_come_back(tmp_path):
    """An adapter, folded by PEFT itself, extracted again: the same update, at the same rank, at rounding error."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, pad_token_id=0, **SIZES)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape)
    wrapped.save_pretrained(tmp_path / "a")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "tuned")
    before, after = load(tmp_path / "a"), extract(tmp_path / "tuned", tmp_path / "base", rank=3)
    assert sorted(before.modules) == sorted(after.modules) and after.config["task_type"] == "SEQ_CLS"
    for name in before.modules:
        torch.testing.assert_close(after.modules[name].delta(), before.modules[name].delta(), rtol=1e-4, atol=1e-5)
        assert after.provenance["record"]["error"][name] < 1e-5
