"""What PEFT writes we read; what we write PEFT reads; a live model is left as it was."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loraloom.adapter import Adapter, AdapterMismatch, UnsupportedKind
from loraloom.integrations.peft import attached, from_model
from loraloom.store import load, save
from tiny import Convs, tiny_llama

# PEFT 0.21 asks Transformers 5.23 for a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = torch.arange(12).reshape(2, 6)


def _drawn(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return _drawn(GPT2LMHeadModel(config), 1)


def convs() -> nn.Module:
    return _drawn(Convs(), 2)


def classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config.pad_token_id = 0
    return _drawn(LlamaForSequenceClassification(config), 3)


@dataclass(frozen=True)
class Kind:
    config: Any
    base: Any = tiny_llama
    dtype: torch.dtype = torch.float32


ATTENTION = ["q_proj", "v_proj", "down_proj"]


def _lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": list(ATTENTION), **more})


KINDS = {
    "lora": lambda: Kind(_lora(task_type="CAUSAL_LM")),
    "rslora": lambda: Kind(_lora(use_rslora=True)),
    "patterns": lambda: Kind(
        _lora(
            rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 3},
            alpha_pattern={"0.self_attn.q_proj": 7, "down_proj": 1},
        )
    ),
    "patterns-rslora": lambda: Kind(
        _lora(use_rslora=True, rank_pattern={"^model.layers.1.mlp.down_proj": 3}, alpha_pattern={"v_proj": 5})
    ),
    "layers": lambda: Kind(_lora(layers_to_transform=[1], exclude_modules=["v_proj"])),
    "regex": lambda: Kind(_lora(target_modules=r".*\.1\..*(q|o)_proj")),
    "lora-bias": lambda: Kind(_lora(lora_bias=True, target_modules=["q_proj", "v_proj"])),
    "bias-all": lambda: Kind(_lora(bias="all")),
    "bias-all-beside-saved": lambda: Kind(
        _lora(bias="all", target_modules=["conv1", "conv2"], modules_to_save=["head"]), convs
    ),
    "bias-only": lambda: Kind(_lora(bias="lora_only")),
    "modules-to-save": lambda: Kind(_lora(modules_to_save=["lm_head", "norm"])),
    "sequence-classification": lambda: Kind(_lora(task_type="SEQ_CLS"), classifier),
    "dora": lambda: Kind(_lora(use_dora=True)),
    "hira": lambda: Kind(HiraConfig(r=4, target_modules=list(ATTENTION))),
    "conv": lambda: Kind(_lora(target_modules=["conv1", "conv2", "point", "head"], rank_pattern={"conv2": 2}), convs),
    "conv-dora": lambda: Kind(_lora(target_modules=["conv2", "point"], use_dora=True), convs),
    "conv-hira": lambda: Kind(HiraConfig(r=2, target_modules=["conv1", "conv2", "head"]), convs),
    "embedding": lambda: Kind(_lora(target_modules=["embed", "head"], use_rslora=True), convs),
    "embedding-dora": lambda: Kind(_lora(target_modules=["embed", "head"], use_dora=True), convs),
    "embedding-hira": lambda: Kind(HiraConfig(r=2, target_modules=["embed", "head"]), convs),
    "embedding-llama": lambda: Kind(_lora(target_modules=["embed_tokens", "q_proj"])),
    "fan-in-fan-out": lambda: Kind(_lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), tiny_gpt2),
    "dora-fan-in-fan-out": lambda: Kind(
        _lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True), tiny_gpt2
    ),
    "bf16": lambda: Kind(_lora(), dtype=torch.bfloat16),
    "fp16": lambda: Kind(_lora(use_rslora=True), dtype=torch.float16),
    "gaussian": lambda: Kind(_lora(init_lora_weights="gaussian")),
    "mica": lambda: Kind(_lora(init_lora_weights="mica")),
    "orthogonal": lambda: Kind(_lora(init_lora_weights="orthogonal")),
}


def trained(kind: Kind, seed: int = 5) -> PeftModel:
    """A PeftModel as if trained: every trainable number drawn; magnitudes and norms near what they were."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(kind.base(), kind.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape) * 0.2
                near = "magnitude" in name or "modules_to_save" in name or "lora_" not in name
                parameter.copy_(parameter * (1 + noise * 0.5) if near and "hira_" not in name else noise)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and kind.dtype != torch.float32:
            for part in (module.lora_A, module.lora_B):
                part.to(kind.dtype)
    return model.eval()


