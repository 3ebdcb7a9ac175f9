"""What else becomes a page: adapters' records, scores, rows of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loraloom.adapter import Adapter, Factors
from loraloom.cli import app
from loraloom.ops.merge import merge
from loraloom.probes.stability import Stability
from loraloom.probing import stability_report_of
from loraloom.report import Bars, Curve, Heatmap, Table, read
from loraloom.report.context import ran
from loraloom.report.words import words_of
from loraloom.store import save

ROOT = Path(__file__).parent.parent


def adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        f"layers.{at}.{role}": Factors(
            B=torch.randn(6, 2, generator=generator), A=torch.randn(2, 5, generator=generator)
        )
        for at in range(2)
        for role in ("q", "v")
    }
    log = [{"step": 10, "loss": 2.0, "grad_norm": 1.0}, {"step": 20, "loss": 1.0}, {"step": 20, "train_loss": 1.5}]
    made = {"operation": "train", "seed": seed, "arguments": {"model": "m", "seed": seed}}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q", "v"]}
    return Adapter(config, modules, provenance={**made, "record": {"seconds": 12.0, "log": log}})


def titles(report, kind):
    return [panel.title for panel in report.panels if isinstance(panel, kind)]


def test_a_trained_adapter_shows_what_was_logged(tmp_path):
    save(adapter(0), tmp_path / "a")
    report = read([tmp_path / "a"])
    assert report.title == "a: train"
    assert titles(report, Curve) == ["Training loss"]  # the gradient was logged once: no curve
    assert report.panels[0].series[0].y == (2.0, 1.0)
    assert "Training took 12 s. The training loss went from 2 to 1." in report.summary
    assert report.run["arguments"] == {"model": "m", "seed": 0}
    assert report.panels[0].command.startswith("loraloom train")


def test_a_merged_adapter_shows_its_error_and_its_inputs(tmp_path):
    for at in range(2):
        save(adapter(at), tmp_path / str(at))
    save(merge([adapter(0), adapter(1)], method="linear", space="delta", rank=1), tmp_path / "m", command="loraloom m")
    report = read([tmp_path / "m"])
    (errors,) = [panel for panel in report.panels if isinstance(panel, Heatmap)]
    assert (errors.y, errors.x) == (("layers.0", "layers.1"), ("q", "v"))
    assert all(0 < z < 1 for row in errors.z for z in row)
    assert "m was made by merge by linear." in report.summary
    assert "% off what was asked for" in report.summary
    assert titles(report, Table) == ["Inputs"]
    assert {panel.command for panel in report.panels} == {"loraloom m"}


def test_scores_are_bars_with_intervals_and_all_can_be_read_at_once(tmp_path):
    rows = [
        {"adapter": who, "task": task, "split": "test", "value": 0.5, "low": 0.4, "high": 0.6, "examples": 100}
        for who in ("a", "b")
        for task in ("digits", "shapes")
    ]
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    save(adapter(0), tmp_path / "a")
    report = read([tmp_path / "scores.json", tmp_path / "a"])
    (bars,) = [panel for panel in report.panels if isinstance(panel, Bars)]
    assert (bars.categories, [one.name for one in bars.series]) == (("digits", "shapes"), ["a", "b"])
    assert bars.series[0].low == (0.4, 0.4)
    assert len(titles(report, Table)) == 1
    assert report.title == "2 reports: scores, a: train"


def test_scores_on_two_splits_or_twice_on_one_are_bars_of_their_own(tmp_path):
    row = {"adapter": "a", "task": "digits", "low": 0.1, "high": 0.9}
    told = [("test", 0.5), ("validation", 0.6), ("test", 0.7)]
    (tmp_path / "s.json").write_text(json.dumps([row | {"split": split, "value": value} for split, value in told]))
    bars = read([tmp_path / "s.json"]).panels[0]
    shown = {one.name: one.y for one in bars.series}
    assert shown == {"a, test": (0.5,), "a, validation": (0.6,), "a, test #2": (0.7,)}


OTHERS = {
    "log of texts": ({"log": ["x"]}, ""),
    "no log": ({"log": 5, "error": {}}, ""),
    "a loss that is text": ({"log": [{"step": 1, "loss": "x"}, {"step": 2, "loss": 1.0}]}, "went from 1 to 1."),
    "seconds": ({"seconds": [1]}, ""),
    "a norm that is text": ({"error": {"a": 0.5, "b": 0.25}, "norm": {"a": "x", "b": 2.0}}, "is 25 % off"),
    "norms in a list": ({"error": {"a": 0.5}, "norm": ["a"]}, ""),
    "an error that is none": ({"error": {"a": [1]}, "norm": {"a": 1.0}}, ""),
    "errors in a list": ({"error": ["a"], "norm": {"a": 1.0}}, ""),
}


@pytest.mark.parametrize(("record", "said"), OTHERS.values(), ids=OTHERS)
def test_what_another_program_wrote_is_left_out_where_it_is_of_another_type(record, said, tmp_path):
    file = tmp_path / "loraloom.json"
    for told in ({"record": record}, {"record": record, "inputs": 5}, {"record": [record], "inputs": ["x"]}):
        file.write_text(json.dumps({"operation": "train", **told}))
        report = read([file])
        assert report.summary.startswith(f"{tmp_path.name} was made by train.")
        assert said in report.summary or isinstance(told["record"], list)
        assert "Inputs" not in titles(report, Table) and ("off what" in report.summary) <= ("off" in said)
    done = CliRunner().invoke(app, ["report", str(file), "-o", str(tmp_path / "page.md")])
    assert done.exit_code == 0, done.output


def test_what_is_not_finite_is_left_out_and_rows_of_nothing_are_refused(tmp_path):
    log = [{"step": 1, "loss": 1.0, "grad_norm": float("nan")}, {"step": 2, "loss": 0.5, "grad_norm": 1.0}]
    (tmp_path / "loraloom.json").write_text(json.dumps({"operation": "train", "record": {"log": log}}))
    found = read([tmp_path])
    assert found.records[0]["record"]["log"][0]["grad_norm"] is None and "went from 1 to 0.5" in found.summary
    (tmp_path / "rows.json").write_text(json.dumps([{"note": "x" * 200}]))
    with pytest.raises(ValueError, match=r"rows\.json: no row has a value that a table can show"):
        read([tmp_path / "rows.json"])


def test_intervals_are_of_what_their_note_says():
    """Those of a sweep are over seeds, those of draws over draws: the glossary must not say test examples."""
    meaning = dict(words_of(["95 % intervals"]))["95 % interval"]
    assert "examples" not in meaning and "the note beside it" in meaning
    found = Stability((0.5,), (0.9,), (0.8,), (1.0,), ((0.8, 1.0),), "layer", 4, 1.0, 0.5, None, None, 9, 2)
    assert "95 % intervals over them" in stability_report_of(found, "a", "digits").panels[0].note


@pytest.mark.parametrize("name", ["balance", "tune_demo", "lori"])
def test_rows_of_benchmarks_are_tables(name):
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    (panel,) = read([path]).panels
    assert len(panel.rows) == len(json.loads(path.read_text()))


def test_what_was_run_is_told(tmp_path):
    save(adapter(3), tmp_path / "a")
    (tmp_path / "b").mkdir()
    save(adapter(4), tmp_path / "c")
    report = ran(read([tmp_path / "a"]), "loraloom probe x", [tmp_path / "a", tmp_path / "b"])
    assert report.run["adapters"] == {"a": {"operation": "train", "seed": 3, "model": "m"}}
    both = ran(report, "loraloom probe x", [tmp_path / "a", tmp_path / "c"]).run["adapters"]
    assert both == {"all": {"operation": "train", "model": "m"}, "a": {"seed": 3}, "c": {"seed": 4}}
    assert report.run["versions"]["torch"] == torch.__version__
    assert report.panels[0].command.startswith("loraloom train")  # its own stays
