"""Tiny random multimodal models of Transformers' own classes, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE, PADDING = 30, 31
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _made(make: Any, config: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config).eval()
        for parameter in model.parameters():  # initial values are so small that nothing would be seen
            parameter.data.normal_(0, 0.2)
        return model


def tiny_llava(seed: int = 0) -> nn.Module:
    """LLaVA whose image is 4 placeholder tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    return _made(LlavaForConditionalGeneration, config, seed)


def tiny_qwen_vl() -> nn.Module:
    """Qwen2.5-VL; an image of 1 x 4 x 4 patches is 4 placeholder tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 4,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        image_token_id=IMAGE,
        video_token_id=29,
        vision_start_token_id=28,
        vision_end_token_id=27,
    )
    return _made(Qwen2_5_VLForConditionalGeneration, config)


def tiny_qwen_audio() -> nn.Module:
    """Qwen2-Audio with a window of 16 mel frames, which are 4 placeholder tokens."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2Config
    from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig

    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=8,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=8,
        d_model=8,
        max_source_positions=8,
    )
    config = Qwen2AudioConfig(audio_config=audio, text_config=Qwen2Config(**TEXT), audio_token_index=IMAGE)
    return _made(Qwen2AudioForConditionalGeneration, config)


def tiny_whisper() -> nn.Module:
    """Whisper with a window of 16 mel frames."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=32,
        num_mel_bins=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        d_model=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=PADDING,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return _made(WhisperForConditionalGeneration, config)


def image_batch(rows: int = 2, text: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """One token, an image of four, and text: the last two tokens are the answer of ``labels``."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 26, (rows, 5 + text), generator=chance)
    ids[:, 1:5] = IMAGE
    labels = ids.clone()
    labels[:, :-2] = -100
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=chance),
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


def without(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """A batch less some of its inputs."""
    return {name: value for name, value in batch.items() if name not in names}


def lively(peft_model: nn.Module, seed: int = 1) -> nn.Module:
    """Adapters with values that can be seen (B starts at 0)."""
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=chance) * 0.3)
    return peft_model
