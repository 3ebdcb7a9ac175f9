"""Models by name: what a name stands for, the readers of foreign formats, and the light ones for real."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from loraloom.models import models, resolve
from loraloom.models.whisper_tiny import _renamed, _variables


def test_every_model_tells_its_facts() -> None:
    assert list(models) == [
        "llava-smollm2",
        "minilm-l6",
        "smollm2-135m",
        "speech-smollm2",
        "vit-s14",
        "whisper-tiny-en",
    ]
    families = {"causal", "encoder", "multimodal", "vision", "speech"}
    assert {models[name].facts["family"] for name in models} == families
    for name in models:
        facts = models[name].facts
        assert set(facts) == {"family", "licence", "parameters", "size", "package"}
        assert facts["parameters"] > 1e7
        assert "==" in facts["package"]
        assert models[name].paper.startswith("https://")


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve(str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert resolve("~/mine") == str(tmp_path / "mine")
    assert resolve("somebody/some-model") == "somebody/some-model"
    assert resolve("gpt2") == "gpt2"
    for path in (str(tmp_path / "none"), "./none", "~/none"):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            resolve(path)
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache/models/vit-s14-0.1.1"
    folder.mkdir(parents=True)
    assert resolve("vit-s14") == str(folder)


def ct2(arrays: dict[str, np.ndarray], specification: str = "WhisperSpec") -> io.BytesIO:
    """A CTranslate2 model file as its format's description has it."""
    numbers = {np.dtype("f4"): 0, np.dtype("i1"): 1, np.dtype("i2"): 2, np.dtype("i4"): 3, np.dtype("f2"): 4}

    def text(words: str) -> bytes:
        content = words.encode() + b"\0"
        return struct.pack("<H", len(content)) + content

    out = struct.pack("<I", 6) + text(specification) + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        shape = b"".join(struct.pack("<I", size) for size in array.shape)
        out += text(name) + struct.pack("<B", array.ndim) + shape
        out += struct.pack("<BI", numbers[array.dtype], array.nbytes) + array.tobytes()
    return io.BytesIO(out)


def test_ctranslate2_files() -> None:
    arrays = {
        "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.array(7, dtype=np.int8),
        "c": np.array([1.5], dtype=np.float32),
    }
    found = dict(_variables(ct2(arrays)))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="holds 'OtherSpec'"):
        list(_variables(ct2(arrays, "OtherSpec")))


def whisper_as_ct2(state: dict[str, torch.Tensor], layers: int) -> dict[str, np.ndarray]:
    """A Whisper of Transformers with CTranslate2's names: written down the other way round, one by one."""
    get = {name.removeprefix("model."): tensor.numpy() for name, tensor in state.items()}
    out = {"decoder/embeddings/weight": get["decoder.embed_tokens.weight"]}

    def norm(old: str, new: str) -> None:
        out[f"{new}/gamma"], out[f"{new}/beta"] = get[f"{old}.weight"], get[f"{old}.bias"]

    def linear(olds: list[str], new: str) -> None:
        weights = [get[f"{old}.weight"] for old in olds]
        biases = [get.get(f"{old}.bias", np.zeros(len(w), "f4")) for old, w in zip(olds, weights, strict=True)]
        out[f"{new}/weight"], out[f"{new}/bias"] = np.concatenate(weights), np.concatenate(biases)

    for conv in ("conv1", "conv2"):
        linear([f"encoder.{conv}"], f"encoder/{conv}")
    for side in ("encoder", "decoder"):
        out[f"{side}/position_encodings/encodings"] = get[f"{side}.embed_positions.weight"]
        norm(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers):
            old, new = f"{side}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{old}.self_attn_layer_norm", f"{new}/self_attention/layer_norm")
            linear([f"{old}.self_attn.{x}_proj" for x in "qkv"], f"{new}/self_attention/linear_0")
            linear([f"{old}.self_attn.out_proj"], f"{new}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{old}.encoder_attn_layer_norm", f"{new}/attention/layer_norm")
                linear([f"{old}.encoder_attn.q_proj"], f"{new}/attention/linear_0")
                linear([f"{old}.encoder_attn.{x}_proj" for x in "kv"], f"{new}/attention/linear_1")
                linear([f"{old}.encoder_attn.out_proj"], f"{new}/attention/linear_2")
            norm(f"{old}.final_layer_norm", f"{new}/ffn/layer_norm")
            linear([f"{old}.fc1"], f"{new}/ffn/linear_0")
            linear([f"{old}.fc2"], f"{new}/ffn/linear_1")
    return out


