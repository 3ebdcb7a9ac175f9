"""Every command as it is typed: what it writes, what it prints, and one line with status 2 for every wrong request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import loraloom as ll
from loraloom.cli import app


@pytest.fixture
def run(world: Path, monkeypatch: pytest.MonkeyPatch):
    """The command in this process: quick, for the many cases; `loraloom` (the fixture) starts a real process."""
    from typer.testing import CliRunner

    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words), prog_name="loraloom")


def dense(adapter: ll.Adapter) -> dict[str, torch.Tensor]:
    return {name: factors.delta() for name, factors in adapter.modules.items()}


def test_version_and_help_need_no_framework(loraloom):
    done = loraloom.process("--version")
    assert (done.returncode, done.stdout.strip()) == (0, ll.__version__)
    assert "merge" in loraloom.process("--help").stdout


def test_a_recipe_becomes_an_adapter_that_is_scored(loraloom, world):
    done = loraloom("train", "recipe.yaml", "--set", "output=c", "--set", "train.steps=3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"] == "c"
    assert sorted(path.name for path in (world / "c").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loraloom.json",
    ]
    assert not (world / "c.training").exists()
    done = loraloom("evaluate", "c", "--task", "digits", "--limit", "20", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["n"] == 20
    assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_the_dropout_that_training_ends_with_is_saved(loraloom, world, kind):
    changes = [f"adapter.kind={kind}", "strategy={name: progressive-dropout, end: 0.25}", f"output=dropped-{kind}"]
    done = loraloom("train", "recipe.yaml", *(word for change in changes for word in ("--set", change)))
    assert done.returncode == 0, done.stderr
    assert ll.load(world / f"dropped-{kind}").config[f"{kind}_dropout"] == 0.25


def test_a_score_does_not_depend_on_who_asks(run, world, tiny_model):
    """An adapter trained on few examples meets the head that it was trained with."""
    (row,) = json.loads(run("evaluate", "a", "--task", "digits", "--json").stdout)
    asked = ll.bench(str(tiny_model), "digits", image_size=28, train_limit=60).evaluate(ll.load(world / "a"))
    assert row == {"adapter": "a", **asked.to_json()}


def test_merge_adds_the_updates(run, world):
    done = run("merge", "a", "b", "-o", "sum", "--weights", "0.25,2", "--space", "delta", "--json")
    assert done.exit_code == 0, done.output
    a, b, merged = (dense(ll.load(world / name)) for name in ("a", "b", "sum"))
    for name, delta in merged.items():
        torch.testing.assert_close(delta, 0.25 * a[name] + 2 * b[name])


def test_interpolate_at_the_ends_is_the_end(run, world):
    assert run("interpolate", "a", "b", "--at", "1", "-o", "end").exit_code == 0
    b, end = dense(ll.load(world / "b")), dense(ll.load(world / "end"))
    assert all(torch.equal(end[name], b[name]) for name in b)


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["--keep", "every-other"], {0, 2}),
        (["--keep", "low"], {0}),
        (["--keep", "high"], {3}),
        (["--keep", "1,2-3"], {1, 2, 3}),
    ],
)
def test_prune_keeps_the_layers_that_were_asked_for(run, world, words, layers):
    assert run("prune", "a", "-o", "kept", "--overwrite", *words).exit_code == 0
    names = list(ll.load(world / "kept").modules)
    assert {int(name.split("layer.")[1].split(".")[0]) for name in names} == layers


def test_prune_by_density_keeps_exactly_that_share(run, world):
    assert run("prune", "a", "-o", "sparse", "--density", "0.25").exit_code == 0
    total = kept = 0
    for factors in ll.load(world / "sparse").modules.values():
        for matrix in (factors.A, factors.B):
            total, kept = total + matrix.numel(), kept + int(matrix.count_nonzero())
    assert kept == round(0.25 * total)


def test_inspect_says_what_is_there(run):
    done = run("inspect", "a", "b", "--json")
    first, second = json.loads(done.stdout)
    assert (first["kind"], first["rank"], len(first["layers"])) == ("lora", "2", 4)
    assert first["norm"] > 0
    assert first["norm"] != second["norm"]
    assert "cosine" in run("inspect", "a", "b").stdout


@pytest.mark.parametrize("what", ["methods", "schedules", "tasks", "models", "probes"])
def test_list_names_a_source_for_everything(run, what):
    rows = json.loads(run("list", what, "--json").stdout)
    assert rows
    assert all(row["summary"] and row["paper"] for row in rows)
    lines = run("list", what).stdout.splitlines()
    assert {row["name"] for row in rows} == {line for line in lines if not line.startswith(" ")}
    assert {word for row in rows for word in row["paper"].split()} <= {word for line in lines for word in line.split()}


WRONG = {
    "no such adapter": (["merge", "a", "nowhere", "-o", "x"], "nowhere"),
    "no adapter at all": (["inspect", "recipe.yaml"], "recipe.yaml"),
    "output exists": (["interpolate", "a", "b", "-o", "b"], "--overwrite"),
    "unknown method": (["merge", "a", "b", "-o", "x", "--method", "linaer"], "linear"),
    "too few weights": (["merge", "a", "b", "-o", "x", "--weights", "1"], "weights"),
    "weights that are none": (["merge", "a", "b", "-o", "x", "--weights", "1,two"], "--weights"),
    "weight not finite": (["merge", "a", "b", "-o", "x", "--weights", "1,nan"], "weight"),
    "off the path": (["interpolate", "a", "b", "-o", "x", "--at", "1.5"], "1.5"),
    "nothing to prune": (["prune", "a", "-o", "x"], "density"),
    "density 0": (["prune", "a", "-o", "x", "--density", "0"], "density"),
    "layer that is not there": (["prune", "a", "-o", "x", "--keep", "99"], "99"),
    "projection that is not there": (["prune", "a", "-o", "x", "--modules", "q_porj"], "q_porj"),
    "unknown task": (["evaluate", "a", "--task", "digist"], "digits"),
    "a data set without that column": (["evaluate", "a", "--task", "hub:reviews"], "columns: words, stars"),
    "a data set that is not there": (["evaluate", "a", "--task", "task.yaml"], "task.yaml"),
    "unknown split": (["evaluate", "a", "--task", "digits", "--split", "tset"], "test"),
    "base without a model": (["evaluate", "base", "--task", "digits"], "--model"),
    "no such recipe": (["train", "nowhere.yaml"], "nowhere.yaml"),
    "unknown key": (["train", "recipe.yaml", "--set", "train.learning_rat=1"], "learning_rate"),
    "impossible value": (["train", "recipe.yaml", "--set", "adapter.rank=0"], "adapter.rank"),
    "output of a run exists": (["train", "recipe.yaml"], "--overwrite"),
    "unknown model": (["train", "recipe.yaml", "--set", "output=x", "--set", "model=./nowhere"], "nowhere"),
    "unknown module": (["train", "recipe.yaml", "--set", "output=x", "--set", "adapter.target_modules=qqq"], "qqq"),
    "task of another kind": (["train", "recipe.yaml", "--set", "output=x", "--set", "task=sent-movie"], "text"),
}


@pytest.mark.parametrize(("words", "named"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_one_line_and_status_2(run, world, words, named):
    before = sorted(path.name for path in world.iterdir())
    done = run(*words)
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"loraloom {words[0]}: ")
    assert named in lines[0]
    assert sorted(path.name for path in world.iterdir()) == before


def test_a_wrong_request_in_a_real_process(loraloom):
    done = loraloom.process("merge", "a", "nowhere", "-o", "x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().split("\n")) == 1
    assert "Traceback" not in done.stderr
