"""A small LLaVA: ViT-S/14, a projector that is still to be trained, SmolLM2-135M."""

from __future__ import annotations

import json
from pathlib import Path

from loraloom.models import models
from loraloom.models.assembly import PLACEHOLDER, PLACEHOLDER_ID, assembled
from loraloom.models.smollm2 import PACKAGE as TEXT
from loraloom.models.smollm2 import smollm2_135m
from loraloom.models.vit_s14 import PACKAGE as VISION
from loraloom.models.vit_s14 import PREPROCESSOR, WIDTH, vit_s14

SIDE, PATCH = 42, 14


@models.register(
    "llava-smollm2",
    paper="https://arxiv.org/abs/2304.08485",
    family="multimodal",
    licence="Apache-2.0, MIT",
    parameters=157_125_696,
    size="360 MB",
    package=f"{VISION.requirement}, {TEXT.requirement}",
)
def llava_smollm2() -> Path:
    """A LLaVA (Liu et al. 2023) of ViT-S/14 and SmolLM2-135M, for pictures of 42 pixels a side, which are 9 tokens.

    Nothing in it has been trained together: the projector (two layers) is random. Train it first
    (``recipes/moka/vqa-projector.yaml``), then adapters on top of that.
    """
    vision = vit_s14()

    def encoder() -> dict:
        from safetensors.torch import load_file

        held = load_file(vision / "model.safetensors")
        return {f"model.vision_tower.{key}": value for key, value in held.items()}

    configuration = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": json.loads((vision / "config.json").read_text()),
        "image_token_index": PLACEHOLDER_ID,
        "image_seq_length": (SIDE // PATCH) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
    }
    processor = {
        "preprocessor_config.json": PREPROCESSOR
        | {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": PLACEHOLDER,
            "patch_size": PATCH,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    }
    return assembled("llava-smollm2-1", smollm2_135m(), encoder, configuration, processor, WIDTH)
