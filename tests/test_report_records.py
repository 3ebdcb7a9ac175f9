"""What else becomes a page: adapters' records, scores, rows of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loraloom.adapter import Adapter, Factors
from loraloom.ops.merge import merge
from loraloom.report import Bars, Curve, Heatmap, Table, read
from loraloom.report.context import ran
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
