"""fold where layouts, ties and whole tensors make it hard, against live PEFT models and float64."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.checkpoint import Checkpoint
from loraloom.folding import fold
from loraloom.safefile import Writer, sha256
from loraloom.store import fingerprint, load, save
from processes import process, status_of
from test_checkpoint import sharded, single
from tiny import Convs

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(2, 14).view(2, 6)


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def llama(tied: bool = False) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return drawn(LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=tied, **sizes)))


def gpt2(tied: bool = False) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return drawn(GPT2LMHeadModel(GPT2Config(vocab_size=32, tie_word_embeddings=tied, **sizes)))


def convs() -> nn.Module:
    return drawn(Convs())


def written(model: nn.Module, folder: Path) -> Path:
    if isinstance(model, Convs):
        return single(folder, model.state_dict())
    model.save_pretrained(folder)
    return folder


def opened(model: nn.Module, folder: Path) -> nn.Module:
    if not isinstance(model, Convs):
        return type(model).from_pretrained(folder).eval()
    again = Convs().eval()
    again.load_state_dict(load_file(folder / "model.safetensors"))
    return again


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result = model(IDS)
    return result if isinstance(result, Tensor) else result.logits


def trained(model: nn.Module, config: Any, folder: Path, seed: int = 1) -> Path:
    """An adapter that PEFT writes, with all that is trained in it random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.data = parameter.data * (1 + noise) if "magnitude" in name else parameter.data + noise
        wrapped.save_pretrained(folder)
        wrapped.unload()
    return folder