def saved(model: PeftModel, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def reloaded(base: nn.Module, path: Path, **more: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, path, **more).eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result = model(IDS)
    return result if isinstance(result, Tensor) else result.logits


def live_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    base = model.get_base_model()
    return {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}


def same(a: Adapter, b: Adapter) -> bool:
    for name in a.modules:
        f, g = a.modules[name], b.modules[name]
        parts = [(f.A, g.A), (f.B, g.B), (f.bias, g.bias), (f.magnitude, g.magnitude)]
        if any((x is None) != (y is None) or (x is not None and not torch.equal(x, y)) for x, y in parts):
            return False
        if (f.scale, f.kernel, f.embedding, f.dtype) != (g.scale, g.kernel, g.embedding, g.dtype):
            return False
    extras = all(torch.equal(a.extras[path], b.extras[path]) for path in a.extras)
    return extras and list(a.modules) == list(b.modules) and list(a.extras) == list(b.extras)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]()


def test_round_trip(kind: Kind, tmp_path: Path) -> None:
    model = trained(kind)
    wanted = outputs(model) if kind.dtype == torch.float32 else None
    adapter = load(saved(model, tmp_path / "theirs"))
    layers = live_layers(model)
    assert sorted(adapter.modules) == sorted(layers) and layers
    for name, layer in layers.items():
        factors = adapter.modules[name]
        assert factors.shape == adapter.shape(name)
        assert factors.scale == getattr(layer, "scaling", {"default": 1.0})["default"]
        assert factors.dtype == kind.dtype
        theirs = layer.get_delta_weight("default").float()
        ours = (
            factors.delta() if kind.dtype == torch.float32 else factors.scale * (factors.B.float() @ factors.A.float())
        )
        ours = ours.T if factors.embedding or getattr(layer, "fan_in_fan_out", False) else ours
        torch.testing.assert_close(
            ours.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-5 if wanted is not None else 2e-2
        )
    save(adapter, tmp_path / "ours")
    if wanted is None:
        wanted = outputs(reloaded(kind.base(), tmp_path / "theirs"))
    assert not torch.equal(wanted, outputs(kind.base()))
    assert torch.equal(outputs(reloaded(kind.base(), tmp_path / "ours")), wanted)
    assert torch.equal(outputs(reloaded(kind.base(), tmp_path / "ours", low_cpu_mem_usage=True)), wanted)
    # an exact copy: tensors byte for byte, and the configuration as PEFT wrote it
    assert same(adapter, load(tmp_path / "ours"))
    files = [(tmp_path / who / "adapter_config.json").read_text() for who in ("theirs", "ours")]
    assert json.loads(files[0]) == json.loads(files[1])
    with attached(kind.base(), adapter) as live:
        assert torch.equal(outputs(live), wanted)


