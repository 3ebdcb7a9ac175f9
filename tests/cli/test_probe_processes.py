"""Probes under ``accelerate launch``: evaluations are split, the numbers stay, one process writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraloom.cli import app
from loraloom.integrations.scoring import Bench
from processes import ranks, status_of

WORDS = ["probe", "shapley", "a", "--task", "digits"]


def together(folder: Path, *words: str, size: int = 2) -> list[dict]:
    """What each of several processes that know of each other printed and did."""
    assert [status_of(one) for one in ranks(_one, size, folder, words)] == [0] * size
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]


def _one(rank: int, folder: Path, words: tuple[str, ...]) -> None:
    count, plain = [0], Bench.outcomes

    def outcomes(self: Bench, *arguments: object) -> object:
        count[0] += 1
        return plain(self, *arguments)

    Bench.outcomes = outcomes
    done = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, list(words), prog_name="loraloom")
    told = {"code": done.exit_code, "out": done.stdout, "err": done.stderr, "evaluations": count[0]}
    (folder / f"rank{rank}.json").write_text(json.dumps(told))


@pytest.mark.parametrize(("limit", "evaluations"), [(24, 8), (8, 1)])  # one by one; eight variants in a pass
def test_two_processes_give_what_one_gives_and_score_each_a_half(world, tmp_path, monkeypatch, limit, evaluations):
    monkeypatch.chdir(world)
    words = [*WORDS, "--limit", str(limit)]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "one.json"), "--json"])
    assert done.exit_code == 0, done.output
    first, second = together(tmp_path, *words, "-o", str(tmp_path / "two.json"), "--json")
    assert (first["code"], second["code"], second["out"]) == (0, 0, ""), (first, second)
    assert first["out"] == done.stdout
    assert (first["evaluations"], second["evaluations"]) == (evaluations, evaluations)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert {key: one[key] for key in ("summary", "panels", "records")} == {
        key: two[key] for key in ("summary", "panels", "records")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "rank0.json", "rank1.json", "two.json"]


@pytest.mark.parametrize("words", [("--limit", "24", "-o", "a"), ("--unit", "layers", "-o", "x.json")])
def test_a_wrong_request_is_told_once(world, tmp_path, monkeypatch, words):
    monkeypatch.chdir(world)
    told = together(tmp_path, *WORDS, *words)
    assert [one["code"] for one in told] == [2, 2], told
    assert sorted(one["err"].count("\n") for one in told) == [0, 1], told
