"""`loraloom train`, killed at random moments and resumed, ends in the same bits as a run that nothing interrupted."""

from __future__ import annotations

import json
import random
import time

import yaml

STEPS = ["--set", "train.steps=60", "--set", "train.save_every=4", "--set", "adapter.dropout=0.1"]


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_killed_and_resumed_is_bit_equal(loraloom, world):
    began = time.monotonic()
    whole = loraloom("train", "recipe.yaml", "--set", "output=whole", *STEPS)
    seconds = time.monotonic() - began
    assert whole.returncode == 0, whole.stderr
    chance, kills = random.Random(0), 0
    for _ in range(4):
        process = loraloom.start("train", "recipe.yaml", "--set", "output=killed", "--resume", *STEPS)
        time.sleep(seconds * chance.uniform(0.5, 0.95))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        if (world / "killed").exists():
            break
    done = loraloom("train", "recipe.yaml", "--set", "output=killed", "--resume", *STEPS)
    if kills and not (world / "killed").exists():
        raise AssertionError(done.stderr)
    assert kills
    assert weights(world / "killed") == weights(world / "whole")


def test_an_unfinished_run_is_not_overwritten_by_accident(loraloom, world):
    work = world / "half.training"
    work.mkdir()
    done = loraloom("train", "recipe.yaml", "--set", "output=half")
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert work.exists()


def test_another_recipe_is_not_resumed(loraloom, world):
    content = yaml.safe_load((world / "recipe.yaml").read_text())
    from loraloom import recipe

    started = recipe.parse({**content, "output": "other"})
    work = world / "other.training"
    work.mkdir()
    (work / "recipe.yaml").write_text(yaml.safe_dump(started.model_dump(mode="json"), sort_keys=False))
    done = loraloom("train", "recipe.yaml", "--set", "output=other", "--set", "train.learning_rate=0.5", "--resume")
    assert done.returncode == 2
    assert "train.learning_rate" in done.stderr
    assert json.dumps(0.5) in done.stderr
