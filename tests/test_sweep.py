"""Sweeps: what a table asks for is done once, the same whoever does it, and told with its spread."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from transformers import AutoModel

from loraloom import report, sweep
from loraloom.adapter import Adapter, Factors
from loraloom.integrations.processes import Elsewhere, device_name
from loraloom.recipe import parse
from loraloom.run import bench_of
from loraloom.store import load
from loraloom.sweep.found import spread
from loraloom.sweep.gaps import Gap
from loraloom.sweep.operations import groups, operations
from loraloom.sweep.plan import cells, phases, run_key, run_of, where
from loraloom.sweep.results import summarised
from loraloom.sweep.table import Measure
from loraloom.sweep.work import Journal, Worker, chooser, claimed
from processes import clean, process, ranks, status_of
from tiny_vision import recipe_content, tiny_model  # noqa: F401

TABLE = {
    "title": "Tiny",
    "recipe": "recipe.yaml",
    "arms": {"LoRA": {"strategy": {"name": "none"}}, "CoTo": {"strategy.name": "coto"}},
    "tasks": ["digits"],
    "seeds": [0, 1],
    "rates": ["1e-2", 0.03],
    "tuned_on": [0],
    "limit": 20,
    "threads": 1,
    "measure": {
        "interpolate": {"at": [0.0, 0.5], "spaces": ["factors"]},
        "merge": [{"weights": [1, 2], "space": "delta"}],
        "prune": [{"keep": "every-other"}, {"density": 0.5}],
        "coalitions": {"off": [0.5], "draws": 2},
    },
}


def written(folder: Path, content: dict, **changes: object) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**TABLE, **changes}, sort_keys=False))
    return folder / "sweep.yaml"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, recipe_content: dict) -> Path:  # noqa: F811
    return written(tmp_path_factory.mktemp("table"), recipe_content)


@pytest.fixture(scope="module")
def done(table: Path) -> tuple[sweep.Sweep, Path, list[str]]:
    """The table run by one process."""
    said: list[str] = []
    made = sweep.read(table)
    sweep.run(made, table.parent / "done", say=said.append)
    return made, table.parent / "done", said


def results(folder: Path) -> dict:
    return json.loads((folder / report.files.RESULTS).read_text())


def test_every_job_is_done_once_and_counted(done) -> None:
    _, folder, said = done
    # 1 frozen, 2 arms x 2 rates on seed 0, seed 1 at the chosen rates, then 2 arms x (2 points of one path, a merge of
    # each pair, 2 prunings and 2 coalitions of each seed).
    jobs = 1 + 4 + 2 + 2 * (2 + 2 + 2 * 2 + 2 * 2)
    assert len(list((folder / "journal").iterdir())) == jobs
    assert (
        said[0].startswith(f"[1/{jobs}] ")
        and said[0].endswith("time left not known yet")
        and said[-2].startswith(f"[{jobs}/{jobs}] ")
        and "0:00:00 left" in said[-2]
    )
    assert len(list((folder / "adapters").iterdir())) == 6
    assert results(folder)["run"]["jobs"] == jobs
    assert report.read([folder]).title == "Tiny"


def test_an_adapter_is_the_recipe_s_and_its_score_the_bench_s(done) -> None:
    made, folder, _ = done
    jobs = [job for part in phases(made, lambda cell: cell.rate) for job in part]
    job = next(job for job in jobs if job.cell.arm == "CoTo" and job.operation.how == "alone")
    assert job.sources[0].strategy.name == "coto"
    adapter = load(folder / "adapters" / run_key(job.sources[0]))
    assert adapter.provenance["arguments"]["train"]["learning_rate"] == 0.01
    expected = bench_of(job.sources[0]).evaluate(adapter, "test", 20).correct
    assert Journal(folder / "journal").correct(job, "test").tolist() == list(expected)


def test_an_operation_is_on_the_seeds_that_it_says(done) -> None:
    made, folder, _ = done
    journal = Journal(folder / "journal")
    choose = chooser(made, journal)
    jobs = [job for part in phases(made, choose) for job in part]
    alone = {(job.cell, job.seed): job for job in jobs if job.operation.how == "alone"}
    at_start = [job for job in jobs if job.operation.name == "at 0, factors"]
    assert sorted((job.cell.arm, job.seed) for job in at_start) == [("CoTo", 0), ("LoRA", 0)]
    for job in at_start:  # the start of a path is its first adapter
        assert (journal.correct(job, "test") == journal.correct(alone[job.cell, job.seed], "test")).all()
    merged = next(job for job in jobs if job.operation.name == "merge 1:2, linear delta")
    assert merged.operation.arguments["weights"] == [1 / 3, 2 / 3]
    assert [source.seed for source in merged.sources] == [0, 1]


def test_coalitions_are_drawn_alike_and_told_as_one(done) -> None:
    made, folder, _ = done
    journal = Journal(folder / "journal")
    jobs = [job for part in phases(made, chooser(made, journal)) for job in part if job.operation.how == "coalition"]
    assert sorted((job.cell.arm, job.seed, job.operation.arguments["draw"]) for job in jobs) == [
        (arm, seed, draw) for arm in ("CoTo", "LoRA") for seed in (0, 1) for draw in (0, 1)
    ]
    kept = {}
    for job in jobs:
        whole = load(folder / "adapters" / run_key(job.sources[0]))
        kept.setdefault(job.operation.arguments["draw"], set()).add(tuple(job.operation.applied([whole]).modules))
        assert 0 < len(job.operation.applied([whole]).modules) < len(whole.modules)
    assert all(len(one) == 1 for one in kept.values()) and kept[0] != kept[1]
    mine = [job for job in jobs if (job.cell.arm, job.seed) == ("CoTo", 1)]
    mean = np.mean([journal.correct(job, "test").mean() for job in mine])
    (told,) = [
        record["by_seed"]["1"]
        for record in results(folder)["records"]
        if (record["arm"], record["measurement"]) == ("CoTo", "layers off with chance 0.5")
    ]
    assert told == pytest.approx(mean)


def test_the_rate_is_chosen_on_validation_of_the_tuning_seeds(table: Path, tmp_path: Path) -> None:
    made = sweep.read(table)
    journal = Journal(tmp_path)
    value = {("LoRA", 0.01): 2, ("LoRA", 0.03): 3, ("CoTo", 0.01): 3, ("CoTo", 0.03): 3}
    for job in next(phases(made, lambda cell: cell.rate)):
        right = value[job.cell.arm, job.cell.rate]
        scores = {"test": "1" * (5 - right) + "0" * right, "validation": "1" * right + "0" * (5 - right)}
        journal.put(job, {"scores": scores, "seconds": 1.0, "broken": False, "took": 1.0})
    choose = chooser(made, journal)
    assert [choose(cell) for cell in cells(made)] == [0.03, 0.01, 0.03, 0.01]  # equal ones: the smallest


def test_processes_share_a_folder(table: Path, done, recipe_content: dict, tmp_path: Path) -> None:  # noqa: F811
    """A part of the table, done by two: each job is in the journal as one process found it."""
    arms = {"LoRA": {"strategy": {"name": "none"}}}
    few = sweep.read(written(tmp_path, recipe_content, arms=arms, rates=[0.01], measure={}))
    sweep.run(few, tmp_path / "out", jobs=2, say=lambda line: None)
    one, two = done[1] / "journal", tmp_path / "out" / "journal"
    assert len(list(two.iterdir())) == 3  # the frozen model and two seeds
    for path in two.iterdir():
        assert scores(path) == scores(one / path.name)


def test_other_processes_end_with_one_that_is_killed(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    long = {**recipe_content, "train": {**recipe_content["train"], "steps": 100_000}}
    first = process(_sweep_of_two, written(tmp_path, long), tmp_path / "out")
    first.start()
    others: list[psutil.Process] = []
    while not others and first.is_alive():
        time.sleep(0.02)
        others = [one for one in psutil.Process(first.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    first.kill()
    assert status_of(first) == -signal.SIGKILL
    left = psutil.wait_procs(others, timeout=60)[1]
    for one in left:
        one.kill()
    assert len(others) == 1 and not left


def _sweep_of_two(table: Path, out: Path) -> None:
    sweep.run(sweep.read(table), out, jobs=2, say=lambda line: None)


def scores(path: Path) -> dict:
    return json.loads(path.read_text())["scores"]


def test_a_job_that_another_one_has_is_waited_for(done, tmp_path: Path) -> None:
    made, folder, _ = done
    shutil.copytree(folder / "journal", tmp_path / "journal")
    job = next(phases(made, lambda cell: cell.rate))[0]
    kept = tmp_path / "journal" / f"{job.key}.json"
    text = kept.read_text()
    kept.unlink()
    held = clean.Event()
    child = process(_hold, tmp_path / "claims" / job.key, kept, text, held)
    child.start()
    assert held.wait(60)
    said: list[str] = []
    Worker(made, tmp_path, say=said.append).complete()
    assert status_of(child) == 0
    assert said == [] and kept.read_text() == text


def _hold(claim: Path, kept: Path, text: str, held: object) -> None:
    with claimed(claim) as mine:
        assert mine
        held.set()
        time.sleep(0.3)
        kept.write_text(text)


def test_ranks_of_a_launcher_share_a_folder_and_the_first_one_refuses(table: Path, done, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [status_of(one) for one in ranks(_launched, 2, table, out)] == [0, 0]
    assert results(out)["records"] == results(done[1])["records"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    shutil.rmtree(out / "claims")
    assert [status_of(one) for one in ranks(_launched, 2, table, out)] == [2, 2]
    assert not (out / "claims").exists()
    assert all(path.stat().st_mtime_ns == before[path] for path in (out / "journal").iterdir())


def _launched(rank: int, table: Path, out: Path) -> None:
    try:
        sweep.run(sweep.read(table), out, say=lambda line: None)
    except (FileExistsError, Elsewhere) as error:
        assert isinstance(error, Elsewhere) == (rank > 0)
        raise SystemExit(2) from None
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & set(os.environ)


def test_a_sweep_goes_on_with_what_is_done(done, capsys) -> None:
    made, folder, _ = done
    with pytest.raises(FileExistsError, match="--resume"):
        sweep.run(made, folder)
    before = results(folder)["records"]
    journal = sorted((folder / "journal").iterdir())
    stamps = {path: path.stat().st_mtime_ns for path in journal}
    job = next(job for job in next(phases(made, lambda cell: cell.rate)) if job.cell.arm == "CoTo")
    left = folder / "work" / run_key(job.sources[0]) / "checkpoint-3"  # killed in the middle of training
    left.mkdir(parents=True)
    (left / "torn.safetensors").write_text("torn")
    lost = [next(path for path in journal if "every-other" in path.read_text()), folder / "journal" / f"{job.key}.json"]
    for path in lost:
        path.unlink()
    said: list[str] = []
    sweep.run(made, folder, resume=True, say=said.append)
    assert len(said) == 3 and "alone" in said[0] and "every-other" in said[1] and not left.exists()  # and the end
    assert {path: path.stat().st_mtime_ns for path in journal if path not in lost} == {
        path: stamp for path, stamp in stamps.items() if path not in lost
    }
    assert results(folder)["records"] == before


def test_a_changed_sweep_shares_what_is_the_same(table: Path) -> None:
    made = sweep.read(table)
    more = made.model_copy(update={"seeds": (0, 1, 2), "rates": (0.01, 0.03, 0.1)})
    keys = [{job.key for part in phases(one, lambda cell: 0.01) for job in part} for one in (made, more)]
    assert len(keys[0] - keys[1]) == 2  # of two arms, the merge of seeds 1 and 0: seed 1 goes with seed 2 now
    limited = made.model_copy(update={"limit": 10})
    assert not keys[0] & {job.key for part in phases(limited, lambda cell: 0.01) for job in part}


def test_a_claim_is_one_s_own_and_ends_with_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "a"
    with claimed(path) as first, claimed(path) as second:
        assert (first, second) == (True, False)
    child = process(_die_with, path)
    child.start()
    assert status_of(child) == -9
    with claimed(path) as mine:
        assert mine


def _die_with(path: Path) -> None:
    with claimed(path) as mine:
        assert mine
        os.kill(os.getpid(), signal.SIGKILL)


def test_tasks_are_merged_at_each_one_s_own_rate(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    made = sweep.read(
        written(tmp_path, recipe_content, tasks=["digits", "fashion-mnist"], measure={"tasks": [{"method": "ties"}]})
    )
    part = list(phases(made, lambda cell: 0.01 if cell.task == "digits" else 0.03))[-1]
    assert [(job.cell.arm, job.cell.task, job.seed) for job in part[:4]] == [
        ("LoRA", "digits", 0),
        ("LoRA", "digits", 1),
        ("CoTo", "digits", 0),
        ("CoTo", "digits", 1),
    ]
    assert {tuple((str(r.task), r.train.learning_rate) for r in job.sources) for job in part} == {
        (("digits", 0.01), ("fashion-mnist", 0.03))
    }
    assert len({job.key for job in part}) == 8  # the same merge is scored on two tasks


def test_dora_adapters_are_put_together_on_the_base_s_weights(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    measure = {"merge": [{"weights": [1, 1], "space": "delta"}], "interpolate": {"at": [0.25], "spaces": ["delta"]}}
    arms = {"DoRA": {"adapter.kind": "dora"}}
    path = written(tmp_path, recipe_content, arms=arms, rates=[0.01], measure=measure)
    jobs = [job for part in phases(sweep.read(path), lambda cell: 0.01) for job in part][-2:]
    model = AutoModel.from_pretrained(recipe_content["model"])
    square = {path: one for path, one in model.named_modules() if getattr(one, "out_features", 0) == 16}
    name, weight = next((path, one.weight.detach()) for path, one in square.items() if one.in_features == 16)

    def drawn(seed: int) -> Factors:
        draw = torch.Generator().manual_seed(seed)
        parts = [torch.randn(*shape, generator=draw) for shape in ((16, 2), (2, 16), (16,))]
        return Factors(parts[0], parts[1], magnitude=parts[2].abs())

    def effective(one: Factors) -> torch.Tensor:
        moved = weight + one.delta()
        return one.magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight

    one, other = drawn(0), drawn(1)
    adapters = [Adapter({"r": 2, "peft_type": "LORA", "use_dora": True}, {name: held}) for held in (one, other)]
    for job, at in zip(jobs, (0.25, 0.5), strict=True):
        found = job.operation.applied(adapters, Worker._base(job)).modules[name].delta()
        wanted = (1 - at) * effective(one) + at * effective(other)
        u, s, v = torch.linalg.svd(wanted)  # the best of rank 4, the sum of the ranks
        assert torch.allclose(found, u[:, :4] * s[:4] @ v[:4], atol=1e-3), job.operation.name
    with pytest.raises(ValueError, match=r"at 0\.25, factors, arm DoRA .*: cannot merge DoRA adapters"):
        sweep.read(written(tmp_path, recipe_content, arms=arms, rates=[0.01], measure={"interpolate": {"at": [0.25]}}))


def test_maps_show_the_first_arm_and_the_gaps_to_it(done) -> None:
    by = {
        (record["arm"], record["rate"]): record["by_seed"]
        for record in results(done[1])["records"]
        if record["measurement"] == "alone"
    }
    panels = {panel["title"]: panel for panel in results(done[1])["panels"]}
    z = panels["alone: CoTo minus LoRA"]["z"][0]
    for rate, value in zip([0.01, 0.03], z, strict=True):
        pairs = [
            (by["CoTo", rate][seed], by["LoRA", rate][seed]) for seed in set(by["CoTo", rate]) & set(by["LoRA", rate])
        ]
        assert value == pytest.approx(np.mean([one - other for one, other in pairs]), abs=1e-4)
    assert "alone: LoRA" in panels and "alone: CoTo" not in panels


def test_gaps_over_tasks_have_both_intervals(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    """Outcomes written by hand: CoTo is ahead by .1 and .3 on one task, by .2 and .4 on the other."""
    made = sweep.read(written(tmp_path, recipe_content, tasks=["digits", "fashion-mnist"], rates=[0.01], measure={}))
    journal = Journal(tmp_path / "out" / "journal")
    ahead = {("digits", 0): 1, ("digits", 1): 3, ("fashion-mnist", 0): 2, ("fashion-mnist", 1): 4}
    for job in (job for part in phases(made, lambda cell: 0.01) for job in part):
        right = 5 + ahead[job.cell.task, job.seed] * (job.cell.arm == "CoTo")
        scores = dict.fromkeys(job.splits, "1" * right + "0" * (10 - right))
        where = {"device": "H100"} if job.seed else {}  # entries of earlier versions do not say
        where |= {"device": "elsewhere"} if job.operation.how == "base" else {}  # no run was made there
        seconds = None if job.operation.how == "base" else 1.0 + job.seed
        journal.put(job, {"scores": scores, "seconds": seconds, "broken": False, "took": 1.0, **where})
    panels = {one.title: one for one in summarised(made, journal, seconds=1, processes=1).panels}
    times = [("H100", 2, 2.0, 0), ("not noted", 2, 1.0, 0)]
    assert panels["Training time"].rows == tuple((arm, *row) for arm in ("LoRA", "CoTo") for row in times)
    table, (bars,) = panels["Over the tasks"], panels["Gap to LoRA over the tasks"].series
    assert (bars.name, bars.x, bars.y) == ("CoTo", ("alone",), (0.25,))
    assert (bars.low[0], bars.high[0]) == pytest.approx(spread({(0,): 0.15, (1,): 0.35})[1:], abs=1e-4)
    rows = {row[1]: row[2:] for row in table.rows}
    assert rows["LoRA"] == (0.5, None, None, None, None, None) and rows["CoTo"][:2] == (0.75, 0.25)
    wanted = [spread({(0,): one, (1,): two})[1:] for one, two in ((0.15, 0.35), (0.2, 0.3))]
    assert rows["CoTo"][2:] == tuple(round(end, 4) for ends in wanted for end in ends)
    half = (wanted[0][1] - wanted[0][0]) / 2
    assert panels["Arm by arm"].columns == ("measurement", "LoRA", "CoTo")
    assert panels["Arm by arm"].rows == (("alone", "0.500", f"0.750 (+0.250\u00a0±\u00a0{half:.3f})"),)


def test_a_gap_beyond_its_interval_is_marked() -> None:
    told = [str(Gap(0.75, ends, ())) for ends in ((0.1, 0.0, 0.2), (0.1, 0.01, 0.19), (-0.1, -0.2, -0.01))]
    assert [one[-1] for one in told] == [")", "▲", "▼"]
    assert str(Gap(0.75, (0.0, None, None), ())) == "0.750 (+0.000)"


def test_a_run_that_breaks_down_has_no_right_answer(recipe_content: dict, tmp_path: Path) -> None:  # noqa: F811
    measure = {"rates": "all", "interpolate": {"at": [0.5], "spaces": ["delta"]}}
    made = sweep.read(written(tmp_path, recipe_content, arms={"LoRA": {}}, rates=[0.01, 1e38], measure=measure))
    found = sweep.run(made, tmp_path / "out", say=lambda line: None)
    by = {(record["measurement"], record["rate"]): record for record in found.records}
    assert by["alone", 1e38]["by_seed"] == {"0": 0.0, "1": 0.0} and by["half way, delta", 1e38]["by_seed"] == {"0": 0.0}
    assert by["alone", 0.01]["chosen"] and not by["alone", 1e38]["chosen"]
    (times,) = [panel for panel in found.panels if panel.title == "Training time"]
    assert times.rows[0][1:3] == (device_name(), 2) and times.rows[0][-1] == 3


def test_a_projection_that_the_model_has_not_is_told_with_the_first_adapter(
    recipe_content: dict,  # noqa: F811
    tmp_path: Path,
) -> None:
    measure = {"prune": [{"modules": "query"}]}
    made = sweep.read(written(tmp_path, recipe_content, arms={"LoRA": {}}, measure=measure))
    with pytest.raises(ValueError, match="projection 'query' is not known"):
        sweep.run(made, tmp_path / "out", say=lambda line: None)
    assert len(list((tmp_path / "out" / "journal").iterdir())) == 1  # the frozen model


def test_an_axis_is_a_key_of_the_recipe(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    made = sweep.read(
        written(tmp_path, recipe_content, axes={"train.steps": [3, 6], "adapter.target_modules": [["query"]]})
    )
    runs = [run_of(made, cell, 1) for cell in cells(made)]
    assert {(run.train.steps, run.adapter.target_modules, run.seed) for run in runs} == {
        (3, ("query",), 1),
        (6, ("query",), 1),
    }


def test_axes_are_told_apart(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    """By the last part of their keys, by all of it where that is another one's; true and false are words."""
    axes = {"train.steps": [3, 6], "lori.calibrate.steps": [2], "train.gradient_checkpointing": [True, False]}
    table = written(tmp_path, recipe_content, axes=axes, arms={"LoRI-S": {"lori.calibrate.density": 0.1}}, measure={})
    made = sweep.read(table)
    assert where(made, next(cells(made))) == {
        "train.steps": 3,
        "lori.calibrate.steps": 2,
        "gradient_checkpointing": "true",
        "task": "digits",
    }
    journal = Journal(tmp_path / "journal")
    scored(made, journal)
    page = summarised(made, journal, seconds=1, processes=1)
    (rates,) = [panel for panel in page.panels if panel.title == "Learning rates chosen on validation"]
    assert {row[:3] for row in rates.rows} == {(steps, 2, on) for steps in (3, 6) for on in ("true", "false")}


