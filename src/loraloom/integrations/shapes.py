"""Models without weights: their shapes on the meta device, from a configuration or from the table below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loraloom.integrations.backbones import (
    _configuration,  # the same reading of names and folders as where weights are loaded
    _family,
    _multimodal_class,
)
from loraloom.models import resolve

LLAMA: Mapping[str, tuple[int, int, int, int]] = {
    "llama-8b": (4096, 14336, 32, 32),
    "llama-70b": (8192, 28672, 80, 64),
    "llama-405b": (16384, 53248, 126, 128),
}
"""Width, width of the MLP, layers and heads (Llama 3, arXiv 2407.21783, table 3); 8 key heads, 128 256 words."""


def bare(model: str, dtype: str = "float32") -> tuple[nn.Module, str]:
    """A model's modules on the meta device, frozen, and its family; no weight is read or made.

    Args:
        model: ``llama-8b``, ``llama-70b``, ``llama-405b``, a bundled name, a local folder (its ``config.json`` is
            enough) or a hub id.
        dtype: of the weights.

    Raises:
        ValueError: the configuration is not found, or is of no family that is trained here.

    Example:
        >>> made, family = bare("llama-8b")
        >>> family, sum(weight.numel() for weight in made.parameters())
        ('causal', 8030261248)
    """
    import transformers

    source = model if model in LLAMA else resolve(model)
    config = _llama(*LLAMA[model]) if model in LLAMA else _configuration(model, source)
    family = "causal" if model in LLAMA else _family(model, config, "")
    made: Any = transformers.AutoModelForCausalLM if family == "causal" else transformers.AutoModel
    if family == "multimodal":
        made = _multimodal_class(source)
        config = getattr(config, "thinker_config", config)
    wanted = getattr(torch, dtype)
    build = made._from_config if family == "multimodal" else made.from_config
    with torch.device("meta"):
        return build(config, dtype=wanted).requires_grad_(False), family


def inputs(model: nn.Module, family: str, *, batch: int, length: int, image_size: int) -> dict[str, Any]:
    """What one forward pass of training gets, on the meta device; of a multimodal model text alone.

    Raises:
        ValueError: an image is not a whole number of the model's patches, or a text is longer than it has places.
    """
    config: Any = model.config
    if family == "vision":
        patch = getattr(config, "patch_size", 1)
        if image_size < patch:
            raise ValueError(f"data.image_size {image_size} is below the model's patches of {patch} pixels")
        shape = (batch, config.num_channels, image_size, image_size)
        kind = next(model.parameters()).dtype
        told: dict[str, Any] = {"pixel_values": torch.empty(shape, device="meta", dtype=kind)}
        if image_size != getattr(config, "image_size", image_size):
            told["interpolate_pos_encoding"] = True
        return told
    places = getattr(config, "max_position_embeddings", None)
    if places is not None and length > places:
        raise ValueError(f"data.max_length {length} is more than the {places} places of the model")
    ids = torch.empty((batch, length), dtype=torch.long, device="meta")
    if family == "encoder":
        return {"input_ids": ids}
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _llama(width: int, inner: int, layers: int, heads: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
    )
