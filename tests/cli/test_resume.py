"""`loraloom train`, killed at random moments and resumed, ends in the same bits as a run that nothing interrupted."""

from __future__ import annotations

import json
import random
import signal
import time

import torch
import yaml

from loraloom.integrations.checkpoints import StopOnInterrupt

STEPS = ["--set", "train.steps=200", "--set", "train.save_every=40", "--set", "adapter.dropout=0.1"]


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def newest_step(work):
    return max((int(path.name.split("-")[1]) for path in work.glob("checkpoint-*")), default=0)


def test_killed_and_resumed_is_bit_equal(loraloom, world):
    """One kill of a real process; tests/integrations/test_resume.py has many, `make crash` hundreds."""
    whole = loraloom("train", "recipe.yaml", "--set", "output=whole", *STEPS)
    assert whole.returncode == 0, whole.stderr
    process = loraloom.start("train", "recipe.yaml", "--set", "output=killed", "--resume", *STEPS)
    while newest_step(world / "killed.training") < 40 and process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.Random(0).uniform(0, 0.1))
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert not (world / "killed").exists() and newest_step(world / "killed.training") < 200
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


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(loraloom, world, monkeypatch):
    words = ("train", "recipe.yaml", "--set", "output=stopped")  # of a recipe that asks for no checkpoints
    assert loraloom("train", "recipe.yaml", "--set", "output=unstopped").returncode == 0
    on_step_end = StopOnInterrupt.on_step_end

    def interrupted(self, args, state, *more, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return on_step_end(self, args, state, *more, **kwargs)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(StopOnInterrupt, "on_step_end", interrupted)
            done = loraloom(*words)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stderr) == (130, "loraloom train: stopped; the same command with --resume goes on\n")
    assert newest_step(world / "stopped.training") == 3 and not (world / "stopped").exists()
    assert loraloom(*words, "--resume").returncode == 0
    assert weights(world / "stopped") == weights(world / "unstopped")


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_the_last_whole_checkpoint(loraloom, world, monkeypatch):
    words = ("train", "recipe.yaml", "--set", "output=full", "--set", "train.save_every=2")
    assert loraloom(*words, "--set", "output=roomy").returncode == 0
    saved = torch.save

    def no_room(what, path, *more, **kwargs):
        if "checkpoint-4" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")  # torch's words
        saved(what, path, *more, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_room)
        done = loraloom(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "full.training" in done.stderr and "no space left" in done.stderr and "--resume" in done.stderr
    assert loraloom(*words, "--resume").returncode == 0
    assert weights(world / "full") == weights(world / "roomy")


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