def test_changed_adapter(kind: Kind, tmp_path: Path) -> None:
    """Half the modules, each with a scale of its own: baked and named one by one, as PEFT reads it."""
    adapter = load(saved(trained(kind), tmp_path / "theirs"))
    names = list(adapter.modules)[::2]
    weights = {name: 0.5 + 0.25 * i for i, name in enumerate(names)}
    fewer = {name: adapter.modules[name].scaled(weights[name]) for name in names}
    changed = replace(adapter, modules=fewer, provenance={"operation": "test", "inputs": [adapter.provenance]})
    save(changed, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert list(again.modules) == names
    config = again.config
    if config["peft_type"] == "LORA":
        assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
        assert not config["use_rslora"]
    for name in names:
        assert again.modules[name].scale == 1.0
        torch.testing.assert_close(
            again.modules[name].delta(),
            fewer[name].delta(),
            rtol=2e-2 if kind.dtype != torch.float32 else 1e-5,
            atol=1e-2 if kind.dtype != torch.float32 else 1e-5,
        )
    model = reloaded(kind.base(), tmp_path / "ours")
    assert sorted(live_layers(model)) == sorted(names)
    with attached(kind.base(), changed) as live:
        assert torch.equal(outputs(live), outputs(model))


def test_from_model_is_save_and_load(kind: Kind, tmp_path: Path) -> None:
    model = trained(kind)
    snapshot = from_model(model)
    adapter = load(saved(model, tmp_path / "theirs"))
    assert same(snapshot, adapter)

    def plain(config: Any) -> dict:
        return {k: sorted(v) if isinstance(v, list) else v for k, v in config.items()}

    assert plain(snapshot.config) == plain(adapter.config)
    with torch.no_grad():  # a snapshot: later training does not reach it
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert same(snapshot, adapter)


def test_from_model_has_every_layer_of_those_in_a_checkpoint_wrapper_of_torch() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    live = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    plain = from_model(live)
    layers = live.get_base_model().model.layers
    layers[1] = checkpoint_wrapper(layers[1])
    live.get_base_model().model.norm = checkpoint_wrapper(live.get_base_model().model.norm)
    wrapped = from_model(live)
    assert list(wrapped.modules) == list(plain.modules) and [*wrapped.extras] == [*plain.extras] != []
    assert all(torch.equal(wrapped.modules[name].A, one.A) for name, one in plain.modules.items())


def test_from_model_chooses_the_adapter() -> None:
    model = get_peft_model(tiny_llama(), _lora())
    model.add_adapter("other", _lora(r=2, target_modules=["o_proj"]))
    other = from_model(model, "other")
    assert [other.shape(name).rank for name in other.modules] == [2, 2]
    assert all(name.endswith("o_proj") for name in other.modules)
    with pytest.raises(ValueError, match="no adapter 'third' in the model; it has: default, other"):
        from_model(model, "third")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_residual_starts(start: str, tmp_path: Path) -> None:
    """Converted by PEFT they are ordinary LoRA of the unchanged base; raw they are refused, with the way out."""
    base = tiny_llama()
    model = get_peft_model(base, _lora(init_lora_weights=start))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's own conversion asks for the initial adapter
    saved(model, tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    wanted = outputs(model)
    for refused in (lambda: load(saved(model, tmp_path / "raw")), lambda: from_model(model)):
        with pytest.raises(UnsupportedKind, match="path_initial_model_for_weight_conversion"):
            refused()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = load(tmp_path / "plain")
    assert {adapter.shape(name).rank for name in adapter.modules} == {8}
    save(adapter, tmp_path / "ours")
    got = outputs(reloaded(tiny_llama(), tmp_path / "ours"))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# --- attached ---------------------------------------------------------------------------------------------------------
def state(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {n: (id(p), p.clone(), p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        "modules": {
            n: (id(m), m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.named_modules()
        },
        "config": str(getattr(model, "config", None)),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modules"] == after["modules"] and before["config"] == after["config"]
    for part in ("parameters", "buffers"):
        assert list(before[part]) == list(after[part])
        for name, (identity, value, *flags) in before[part].items():
            assert (identity, flags) == (after[part][name][0], list(after[part][name][2:]))
            assert torch.equal(value, after[part][name][1])


@pytest.mark.parametrize("training", [False, True])
def test_attached_leaves_nothing_behind(kind: Kind, training: bool, tmp_path: Path) -> None:
    adapter = load(saved(trained(kind), tmp_path / "theirs"))
    base = kind.base().train(training)
    next(base.parameters()).requires_grad_(False)
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable()
    before, random = state(base), torch.random.get_rng_state()
    with attached(base, adapter) as model:
        assert isinstance(model, PeftModel) and not model.training
        assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert_same_state(before, state(base))
    with pytest.raises(KeyboardInterrupt), attached(base, adapter):
        raise KeyboardInterrupt
    assert_same_state(before, state(base))
    with attached(base, adapter) as again:  # and it can be used again
        outputs(again)
    assert_same_state(before, state(base))


def test_attached_none_is_the_base(llama: nn.Module) -> None:
    before = state(llama)
    with attached(llama, None) as model:
        assert model is llama
    assert_same_state(before, state(llama))


def test_attached_refuses_what_does_not_fit(tmp_path: Path) -> None:
    adapter = load(saved(trained(Kind(_lora())), tmp_path / "theirs"))
    small, deep = tiny_llama(layers=1), convs()
    for model, message in (
        (small, "module model.layers.1.mlp.down_proj is not in the model"),
        (deep, "module model.layers.0.mlp.down_proj is not"),
    ):
        before = state(model)
        with pytest.raises(AdapterMismatch, match=message), attached(model, adapter):
            pass
        assert_same_state(before, state(model))
    wrong = Adapter(adapter.config, {**adapter.loaded().modules})
    name = next(iter(wrong.modules))
    wrong.modules[name] = replace(wrong.modules[name], A=torch.ones(4, 99))  # type: ignore[index]
    model = tiny_llama()
    before = state(model)
    with pytest.raises(AdapterMismatch, match=name) as caught, attached(model, wrong):
        pass
    assert "\n" not in str(caught.value)
    assert_same_state(before, state(model))


def test_attached_refuses_extras_without_a_place(llama: nn.Module, tmp_path: Path) -> None:
    adapter = load(saved(trained(Kind(_lora())), tmp_path / "theirs"))
    lost = Adapter(adapter.config, adapter.modules, {"model.nowhere.weight": torch.ones(2)}, adapter.provenance)
    with pytest.raises(AdapterMismatch, match=r"model\.nowhere\.weight is only in the adapter"), attached(llama, lost):
        pass
    missing = Adapter({**adapter.config, "modules_to_save": ["lm_head"]}, adapter.modules, {}, adapter.provenance)
    before = state(llama)
    with pytest.raises(AdapterMismatch, match="lm_head"), attached(llama, missing):
        pass
    assert_same_state(before, state(llama))


def test_attached_refuses_a_model_with_adapters() -> None:
    model = get_peft_model(tiny_llama(), _lora())
    with pytest.raises(ValueError, match="already has adapters"), attached(model, from_model(model)):
        pass


def test_many_modules_named_one_by_one(tmp_path: Path) -> None:
    """PEFT shortens lists of 20 and more targets; what it makes of ours must be the same modules."""
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = trained(Kind(_lora(target_modules=everything), base=lambda: tiny_llama(layers=12)))
    adapter = load(saved(model, tmp_path / "theirs"))
    kept = {name: adapter.modules[name] for i, name in enumerate(adapter.modules) if i % 12 not in (1, 5, 6)}
    assert len(kept) > 20
    save(replace(adapter, modules=kept), tmp_path / "ours")
    assert sorted(live_layers(reloaded(tiny_llama(layers=12), tmp_path / "ours"))) == sorted(kept)


def test_a_top_level_name_is_not_taken_for_a_deeper_one(tmp_path: Path) -> None:
    base = lambda: _drawn(nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12))), 4)  # noqa: E731
    model = get_peft_model(base(), _lora(target_modules=["0"]))
    adapter = from_model(model)
    assert list(adapter.modules) == ["0", "1.0"]
    save(Adapter(adapter.config, {"0": adapter.modules["0"]}), tmp_path / "ours")
    assert list(live_layers(reloaded(base(), tmp_path / "ours"))) == ["0"]


def test_rslora_scale_is_the_paper_s() -> None:
    model = get_peft_model(tiny_llama(), _lora(r=9, lora_alpha=3, use_rslora=True))
    scales = {from_model(model).modules[name].scale for name in from_model(model).modules}
    assert scales == {3 / math.sqrt(9)}


def test_hira_has_one_rank(tmp_path: Path) -> None:
    """PEFT 0.21 does not heed HiRA's rank_pattern: such folders are read, and written so that every PEFT agrees."""
    model = trained(Kind(HiraConfig(r=4, target_modules=list(ATTENTION), rank_pattern={"q_proj": 2})))
    adapter = load(saved(model, tmp_path / "theirs"))
    save(adapter, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert (again.config["r"], again.config["rank_pattern"]) == (4, {})
    assert torch.equal(outputs(reloaded(tiny_llama(), tmp_path / "ours")), outputs(model))
    name = next(iter(adapter.modules))
    full = adapter.modules[name]
    mixed = {**adapter.modules, name: replace(full, A=full.A[:2], B=full.B[:, :2])}
    with pytest.raises(UnsupportedKind, match=r"HiRA modules of different ranks \[2, 4\]"):
        save(replace(adapter, modules=mixed), tmp_path / "mixed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_on_a_base_of_16_bits_factors_of_32_are_not_rounded(tmp_path: Path) -> None:
    live = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    _drawn(live, 4).save_pretrained(tmp_path)
    want = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path)
    with attached(tiny_llama().bfloat16(), load(tmp_path)) as got:
        pairs = zip(want.state_dict().items(), got.state_dict().items(), strict=True)
        assert [name for (name, one), (_, other) in pairs if not torch.equal(one, other)] == []
