"""Paths and planes between adapters as they are typed."""

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


def test_paths_and_planes_are_what_python_gives_and_the_report_shows_them(run, tmp_path, world):
    out = lambda name: str(tmp_path / name)  # noqa: E731
    a, b = ll.load(world / "a"), ll.load(world / "b")
    ll.save(ll.scale(ll.merge([a, b]), 3.0), tmp_path / "via")
    via = ll.load(tmp_path / "via")
    score = ll.score(a.base, "digits", limit=24, image_size=28)

    words = ["--points", "3", "--align", "none,invertible"]
    done = run("probe", "connectivity", "a", "b", *TASK, "-o", out("c.json"), *words)
    assert done.exit_code == 0, done.output
    assert "From a to b" in done.stdout and "factors, invertible" in done.stdout
    (record,) = json.loads((tmp_path / "c.json").read_text())["records"]
    spaces = ["delta", "factors"]
    found = ll.connectivity(a, b, score, points=3, space=spaces, align=[None, "invertible"])
    assert record == json.loads(json.dumps(found.to_json()))
    assert (record["scores"][0], record["scores"][-1]) == (score(a), score(b))

    done = run("probe", "connectivity", "a", "b", *TASK, "-o", out("v.json"), "--points", "3", "--json", "--space",
               "delta", "--via", out("via"))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(json.dumps(ll.connectivity(a, b, score, points=3, via=via).to_json()))

    done = run("probe", "plane", "a", "b", out("via"), *TASK, "-o", out("p.json"), "--grid", "2")
    assert done.exit_code == 0, done.output
    (record,) = json.loads((tmp_path / "p.json").read_text())["records"]
    found = ll.plane(a, b, via, score, grid=2)
    assert record == json.loads(json.dumps(found.to_json()))
    assert f"a {score(a):.4g}" in done.stdout and f"mean {found.centre:.4g}" in done.stdout

    assert run("report", out("c.json"), out("v.json"), out("p.json"), "-o", out("r.html")).exit_code == 0
    page = (tmp_path / "r.html").read_text()
    assert "How far each path sinks" in page and "digits on the plane of a, b, via" in page
    assert "control point via" in page


def test_wrong_paths_are_one_line(run, world):
    task = [*TASK, "-o", "x.json"]
    for words, said in (
        (["connectivity", "a", "b", *task, "--space", "nowhere"], "nowhere"),
        (["connectivity", "a", "b", *task, "--align", "up"], "up"),
        (["connectivity", "a", "b", *task, "--space", "delta", "--align", "invertible"], "needs space='factors'"),
        (["connectivity", "a", "gone", *task], "gone"),
        (["plane", "a", "b", "a", *task], "lie on one line"),
    ):
        done = run("probe", *words)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), (words, done.output, done.exception)
        assert said in done.stderr and not (world / "x.json").exists()
