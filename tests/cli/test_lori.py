"""LoRI as a user types it: train D, calibrate, train S, go on with another task, and what is forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import loraloom as ll
from loraloom.integrations.checkpoints import SafeCheckpoints
from loraloom.masks import MASK

LORI = ["--set", "lori={}", "--set", "strategy.name=none"]
NEXT = ["--set", "task=digits-policy", "--set", "adapter={}"]  # the earlier adapter decides rank and targets


@pytest.fixture(scope="module")
def trained(loraloom, world):
    """A LoRI-D run of its own, `d`, and a LoRI-S run with its mask, `s`."""
    assert loraloom("train", "recipe.yaml", "--set", "output=d", *LORI).returncode == 0
    done = loraloom("calibrate", "d", "-o", "m.safetensors", "--density", "0.25", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kept"] == round(0.25 * told["entries"])
    done = loraloom("train", "recipe.yaml", "--set", "output=s", *LORI, "--set", "lori.mask=m.safetensors")
    assert done.returncode == 0, done.stderr
    return world


def test_the_sparse_run_reuses_a_and_holds_its_mask(loraloom, trained):
    d, s = ll.load(trained / "d"), ll.load(trained / "s")
    mask = ll.load_mask(trained / "s")
    kept = sum(int((s.modules[name].B != 0).sum()) for name in s.modules)
    assert kept == mask.kept == s.provenance["record"]["lori"]["kept"]
    for name in s.modules:
        assert torch.equal(s.modules[name].A, d.modules[name].A), "A is drawn again from its seed"
        assert not s.modules[name].B[~mask[name]].any() and d.modules[name].B.all()
    assert (trained / "s" / MASK).is_file() and not (trained / "d" / MASK).exists()
    fresh = loraloom(
        *("train", "recipe.yaml", "--set", "output=fresh", *LORI, "--overwrite"),
        *("--set", "lori.mask=m.safetensors", "--set", "lori.start=fresh"),
    )
    assert fresh.returncode == 0, fresh.stderr
    assert not any(torch.equal(f.A, d.modules[n].A) for n, f in ll.load(trained / "fresh").modules.items())


@pytest.mark.parametrize(("coto", "protect"), [(False, False), (True, True)])
def test_the_next_task_moves_only_what_it_may(loraloom, trained, coto, protect):
    more = ["--set", f"strategy.name={'coto' if coto else 'none'}"]
    more += ["--set", "protect=[s]"] if protect else []
    told = ["--set", "continue_from=s", "--set", "lori={calibrate: {density: 0.25, steps: 3}}", *NEXT, *more]
    done = loraloom("train", "recipe.yaml", "--set", "output=next", "--overwrite", *told)
    assert done.returncode == 0, done.stderr
    before, after, mask = ll.load(trained / "s"), ll.load(trained / "next"), ll.load_mask(trained / "next")
    for name in after.modules:
        old, new = before.modules[name], after.modules[name]
        assert torch.equal(old.A, new.A) and torch.equal(old.B[~mask[name]], new.B[~mask[name]])
        assert (old.B[mask[name]] != new.B[mask[name]]).all()
        assert not protect or not old.B[mask[name]].any()
    record = after.provenance["record"]["lori"]
    assert 0 < record["overlap"]["s"] < 1 and record["a"] == before.provenance["record"]["lori"]["a"]
    assert mask.overlap(ll.support(before)) == (0 if protect else record["overlap"]["s"])
    assert after.provenance["inputs"][0]["name"] == "s"

    done = loraloom(
        "probe", "forgetting", "s", "next", "--task", "digits", "--task", "digits-policy", "-o", "f.json", "--overwrite"
    )
    assert done.returncode == 0, done.stderr
    assert "ACC" in done.stdout and "BWT" in done.stdout
    (record,) = json.loads((trained / "f.json").read_text())["records"]
    scores = [[ll.evaluate(a, t).value for t in ("digits", "digits-policy")] for a in (before, after)]
    assert record["scores"] == scores and record["backward"] == pytest.approx(scores[1][0] - scores[0][0])
    assert record["forward"] == pytest.approx(scores[0][1] - record["before"][1])
    assert loraloom("report", "f.json", "-o", "f.html", "--overwrite").returncode == 0


def test_plain_lora_goes_on_too(loraloom, world):
    assert loraloom("train", "recipe.yaml", "--set", "output=p", "--overwrite").returncode == 0
    done = loraloom("train", "recipe.yaml", "--set", "output=q", "--set", "continue_from=p", *NEXT, "--overwrite")
    assert done.returncode == 0, done.stderr
    p, q = ll.load(world / "p"), ll.load(world / "q")
    assert all(p.shape(n) == q.shape(n) and not torch.equal(p.modules[n].A, q.modules[n].A) for n in p.modules)


def test_calibration_by_gradients_and_disjoint_masks(loraloom, trained):
    told = ["--set", "lori={calibrate: {density: 0.25, by: gradients, examples: 20, exclude: [s]}}", *LORI[2:]]
    done = loraloom("train", "recipe.yaml", "--set", "output=g", *told, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert ll.support(ll.load(trained / "g")).overlap(ll.load_mask(trained / "s")) == 0
    done = loraloom("calibrate", "d", "-o", "n.safetensors", "--exclude", "s", "--overwrite", "--density", "0.5")
    assert done.returncode == 0, done.stderr
    assert ll.load_mask(trained / "n.safetensors").overlap(ll.load_mask(trained / "m.safetensors")) == 0


@pytest.mark.parametrize("place", ["calibration", "lk.training"])
def test_stopped_at_once_in_calibration_or_after_it_and_resumed(loraloom, world, monkeypatch, place):
    steps = ["--set", "train.steps=20", "--set", "train.save_every=5", *LORI]
    steps += ["--set", "lori={calibrate: {density: 0.25}}"]
    if not (world / "lw").exists():
        whole = loraloom("train", "recipe.yaml", "--set", "output=lw", *steps)
        assert whole.returncode == 0, whole.stderr
    on_save = SafeCheckpoints.on_save

    def stopped(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        if Path(args.output_dir).name == place and state.global_step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SafeCheckpoints, "on_save", stopped)
        assert loraloom("train", "recipe.yaml", "--set", "output=lk", "--overwrite", *steps).returncode == 130
    work = world / "lk.training"
    assert any(work.glob("calibration/checkpoint-10" if place == "calibration" else "checkpoint-10"))
    done = loraloom("train", "recipe.yaml", "--set", "output=lk", "--resume", "--overwrite", *steps)
    assert done.returncode == 0, done.stderr
    for file in ("adapter_model.safetensors", MASK):
        assert (world / "lk" / file).read_bytes() == (world / "lw" / file).read_bytes()
    assert not work.exists()
    shutil.rmtree(world / "lk")


WRONG = {
    "no mask": (["lori.mask=nowhere.safetensors"], "nowhere.safetensors is not there"),
    "no such adapter": (["continue_from=nowhere", "adapter={}"], "nowhere is not a folder"),
    "nothing left": (["lori={}", "continue_from=a", "adapter={}", "protect=[a]"], "leaves no entry to train"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_wrong_requests_are_one_line(loraloom, world, changes, said):
    held = sorted(path.name for path in world.iterdir())
    done = loraloom("train", "recipe.yaml", "--set", "output=w", *(x for one in changes for x in ("--set", one)))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert sorted(path.name for path in world.iterdir()) == held


def test_wrong_masks_and_probes_are_one_line(loraloom, world):
    for arguments, said in (
        (("calibrate", "a", "-o", "x.safetensors", "--density", "0"), "density must be in (0, 1]"),
        (("calibrate", "a", "-o", "x.safetensors", "--exclude", "nowhere"), "nowhere is not there"),
        (("calibrate", "nowhere", "-o", "x.safetensors"), "nowhere is not a folder"),
        (
            ("probe", "forgetting", "a", "--task", "digits", "--task", "digits", "-o", "x.json"),
            "1 adapters and 2 tasks",
        ),
    ):
        done = loraloom(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr and not (world / arguments[-1]).exists()
