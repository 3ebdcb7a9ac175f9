"""Long probes: what was scored is kept, a killed probe goes on from there, and nothing of another request is used."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import loraloom as ll
from loraloom.adapter import Adapter, Factors
from loraloom.integrations.scoring import Bench, Evaluation, bench
from loraloom.probing import forgetting_report, shapley_report, stability_report
from loraloom.probing.asking import asked, kept
from loraloom.probing.journal import Journal
from loraloom.tasks import Example, Task
from processes import process, status_of

REQUEST = {"probe": "shapley", "samples": 200}


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.fc(x))


class Tower(nn.Module):
    """Four blocks on the features of an image; enough of a vision model for a bench."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, pixel_values: torch.Tensor) -> Any:
        x = pixel_values[:, 0, :8, :8]
        for block in self.layers:
            x = block(x)
        return SimpleNamespace(last_hidden_state=x)


@pytest.fixture(scope="module")
def made() -> Bench:
    return noise()


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return drawn()


def noise(test: list[Example] | None = None) -> Bench:
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    rows = [Example(draw.integers(0, 256, (8, 8, 3), np.uint8), ("a", "b"), at % 2) for at in range(30)]
    task = Task(
        "noise", "image", ("a", "b"), "", MappingProxyType({"train": rows, "test": test or rows}), "here", "none"
    )
    stats = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    return bench(Tower().eval(), task, family="vision", processor=stats, image_size=8)


def drawn() -> Adapter:
    draw = torch.Generator().manual_seed(1)
    pairs = {
        f"layers.{at}.fc": Factors(torch.randn(8, 2, generator=draw), torch.randn(2, 8, generator=draw))
        for at in range(4)
    }
    return Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc"]}, pairs)


def counted(monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> list[int]:
    """How many evaluations are made; the one after the most is interrupted in its middle."""
    count = [0]

    def counting(plain: Callable) -> Callable:
        def evaluate(self: Bench, *arguments: Any, **named: Any) -> list[Evaluation]:
            if count[0] == most:
                raise KeyboardInterrupt
            count[0] += 1
            return plain(self, *arguments, **named)

        return evaluate

    monkeypatch.setattr(Bench, "outcomes", counting(Bench.outcomes))
    return count


def report(
    made: Bench, adapter: Adapter, out: Path, request: dict = REQUEST, limit: int | None = None, **options: Any
) -> dict:
    with kept(out, lambda: request, "probe shapley", **options):
        found = shapley_report({"a": adapter}, made, limit=limit).to_json()
        out.write_text(json.dumps(found))
    return found


def test_an_interrupted_probe_goes_on_from_there_and_gives_the_same(made, adapter, tmp_path, monkeypatch, capsys):
    plain = shapley_report({"a": adapter}, made).to_json()
    assert plain["records"][0]["passes"] == 2 + 4 + 8 + 16 and plain["records"][0]["passes_saved"] == 64 - 30
    assert plain["records"][0] == json.loads(json.dumps(ll.shapley(adapter, asked(adapter, made)).to_json()))
    out = tmp_path / "new" / "s.json"
    with monkeypatch.context() as stopped:
        counted(stopped, most=5)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
            report(made, adapter, out)
    part = out.with_name("s.json.part")
    assert part.is_file() and not out.exists() and len(part.read_text().splitlines()) == 1 + 2 + 5
    part.write_bytes(part.read_bytes() + b'{"of": "cut o')
    count = counted(monkeypatch)
    assert report(made, adapter, out) == plain
    assert count == [11] and out.exists() and not part.exists()
    assert capsys.readouterr().err == "loraloom probe shapley: goes on; 5 scores are known from an earlier run\n"


def test_variants_that_shared_a_pass_share_it_again_where_not_all_was_kept(made, adapter, tmp_path, monkeypatch):
    plain = shapley_report({"a": adapter}, made, limit=8).to_json()
    out = tmp_path / "s.json"
    part = out.with_name("s.json.part")
    with monkeypatch.context() as stopped:
        counted(stopped, most=1)
        with pytest.raises(KeyboardInterrupt):
            report(made, adapter, out, limit=8)
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 + 8  # two passes of eight variants each
    for scores, passes in ((8, 1), (5, 2), (0, 2)):
        out.unlink(missing_ok=True)
        part.write_bytes(b"".join(lines[: 1 + 2 + scores]))
        with monkeypatch.context() as noted:
            count = counted(noted)
            assert report(made, adapter, out, limit=8) == plain
        assert count == [passes] and not part.exists()


def probed_for_ever(out: Path) -> None:
    """A probe whose seventh evaluation never ends."""
    plain, count = Bench.outcomes, [0]

    def slow(self: Bench, *arguments: Any) -> Any:
        count[0] += 1
        return plain(self, *arguments) if count[0] < 7 else time.sleep(600)

    Bench.outcomes = slow
    report(noise(), drawn(), out)


def test_a_killed_probe_loses_at_most_the_evaluation_that_it_was_in(made, adapter, tmp_path, monkeypatch):
    made.ready()
    out = tmp_path / "s.json"
    part = out.with_name("s.json.part")
    child = process(probed_for_ever, out)
    child.start()
    while child.is_alive() and not (part.is_file() and part.read_text().count('"score"') == 6):
        time.sleep(0.02)
    child.kill()
    assert status_of(child) == -signal.SIGKILL
    count = counted(monkeypatch)
    assert report(made, adapter, out) == shapley_report({"a": adapter}, made).to_json()
    assert count == [10 + 16]


def test_a_journal_of_another_request_model_or_task_is_refused(made, adapter, tmp_path, monkeypatch):
    out = tmp_path / "s.json"
    with monkeypatch.context() as stopped:
        counted(stopped, most=3)
        with pytest.raises(KeyboardInterrupt):
            report(made, adapter, out)
    with pytest.raises(ValueError, match=r"s.json.part is of another request \(samples: 200, now 8\); remove it, or"):
        report(made, adapter, out, {**REQUEST, "samples": 8})
    weight = made.model.layers[0].fc.weight
    with torch.no_grad():
        weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"holds scores of another model"):
        report(made, adapter, out)
    with torch.no_grad():
        weight.div_(1.01)
    report(made, adapter, out, {**REQUEST, "samples": 8}, fresh=True)
    assert out.exists() and not out.with_name("s.json.part").exists()


