"""A tiny world for the command line: a random vision model, the digits of scikit-learn, two trained adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("model") / "tiny-vit"
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
def recipe_content(tiny_model: Path) -> dict:
    return {
        "model": str(tiny_model),
        "task": "digits",
        "output": "a",
        "seed": 0,
        "adapter": {"rank": 2, "alpha": 4},
        "strategy": {"name": "coto"},
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 2, "save_every": None},
        "data": {"image_size": 28, "train_limit": 60},
    }


class CommandLine:
    """``loraloom`` as a user types it, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *words: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "loraloom", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str) -> subprocess.CompletedProcess:
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, recipe_content: dict) -> Path:
    """A folder with recipe.yaml and two trained adapters, a and b (another seed)."""
    from loraloom import recipe, run

    folder = tmp_path_factory.mktemp("world")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    (folder / "reviews").mkdir()
    (folder / "reviews" / "train.jsonl").write_text('{"words": "fine", "stars": 5}\n{"words": "poor", "stars": 1}\n')
    for name, seed in (("a", 0), ("b", 1)):
        run.train(recipe.parse({**recipe_content, "output": str(folder / name), "seed": seed}))
    return folder


@pytest.fixture
def loraloom(world: Path) -> CommandLine:
    return CommandLine(world)