def test_whisper_there_and_back() -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    size = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(WhisperConfig(**size, **heads, **tokens))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "proj_out.weight"}
    found = dict(_renamed(whisper_as_ct2(state, layers=2)))
    assert sorted(found) == sorted(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


def test_a_missing_reader_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from loraloom.models import smollm2, vit_s14

    for module, needed in ((smollm2, "gguf"), (vit_s14, "onnx")):
        monkeypatch.setitem(sys.modules, needed, None)
        with pytest.raises(ValueError, match=rf"needs the package {needed} .* pip install 'loraloom\[bundled\]'"):
            module._convert(tmp_path, tmp_path)


@pytest.mark.real
def test_vit_for_real() -> None:
    from safetensors import safe_open
    from transformers import AutoImageProcessor, AutoModel

    folder = Path(resolve("vit-s14"))
    model, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == models["vit-s14"].facts["parameters"]
    record = json.loads((folder / "loraloom-source.json").read_text())
    assert record["files"]["model.safetensors"].startswith("8b38fc0f3652d5a3")  # conversion is deterministic
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert stored.get_tensor("embeddings.position_embeddings").shape == (1, 1 + 37 * 37, 384)
    ramp = np.linspace(0, 255, 64 * 80 * 3).reshape(64, 80, 3).astype(np.uint8)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[ramp], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(pixels).last_hidden_state).all()


@pytest.mark.real
def test_minilm_for_real() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = resolve("minilm-l6")
    model, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == models["minilm-l6"].facts["parameters"]
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell."]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert abs(float(vectors[0] @ vectors[1]) - 0.761) < 0.01
    assert abs(float(vectors[0] @ vectors[2])) < 0.1


def beside_smollm2(name: str) -> tuple:
    """A model that is put together, its processor and a batch of text, on which it must be SmolLM2 itself."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    from loraloom.integrations.backbones import load_backbone

    backbone = load_backbone(name)
    assert sum(parameter.numel() for parameter in backbone.model.parameters()) == models[name].facts["parameters"]
    assert type(backbone.processor) is type(AutoProcessor.from_pretrained(resolve(name)))
    words = backbone.processor.tokenizer(["The capital of France is"], return_tensors="pt")
    alone = AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m"), dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone.model(**words).logits, alone(**words).logits)
    return backbone.model, backbone.processor


@pytest.mark.real
def test_llava_smollm2_for_real() -> None:
    from safetensors import safe_open

    model, processor = beside_smollm2("llava-smollm2")
    with safe_open(Path(resolve("vit-s14")) / "model.safetensors", "pt") as stored:
        live = model.state_dict()
        for key in ("embeddings.position_embeddings", "encoder.layer.11.mlp.fc2.weight"):
            assert torch.equal(live[f"model.vision_tower.{key}"], stored.get_tensor(key))
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    batch = processor(text=["<filename> What is it?"], images=[[picture]], return_tensors="pt")
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 9
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"]).pooler_output[0]
        assert torch.isfinite(model(**batch).logits).all()
    spread = float(features.std() / model.get_input_embeddings().weight.std())
    assert 0.1 < spread < 10  # what stands beside words is of their size before anything is trained


@pytest.mark.real
def test_speech_smollm2_for_real() -> None:
    from safetensors import safe_open

    model, processor = beside_smollm2("speech-smollm2")
    with safe_open(Path(resolve("whisper-tiny-en")) / "model.safetensors", "pt") as stored:
        tower = model.model.audio_tower
        assert torch.equal(tower.layers[3].fc2.weight, stored.get_tensor("model.encoder.layers.3.fc2.weight").float())
        positions = stored.get_tensor("model.encoder.embed_positions.weight").float()
        assert torch.equal(tower.embed_positions.weight, positions[:100])
    clip = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    batch = processor(text=["<filename> Transcript:"], audio=[clip], sampling_rate=16_000, return_tensors="pt")
    assert int((batch["input_ids"] == model.config.audio_token_id).sum()) == 25  # a second, 40 ms a token
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
