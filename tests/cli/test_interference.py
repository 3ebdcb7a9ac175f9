"""The commands that compare adapters, as they are typed; no model, no task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import loraloom as ll
from loraloom.cli import app
from loraloom.masks import MASK, Mask
from loraloom.report import Report
from oracles.ops_dense import random_adapter

SIZES = {f"layers.{at}.{name}": (8, 8, 2) for at in range(2) for name in ("q_proj", "v_proj")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "c")):
        ll.save(random_adapter(seed, SIZES, target_modules=["q_proj", "v_proj"]), tmp_path / name)
    return tmp_path


def run(*words: str):
    return CliRunner().invoke(app, ["probe", *words], env={"COLUMNS": "160", "NO_COLOR": "1"})


def test_interference_writes_a_report_of_the_probe(place):
    done = run("interference", "a", "b", "c", "-o", "new/i.json")
    assert done.exit_code == 0, done.output
    report = Report.from_json(json.loads((place / "new" / "i.json").read_text()))
    found = ll.interference([ll.load(place / name) for name in ("a", "b", "c")])
    assert report.records == (found.to_json(),)
    assert [panel.title for panel in report.panels][2:] == [
        "Every pair, over all modules",
        "The worst module of each layer, by interference",
        "Where the adapters lie",
    ]
    worst = max(((i, j) for i in range(3) for j in range(i)), key=lambda pair: found.tsv[pair[0]][pair[1]])
    pair = " | ".join(sorted("abc"[at] for at in worst))
    assert pair in report.summary and pair in done.output
    told = {row[0]: row[1] for row in report.panels[1].rows}
    assert told["pair"] == pair and told["interference"] == max(max(row) for row in found.tsv)
    assert told["sign conflict"] == found.sign_conflict[worst[0]][worst[1]]
    angles = torch.tensor(found.angles.columns[worst[0]][worst[1]])
    assert told["column angle"] == pytest.approx(float(angles.rad2deg().square().mean().sqrt()), rel=1e-5)
    layers = report.panels[3].rows
    assert [row[0] for row in layers] == ["layers.0", "layers.1"]
    at = report.panels[3].columns.index("interference")
    for row in layers:
        inside = [found.modules[name] for name in SIZES if name.startswith(row[0])]
        assert row[at] == max(max(map(max, module.tsv)) for module in inside)
    assert "cosine" in done.output and "sign conflict" in done.output


def test_json_two_adapters_of_one_name_and_no_entries(place):
    (place / "other").mkdir()
    (place / "a").rename(place / "other" / "b")
    done = run("interference", "b", "other/b", "-o", "i.json", "--no-entries", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["sign_conflict"] is None and len(told["modules"]) == 4
    report = Report.from_json(json.loads((place / "i.json").read_text()))
    assert report.panels[0].x == ("1: b", "2: b") and len(report.panels) == 3
    assert "sign" not in report.summary


@pytest.mark.parametrize("words", [("--model", "x"), ("--split", "validation"), ("--limit", "3")])
def test_what_goes_with_a_task_is_refused_without_one(place, words):
    done = run("interference", "a", "b", "-o", "i.json", *words)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1) and "give --task" in done.stderr
    assert not (place / "i.json").exists()


def test_masks_are_those_in_the_folders(place):
    masks = {}
    for name, share in (("a", 0.5), ("b", 0.25)):
        kept = {module: torch.rand(8, 2, generator=torch.Generator().manual_seed(7)) < share for module in SIZES}
        masks[name] = Mask.of(kept)
        ll.save_mask(masks[name], place / name / MASK)
    done = run("interference", "a", "b", "-o", "i.json", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)["mask_overlap"]
    assert told[1][0] == 1.0 and told[0][1] == pytest.approx(masks["a"].overlap(masks["b"])) and told[0][1] < 1


def test_geometry_writes_a_report_of_the_probe(place):
    done = run("geometry", "a", "b", "c", "-o", "g.json")
    assert done.exit_code == 0, done.output
    report = Report.from_json(json.loads((place / "g.json").read_text()))
    found = ll.geometry([ll.load(place / name) for name in ("a", "b", "c")])
    assert report.records == (found.to_json(),)
    points = {series.name: (series.x[0], series.y[0]) for series in report.panels[2].series}
    assert points == dict(zip("abc", found.positions, strict=True))
    assert report.panels[3].z == found.distance
    assert run("geometry", "a", "b", "-o", "two.json").exit_code == 0


def test_the_report_says_what_of_other_kinds_is_not_looked_at(place):
    for name in ("a", "b"):
        held = ll.load(place / name).loaded()
        modules = {path: replace(part, magnitude=torch.ones(8)) for path, part in held.modules.items()}
        ll.save(replace(held, config={**held.config, "use_dora": True}, modules=modules), place / f"dora-{name}")
    for probe in ("interference", "geometry"):
        assert run(probe, "dora-a", "dora-b", "-o", f"{probe}.json").exit_code == 0
        assert "magnitudes of DoRA are not looked at" in (place / f"{probe}.json").read_text()


def test_wrong_requests_are_one_line(place):
    ll.save(random_adapter(5, SIZES, base_model_name_or_path="org/other", target_modules=["q_proj"]), place / "d")
    (place / "taken.json").write_text("{}")
    cases = {
        ("interference", "a", "-o", "i.json"): "at least two are needed, got 1",
        ("geometry", "a", "-o", "i.json"): "at least two are needed, got 1",
        ("interference", "a", "d", "-o", "i.json"): "--allow-different-bases",
        ("geometry", "a", "d", "-o", "i.json"): "--allow-different-bases",
        ("interference", "a", "nowhere", "-o", "i.json"): "nowhere",
        ("interference", "a", "b", "-o", "taken.json"): "taken.json exists",
        ("geometry", "a", "b", "-o", "taken.json"): "taken.json exists",
    }
    for words, said in cases.items():
        done = run(*words)
        assert done.exit_code == 2 and said in done.output, (words, done.output)
        assert done.stderr.startswith(f"loraloom probe {words[0]}: ") and done.stderr.count("\n") == 1
    assert not (place / "i.json").exists()
    assert run("interference", "a", "d", "-o", "i.json", "--allow-different-bases").exit_code == 0


def test_a_result_that_came_meanwhile_is_not_lost(place, monkeypatch):
    """Another process writes it while this one computes."""
    from loraloom import probing

    made = probing.geometry_report

    def meanwhile(*arguments, **named):
        (place / "g.json").write_text("of another")
        return made(*arguments, **named)

    monkeypatch.setattr(probing, "geometry_report", meanwhile)
    words = ("geometry", "a", "b", "-o", "g.json")
    done = run(*words)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1) and "g.json" in done.stderr
    assert (place / "g.json").read_text() == "of another"
    assert run(*words, "--overwrite").exit_code == 0
    assert json.loads((place / "g.json").read_text())["title"] == "Geometry"


def test_json_is_the_record_and_a_list_where_there_are_several(place):
    def printed(*words):
        done = run(*words, "--json", "--overwrite", "-o", "out.json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), json.loads((place / "out.json").read_text())["records"]

    found, records = printed("interference", "a", "b")
    assert [found] == records
    shares = {"steps": [1, 2], "modules": ["layers.0.q_proj"], "gradient": [[1.0], [2.0]], "update": [[0.1], [0.2]]}
    for name in ("x", "y"):
        Path(f"{name}.json").write_text(json.dumps(shares | {"distance": [[0.1], [0.2]], "since": 0}))
    found, records = printed("balance", "x.json", "y.json")
    assert found == records and [one["run"] for one in found] == ["x", "y"]