def lora(*targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": list(targets), **more})


CASES = {
    "square and not": (gpt2, lambda: lora("c_proj", "c_attn", "c_fc")),
    # PEFT stores fan_in_fan_out of the last module alone, that is, of lm_head
    "conv1d and linear": (gpt2, lambda: lora("c_proj", "c_attn", "lm_head")),
    "square conv1d and linear": (gpt2, lambda: lora(target_modules=r".*attn\.c_proj|lm_head")),
    "conv1d hira": (gpt2, lambda: HiraConfig(r=2, target_modules=["c_proj", "c_attn"], fan_in_fan_out=True)),
    "conv1d dora": (gpt2, lambda: lora("c_proj", "c_fc", use_dora=True, fan_in_fan_out=True)),
    "embedding": (llama, lambda: lora("embed_tokens", "q_proj")),
    "embedding dora": (llama, lambda: lora("embed_tokens", "q_proj", use_dora=True)),
    "embedding hira": (llama, lambda: HiraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "head": (llama, lambda: lora("lm_head", use_rslora=True)),
    "saved embedding": (llama, lambda: lora("q_proj", modules_to_save=["embed_tokens", "norm"])),
    "convs": (convs, lambda: lora("conv1", "conv2", "point", "head", rank_pattern={"conv2": 1})),
    "convs dora": (convs, lambda: lora("conv1", "conv2", "point", use_dora=True)),
    "convs hira": (convs, lambda: HiraConfig(r=2, target_modules=["conv1", "conv2", "head"])),
    "convs bias": (convs, lambda: lora("conv1", "conv2", "point", lora_bias=True)),
    "convs all biases": (convs, lambda: lora("conv1", "head", bias="all")),
    "convs all biases, one whole": (convs, lambda: lora("conv1", bias="all", modules_to_save=["head"])),
    "plain embedding dora": (convs, lambda: lora("embed", use_dora=True)),
    "plain embedding hira": (convs, lambda: HiraConfig(r=2, target_modules=["embed"])),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folded_model_computes_what_peft_does(case, tmp_path):
    """The model with the adapter on it, not merged: what the adapter means, whatever merge_and_unload makes of it."""
    make, config = CASES[case]
    base = written(make(), tmp_path / "base")
    adapter = trained(make(), config(), tmp_path / "a")
    folded = opened(make(), fold([load(adapter)], base, tmp_path / "out"))
    wanted = output(PeftModel.from_pretrained(opened(make(), base), adapter).eval())
    assert (wanted - output(make())).abs().max() > 1e-2
    torch.testing.assert_close(output(folded), wanted, rtol=1e-5, atol=1e-5)


def test_adapters_of_one_embedding_fold_together(tmp_path):
    """PEFT stores the frozen embedding in both, which is no whole tensor to average."""
    base = written(llama(), tmp_path / "base")
    adapters = [load(trained(llama(), lora("embed_tokens"), tmp_path / f"a{seed}", seed)) for seed in (1, 2)]
    assert all(list(adapter.extras) == ["model.embed_tokens.weight"] for adapter in adapters)
    folded = opened(llama(), fold(adapters, base, tmp_path / "out")).get_input_embeddings().weight
    deltas = sum(adapter.modules["model.embed_tokens"].delta().T for adapter in adapters)
    torch.testing.assert_close(folded, opened(llama(), base).get_input_embeddings().weight + deltas)


# --- tied weights -----------------------------------------------------------------------------------------------------
TIES = {
    "lora": (gpt2, lambda: lora("wte"), UnsupportedKind, "tied weights"),
    "whole": (gpt2, lambda: lora("c_attn", modules_to_save=["wte"]), UnsupportedKind, "tied weights"),
    "head": (llama, lambda: lora("lm_head"), AdapterMismatch, "tied weight is stored once"),
    "whole head": (llama, lambda: lora("q_proj", modules_to_save=["lm_head"]), AdapterMismatch, "stored once"),
}


@pytest.mark.parametrize("case", TIES)
def test_half_of_tied_weights_is_not_folded(case, tmp_path):
    make, config, kind, message = TIES[case]
    base = written(make(tied=True), tmp_path / "base")
    adapter = load(trained(make(tied=True), config(), tmp_path / "a"))
    with pytest.raises(kind, match=message):
        fold([adapter], base, tmp_path / "out")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "base"]


def test_copies_of_both_ends_of_tied_weights_change_nothing(tmp_path):
    """PEFT stores embedding and head of a resized or targeted vocabulary, both the same tensor."""
    base = written(llama(tied=True), tmp_path / "base")
    adapter = load(trained(llama(tied=True), lora("q_proj"), tmp_path / "a"))
    embed = Checkpoint(base)["model.embed_tokens.weight"]
    both = {"model.embed_tokens.weight": embed + 1, "lm_head.weight": embed + 1}
    folded = Checkpoint(fold([replace(adapter, extras=both)], base, tmp_path / "out"))
    assert torch.equal(folded["model.embed_tokens.weight"], embed + 1) and "lm_head.weight" not in folded
    unchanged = {"model.embed_tokens.weight": embed}
    same = fold([replace(adapter, extras=unchanged)], base, tmp_path / "same")
    assert torch.equal(Checkpoint(same)["model.embed_tokens.weight"], embed)
    apart = {"model.embed_tokens.weight": embed + 1, "lm_head.weight": embed + 2}
    with pytest.raises(UnsupportedKind, match="tied weights"):
        fold([replace(adapter, extras=apart)], base, tmp_path / "apart")


def test_equal_tensors_that_the_base_lacks_are_not_taken_for_tied_weights(tmp_path):
    base = single(tmp_path / "base", FC)
    norms = {"head__norm1__weight": torch.ones(4), "head__norm2__weight": torch.ones(4)}
    with pytest.raises(AdapterMismatch, match=r"head\.norm1\.weight is not in the checkpoint"):
        fold([one(**norms)], base, tmp_path / "out")
    with pytest.raises(AdapterMismatch, match=r"head\.norm1\.weight is not in the checkpoint"):
        fold([one(norm__weight=torch.ones(4), head__norm1__weight=torch.ones(4))], base, tmp_path / "out")
    tied = written(llama(tied=True), tmp_path / "tied")
    adapter = load(trained(llama(tied=True), lora("q_proj"), tmp_path / "a"))
    embed = Checkpoint(tied)["model.embed_tokens.weight"]
    other = {"model.embed_tokens.weight": embed + 1, "lm_head.weight": embed + 2, "more.weight": embed + 2}
    with pytest.raises((AdapterMismatch, UnsupportedKind)):
        fold([replace(adapter, extras=other)], tied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- whole tensors ----------------------------------------------------------------------------------------------------
FC = {"h.0.fc.weight": torch.randn(2, 3), "norm.weight": torch.randn(4), "count": torch.tensor([3])}


def one(weight: float = 1.0, **extras: Tensor) -> Adapter:
    part = Factors(torch.full((2, 1), weight), torch.ones(1, 3))
    return Adapter({"peft_type": "LORA"}, {"h.0.fc": part}, {k.replace("__", "."): v for k, v in extras.items()})


def test_whole_tensors_of_one_adapter_replace_to_the_bit(tmp_path):
    base = single(tmp_path / "base", FC)
    mine = torch.randn(4) * 1e-3
    extras = {"norm__weight": mine, "count": torch.tensor([7])}
    folded = Checkpoint(fold([one(), one(**extras)], base, tmp_path / "out", weights=[1.0, 0.25]))
    assert torch.equal(folded["norm.weight"], mine) and folded["count"].tolist() == [7]
    assert folded["count"].dtype == torch.int64
    torch.testing.assert_close(folded["h.0.fc.weight"], FC["h.0.fc.weight"] + 1.25)


def test_whole_tensors_are_not_each_compared_with_all_the_others(tmp_path):
    class Counted(dict):
        def __getitem__(self, path: str) -> Tensor:
            reads.append(path)
            return super().__getitem__(path)

    reads: list[str] = []
    held = {f"norms.{i}.weight": torch.full((4,), float(i)) for i in range(40)}
    base = single(tmp_path / "base", {**FC, **{path: held[path] - 1 for path in held}})
    folded = Checkpoint(fold([replace(one(), extras=Counted(held))], base, tmp_path / "out"))
    assert all(torch.equal(folded[path], held[path]) for path in held)
    assert max(map(reads.count, held)) <= 4


def test_whole_tensors_of_several_adapters(tmp_path):
    base = single(tmp_path / "base", FC)
    left, right = torch.randn(4), torch.randn(4)
    several = [one(norm__weight=left), one(), one(norm__weight=right)]
    with pytest.raises(AdapterMismatch, match="2 adapters hold whole tensors"):
        fold(several, base, tmp_path / "out")
    out = fold(several, base, tmp_path / "out", weights=[0.5, 1.0, -2.0], extras="average")
    start = FC["norm.weight"]
    torch.testing.assert_close(Checkpoint(out)["norm.weight"], start + 0.5 * (left - start) - 2 * (right - start))
    counts = [one(count=torch.tensor([n])) for n in (7, 9)]
    with pytest.raises(AdapterMismatch, match="has no average"):
        fold(counts, base, tmp_path / "no", extras="average")
    with pytest.raises(ValueError, match="differ by module"):
        fold(several, base, tmp_path / "no", weights={"h.0.fc": [1.0, 1.0, 1.0]}, extras="average")


def test_dora_is_relative_to_the_weight_that_its_adapter_saved(tmp_path):
    base = single(tmp_path / "base", FC)
    saved, part = torch.randn(2, 3), Factors(torch.ones(2, 1), torch.ones(1, 3), magnitude=torch.tensor([1.0, 2.0]))
    dora = Adapter({"peft_type": "LORA", "use_dora": True}, {"h.0.fc": part}, {"h.0.fc.weight": saved})
    folded = Checkpoint(fold([dora], base, tmp_path / "out"))["h.0.fc.weight"]
    torch.testing.assert_close(folded.norm(dim=1), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(nn.functional.normalize(folded), nn.functional.normalize(saved + 1))
    with pytest.raises(UnsupportedKind, match="depends on a weight that adapters replace"):
        fold([replace(dora, extras={}), one(**{"h__0__fc__weight": saved})], base, tmp_path / "no")


def test_another_vocabulary(tmp_path):
    base = written(llama(), tmp_path / "base")
    larger = llama()
    larger.resize_token_embeddings(40)
    config = lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])
    adapter = load(trained(larger, config, tmp_path / "a"))
    folded = LlamaForCausalLM.from_pretrained(fold([adapter], base, tmp_path / "out")).eval()
    assert folded.config.vocab_size == 40 and folded.lm_head.weight.shape == (40, 16)
    bare = opened(llama(), base)
    bare.resize_token_embeddings(40)
    live = PeftModel.from_pretrained(bare, tmp_path / "a").eval()
    torch.testing.assert_close(output(folded), output(live), rtol=1e-5, atol=1e-5)
    paths = ["lm_head.weight", "model.embed_tokens.weight"]
    for broken in (
        {paths[0]: adapter.extras[paths[0]]},
        {paths[0]: adapter.extras[paths[0]], paths[1]: adapter.extras[paths[1]][:36]},
        {paths[0]: adapter.extras[paths[0]], paths[1]: adapter.extras[paths[1]][:, :8]},
    ):
        with pytest.raises(AdapterMismatch, match=r"is \(32, 16\) in the base"):
            fold([replace(adapter, extras=broken)], base, tmp_path / "no")
    with pytest.raises(AdapterMismatch, match="has no average"):
        fold([adapter, adapter], base, tmp_path / "no", extras="average")
    assert not (tmp_path / "no").exists()


# --- numbers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(dtype, tmp_path):
    """Three adapters of weights that cancel: what comes out is the exact sum, rounded to the stored type."""
    torch.manual_seed(0)
    start = torch.randn(300, 200).to(dtype)
    base = single(tmp_path / "base", {"h.0.fc.weight": start, "h.0.other": start.clone()})
    parts = [Factors(torch.randn(300, 4), torch.randn(4, 200), scale=s) for s in (1.5, 0.1, 3.0)]
    weights = [100.0, -3.0, -50.0]
    adapters = [Adapter({"r": 4}, {"h.0.fc": part}) for part in parts]
    folded = Checkpoint(fold(adapters, base, tmp_path / "out", weights=weights))
    exact = start.double()
    for part, weight in zip(parts, weights, strict=True):
        exact += weight * part.scale * part.B.double() @ part.A.double()
    got = folded["h.0.fc.weight"]
    assert got.dtype == dtype and torch.equal(folded["h.0.other"], start)
    if dtype == torch.float32:
        assert (got - exact).norm() < 3e-7 * exact.norm()
    else:
        assert (got == exact.to(dtype)).double().mean() > 0.999


def test_blocks_of_rows_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("loraloom.folding._BLOCK", 40)
    for case in ("conv1d dora", "embedding hira", "convs dora", "convs bias", "plain embedding dora"):
        (tmp_path / case).mkdir()
        test_the_folded_model_computes_what_peft_does(case, tmp_path / case)


def test_weights_of_biases_and_of_several_kinds(tmp_path):
    base = single(tmp_path / "base", {"h.0.fc.weight": torch.ones(2, 3), "h.0.fc.bias": torch.ones(2)})
    part = Factors(torch.ones(2, 1), torch.ones(1, 3), scale=2.0)
    biased = Adapter({"lora_bias": True}, {"h.0.fc": replace(part, bias=torch.tensor([1.0, 3.0]))})
    hira = Adapter({"peft_type": "HIRA"}, {"h.0.fc": part})
    dora = Adapter({"use_dora": True}, {"h.0.fc": replace(part, magnitude=torch.full((2,), 27.0**0.5))})
    folded = Checkpoint(fold([biased, hira, dora], base, tmp_path / "out", weights=[10.0, 100.0, 1000.0]))
    assert folded["h.0.fc.bias"].tolist() == [21.0, 61.0]
    torch.testing.assert_close(folded["h.0.fc.weight"], torch.full((2, 3), 1 + 20 + 200 + 1000 * (3.0 - 1)))
    together = Checkpoint(fold([biased, hira], base, tmp_path / "together"))  # 1 each, as if both were switched on
    assert together["h.0.fc.weight"].tolist() == [[5.0] * 3] * 2 and together["h.0.fc.bias"].tolist() == [3.0, 7.0]


def test_weights_by_module(tmp_path):
    base = single(tmp_path / "base", {f"h.{n}.fc.weight": torch.zeros(2, 3) for n in range(2)})
    part = Factors(torch.ones(2, 1), torch.ones(1, 3))
    both = Adapter({"r": 1}, {"h.0.fc": part, "h.1.fc": part})
    folded = Checkpoint(fold([both, both], base, tmp_path / "out", weights={"h.0.fc": [1, 2], "h.1.fc": [5, -1]}))
    assert [float(folded[f"h.{n}.fc.weight"].mean()) for n in range(2)] == [3.0, 4.0]
    with pytest.raises(ValueError, match=r"h\.1\.fc has none"):
        fold([both], base, tmp_path / "no", weights={"h.0.fc": [1.0]})


@pytest.mark.parametrize("key", ["h.0.fc.weight", "norm.weight"])
def test_a_type_that_cannot_hold_a_parameter_is_refused(key, tmp_path):
    base = single(tmp_path / "base", FC | {key: torch.full_like(FC[key], 1e5)})
    with pytest.raises(ValueError, match=f"{key}: the result is not finite as F16"):
        fold([one()], base, tmp_path / "out", dtype="fp16")
    assert [item.name for item in tmp_path.iterdir()] == ["base"]


def test_what_is_infinite_on_purpose_is_copied(tmp_path):
    mask = torch.full((3, 3), -torch.inf).triu(1)
    base = single(tmp_path / "base", FC | {"mask": mask})
    for dtype in (None, "bf16"):
        folded = Checkpoint(fold([one()], base, tmp_path / f"{dtype}", dtype=dtype))
        assert torch.equal(folded["mask"].float(), mask) and folded["count"].dtype == torch.int64


# --- what does not fit ------------------------------------------------------------------------------------------------
def test_everything_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    base = single(tmp_path / "base", FC)
    monkeypatch.setattr("loraloom.folding.whole_folder", None)  # a fold that came so far would fail otherwise
    part = Factors(torch.ones(2, 1), torch.ones(1, 3))
    dora = {"peft_type": "LORA", "use_dora": True}
    cases: list[tuple[Adapter, type[Exception], str]] = [
        (Adapter({}, {"h.0.fc": part, "h.1.fc": part}), AdapterMismatch, r"h\.1\.fc\.weight is not in the checkpoint"),
        (Adapter({}, {"h.0.fc": replace(part, B=torch.ones(3, 1))}), AdapterMismatch, r"is 3 x 3"),
        (Adapter({}, {"h.0.fc": Factors(part.A.T, part.B.T)}), AdapterMismatch, r"is 3 x 2"),
        (Adapter({"lora_bias": True}, {"h.0.fc": part}), AdapterMismatch, r"h\.0\.fc\.bias is not in the checkpoint"),
        (
            Adapter({}, {"h.0.fc": part, "0.fc": part}),
            AdapterMismatch,
            r"0\.fc and h\.0\.fc of one adapter are both h\.0",
        ),
        (one(norm__weight=torch.ones(5)), AdapterMismatch, r"norm\.weight is \(4,\) in the base, \(5,\)"),
        (one(score__weight=torch.ones(5)), AdapterMismatch, r"score\.weight is not in the checkpoint"),
        (Adapter(dora | {"init_lora_weights": "pissa"}, {"h.0.fc": part}), UnsupportedKind, "pissa"),
    ]
    for adapter, kind, message in cases:
        with pytest.raises(kind, match=message):
            fold([adapter], base, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["base"]


def test_two_adapters_that_see_a_square_weight_differently(tmp_path):
    base = single(tmp_path / "base", {"h.0.fc.weight": torch.ones(3, 3)})
    part = Factors(torch.ones(3, 1), torch.ones(1, 3))
    adapters = [Adapter({"fan_in_fan_out": turned}, {"h.0.fc": part}) for turned in (True, False)]
    with pytest.raises(AdapterMismatch, match="stored in x out for one adapter, out x in for another"):
        fold(adapters, base, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_few_bits_are_refused(dtype, tmp_path):
    base = single(tmp_path / "base", {"h.0.fc.weight": torch.ones(2, 3).to(dtype)})
    with pytest.raises(UnsupportedKind, match="cannot be added to exactly"):
        fold([one()], base, tmp_path / "out")


# --- the folder -------------------------------------------------------------------------------------------------------
def test_what_is_written_beside_the_weights(tmp_path):
    shards = {"a.safetensors": {"h.0.fc.weight": torch.ones(2, 3)}, "b.safetensors": {"x": torch.ones(2)}}
    base = sharded(tmp_path / "base", shards, {"dtype": "float32", "text_config": {"dtype": "float32"}})
    save_file(shards["b.safetensors"], base / "b.safetensors")  # without the metadata that Transformers asks for
    for name in ("merges.txt", "LICENSE", "adapter_config.json", "pytorch_model.bin.index.json", "model.gguf"):
        (base / name).write_text("{}")
    save(one(), tmp_path / "a")
    out = fold([load(tmp_path / "a")], base, tmp_path / "out", dtype="bf16", command="loraloom fold")
    names = ["LICENSE", "a.safetensors", "b.safetensors", "config.json", "loraloom.json", "merges.txt"]
    assert sorted(item.name for item in out.iterdir()) == [*names, "model.safetensors.index.json"]
    config = json.loads((out / "config.json").read_text())
    assert config == {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    with safe_open(out / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    record = json.loads((out / "loraloom.json").read_text())
    assert record["operation"] == "fold" and record["command"] == "loraloom fold"
    first, second = record["inputs"]
    assert first == {"name": "a", "sha256": fingerprint(tmp_path / "a")} | {
        k: first[k] for k in first if k not in ("name", "sha256")
    }
    assert second == {"name": "base", "sha256": {name: sha256(base / name) for name in shards}}
    assert record["sha256"] == {name: sha256(out / name) for name in shards}
    assert str(tmp_path) not in (out / "loraloom.json").read_text()


def _killed(base: Path, out: Path, after: int) -> None:
    add, seen = Writer.add, []

    def dying(self: Writer, key: str, tensor: Tensor) -> None:
        seen.append(key)
        if len(seen) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, key, tensor)

    Writer.add = dying  # type: ignore[method-assign]
    fold([one()], base, out)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_between_two_tensors(after, tmp_path):
    shards = {
        "a.safetensors": {"h.0.fc.weight": torch.ones(2, 3)},
        "b.safetensors": {"x": torch.ones(2), "y": torch.ones(2)},
    }
    base = sharded(tmp_path / "base", shards)
    folding = process(_killed, base, tmp_path / "out", after)
    folding.start()
    assert status_of(folding) == -signal.SIGKILL
    left = [item for item in tmp_path.iterdir() if item.name != "base"]
    assert not (tmp_path / "out").exists() and len(left) == 1
    with pytest.raises(ValueError, match="unfinished write"):
        Checkpoint(left[0])
    assert len(Checkpoint(fold([one()], base, tmp_path / "out"))) == 3


def test_an_error_in_the_last_shard_leaves_nothing(tmp_path):
    nan = Adapter({}, {"h.1.fc": Factors(torch.full((2, 1), torch.nan), torch.ones(1, 3))})
    shards = {f"{n}.safetensors": {f"h.{n}.fc.weight": torch.ones(2, 3)} for n in range(2)}
    base = sharded(tmp_path / "base", shards)
    with pytest.raises(ValueError, match=r"h\.1\.fc\.weight: the result is not finite"):
        fold([nan], base, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("turned", [False, True])
def test_memory_of_one_large_weight(turned, tmp_path):
    """A weight of 64 MiB in 16 bits and its result, not four copies of it in 32."""
    shape = (8192, 4096)
    base = single(tmp_path / "base", {"h.0.fc.weight": torch.ones(*shape, dtype=torch.bfloat16)})
    out, in_ = reversed(shape) if turned else shape
    part = Factors(torch.ones(out, 2), torch.ones(2, in_))
    save(Adapter({"peft_type": "LORA", "r": 2, "fan_in_fan_out": turned}, {"h.0.fc": part}), tmp_path / "a")
    # VmHWM, not ru_maxrss: that of a child starts at the size of the process that started it
    script = (
        "import re, sys, loraloom as ll, loraloom.folding\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "a = ll.load(sys.argv[1]); before = peak(); ll.fold([a], sys.argv[2], sys.argv[3]); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a"), str(base), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 180, f"{grown} MiB"
    assert float(Checkpoint(tmp_path / "out")["h.0.fc.weight"].float().mean()) == 3.0
