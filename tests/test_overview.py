"""What `loraloom inspect` finds in an adapter: updates that are zero are told, numbers that are none are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fuzz.readers import adapter
from loraloom.cli import app
from loraloom.overview import summary
from loraloom.store import WEIGHTS, load, save

NAME = "model.layers.1.q_proj"


@pytest.fixture
def inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`loraloom inspect` of an adapter with one entry of a module's B set to a value, or all of it to 0."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(value: float):
        file = save(adapter(), tmp_path / "a") / WEIGHTS
        tensors = load_file(file)
        held = tensors[f"base_model.model.{NAME}.lora_B.weight"]
        held.zero_() if value == 0 else held[1].fill_(value)
        save_file(tensors, file)
        return CliRunner().invoke(app, ["inspect", str(tmp_path / "a")])

    return run


def test_zero_is_a_note_that_names_the_module(inspected, tmp_path: Path) -> None:
    done = inspected(0)
    assert done.exit_code == 0 and f"note 1 updates are zero, first that of {NAME}" in done.stdout
    assert summary(load(tmp_path / "a"))["zero"] == [NAME]
    assert summary(adapter())["zero"] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_and_the_module_named(inspected, value: float) -> None:
    done = inspected(value)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"{NAME}.lora_B.weight has NaN or infinite entries" in done.stderr
