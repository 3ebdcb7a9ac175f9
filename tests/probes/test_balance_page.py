"""The page of the balance: runs of one recipe are told as one, shares add up, what is unknown is left out."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loraloom.adapter import Adapter
from loraloom.cli import app
from loraloom.probes.balance import Balance
from loraloom.probing import balance_report

MODULES = tuple(f"encoder.layer.{at}.{name}" for at in range(3) for name in ("q", "v"))


def run(top: float, steps: tuple[int, ...] = (0, 10, 20)) -> Balance:
    """Layers 0 and 1 have updates of norm 1 a module, layer 2 of ``top``."""
    rows = [(0.0,) * 6, *[(1.0, 1.0, 1.0, 1.0, top, top)] * (len(steps) - 1)]
    gradients = [(None,) * 6, *[(1.0, 1.0, None, None, 1.0, 1.0)] * (len(steps) - 1)]
    return Balance(steps, MODULES, gradients, rows, rows)


def trained(found: Balance, seed: int, **arguments: object) -> Adapter:
    told = {"arguments": {"model": "vit", "seed": seed, **arguments}, "record": {"balance": found.to_json()}}
    return Adapter({}, {}, provenance=told)


def panel(report, start):
    (found,) = [one for one in report.panels if one.title.startswith(start)]
    return found


def test_runs_of_one_recipe_are_one_line_with_a_band():
    runs = [trained(run(1.0), 0), trained(run(2.0), 1, train={"new": None}), trained(run(1.0), 0, strategy="coto")]
    report = balance_report(runs, ["lora-0", "lora-1", "coto-0"])
    curve = panel(report, "Share of the upper third in the update")
    by = {one.name: one for one in curve.series}
    assert list(by) == ["lora", "coto-0", "even"]
    assert by["lora"].x == (10, 20)  # at the start there is nothing to share out
    assert (by["lora"].low, by["lora"].high) == ((1 / 3, 1 / 3), (2 / 3, 2 / 3))
    assert by["lora"].y == pytest.approx((0.5, 0.5))
    assert by["coto-0"].low is None
    assert by["even"].y == pytest.approx((1 / 3, 1 / 3))
    assert "50 % in lora, 33 % in coto-0 (even: 33 %)" in report.summary
    assert [row[0] for row in panel(report, "How the layers share").rows] == ["lora-0", "lora-1", "coto-0"]


def test_groups_that_are_told_go_before_recipes():
    runs = [trained(run(1.0), 0), trained(run(2.0), 1, train={"fast": True})]
    report = balance_report(runs, ["a", "b"], ["LoRA", "LoRA"])
    assert [one.name for one in panel(report, "Share of the upper third in the update").series] == ["LoRA", "even"]
    assert [
        one.name for one in panel(balance_report(runs, ["a", "b"]), "Share of the upper third in the u").series
    ] == [*("a", "b", "even")]


def test_heat_maps_have_the_highest_layer_on_top_and_shares_add_up():
    report = balance_report([run(2.0).to_json()], ["one"])
    shares = panel(report, "Share of each layer")
    assert (shares.x, shares.y) == ((10, 20), ("2", "1", "0"))
    assert [sum(column) for column in zip(*shares.z, strict=True)] == pytest.approx([1.0, 1.0])
    assert shares.z[0][0] == pytest.approx(8 / 12)
    norms = panel(report, "Norm of the update by layer and projection")
    assert (norms.x, norms.z[0]) == (("q", "v"), (2.0, 2.0))


def test_an_update_that_is_not_known_is_not_shown():
    found = run(1.0)
    rows = ((None,) * 6,) * 3
    report = balance_report([Balance(found.steps, MODULES, found.gradient, rows, found.distance).to_json()], ["vera"])
    assert report.summary == "The update is not known by layer, so there is nothing to share out."
    titles = [one.title for one in report.panels]
    assert "Share of the upper third in the gradient" in titles
    assert not any(title.startswith("Share of each layer") for title in titles)


def test_the_command_says_what_makes_the_figures_again(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(run(2.0).to_json()))
    told = CliRunner().invoke(app, ["probe", "balance", str(tmp_path / "run.json"), "-o", str(tmp_path / "out.json")])
    assert told.exit_code == 0, told.output
    made = json.loads((tmp_path / "out.json").read_text())
    assert all(one["command"].startswith("loraloom") for one in made["panels"])
    assert {"command", "versions", "machine"} <= set(made["run"])
    told = CliRunner().invoke(
        app, ["probe", "balance", str(tmp_path / "run.json"), "--groups", "a,b", "-o", str(tmp_path / "no.json")]
    )
    assert told.exit_code == 2
    assert "2 names for 1 runs" in told.output
    (tmp_path / "bad.json").write_text("{}")
    told = CliRunner().invoke(app, ["probe", "balance", str(tmp_path / "bad.json"), "-o", str(tmp_path / "no.json")])
    assert told.exit_code == 2
    assert "this is no balance of a training run" in told.output
    empty = run(2.0).to_json() | {key: [] for key in ("steps", "gradient", "update", "distance")}
    (tmp_path / "bad.json").write_text(json.dumps(empty))
    told = CliRunner().invoke(app, ["probe", "balance", str(tmp_path / "bad.json"), "-o", str(tmp_path / "no.json")])
    assert (told.exit_code, told.stderr.count("\n")) == (2, 1) and "steps must rise, and be at least one" in told.stderr


def test_arguments_of_another_program_are_no_recipe():
    told = {"arguments": ["x"], "record": {"balance": run(1.0).to_json()}}
    assert balance_report([Adapter({}, {}, provenance=told)], ["a"]).title == "Balance of training"
