"""`loraloom train`, killed at random moments and resumed, ends in the same bits as a run that nothing interrupted."""

from __future__ import annotations

import json
import random
import time

import yaml

STEPS = ["--set", "train.steps=150", "--set", "train.save_every=5", "--set", "adapter.dropout=0.1"]


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def newest_step(work):
    return max((int(path.name.split("-")[1]) for path in work.glob("checkpoint-*")), default=0)


def test_killed_and_resumed_is_bit_equal(loraloom, world):
    """One kill of a real process; tests/integrations/test_resume.py has many, `make crash` hundreds."""
    whole = loraloom("train", "recipe.yaml", "--set", "output=whole", *STEPS)
    assert whole.returncode == 0, whole.stderr
    process = loraloom.start("train", "recipe.yaml", "--set", "output=killed", "--resume", *STEPS)
    while newest_step(world / "killed.training") < 20 and process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.Random(0).uniform(0, 0.1))
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert not (world / "killed").exists() and newest_step(world / "killed.training") < 150
    done = loraloom("train", "recipe.yaml", "--set", "output=killed", "--resume", *STEPS)
    assert done.returncode == 0, done.stderr
    assert weights(world / "killed") == weights(world / "whole")
    assert not (world / "killed.training").exists()
    (world / "killed.training").mkdir()  # as if killed between saving the adapter and tidying up
    assert loraloom("train", "recipe.yaml", "--set", "output=killed", "--resume", *STEPS).returncode == 0
    assert not (world / "killed.training").exists()
    other = loraloom("train", "recipe.yaml", "--set", "output=killed", "--resume")
    assert (other.returncode, "--overwrite" in other.stderr) == (2, True)
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
