"""A small speech language model: Whisper tiny.en's encoder, a projector that is still to be trained, SmolLM2-135M."""

from __future__ import annotations

import json
from pathlib import Path

from loraloom.models import models
from loraloom.models.assembly import PLACEHOLDER, PLACEHOLDER_ID, assembled
from loraloom.models.smollm2 import PACKAGE as TEXT
from loraloom.models.smollm2 import smollm2_135m
from loraloom.models.whisper_tiny import PACKAGE as SPEECH
from loraloom.models.whisper_tiny import whisper_tiny_en

SECONDS = 2


@models.register(
    "speech-smollm2",
    paper="https://arxiv.org/abs/2507.08128",
    family="multimodal",
    licence="Apache-2.0, MIT",
    parameters=171_051_456,
    size="420 MB",
    package=f"{SPEECH.requirement}, {TEXT.requirement}",
)
def speech_smollm2() -> Path:
    """The architecture of Audio Flamingo 3 (Goel et al. 2025) with Whisper tiny.en's encoder and SmolLM2-135M.

    For speech of up to 2 seconds at 16 kHz; a token is 40 ms. Nothing in it has been trained together: the projector
    (two layers) is random. Train it first (``recipes/moka/speech-projector.yaml``), then adapters on top of that.
    """
    whisper = whisper_tiny_en()
    told = json.loads((whisper / "config.json").read_text())

    def encoder() -> dict:
        from safetensors.torch import load_file

        held = load_file(whisper / "model.safetensors")
        inside = "model.encoder."
        state = {
            f"model.audio_tower.{key.removeprefix(inside)}": v for key, v in held.items() if key.startswith(inside)
        }
        positions = "model.audio_tower.embed_positions.weight"
        return state | {positions: state[positions][: 50 * SECONDS]}

    audio = {
        "model_type": "audioflamingo3_encoder",
        "num_mel_bins": told["num_mel_bins"],
        "num_hidden_layers": told["encoder_layers"],
        "num_attention_heads": told["encoder_attention_heads"],
        "intermediate_size": told["encoder_ffn_dim"],
        "hidden_size": told["d_model"],
        "max_source_positions": 50 * SECONDS,
    }
    configuration = {
        "architectures": ["AudioFlamingo3ForConditionalGeneration"],
        "model_type": "audioflamingo3",
        "audio_config": audio,
        "audio_token_id": PLACEHOLDER_ID,
    }
    frames = json.loads((whisper / "preprocessor_config.json").read_text())
    frames |= {"chunk_length": SECONDS, "n_samples": 16_000 * SECONDS, "nb_max_frames": 100 * SECONDS}
    processor = {
        "preprocessor_config.json": frames,
        "processor_config.json": {"processor_class": "AudioFlamingo3Processor", "audio_token": PLACEHOLDER},
    }
    return assembled("speech-smollm2-1", smollm2_135m(), encoder, configuration, processor, told["d_model"])
