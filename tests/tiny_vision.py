"""A tiny random vision model in a folder, and a recipe for it; the data are the digits of scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def make_model(folder: Path) -> Path:
    """A random Dinov2 of four layers in a folder."""
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14)
        )
    model.save_pretrained(folder)
    stats = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny-vit")


@pytest.fixture(scope="session")
def recipe_content(tiny_model: Path) -> dict:
    return make_recipe(tiny_model)


def make_recipe(model: Path) -> dict:
    """A short run of it."""
    return {
        "model": str(model),
        "task": "digits",
        "output": "a",
        "seed": 0,
        "adapter": {"rank": 2, "alpha": 4},
        "strategy": {"name": "coto"},
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 2, "save_every": None},
        "data": {"image_size": 28, "train_limit": 60},
    }
