"""The probes as they are typed, and what they write in the hands of prune, compress and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import loraloom as ll
from loraloom.cli import app

TASK = ["--task", "digits", "--limit", "24"]


@pytest.fixture
def run(world: Path, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words), prog_name="loraloom")


@pytest.fixture(scope="module")
def score(world: Path):
    a = ll.load(world / "a")
    return ll.score(a.base, "digits", limit=24, image_size=28)


def test_shapley_goes_to_prune_compress_and_the_report(run, tmp_path, world, score):
    out = lambda name: str(tmp_path / name)  # noqa: E731
    done = run("probe", "shapley", "a", *TASK, "-o", out("s.json"))
    assert done.exit_code == 0, done.output
    assert "top third" in done.stdout and "evaluations 16" in done.stdout
    (record,) = json.loads((tmp_path / "s.json").read_text())["records"]
    a = ll.load(world / "a")
    assert record == json.loads(json.dumps(ll.shapley(a, score).to_json()))
    assert (record["whole"], record["base"]) == (score(a), score(None)) and len(record["units"]) == 4
    assert len(set(record["values"])) > 1

    done = run("prune", "a", "-o", out("p"), "--unit", "layer", "--density", "0.25", "--by", out("s.json"))
    assert done.exit_code == 0, done.output
    best = max(zip(record["values"], record["units"], strict=True))[1]
    assert {row["layer"] for row in ll.summary(ll.load(tmp_path / "p"))["layers"]} == {best}

    done = run("compress", "a", "-o", out("c"), "--budget", "0.9x", "--scores", out("s.json"))
    assert done.exit_code == 0, done.output
    worth = {unit for unit, value in zip(record["units"], record["values"], strict=True) if value > 0}
    assert {row["layer"] for row in ll.summary(ll.load(tmp_path / "c"))["layers"]} <= worth
    (tmp_path / "plain.json").write_text(json.dumps(dict.fromkeys(record["units"], -1.0)))
    done = run("compress", "a", "-o", out("d"), "--budget", "0.9x", "--scores", out("plain.json"))
    assert done.exit_code == 2 and "at least 0" in done.stderr

    done = run("probe", "stability", "a", *TASK, "-o", out("st.json"), "--at", "0.25,0.5", "--draws", "3", "--pruning")
    assert done.exit_code == 0, done.output
    (record,) = json.loads((tmp_path / "st.json").read_text())["records"]
    assert record == json.loads(json.dumps(ll.stability(a, score, at=[0.25, 0.5], draws=3, pruning=True).to_json()))
    assert run("report", out("s.json"), out("st.json"), "-o", out("r.html")).exit_code == 0
    page = (tmp_path / "r.html").read_text()
    assert "Shapley values" in page and "Stability" in page
    done = run("prune", "a", "-o", out("q"), "--unit", "layer", "--density", "0.5", "--by", out("st.json"))
    assert done.exit_code == 2 and "is a report without values by unit" in done.stderr


def test_modules_and_merged_adapters_are_players_too(run, tmp_path, world, score):
    out = lambda name: str(tmp_path / name)  # noqa: E731
    words = [
        "--unit",
        "module",
        "--by",
        "permutations",
        "--samples",
        "4",
        "--truncate",
        "0.05",
        "--seed",
        "1",
        "--json",
    ]
    done = run("probe", "shapley", "a", *TASK, "-o", out("m.json"), *words)
    assert done.exit_code == 0, done.output
    a, b = ll.load(world / "a"), ll.load(world / "b")
    same = ll.shapley(a, score, "module", samples=4, seed=1, by="permutations", truncate=0.05)
    assert json.loads(done.stdout) == json.loads(json.dumps(same.to_json()))
    assert json.loads((tmp_path / "m.json").read_text())["panels"][0]["kind"] == "heatmap"
    done = run("probe", "shapley", "a", "b", *TASK, "-o", out("ab.json"), "--method", "ties", "--json")
    assert done.exit_code == 0, done.output
    same = ll.shapley({"a": a, "b": b}, score, unit="adapter", merge="ties")
    assert json.loads(done.stdout) == json.loads(json.dumps(same.to_json()))
    assert same.whole == score(ll.merge([a, b], "ties"))


def test_a_probe_that_scores_needs_a_task_and_one_that_need_not_does_not(run, world):
    done = run("probe", "stability", "a", "-o", "x.json")
    assert done.exit_code == 2 and "Missing option '--task'" in done.stderr
    assert "--task" not in run("probe", "geometry", "--help").stdout
    shown = run("probe", "shapley", "--help").stdout
    assert "[required]" in next(line for line in shown.splitlines() if "--task" in line)


def test_wrong_probes_are_one_line(run, world):
    task = [*TASK, "-o", "x.json"]
    for words, said in (
        (["shapley", "a", *task, "--unit", "layers"], "did you mean 'layer'"),
        (["shapley", "a", *task, "--truncate", "0.1"], "truncate goes with by='permutations'"),
        (["shapley", "a", *task, "--unit", "adapter"], "unit of one adapter"),
        (["shapley", "a", "b", *task, "--unit", "layer"], "unit='adapter', not 'layer'"),
        (["shapley", "a", "a", *task], "the same adapter is given twice"),
        (["shapley", "a", *task, "--model", "nowhere"], "nowhere"),
        (["shapley", "a", *TASK, "-o", "a"], "a exists"),
        (["stability", "a", *task, "--at", "1"], "at must hold chances in [0, 1)"),
        (["stability", "a", *task, "--at", "x"], "--at 'x'"),
        (["stability", "nowhere", *task], "nowhere"),
        (["stability", "a", *task, "--split", "dev"], "split 'dev'"),
    ):
        done = run("probe", *words)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), (words, done.output, done.exception)
        assert said in done.stderr and not list(world.glob("x.json*"))


def test_interference_tells_what_averaging_costs_where_tasks_are_named(run, tmp_path, world, score):
    done = run("probe", "interference", "a", "b", *TASK, "-o", str(tmp_path / "i.json"), "--no-entries", "--json")
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "i.json").read_text())
    assert json.loads(done.stdout) == made["records"]
    a, b = ll.load(world / "a"), ll.load(world / "b")
    expected = [score(one) for one in (None, a, b, ll.merge([a, b]))]
    assert made["records"][1] == {"adapters": ["base", "a", "b", "average of all"], "scores": {"digits": expected}}
    assert [row[1] for row in made["panels"][2]["rows"]] == expected and len(set(expected)) > 1
