"""export: a small statement of what vLLM's loader does, and that it gets the same updates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from loraloom import serving
from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.registry import UnknownName
from loraloom.safefile import FLOATS
from loraloom.serving import export
from loraloom.store import load, save

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(2, 14).view(2, 6)
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}


def loaded_by_vllm(folder: Path, most: int = 512) -> dict[str, Tensor]:
    """What vLLM (0.11 to 0.12, lora/peft_helper.py, lora_model.py and utils.py) makes of a folder: updates by module.

    It knows seven fields, one scale for all modules, and no name but those of factors.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    known = ("r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora")
    seen = {key: config[key] for key in known if key in config}
    assert {"r", "lora_alpha", "target_modules"} <= set(seen)
    assert not seen.get("modules_to_save") and not seen.get("use_dora") and seen.get("bias", "none") == "none"
    assert isinstance(seen["r"], int) and seen["r"] <= most
    scale = seen["lora_alpha"] / (seen["r"] ** 0.5 if seen.get("use_rslora") else seen["r"])
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        names = key.removeprefix("base_model.model.").split(".")
        if names[-1] == "weight" and names[-2] in ("lora_A", "lora_B"):
            module, part = names[:-2], names[-2][-1]
        elif names[-1] in ("lora_embedding_A", "lora_embedding_B"):
            module, part = names[:-1], names[-1][-1]
        else:
            raise AssertionError(f"{key} is unsupported")
        assert module[-1] in LINEARS
        parts.setdefault(".".join(module), {})[part] = tensor.double()
    for part in parts.values():
        assert part["A"].shape[0] == part["B"].shape[1] == seen["r"]
    return {name: scale * part["B"] @ part["A"] for name, part in parts.items()}


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def trained(folder: Path, config: Any) -> Adapter:
    torch.manual_seed(1)
    wrapped = get_peft_model(llama(), config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) if "lora_" in name else parameter + 0.1
    wrapped.save_pretrained(folder)
    return load(folder)


def lora(*targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": list(targets), **more})


GOOD = {
    "plain": lora("q_proj", "down_proj"),
    "rslora": lora("q_proj", use_rslora=True),
    "patterns": lora("q_proj", "v_proj", rank_pattern={"v_proj": 11}, alpha_pattern={"layers.0.self_attn.v_proj": 2}),
    "some layers": lora("q_proj", layers_to_transform=[1]),
    "regular expression": lora(target_modules=r".*\.1\..*(up|down)_proj"),
    "head": lora("q_proj", "lm_head"),  # PEFT stores the head's frozen weight too, which vLLM skips
    "embedding": lora("embed_tokens", "q_proj"),
}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("dtype", [None, "bf16", "fp16", "fp64"])
def test_vllm_gets_the_same_updates(case, dtype, tmp_path):
    adapter = trained(tmp_path / "a", GOOD[case])
    out = export(adapter, tmp_path / "out", dtype=dtype, command="loraloom export")
    got = loaded_by_vllm(out)
    assert sorted(got) == sorted(adapter.modules)
    for name, delta in got.items():
        wanted = adapter.modules[name].delta().double()
        most = 2e-2 if dtype == "bf16" else 2e-3 if dtype == "fp16" else 1e-6
        assert (delta - wanted).norm() <= most * wanted.norm()
    if dtype is not None:
        stored = {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()}
        assert stored == {FLOATS[dtype]}
    record = json.loads((out / "loraloom.json").read_text())
    assert record["operation"] == "export" and record["command"] == "loraloom export"
    assert record["inputs"][0]["sha256"] and (out / "README.md").read_text().startswith("---")


def test_peft_reads_the_exported_adapter_too(tmp_path):
    adapter = trained(tmp_path / "a", GOOD["patterns"])
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()(IDS).logits
        for target in ("vllm", "peft"):
            out = export(adapter, tmp_path / target, target=target)
            got = PeftModel.from_pretrained(llama(), out).eval()(IDS).logits
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        GOOD["patterns"],
        GOOD["rslora"],
        lora("q_proj", use_dora=True),
        lora("q_proj", lora_bias=True),
        lora("q_proj", modules_to_save=["lm_head"]),
        lora("v_proj", r=2, lora_alpha=2, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 4}),
        HiraConfig(r=2, target_modules=["q_proj"]),
    ],
)
def test_any_kind_for_readers_that_know_r_and_alpha(config, tmp_path):
    adapter = trained(tmp_path / "a", config)
    out = export(adapter, tmp_path / "out", target="peft")
    held = load(out)
    assert held.kind == adapter.kind and list(held.extras) == list(adapter.extras)
    if adapter.kind != "hira":
        assert held.config["lora_alpha"] == held.config["r"] and not held.config["use_rslora"]
        assert not held.config["rank_pattern"] and not held.config["alpha_pattern"]
        assert {part.rank for part in held.modules.values()} == {held.config["r"]}
    with torch.no_grad():
        left, right = (PeftModel.from_pretrained(llama(), at).eval()(IDS).logits for at in (tmp_path / "a", out))
    torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------
BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "dora": (lora("q_proj", use_dora=True), {}, UnsupportedKind, "no dora adapters; fold it"),
    "hira": (HiraConfig(r=2, target_modules=["q_proj"]), {}, UnsupportedKind, "no hira adapters; fold it"),
    "bias of B": (lora("q_proj", lora_bias=True), {}, UnsupportedKind, r"\(lora_bias\); fold"),
    "biases": (lora("q_proj", bias="all"), {}, UnsupportedKind, "fold"),
    "whole": (lora("q_proj", modules_to_save=["norm"]), {}, UnsupportedKind, r"norm\.weight.*fold"),
    "whole head": (lora("q_proj", modules_to_save=["lm_head"]), {}, UnsupportedKind, r"lm_head\.weight.*fold"),
    "rank": (lora("q_proj"), {"max_rank": 2}, ValueError, "compress it first"),
    "target": (lora("q_proj"), {"target": "vlm"}, UnknownName, "did you mean 'vllm'"),
    "dtype": (lora("q_proj"), {"dtype": "fp8"}, UnknownName, "allowed: fp64, fp32, fp16, bf16"),
    "peft rank": (lora("q_proj"), {"max_rank": 2, "target": "peft"}, ValueError, "rank 3 is above 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_vllm_would_refuse_is_refused_here(case, tmp_path):
    config, options, kind, message = BAD[case]
    if case == "biases":
        adapter = trained(tmp_path / "a", lora("q_proj"))
        adapter = replace(adapter, extras={"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    else:
        adapter = trained(tmp_path / "a", config)
    with pytest.raises(kind, match=message):
        export(adapter, tmp_path / "out", **options)
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def factors(rank: int, **more: Any) -> Factors:
    return Factors(torch.ones(4, rank), torch.ones(rank, 4), **more)


def test_ranks_and_layers_that_vllm_has_no_place_for(tmp_path):
    with pytest.raises(ValueError, match="rank 513 needs more, and at most 512 is allowed"):
        export(Adapter({}, {"h.0.q": factors(513)}), tmp_path / "out")
    for name, part in (("h.0.conv", factors(1, kernel=(2, 2))), ("h.0.wte", factors(1, embedding=True))):
        with pytest.raises(UnsupportedKind, match=f"{name}: .*linear layers only"):
            export(Adapter({"peft_type": "LORA"}, {name: part}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- verified before it appears ---------------------------------------------------------------------------------------
def plain(scale: float = 1.0) -> Adapter:
    return Adapter({"peft_type": "LORA", "r": 2}, {"h.0.q_proj": factors(2, scale=scale)})


def test_numbers_that_the_type_cannot_hold(tmp_path):
    for small, message in ((1e-9, "try fp32 or bf16"), (1e9, "NaN or inf")):
        with pytest.raises(ValueError, match=message):
            export(plain(small), tmp_path / "out", dtype="fp16")
        assert export(plain(small), tmp_path / f"{small}", dtype="bf16").is_dir()
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("fault", ["B", "A", "rank", "field", "module", "noise"])
def test_a_wrong_export_never_appears(fault, tmp_path, monkeypatch):
    """Whatever goes wrong in writing is seen on reading back, and the old folder stays."""
    wrong = {
        "B": lambda a: {"modules": {"h.0.q_proj": replace(a.modules["h.0.q_proj"], B=torch.zeros(4, 8))}},
        "A": lambda a: {"modules": {"h.0.q_proj": replace(a.modules["h.0.q_proj"], A=-a.modules["h.0.q_proj"].A)}},
        "rank": lambda a: {"modules": {"h.0.q_proj": factors(4)}},
        "field": lambda a: {"config": {**a.config, "exclude_modules": ["x"], "layer_count": 3}},
        "module": lambda a: {"modules": {"h.1.q_proj": a.modules["h.0.q_proj"]}},
        "noise": lambda a: {
            "modules": {"h.0.q_proj": replace(a.modules["h.0.q_proj"], A=a.modules["h.0.q_proj"].A + 1e-5)}
        },
    }[fault]
    before = export(plain(), tmp_path / "out")
    kept = (before / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(
        serving, "save", lambda adapter, *given, **more: save(replace(adapter, **wrong(adapter)), *given, **more)
    )
    for overwrite, name in ((True, "out"), (False, "new")):
        with pytest.raises(AdapterMismatch, match="exported"):
            export(plain(), tmp_path / name, overwrite=overwrite)
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert (before / "adapter_model.safetensors").read_bytes() == kept


def test_paths_that_are_taken(tmp_path):
    out = export(plain(), tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(plain(), out)
    assert export(plain(3.0), out, overwrite=True) == out
    assert float(load(out).modules["h.0.q_proj"].delta().max()) == 6.0
    assert sorted(item.name for item in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loraloom.json",
    ]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("all my work")
    with pytest.raises(FileExistsError, match="not just an adapter folder"):
        export(plain(), tmp_path / "home", overwrite=True)