def test_one_seed_has_a_page_without_intervals(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    prune = [{"density": 0.5}, {"density": 0.001}]
    made = sweep.read(written(tmp_path, recipe_content, seeds=[0], measure={"prune": prune}))
    journal = Journal(tmp_path / "journal")
    scored(made, journal)
    page = summarised(made, journal, seconds=1, processes=1)
    (kept,) = [panel for panel in page.panels if panel.title == "Entries kept"]
    assert kept.series[0].low is None and len(kept.series[0].y) == 3 and "Of 0" not in page.summary


def test_threads_are_shared_by_the_ranks_of_a_machine(table: Path, tmp_path: Path, monkeypatch) -> None:
    made = sweep.read(table).model_copy(update={"threads": None})
    asked: list[int] = []
    monkeypatch.setattr("loraloom.sweep.torch.set_num_threads", asked.append)
    monkeypatch.setattr("loraloom.sweep.os.cpu_count", lambda: 12)
    monkeypatch.setattr(Worker, "complete", lambda worker: None)
    monkeypatch.setattr("loraloom.sweep.summarised", lambda *args, **kwargs: report.Report("x", "x"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    sweep.run(made, tmp_path / "out", say=lambda line: None)
    assert asked == [3]


def test_groups_are_consecutive_seeds(table: Path) -> None:
    made = sweep.read(table).model_copy(update={"seeds": (0, 1, 2)})
    by = {operation.name: groups(made, operation) for operation in operations(made)}
    assert by["half way, factors"] == [(0, 1), (1, 2), (2, 0)]
    assert by["kept: every-other"] == [(0,), (1,), (2,)]


WRONG = {
    "an unknown key": ({"rate": [1]}, "rate is not known (did you mean 'rates'?)"),
    "an unknown key of a merge": (
        {"measure": {"merge": [{"weights": [1, 1], "metod": "ties"}]}},
        "measure.merge.0.metod is not known (did you mean 'method'?); allowed: method, space, options, weights",
    ),
    "what every run is given, in an arm": (
        {"arms": {"X": {"train": {"learning_rate": 0.5}}}},
        "arm X sets train.learning_rate, which every run is given by rates",
    ),
    "what every run is given, in an axis": (
        {"axes": {"seed": [1]}},
        "axes sets seed, which every run is given by seeds",
    ),
    "an axis that an arm sets": (
        {"arms": {"X": {"train": {"steps": 9}}}, "axes": {"train.steps": [3, 6]}},
        "arm X and axes both set train.steps",
    ),
    "a date": (
        {"arms": {"X": {"train.steps": date(2024, 1, 1)}}},
        "train.steps must be text, a number, true, false, null, a list or a map, got datetime.date(2024, 1, 1)",
    ),
    "no points": ({"measure": {"interpolate": {"at": []}}}, "measure.interpolate.at"),
    "a space twice": ({"measure": {"interpolate": {"spaces": ["delta", "delta"]}}}, "has a value twice"),
    "an unknown key of a path": ({"measure": {"interpolate": {"points": 3}}}, "allowed: at, spaces"),
    "an unknown key of an arm": ({"arms": {"X": {"strategy.nam": "coto"}}}, "arm X: recipe"),
    "an unknown method": ({"measure": {"merge": [{"weights": [1, 1], "method": "teis"}]}}, "'teis'"),
    "an argument that the method has not": (
        {"measure": {"merge": [{"weights": [1, 1], "method": "linear", "options": {"density": 0.2}}]}},
        "merge 1:1, linear density 0.2, arm LoRA (lora): method 'linear' takes no 'density'",
    ),
    "a kind that does not merge": (
        {"arms": {"A": {}, "B": {"adapter.kind": "dora"}}},
        "at 0, factors, arm B (dora): cannot merge DoRA adapters",
    ),
    "a space of two lines": (
        {"measure": {"merge": [{"weights": [1, 1], "space": "a\n\nb"}]}},
        "sweep.yaml: merge 1:1, linear a b, arm LoRA",
    ),
    "an arm of two lines": ({"arms": {"X\nY": {"strategy.nam": "coto"}}}, "arm X Y: recipe"),
    "seeds that are no list": ({"seeds": 3}, "seeds"),
    "rates that are a text": ({"rates": "12"}, "rates"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds has a value twice: [1, 1]"),
    "too few seeds": ({"seeds": [0], "tuned_on": [0]}, "measure needs 2 seeds"),
    "a tuning seed that is none": ({"tuned_on": [7]}, "tuned_on has seed 7"),
    "one task": ({"measure": {"tasks": [{}]}}, "fewer than two"),
    "an unknown task": ({"tasks": ["digitz"]}, "'digitz' is not known (did you mean 'digits'?)"),
    "a rate of 0": ({"rates": [0]}, "rates.0"),
    "no arms": ({"arms": {}}, "arms"),
    "rates of an arm that are none": (
        {"arms": {"X": {"rates": [0]}}},
        "arms: rates of arm X must be numbers above 0, got [0]",
    ),
    "a rate of an arm twice": (
        {"arms": {"X": {"rates": [1, 1]}}},
        "arms: rates of arm X has a value twice: [1.0, 1.0]",
    ),
    "a density of 0": ({"measure": {"prune": [{"density": 0}]}}, "measure.prune.0.density"),
    "no recipe": ({"recipe": "nowhere.yaml"}, "nowhere.yaml: no such file"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_sweep_is_one_line(tmp_path: Path, recipe_content: dict, changes: dict, said: str) -> None:  # noqa: F811
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        sweep.read(written(tmp_path, recipe_content, **changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_sweep_of_others_is_read_with_bounds(tmp_path: Path) -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    for text, said in (("a0: &a0 [x]\n" + "\n".join(levels), "sweep"), ("seeds: [0]\nseeds: [1]\n", "seeds")):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(ValueError, match=said) as caught:
            sweep.read(tmp_path / "sweep.yaml")
        assert "\n" not in str(caught.value)


def test_a_damaged_journal_names_the_file(done) -> None:
    made, folder, _ = done
    job = next(phases(made, lambda cell: cell.rate))[0]
    path = folder / "journal" / f"{job.key}.json"
    kept = path.read_text()
    path.write_text(kept[:20])
    try:
        with pytest.raises(ValueError, match=rf"{job.key}\.json is damaged"):
            Journal(folder / "journal").get(job)
    finally:
        path.write_text(kept)


def test_one_pair_has_no_interval_over_seeds(done) -> None:
    """What was measured once is not called better or worse."""
    panels = {panel["title"]: panel for panel in results(done[1])["panels"]}
    rows = {tuple(row[:3]): row[3:] for row in panels["Accuracy at the chosen rates"]["rows"]}
    assert rows["digits", "half way, factors", "CoTo"][1:] == [None, None, 1]
    assert rows["digits", "alone", "CoTo"][1] < rows["digits", "alone", "CoTo"][2]
    gaps = {row[1]: row[3:] for row in panels["Against LoRA"]["rows"]}
    assert gaps["half way, factors"][1:3] == [None, None] and None not in gaps["half way, factors"][3:]
    several = sum(low is not None for _, low, *_ in gaps.values())  # none where both seeds gave the same
    told = re.search(r"CoTo is better in \d+ and worse in \d+ of (\d+)", results(done[1])["summary"])
    assert 0 < several <= 4 and told is not None and int(told[1]) == several


def test_the_interval_is_student_s() -> None:
    """Against the textbook's quantile of 4 degrees of freedom, 2.776."""
    values = [0.7, 0.8, 0.75, 0.9, 0.6]
    mean, low, high = spread({(seed,): value for seed, value in enumerate(values)})
    assert mean == pytest.approx(0.75)
    assert high - mean == pytest.approx(2.776 * np.std(values, ddof=1) / 5**0.5, rel=1e-3)
    assert mean - low == pytest.approx(high - mean)


@pytest.mark.parametrize(("seeds", "size"), [(5, 2), (5, 3), (4, 3), (3, 2)])
@pytest.mark.parametrize("own", [0.0, 1.0], ids=["of seeds", "of groups"])
def test_the_interval_over_groups_that_share_seeds_covers(seeds: int, size: int, own: float) -> None:
    """Where only seeds, or only groups, are the chance; Student's over groups covers 62 to 84 % of the first."""
    around = [tuple((at + more) % seeds for more in range(size)) for at in range(seeds)]
    draw, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        seed, group = draw.normal(size=seeds), draw.normal(size=seeds)
        _, low, high = spread({g: own * group[at] + (1 - own) * seed[list(g)].mean() for at, g in enumerate(around)})
        covered += low < 0 < high
    assert covered > 915


def hand_written(made: sweep.Sweep, out: Path, share: object) -> dict:
    """The panels of a sweep of which each job scored what ``share(job, split)`` says, of ten examples."""
    journal = Journal(out / "journal")
    for job in (job for part in phases(made, lambda cell: 0.01) for job in part):
        scores = {split: "1" * share(job, split) + "0" * (10 - share(job, split)) for split in job.splits}
        journal.put(job, {"scores": scores, "seconds": 1.0, "broken": False, "took": 1.0})
    return {one.title: one for one in summarised(made, journal, seconds=1, processes=1).panels}


def test_all_is_told_on_the_split_that_is_measured(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    measure = {"split": "validation", "interpolate": {"at": [0.5], "spaces": ["delta"]}}
    made = sweep.read(written(tmp_path, recipe_content, rates=[0.01], measure=measure))
    panels = hand_written(made, tmp_path / "out", lambda job, split: {"validation": 9, "test": 8}[split])
    assert [row[3:] for row in panels["Barriers between seeds"].rows] == [(0.0, None, None, 1)] * 2
    assert {row[3] for row in panels["Accuracy at the chosen rates"].rows} == {0.9}
    assert "on validation" in panels["Accuracy at the chosen rates"].note.lower()


@pytest.mark.parametrize("at", [[0.25, 0.5, 0.75], [0.5, 0.25, 0.75]])
def test_two_seeds_have_one_path(tmp_path: Path, recipe_content: dict, at: list[float]) -> None:  # noqa: F811
    measure = {"interpolate": {"at": at, "spaces": ["delta"]}}
    made = sweep.read(written(tmp_path, recipe_content, rates=[0.01], measure=measure))
    panels = hand_written(made, tmp_path / "out", lambda job, split: {0.5: 5}.get(job.operation.arguments.get("at"), 9))
    assert [row[3:] for row in panels["Barriers between seeds"].rows] == [(0.4, None, None, 1)] * 2


def test_an_adapter_that_is_gone_is_no_broken_training(done, tmp_path: Path) -> None:
    made, folder, _ = done
    shutil.copytree(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "adapters")
    more = made.model_copy(update={"measure": Measure.model_validate({"prune": [{"keep": "low"}]})})
    with pytest.raises(
        ValueError, match=r"adapters/\w+ is gone; put it back, or remove .*\.json and it is trained again"
    ):
        sweep.run(more, tmp_path / "out", resume=True, say=lambda line: None)


def test_bundled_sweeps_are_valid() -> None:
    folder = Path(__file__).parents[1] / "recipes" / "small"
    found = sorted(folder.glob("sweep-*.yaml"))
    assert found
    for path in found:
        made = sweep.read(path)
        assert parse(run_of(made, next(cells(made)), 0).model_dump(mode="json"))


def test_the_curve_of_entries_kept(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    """Outcomes written by hand: LoRA has 9 of 10 whole, 8 with half of the entries and 6 with a tenth; CoTo one less,
    and in seed 1 two."""
    kept = {"alone": 9, "kept: density 0.5": 8, "kept: density 0.1": 6}
    asked = {"measure": {"prune": [{"keep": "low"}, {"density": 0.5}, {"density": 0.1}]}}
    made = sweep.read(written(tmp_path, recipe_content, **asked))
    journal = Journal(tmp_path / "out" / "journal")
    for job in (job for part in phases(made, lambda cell: 0.01) for job in part):
        right = kept.get(job.operation.name, 2) - (job.cell.arm == "CoTo") * (1 + job.seed)
        scores = dict.fromkeys(job.splits, "1" * right + "0" * (10 - right))
        journal.put(job, {"scores": scores, "seconds": 1.0, "broken": False, "took": 1.0})
    panels = {one.title: one for one in summarised(made, journal, seconds=1, processes=1).panels}
    lora, coto = panels["Entries kept"].series
    assert (lora.name, lora.x, lora.y) == ("LoRA", (0.1, 0.5, 1.0), (0.6, 0.8, 0.9))
    assert (coto.name, coto.y) == ("CoTo", (0.45, 0.65, 0.75))
    assert coto.low == tuple(round(value - 12.7062 * 0.05, 4) for value in coto.y)  # Student's, two seeds


def test_where_a_gap_grows(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    """Outcomes written by hand: CoTo is ahead by .1 at one rate and .3 at the other, and .2 more at rank 3."""
    asked = {"rates": [0.01, 0.03], "axes": {"adapter.rank": [2, 3]}, "measure": {"rates": "all"}}
    made = sweep.read(written(tmp_path, recipe_content, **asked))
    journal = Journal(tmp_path / "out" / "journal")
    for job in (job for part in phases(made, lambda cell: 0.01) for job in part):
        ahead = {0.01: 1, 0.03: 3}[job.cell.rate] + 2 * (job.cell.axes == ("3",))
        right = 5 + ahead * (job.cell.arm == "CoTo")
        scores = dict.fromkeys(job.splits, "1" * right + "0" * (10 - right))
        journal.put(job, {"scores": scores, "seconds": 1.0, "broken": False, "took": 1.0})
    panels = {one.title: one for one in summarised(made, journal, seconds=1, processes=1).panels}
    table = panels["Where the gap to LoRA grows"]
    assert table.columns[3:] == ("everywhere", "rate 0.01", "rate 0.03", "rank 2", "rank 3")
    assert table.rows == (("alone", "CoTo", "4 of 4", 0.3, 0.2, 0.4, 0.2, 0.4),)
    assert panels["alone: LoRA"].y == ("2", "3")  # what all places share is left out


def three(tmp_path: Path, content: dict, arms: tuple[str, ...] = ("LoRA", "CoTo", "half")) -> sweep.Sweep:
    """Three arms, one with rates of its own, on two tasks."""
    every = {
        "LoRA": {"strategy": {"name": "none"}},
        "CoTo": {"strategy.name": "coto"},
        "half": {"adapter.alpha": 8, "rates": [0.03, "1e-1"]},
    }
    measure = {
        "interpolate": {"at": [0.5], "spaces": ["delta"]},
        "tasks": [{}],
        "coalitions": {"off": [0.5], "draws": 2},
    }
    chosen = {name: every[name] for name in arms}
    tasks = ["digits", "fashion-mnist"]
    return sweep.read(written(tmp_path, content, arms=chosen, tasks=tasks, seeds=[0, 1, 2], measure=measure))


def scored(made: sweep.Sweep, journal: Journal) -> None:
    """Scores that differ from job to job, by the job's key."""
    for job in (job for part in phases(made, chooser(made, journal)) for job in part):
        draw = np.random.default_rng(int(job.key, 16))
        scores = {split: "".join(map(str, draw.integers(2, size=10))) for split in job.splits}
        seconds = None if job.operation.how == "base" else 2.0
        journal.put(job, {"scores": scores, "seconds": seconds, "broken": False, "took": 1.0})


def test_gaps_of_many_arms_are_a_heat_map(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    arms = {f"alpha {alpha}": {"adapter.alpha": alpha} for alpha in (8, 1, 2, 3, 4, 5)}
    made = sweep.read(written(tmp_path, recipe_content, arms=arms, tasks=["digits", "fashion-mnist"], measure={}))
    journal = Journal(tmp_path / "journal")
    scored(made, journal)
    panels = {one.title: one for one in summarised(made, journal, seconds=1, processes=1).panels}
    drawn = panels["Gap to alpha 8 over the tasks"]
    assert (drawn.x, drawn.y) == (tuple(arms)[1:], ("alone",))
    assert drawn.z == (tuple(row[3] for row in panels["Over the tasks"].rows if row[1] != "alpha 8"),)


def test_an_arm_has_its_own_rates(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    made = three(tmp_path, recipe_content)
    assert (made.grid("LoRA"), made.grid("half")) == ((0.01, 0.03), (0.03, 0.1))
    assert {(cell.arm, cell.rate) for cell in cells(made)} == {
        (arm, rate) for arm in made.arms for rate in made.grid(arm)
    }
    assert run_of(made, next(cell for cell in cells(made) if cell.rate == 0.1), 0).adapter.alpha == 8
    scored(made, Journal(tmp_path / "journal"))
    panels = {one.title: one for one in summarised(made, Journal(tmp_path / "journal"), seconds=1, processes=1).panels}
    rates = panels["Learning rates chosen on validation"]
    assert rates.note.startswith("Every arm chose from 0.01, 0.03, half from 0.03, 0.1, by its mean over seeds 0.")
    assert {row[2] for row in rates.rows if row[1] == "half"} <= {0.03, 0.1}
    assert panels["alone: half minus LoRA"].x == (0.03, 0.1)
    assert [row[1] for row in panels["alone: half minus LoRA"].z] == [None, None]  # LoRA has no run at 0.1


def test_arms_that_are_known_count_as_if_they_had_been_run_here(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    journal = Journal(tmp_path / "all" / "journal")
    scored(three(tmp_path, recipe_content), journal)
    whole = summarised(three(tmp_path, recipe_content), journal, seconds=1, processes=1)
    elsewhere = three(tmp_path, recipe_content, ("CoTo", "LoRA"))
    scored(elsewhere, journal)  # the frozen model is the first arm's
    report.write(summarised(elsewhere, journal, seconds=1, processes=1), tmp_path / "elsewhere")
    made = three(tmp_path, recipe_content)
    known = sweep.known(made, [tmp_path / "elsewhere"])
    assert set(known.source) == {"LoRA", "CoTo"}
    mine = Journal(tmp_path / "mine" / "journal")
    scored(known.own(made), mine)
    assert 0 < len(list(mine.folder.iterdir())) < len(list(journal.folder.iterdir())) / 2
    said: list[str] = []
    found = sweep.run(made, tmp_path / "mine", resume=True, known=known, say=said.append)
    assert len(said) == 3 and said[0].startswith("LoRA is read from ")  # two arms and the end: nothing was run
    assert "LoRA, CoTo read from" in found.summary
    told = [{one.title: one for one in each.panels} for each in (whole, found)]
    assert list(told[0]) == list(told[1])
    for title in told[0]:
        if title != "Against LoRA":
            assert told[0][title] == told[1][title], title
    gaps = [one["Against LoRA"].rows for one in told]
    assert [row[:-2] for row in gaps[0]] == [row[:-2] for row in gaps[1]] and {row[-2:] for row in gaps[1]} == {
        (None, None)
    }

    def ordered(one: report.Report) -> list[str]:
        frozen = [each for each in one.records if each["measurement"] != "frozen model"]
        return sorted(json.dumps(each, sort_keys=True) for each in frozen)

    assert ordered(whole) == ordered(found)  # a page of a page tells as much
    again = sweep.known(made, [tmp_path / "mine"])
    every = sweep.run(made, tmp_path / "none", known=again, say=said.append)
    assert {one.title: one for one in every.panels}["Over the tasks"] == told[0]["Over the tasks"]
    assert every.run["jobs"] == 0 and "jobs" not in every.run["arms read from"]


def test_a_page_that_lacks_something_is_not_read_and_says_so(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    made = three(tmp_path, recipe_content)
    journal = Journal(tmp_path / "journal")
    scored(made, journal)
    page = report.write(summarised(made, journal, seconds=1, processes=1), tmp_path / "page") or tmp_path / "page"
    measure = {"coalitions": {"off": [0.5], "draws": 2}}
    few = made.model_copy(update={"measure": Measure.model_validate(measure)})
    report.write(summarised(few, journal, seconds=1, processes=1), tmp_path / "few")
    both = sweep.known(made, [tmp_path / "few", page])  # each arm from the first file that has all of it
    assert set(both.source.values()) == {str(page)} and both.said[:3] == [
        f"{arm} is not read from {tmp_path / 'few'}: it lacks 'half way, delta' on digits for seeds 0, 1"
        for arm in made.arms
    ]
    arms = {**made.arms, "CoTo": {"strategy.name": "coto", "strategy.start": 0.5}}
    other = sweep.known(made.model_copy(update={"arms": arms}), [page])
    assert set(other.source) == {"LoRA", "half"}
    assert f"CoTo is not read from {page}: it lacks it as it is in this sweep" in other.said
    lines = json.loads((page / report.files.RESULTS).read_text())
    for record in lines["records"]:
        record["chosen"] &= record["arm"] != "half"
    (page / report.files.RESULTS).write_text(json.dumps(lines))
    assert sweep.known(made, [page]).said[-1] == f"half is not read from {page}: it lacks a chosen rate on digits"


def test_a_map_over_rates_is_known_too(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    """Tasks are merged at the chosen rates alone; the order of rates and where a file lies change nothing."""
    task = tmp_path / "mine.yaml"
    task.write_text("kind: pictures\n")
    measure = {"rates": "all", "prune": [{"density": 0.5}], "tasks": [{}]}
    arms = {"LoRA": {"strategy": {"name": "none"}}}
    path = written(tmp_path, recipe_content, arms=arms, tasks=["digits", "fashion-mnist"], measure=measure, tuned_on=[])
    made = sweep.read(path)
    journal = Journal(tmp_path / "journal")
    scored(made, journal)
    report.write(summarised(made, journal, seconds=1, processes=1), tmp_path / "page")
    turned = made.model_copy(update={"rates": made.rates[::-1], "tuned_on": (1, 0)})
    assert set(sweep.known(turned, [tmp_path / "page"]).source) == {"LoRA"}


def test_pages_of_earlier_versions_have_times_too(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    made = three(tmp_path, recipe_content)
    journal = Journal(tmp_path / "journal")
    scored(made, journal)
    report.write(summarised(made, journal, seconds=1, processes=1), tmp_path / "page")
    page = results(tmp_path / "page")
    (times,) = [panel for panel in page["panels"] if panel["title"] == "Training time"]
    times["columns"].remove("device")
    times["rows"] = [[row[0], *row[2:]] for row in times["rows"]]
    (tmp_path / "page" / report.files.RESULTS).write_text(json.dumps(page))
    assert sweep.known(made, [tmp_path / "page"]).times[0][:2] == ("LoRA", "not noted")


CHANGED = {
    "other seeds": ({"seeds": [0, 1, 3]}, "seeds is [0, 1, 2] there and [0, 1, 3] in this sweep"),
    "fewer tasks": ({"tasks": ["digits"], "measure": {}}, "tasks is ['digits', 'fashion-mnist'] there"),
    "another limit": ({"limit": 10}, "limit is 20 there and 10 in this sweep"),
    "another split": ({"measure": {"split": "validation"}}, "split is 'test' there and 'validation' in this sweep"),
    "other arms": ({"arms": {"new": {}}}, "none of the arms new is there"),
    "other draws": ({"measure": {"coalitions": {"draws": 3}}}, "draws is 2 there and 3 in this sweep"),
    "other axes": ({"axes": {"train.steps": [3]}}, "axes is {} there and {'train.steps': [3]} in this sweep"),
}


@pytest.mark.parametrize(("changes", "said"), CHANGED.values(), ids=CHANGED.keys())
def test_what_is_known_must_fit(tmp_path: Path, recipe_content: dict, changes: dict, said: str) -> None:  # noqa: F811
    made = three(tmp_path, recipe_content, ("LoRA", "CoTo"))
    journal = Journal(tmp_path / "journal")
    scored(made, journal)
    report.write(summarised(made, journal, seconds=1, processes=1), tmp_path / "page")
    arms = {"LoRA": {"strategy": {"name": "none"}}, "CoTo": {"strategy.name": "coto"}}
    usual = {"arms": arms, "tasks": ["digits", "fashion-mnist"], "seeds": [0, 1, 2], "measure": {}}
    other = sweep.read(written(tmp_path, recipe_content, **{**usual, **changes}))
    with pytest.raises(ValueError) as caught:
        sweep.known(other, [tmp_path / "page"])
    assert str(caught.value).startswith(f"{tmp_path / 'page'}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda page: page["run"].pop("sweep"), "not the results of a sweep"),
        (lambda page: page["run"]["sweep"].update(arms=[1]), "not the results of a sweep"),
        (lambda page: page["run"]["sweep"].update(measure=3), "not the results of a sweep"),
        (lambda page: page["records"][-1].update(by_seed={"0": 1.5}), "must be between 0 and 1, got 1.5"),
        (lambda page: page["records"][-1].update(by_seed={"7": 0.5}), "must map seeds of [0, 1, 2] to accuracies"),
        (lambda page: page["records"][-1].update(by_seed=[0.5]), "must map seeds of [0, 1, 2] to accuracies"),
    ],
)
def test_a_page_of_others_is_not_trusted(tmp_path: Path, recipe_content: dict, change: object, said: str) -> None:  # noqa: F811
    made = three(tmp_path, recipe_content)
    journal = Journal(tmp_path / "journal")
    scored(made, journal)
    report.write(summarised(made, journal, seconds=1, processes=1), tmp_path / "page")
    page = results(tmp_path / "page")
    change(page)
    (tmp_path / "page" / report.files.RESULTS).write_text(json.dumps(page))
    with pytest.raises(ValueError) as caught:
        sweep.known(made, [tmp_path / "page"])
    assert said in str(caught.value) and "\n" not in str(caught.value)
