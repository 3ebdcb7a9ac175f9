"""Tiny random multimodal models of Transformers' own classes, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, PADDING = 30, 31
VIDEO, AUDIO = 29, 26
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


_ROPE = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_MARKERS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 28, "vision_end_token_id": 27}
_PATCHES = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
_WINDOWS = {**_PATCHES, "intermediate_size": 16, "out_hidden_size": 16, "fullatt_block_indexes": [1], "window_size": 16}


def tiny_qwen_vl() -> nn.Module:
    """Qwen2.5-VL; an image of 1 x 4 x 4 patches is 4 placeholder tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": _ROPE}, vision_config=_WINDOWS, **_MARKERS)
    return _made(Qwen2_5_VLForConditionalGeneration, config)


def tiny_qwen2_vl() -> nn.Module:
    """Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {**_PATCHES, "embed_dim": 16, "mlp_ratio": 1}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": _ROPE}, vision_config=vision, **_MARKERS)
    return _made(Qwen2VLForConditionalGeneration, config)


def tiny_qwen3_vl() -> nn.Module:
    """Qwen3-VL, whose vision features enter some decoder layers too."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {**_PATCHES, "intermediate_size": 16, "out_hidden_size": 16, "num_position_embeddings": 16}
    text = {**TEXT, "head_dim": 8, "rope_parameters": _ROPE}
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, **_MARKERS)
    return _made(Qwen3VLForConditionalGeneration, config)


def _siglip(**options: Any) -> Any:
    from transformers import SiglipVisionConfig

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SiglipVisionConfig(**small, image_size=8, patch_size=4, vision_use_head=False, **options)


def tiny_llava_next() -> nn.Module:
    """LLaVA-Next; an image is 4 tokens, 4 of its one tile and 2 ends of line."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 8]],
    )
    return _made(LlavaNextForConditionalGeneration, config)


def tiny_gemma3() -> nn.Module:
    """Gemma3: image tokens see each other both ways, a layer with a sliding window, ``token_type_ids``."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"]
    text = Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=8, layer_types=layers)
    config = Gemma3Config(
        vision_config=_siglip(),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=28,
        eoi_token_index=27,
    )
    return _made(Gemma3ForConditionalGeneration, config)


def tiny_paligemma() -> nn.Module:
    """PaliGemma, whose ``token_type_ids`` tell the answer, not the image."""
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config=_siglip(projection_dim=16),
        text_config=GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=16,
    )
    return _made(PaliGemmaForConditionalGeneration, config)


def tiny_flamingo() -> nn.Module:
    """Audio Flamingo 3 with a window of 16 mel frames, which are 4 placeholder tokens."""
    from transformers import (
        AudioFlamingo3Config,
        AudioFlamingo3EncoderConfig,
        AudioFlamingo3ForConditionalGeneration,
        Qwen2Config,
    )

    audio = AudioFlamingo3EncoderConfig(
        num_mel_bins=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        hidden_size=8,
        max_source_positions=8,
    )
    config = AudioFlamingo3Config(audio_config=audio, text_config=Qwen2Config(**TEXT), audio_token_id=AUDIO)
    return _made(AudioFlamingo3ForConditionalGeneration, config)


def tiny_omni() -> nn.Module:
    """The thinker of Qwen2.5-Omni: images, video and audio."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    audio = {
        "d_model": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "n_window": 4,
        "output_dim": 16,
    }
    config = Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        vision_config=_WINDOWS,
        text_config={**TEXT, "rope_parameters": _ROPE},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=28,
        vision_end_token_id=27,
        audio_start_token_id=25,
        audio_end_token_id=24,
    )
    return _made(Qwen2_5OmniThinkerForConditionalGeneration, config)


def tiny_llama() -> nn.Module:
    """A language model of text alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _made(LlamaForCausalLM, LlamaConfig(**TEXT))


def tiny_moe() -> nn.Module:
    """Qwen2-MoE: its expert blocks see the tokens of all rows in one dimension."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return _made(Qwen2MoeForCausalLM, Qwen2MoeConfig(**TEXT, **sizes, num_experts_per_tok=2))


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
    config = Qwen2AudioConfig(audio_config=audio, text_config=Qwen2Config(**TEXT), audio_token_index=AUDIO)
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


def _ids(media: list[int], rows: int = 2, text: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """One token, the placeholders, and text: the last two tokens are the answer of ``labels``."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 24, (rows, 1 + len(media) + text), generator=chance)
    ids[:, 1 : 1 + len(media)] = torch.tensor(media)
    labels = ids.clone()
    labels[:, :-2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _qwen_image() -> dict[str, Tensor]:
    batch = _ids([28] + [IMAGE] * 4 + [27])
    types = (batch["input_ids"] == IMAGE).long()
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {**batch, "pixel_values": _random(32, 96), "image_grid_thw": grid, "mm_token_type_ids": types}


def _qwen_video() -> dict[str, Tensor]:
    batch = _ids([28] + [VIDEO] * 4 + [27])
    types = (batch["input_ids"] == VIDEO).long() * 2
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {**batch, "pixel_values_videos": _random(32, 96), "video_grid_thw": grid, "mm_token_type_ids": types}


def _audio(mask: str, *media: int) -> dict[str, Tensor]:
    features = {"input_features": _random(2, 8, 16), mask: torch.ones(2, 16, dtype=torch.long)}
    return {**_ids(list(media) or [AUDIO] * 4), **features}


def _omni() -> dict[str, Tensor]:
    batch = _audio("feature_attention_mask", 28, *[IMAGE] * 4, 27, 25, *[AUDIO] * 4, 24)
    return {**batch, "pixel_values": _random(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def _with_types(value: int) -> dict[str, Tensor]:
    batch = image_batch()
    told = batch["input_ids"] == IMAGE if value == 1 else batch["labels"] != -100
    return {**batch, "token_type_ids": told.long()}


def _anyres() -> dict[str, Tensor]:
    return {**_ids([IMAGE] * 10), "pixel_values": _random(2, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * 2)}


@dataclass(frozen=True)
class Case:
    """A model, a batch of two rows without padding, and the modalities of a plan for both."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    modalities: dict[str, int] = field(default_factory=lambda: {"image": 1})


CASES = {
    "llava": Case(tiny_llava, image_batch),
    "llava-next": Case(tiny_llava_next, _anyres),
    "qwen2-vl": Case(tiny_qwen2_vl, _qwen_image, {"image": 1, "video": 1}),
    "qwen2.5-vl": Case(tiny_qwen_vl, _qwen_image, {"image": 1, "video": 2}),
    "qwen2.5-vl video": Case(tiny_qwen_vl, _qwen_video, {"image": 1, "video": 2}),
    "qwen3-vl": Case(tiny_qwen3_vl, _qwen_image, {"image": 1, "video": 1}),
    "gemma3": Case(tiny_gemma3, lambda: _with_types(1)),
    "paligemma": Case(tiny_paligemma, lambda: _with_types(2)),
    "qwen2-audio": Case(tiny_qwen_audio, lambda: _audio("feature_attention_mask"), {"audio": 1}),
    "audio-flamingo-3": Case(tiny_flamingo, lambda: _audio("input_features_mask"), {"audio": 1}),
    "qwen2.5-omni": Case(tiny_omni, _omni, {"image": 1, "video": 1, "audio": 2}),
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
