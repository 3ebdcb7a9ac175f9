"""fold, extract and export, against PEFT's own merge_and_unload on real (tiny) models of Transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.checkpoint import Checkpoint, base_weights
from loraloom.extraction import extract
from loraloom.folding import fold
from loraloom.ops.merge import merge
from loraloom.registry import UnknownName
from loraloom.serving import export
from loraloom.store import load, save

IDS = torch.arange(2, 14).view(2, 6)
LLAMA = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=1, attention_bias=True))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def bert() -> nn.Module:
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return BertModel(config)


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))


def output(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        if isinstance(model, ViTModel):
            pixels = torch.linspace(-1, 1, 192).view(1, 3, 8, 8).to(next(model.parameters()).dtype)
            return model(pixels).last_hidden_state
        result = model(IDS)
        return result.logits if hasattr(result, "logits") else result.last_hidden_state


def made(model: nn.Module, config, folder: Path, seed: int) -> Path:
    """An adapter that PEFT writes, with every parameter of it random; the model is left as it was."""
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if "magnitude" in name else 0.3
            noise = torch.rand(parameter.shape, generator=generator).to(parameter.dtype) - 0.5
            parameter.data = parameter.data + scale * noise if scale == 1.0 else 2 * scale * noise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes a bias of B for a torn tensor, and tells of embeddings
        wrapped.save_pretrained(folder)
    wrapped.unload()
    return folder


CASES = {
    "llama-lora": (llama, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])),
    "llama-rslora-patterns": (
        llama,
        LoraConfig(
            r=4, use_rslora=True, target_modules="all-linear", rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 5}
        ),
    ),
    "llama-bias-of-B": (llama, LoraConfig(r=2, lora_bias=True, target_modules=["q_proj", "v_proj"])),
    "llama-dora": (llama, LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "up_proj"])),
    "llama-hira": (llama, HiraConfig(r=2, target_modules=["q_proj", "up_proj"])),
    "llama-head": (llama, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="lora_only")),
    "gpt2-conv1d": (gpt2, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2-dora": (gpt2, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "bert-embedding": (bert, LoraConfig(r=2, target_modules=["word_embeddings", "query"])),
    "vit-conv": (vit, LoraConfig(r=2, target_modules=["projection", "q_proj"])),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_is_merge_and_unload(case, dtype, tmp_path):
    torch.manual_seed(0)
    model = CASES[case][0]().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    adapter = made(model, CASES[case][1], tmp_path / "a", 1)
    folded = fold([load(adapter)], tmp_path / "base", tmp_path / "folded")
    ours = type(model).from_pretrained(folded, dtype=dtype)
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    held, wanted = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert held.keys() == wanted.keys()
    for name, parameter in wanted.items():
        size = parameter.abs().max()
        # Ours is rounded once; PEFT rounds the update to 16 bits before it adds it.
        most = 1e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
        assert (held[name] - parameter).abs().max() <= most * size, name
        assert held[name].dtype == dtype
    if dtype == torch.float32:
        assert torch.allclose(output(ours), output(theirs), atol=1e-5)


def test_many_weighted_adapters_of_several_kinds(tmp_path):
    torch.manual_seed(0)
    model = llama().double()
    model.save_pretrained(tmp_path / "base")
    names = ["llama-lora", "llama-dora", "llama-hira"]
    folders = [made(model, CASES[name][1], tmp_path / name, seed) for seed, name in enumerate(names)]
    weights = [0.5, -1.0, 2.0]
    folded = load_file(
        fold([load(f) for f in folders], tmp_path / "base", tmp_path / "out", weights=weights) / "model.safetensors"
    )
    base = load_file(tmp_path / "base" / "model.safetensors")
    want = {key: value.clone() for key, value in base.items()}
    for folder, weight in zip(folders, weights, strict=True):
        alone = load_file(
            fold([load(folder)], tmp_path / "base", tmp_path / f"{folder.name}-folded") / "model.safetensors"
        )
        for key, value in base.items():
            want[key] += weight * (alone[key] - value)
    for key, value in want.items():
        assert torch.allclose(folded[key], value, atol=1e-12)
    record = json.loads((tmp_path / "out" / "loraloom.json").read_text())
    assert (
        record["operation"] == "fold" and [node["name"] for node in record["inputs"]] and record["inputs"][0]["sha256"]
    )


def test_dtype_config_and_other_files(tmp_path):
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "evil.py").write_text("boom")
    adapter = made(model, CASES["llama-lora"][1], tmp_path / "a", 1)
    folded = fold([load(adapter)], tmp_path / "base", tmp_path / "out", dtype="bf16")
    again = AutoModelForCausalLM.from_pretrained(folded)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert (folded / "tokenizer.json").read_text() == "{}" and not (folded / "evil.py").exists()
    index = json.loads((folded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())
    with pytest.raises(FileExistsError):
        fold([load(adapter)], tmp_path / "base", folded)
    fold([load(adapter)], tmp_path / "base", folded, overwrite=True)
    with pytest.raises(FileExistsError, match="not just"):
        fold([load(adapter)], tmp_path / "base", tmp_path / "base", overwrite=True)


def test_a_checkpoint_without_the_models_prefix(tmp_path):
    torch.manual_seed(0)
    model = llama()
    model.model.save_pretrained(tmp_path / "base")  # no "model." in front
    adapter = made(model, CASES["llama-lora"][1], tmp_path / "a", 1)
    folded = Checkpoint(fold([load(adapter)], tmp_path / "base", tmp_path / "out"))
    weight = model.model.layers[0].self_attn.q_proj.weight
    update = load(adapter).modules["model.layers.0.self_attn.q_proj"].delta()
    assert torch.allclose(folded["layers.0.self_attn.q_proj.weight"], weight + update, atol=1e-6)


def simple(folder: Path, tensors: dict, config: dict | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


ONE = Factors(B=torch.ones(2, 1), A=torch.ones(1, 3))


def one(**config) -> Adapter:
    return Adapter({"peft_type": "LORA", **config}, {"h.0.fc": ONE})


WEIGHT = {"h.0.fc.weight": torch.ones(2, 3)}
REFUSED = [
    ({"h.0.gate.weight": torch.ones(2, 3)}, {}, one(), {}, AdapterMismatch, "h.0.fc.weight is not in the checkpoint"),
    ({"h.0.fc.weight": torch.ones(2, 4)}, {}, one(), {}, AdapterMismatch, "the update of h.0.fc is 2 x 3"),
    (WEIGHT, {"quantization_config": {"bits": 4}}, one(), {}, UnsupportedKind, "quantised"),
    ({"h.0.fc.weight": torch.ones(2, 3, dtype=torch.int8)}, {}, one(), {}, UnsupportedKind, "stored as I8"),
    (
        {"h.0.fc.weight": torch.full((2, 3), 65504.0).half()},
        {},
        one(),
        {"weights": [1e4]},
        ValueError,
        "not finite as F16",
    ),
    (WEIGHT, {}, one(init_lora_weights="pissa"), {}, UnsupportedKind, "pissa"),
    (WEIGHT, {}, one(), {"weights": [1.0, 2.0]}, ValueError, "2 weights for 1"),
    (WEIGHT, {}, one(), {"dtype": "int8"}, UnknownName, "allowed: fp64, fp32, fp16, bf16"),
    (WEIGHT, {}, one(), {"extras": "drop"}, UnknownName, "allowed: refuse, average"),
]


@pytest.mark.parametrize(("tensors", "config", "adapter", "options", "kind", "message"), REFUSED)
def test_fold_refuses_and_leaves_nothing(tensors, config, adapter, options, kind, message, tmp_path):
    base = simple(tmp_path / "base", tensors, config)
    with pytest.raises(kind, match=message):
        fold([adapter], base, tmp_path / "out", **options)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["base"]


def test_bad_checkpoints_are_refused(tmp_path):
    base = simple(tmp_path / "base", WEIGHT)
    index = base / "model.safetensors.index.json"
    for shard, message in (("../x.safetensors", "not a file of this folder"), ("gone.safetensors", "is not there")):
        index.write_text(json.dumps({"weight_map": {"h.0.fc.weight": shard}}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Checkpoint(base)
    index.write_text(json.dumps({"weight_map": {"h.1.fc.weight": "model.safetensors"}}))
    with pytest.raises(ValueError, match=r"h\.1\.fc\.weight is in none of the shards"):
        Checkpoint(base)
    index.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Checkpoint(base)
    index.unlink()
    raw = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(raw[:-4])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Checkpoint(base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UnsupportedKind, match="pickle"):
        Checkpoint(base)
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "nowhere")


def test_killed_in_the_middle_leaves_no_half_folder(tmp_path):
    base = simple(tmp_path / "base", {f"h.{n}.fc.weight": torch.ones(512, 512) for n in range(40)})
    part = Factors(B=torch.ones(512, 8), A=torch.ones(8, 512))
    save(Adapter({"peft_type": "LORA", "r": 8}, {f"h.{n}.fc": part for n in range(40)}), tmp_path / "a")
    script = (
        "import sys, loraloom as ll; print('go', flush=True); ll.fold([ll.load(sys.argv[1])], sys.argv[2], sys.argv[3])"
    )
    for moment in (0.3, 0.6, 1.0):
        command = [sys.executable, "-c", script, str(tmp_path / "a"), str(base), str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(moment)
            os.kill(process.pid, signal.SIGKILL)
        if (tmp_path / "out").exists():
            assert len(Checkpoint(tmp_path / "out")) == 40
            break
    else:
        fold([load(tmp_path / "a")], base, tmp_path / "out")


def test_memory_is_that_of_few_tensors(tmp_path):
    """256 MiB of weights in 4 shards are folded in far less memory than that."""
    base = tmp_path / "base"
    base.mkdir()
    where = {}
    for shard in range(4):
        held = {f"h.{4 * shard + n}.fc.weight": torch.ones(2048, 2048) for n in range(4)}
        save_file(held, base / f"m-{shard}.safetensors")
        where |= dict.fromkeys(held, f"m-{shard}.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    part = Factors(B=torch.ones(2048, 2), A=torch.ones(2, 2048))
    save(Adapter({"peft_type": "LORA", "r": 2}, {f"h.{n}.fc": part for n in range(16)}), tmp_path / "a")
    # VmHWM, not ru_maxrss: that of a child starts at the size of the process that started it
    script = (
        "import re, sys, loraloom as ll, loraloom.folding\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "a = ll.load(sys.argv[1]); before = peak(); ll.fold([a], sys.argv[2], sys.argv[3]); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a"), str(base), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 200, f"{grown} MiB"


# ---- extract ----


def test_extract_gives_back_what_was_folded_in(tmp_path):
    torch.manual_seed(0)
    for case in ("llama-lora", "gpt2-conv1d", "vit-conv"):
        model = CASES[case][0]()
        where = tmp_path / case
        model.save_pretrained(where / "base")
        adapter = load(made(model, CASES[case][1], where / "a", 1))
        tuned = fold([adapter], where / "base", where / "tuned")
        inner = [name for name in adapter.modules if any(part.isdecimal() for part in name.split("."))]
        rest = "ignore" if len(inner) < len(adapter.modules) else "refuse"
        again = extract(tuned, where / "base", rank=3, rest=rest)
        assert list(again.modules) == inner
        saved = load(save(again, where / "again"))
        for name in inner:
            assert torch.allclose(saved.modules[name].delta(), adapter.modules[name].delta(), atol=1e-5)
            assert again.provenance["record"]["error"][name] < 1e-4
        by_energy = extract(tuned, where / "base", energy=0.999999, rest=rest)
        assert {by_energy.shape(name).rank for name in inner} <= {1, 2, 3}
        if rest == "refuse":
            from peft import PeftModel

            wanted = output(type(model).from_pretrained(tuned))
            assert torch.allclose(output(PeftModel.from_pretrained(model, where / "again")), wanted, atol=1e-4)


def test_extract_and_the_rest(tmp_path):
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.1
        model.model.norm.weight += 0.5
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(AdapterMismatch, match=r"model\.norm\.weight"):
        extract(tmp_path / "tuned", tmp_path / "base")
    left = extract(tmp_path / "tuned", tmp_path / "base", rest="ignore", rank=1)
    assert left.provenance["record"]["ignored"] == ["model.norm.weight"] and not left.extras
    kept = extract(tmp_path / "tuned", tmp_path / "base", rest="keep", rank=1)
    assert kept.config["modules_to_save"] == ["model.norm"] and torch.equal(
        kept.extras["model.norm.weight"], model.model.norm.weight
    )
    only = extract(tmp_path / "tuned", tmp_path / "base", rest="ignore", modules="q_proj,v_proj")
    assert list(only.modules) == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(UnknownName, match="z_proj"):
        extract(tmp_path / "tuned", tmp_path / "base", modules="z_proj")
    with pytest.raises(ValueError, match="does not differ"):
        extract(tmp_path / "base", tmp_path / "base")
    with pytest.raises(ValueError, match="at most one"):
        extract(tmp_path / "tuned", tmp_path / "base", rank=1, energy=0.5)
    small = simple(tmp_path / "small", WEIGHT)
    with pytest.raises(AdapterMismatch, match="both models must have the same parameters"):
        extract(tmp_path / "tuned", small)


# ---- the base for DoRA, in merge ----


def test_dora_and_hira_merge_on_their_base_like_the_folded_models(tmp_path):
    torch.manual_seed(0)
    model = llama().double()
    model.save_pretrained(tmp_path / "base")
    for kind in ("llama-dora", "llama-hira"):
        a, b = (load(made(model, CASES[kind][1], tmp_path / f"{kind}{seed}", seed)) for seed in (1, 2))
        merged = merge([a, b], weights=[0.5, 0.5], base=base_weights(tmp_path / "base", a), rank=16)
        left = load_file(fold([merged], tmp_path / "base", tmp_path / f"{kind}-m") / "model.safetensors")
        right = load_file(
            fold([a, b], tmp_path / "base", tmp_path / f"{kind}-f", weights=[0.5, 0.5]) / "model.safetensors"
        )
        assert merged.kind == "lora" and all(torch.allclose(left[key], right[key], atol=1e-10) for key in left)


# ---- export ----


def accepted_by_vllm(folder: Path) -> None:
    """What vLLM's documentation says of its PEFT loader, in our own words."""
    config = json.loads((folder / "adapter_config.json").read_text())
    known = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora"}
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    assert config["r"] in (8, 16, 32, 64, 128, 256, 320, 512)
    assert not [key for key in ("rank_pattern", "alpha_pattern", "lora_bias", "layers_to_transform") if config.get(key)]
    assert known <= set(config)
    held = load_file(folder / "adapter_model.safetensors")
    for key, tensor in held.items():
        assert key.startswith("base_model.model.") and key.endswith(("lora_A.weight", "lora_B.weight"))
        assert tensor.shape[0 if "lora_A" in key else 1] == config["r"]