def test_overwriting_begins_anew_where_the_model_or_the_data_changed(adapter, tmp_path, monkeypatch, capsys):
    out, held = tmp_path / "s.json", noise()
    rows = list(held.task.splits["test"])
    rows[0] = replace(rows[0], label=1 - rows[0].label)
    part = out.with_name("s.json.part")

    def stopped(**options: Any) -> None:
        with monkeypatch.context() as patch:
            counted(patch, most=3)
            with pytest.raises(KeyboardInterrupt):
                report(held, adapter, out, **options)

    stopped()
    with torch.no_grad():
        held.model.layers[0].fc.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"s.json.part holds scores of another model .*; remove it, or --overwrite"):
        report(held, adapter, out)
    stopped(fresh=True)
    assert "begins anew; what was kept is of another model" in capsys.readouterr().err
    assert len(part.read_text().splitlines()) == 1 + 2 + 3
    count = counted(monkeypatch)
    expected = shapley_report({"a": adapter}, held).to_json()
    assert report(held, adapter, out, fresh=True) == expected  # the same command goes on
    assert count == [16 + 13]
    held = noise()
    out.unlink()
    stopped()
    held = noise(rows)
    with pytest.raises(ValueError, match=r"holds scores of another task .*; remove it, or --overwrite"):
        report(held, adapter, out)
    assert report(held, adapter, out, fresh=True) == shapley_report({"a": adapter}, held).to_json()
    assert out.exists() and not part.exists()


def test_scores_are_remembered_over_several_questions(made, adapter, tmp_path, monkeypatch):
    count = counted(monkeypatch)
    score = asked(adapter, made)
    with kept(tmp_path / "x.json", dict):
        first = score.many([adapter, None, adapter])
        assert first[0] == first[2] and count == [2] and score(None) == first[1] and count == [2]
        assert score.work == (8, 8, 0)
        again = asked(adapter, made)
        assert again(adapter) == first[0] and count == [2]


def test_a_task_that_comes_again_in_a_chain_is_one_more_column(made, adapter):
    tasks = [made, replace(made.task, name="other"), made.task]
    report = forgetting_report([adapter, replace(adapter, modules={}), adapter], tasks, limit=4)
    matrix = report.panels[0]
    assert matrix.x == ("1: noise", "2: other", "3: noise") and matrix.z[1] == matrix.z[3]
    assert [len(row) for row in report.records[0]["scores"]] == [3, 3, 3]


def test_the_page_says_what_sharing_saved_and_why_it_did_not(made, adapter):
    row = {row[0]: row[1:] for row in shapley_report({"a": adapter}, made).panels[1].rows}["block passes"]
    assert row == (30, "blocks of the model to run over all examples; 2.1 times as many without what is shared")
    pruned = stability_report(adapter, made, at=[0.5], draws=2, pruning=True)  # pruned entries share nothing
    row = {row[0]: row[1:] for row in pruned.panels[1].rows}["block passes"]
    assert row[0] == pruned.records[0]["passes"] > 0 and "times as many without" in row[1]
    other = replace(adapter, modules={name: one.scaled(0.5) for name, one in adapter.modules.items()})
    page = shapley_report({"a": adapter, "b": other}, made)
    row = {row[0]: row[1:] for row in page.panels[1].rows}["block passes"]
    assert row[0] is None and "runs all blocks of the model: the adapters differ in" in row[1]
    assert page.records[0]["passes"] is None


def test_the_journal_refuses_what_it_cannot_trust(tmp_path):
    path = tmp_path / "s.json.part"
    one = Journal(path, REQUEST)
    one.add("a", 0.1 + 0.2)
    with pytest.raises(ValueError, match="is being written by another process"):
        Journal(path, REQUEST)
    one.close()
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 13), len(whole) - 1, len(whole)]:  # whenever the machine stops
        path.write_bytes(whole[:cut])
        held = Journal(path, REQUEST)
        held.close()
        assert held.known == ({"a": 0.1 + 0.2} if cut == len(whole) else {})
        assert path.read_bytes().startswith(whole[: whole.index(b"\n") + 1])
    path.write_bytes(whole + b"garbage\n")
    with pytest.raises(ValueError, match=r"s.json.part is damaged; remove it"):
        Journal(path, REQUEST)
    Journal(path, REQUEST, fresh=True).remove()
    assert not path.exists()


def test_a_terminal_shows_how_far_it_is(made, adapter, tmp_path, monkeypatch):
    import sys

    from loraloom.probing.progress import Progress

    shown = Progress("probe x")
    shown.expect(3, 0)
    shown.advance()
    assert shown._bar is None  # no terminal here
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown.expect(3, 1)
    shown.advance()
    task = shown._bar.tasks[0]
    assert (task.description, task.completed, task.total) == ("probe x", 1, 2)
    shown.close()
    silent = Progress("probe x", shown=False)
    silent.expect(3, 1)
    assert silent._bar is None
