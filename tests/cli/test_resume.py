"""`loraloom train`, killed at random moments and resumed, ends in the same bits as a run that nothing interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import random
import shutil
import signal
import time

import torch
import yaml
from typer.testing import CliRunner

from loraloom import run
from loraloom.cli import app
from loraloom.integrations.checkpoints import StopOnInterrupt
from processes import answer_of, ranks, status_of

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
    (work / "recipe.yaml").touch()
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


def typed(rank, folder, words):
    """What a command in a process of its own ends with and says; also in a file."""
    done = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, list(words), prog_name="loraloom")
    (folder / f"told-{rank}.json").write_text(json.dumps((done.exit_code, done.stderr)))
    return done.exit_code, done.stderr


def test_a_second_process_is_not_let_in_while_the_first_lives(loraloom, world, tmp_path, monkeypatch):
    words = ("train", "recipe.yaml", "--set", "output=busy", "--set", "train.save_every=2")
    others, plain, found = (words, (*words, "--resume"), (*words, "--overwrite")), StopOnInterrupt.on_step_end, []
    torn = world / "busy.training" / "checkpoint-9"

    def meanwhile(self, args, state, *more, **kwargs):
        if state.global_step == 3:
            torn.mkdir()  # as if it was just being written
            found.extend(answer_of(typed, 0, tmp_path, other) for other in others)
            assert [status_of(one) for one in ranks(typed, 2, tmp_path, others[1])] == [0, 0]
            found.append([json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)])
            torn.rmdir()
        return plain(self, args, state, *more, **kwargs)

    monkeypatch.setattr(StopOnInterrupt, "on_step_end", meanwhile)
    done = loraloom(*words)
    assert done.returncode == 0, done.stderr
    line = "loraloom train: busy is being trained by another process\n"
    *alone, together = found
    assert alone == [(2, line)] * 3 and together == [[2, line], [2, ""]]
    assert weights(world / "busy") and not (world / "busy.training").exists()


def test_an_output_that_came_while_the_model_was_read_is_not_trained_again(loraloom, world, monkeypatch):
    def meanwhile(recipe):
        recipe.output.mkdir()

    monkeypatch.setattr(run, "bench_of", meanwhile)
    monkeypatch.setattr(run, "train_on", lambda *arguments, **named: 1 / 0)
    done = loraloom("train", "recipe.yaml", "--set", "output=came", "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "came exists" in done.stderr


def test_a_run_killed_before_it_is_saved_and_before_its_first_log_is_done(loraloom, world, monkeypatch):
    words = (
        "train",
        "recipe.yaml",
        "--set",
        "output=early",
        "--set",
        "train.save_every=1",
        "--set",
        "train.log_every=99",
    )

    def killed(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "save", killed)
        assert loraloom(*words).returncode == 130
    done = loraloom(*words, "--resume")
    assert done.returncode == 0, done.stderr
    assert weights(world / "early") and "loss" not in done.stdout


def test_where_there_are_no_locks_a_run_goes_on_all_the_same(loraloom, world, monkeypatch):
    def none(*arguments):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS says of a folder

    monkeypatch.setattr(fcntl, "flock", none)
    old = world / "lockless.training" / "checkpoint-2"
    old.mkdir(parents=True)
    done = loraloom("train", "recipe.yaml", "--set", "output=lockless", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert weights(world / "lockless") and not old.parent.exists()


def test_a_whole_model_killed_between_saving_and_tidying_up_is_done(loraloom, world, monkeypatch):
    """With ``kind: none`` the output is a model, not an adapter."""
    content = yaml.safe_load((world / "recipe.yaml").read_text())
    content |= {"output": "model", "adapter": {"kind": "none", "modules_to_save": ["layernorm"]}}
    content["strategy"] = {"name": "none"}
    (world / "whole.yaml").write_text(yaml.safe_dump(content))
    words = ("train", "whole.yaml", "--set", "train.save_every=2", "--resume")
    rmtree = shutil.rmtree

    def stopped(path, *arguments, **named):
        if str(path).endswith("model.training"):
            raise KeyboardInterrupt
        rmtree(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(run.shutil, "rmtree", stopped)
        assert loraloom(*words).returncode == 130
    saved = {path.name: path.read_bytes() for path in (world / "model").iterdir()}
    assert (world / "model.training").exists() and "model.safetensors" in saved
    done = loraloom(*words)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (world / "model").iterdir()} == saved
    assert not (world / "model.training").exists()
    other = loraloom(*words, "--set", "seed=1")
    assert (other.returncode, "--overwrite" in other.stderr) == (2, True)