@pytest.mark.parametrize("case", ["llama-lora", "llama-rslora-patterns"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_export_for_vllm(case, dtype, tmp_path):
    torch.manual_seed(0)
    adapter = load(made(llama(), CASES[case][1], tmp_path / "a", 1))
    served = export(adapter, tmp_path / "served", dtype=dtype)
    accepted_by_vllm(served)
    config = json.loads((served / "adapter_config.json").read_text())
    held = load_file(served / "adapter_model.safetensors")
    for name in adapter.modules:
        a, b = (held[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        delta = config["lora_alpha"] / config["r"] * b @ a
        want = adapter.modules[name].delta().double()
        assert (delta - want).norm() <= (1e-6 if dtype is None else 0.02) * want.norm()


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("llama-dora", {}, "no dora"),
        ("llama-hira", {}, "no hira"),
        ("llama-bias-of-B", {}, "lora_bias"),
        ("llama-head", {}, "trained biases or whole modules"),
        ("llama-lora", {"max_rank": 4}, "rank 3 needs 8, and at most 4"),
        ("llama-lora", {"target": "sglang"}, "allowed: vllm"),
        ("llama-lora", {"dtype": "int4"}, "allowed: fp64, fp32, fp16, bf16"),
        ("bert-embedding", {}, "linear layers only"),
    ],
)
def test_export_refuses_with_the_remedy(case, options, message, tmp_path):
    adapter = load(made(CASES[case][0](), CASES[case][1], tmp_path / "a", 1))
    with pytest.raises(ValueError, match=message):
        export(adapter, tmp_path / "served", **options)
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
