"""Stability on scores whose expectation is known, its draws, its intervals and the pruning curves beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import loraloom as ll
from loraloom.adapter import Adapter, Factors, UnsupportedKind
from loraloom.probes import probes
from loraloom.probes.stability import Stability
from loraloom.probing import stability_report, stability_report_of
from loraloom.report import Curve, Report


def adapter(n=6, projections="qv"):
    draw = torch.Generator().manual_seed(0)
    names = [f"layers.{i}.{p}" for i in range(n) for p in projections]
    modules = {
        name: Factors(B=torch.randn(3, 1, generator=draw), A=torch.randn(1, 3, generator=draw)) for name in names
    }
    return Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, modules)


def names_on(variant):
    return () if variant is None else tuple(variant.modules)


class Share:
    """Scores the share of modules that are on; keeps what it was asked."""

    def __init__(self, whole):
        self.whole, self.asked = len(whole.modules), []

    def __call__(self, variant):
        self.asked.append(names_on(variant))
        return len(names_on(variant)) / self.whole


@pytest.mark.parametrize("unit", ["layer", "module", "projection"])
def test_the_mean_is_the_share_that_is_on(unit):
    a = adapter(8, "qvko")
    found = ll.stability(a, Share(a), at=[0.0, 0.25, 0.7], draws=400, unit=unit, seed=2)
    assert found.mean[0] == found.low[0] == found.high[0] == 1.0
    for p, mean, low, high in zip(found.at[1:], found.mean[1:], found.low[1:], found.high[1:], strict=True):
        n = found.units
        assert mean == pytest.approx(1 - p, abs=4 * (p * (1 - p) / n / 400) ** 0.5)
        assert (high - low) / 2 == pytest.approx(1.966 * (p * (1 - p) / n / 400) ** 0.5, rel=0.25)
        assert low + high == pytest.approx(2 * mean)
    assert (found.whole, found.base) == (1.0, 0.0)


def test_intervals_cover_the_truth_as_often_as_they_say():
    a = adapter(8, "q")
    covered = [
        (found.low[0] <= 0.5 <= found.high[0])
        for found in (ll.stability(a, Share(a), at=[0.5], draws=8, seed=seed) for seed in range(300))
    ]
    assert 0.92 <= np.mean(covered) <= 0.99  # of normal quantiles with 8 draws 0.90 would


def test_the_interval_of_two_draws_is_students():
    """t of one degree of freedom: 12.706 times half the distance of the two."""
    a = adapter(8, "q")
    found = ll.stability(a, Share(a), at=[0.5], draws=2)
    (x, y), half = found.scores[0], (found.high[0] - found.low[0]) / 2
    assert x != y and half == pytest.approx(12.7062 * abs(x - y) / 2, rel=1e-4)


def test_units_are_switched_whole_and_sets_nest_along_the_grid():
    a = adapter()
    score = Share(a)
    found = ll.stability(a, score, at=[0.2, 0.5, 0.8], draws=20)
    assert all(("layers.3.q" in on) == ("layers.3.v" in on) for on in score.asked)
    assert all(list(on) == [name for name in a.modules if name in on] for on in score.asked)
    assert all(x >= y >= z for x, y, z in zip(*found.scores, strict=True))
    assert found.scores[0] != found.scores[2]


def test_more_draws_and_another_grid_keep_what_was_drawn():
    a = adapter()
    short = ll.stability(a, Share(a), at=[0.5], draws=4, seed=3)
    long = ll.stability(a, Share(a), at=[0.3, 0.5], draws=9, seed=3)
    assert long.scores[1][:4] == short.scores[0]
    assert len(set(long.scores[1])) > 1
    assert ll.stability(a, Share(a), at=[0.5], draws=9, seed=4).scores[0] != long.scores[1]


def test_no_set_of_units_is_scored_twice():
    a = adapter(3)
    score = Share(a)
    found = ll.stability(a, score, at=[0.25, 0.5, 0.75], draws=40)
    assert found.evaluations == len(score.asked) == len(set(score.asked)) == 8  # all subsets of three layers
    assert found.saved == 3 * 40 + 2 - 8
    assert () in score.asked and tuple(a.modules) in score.asked


@pytest.mark.parametrize("unit", ["layer", "module"])
def test_pruning_curves_are_those_of_prune(unit):
    a = adapter()

    def score(variant):
        return 0.0 if variant is None else sum(float(f.delta().abs().sum()) for f in variant.modules.values())

    at = (0.0, 0.3, 0.5, 0.95)
    found = ll.stability(a, score, at=at, draws=2, unit=unit, pruning=True)
    whole = [ll.prune(a, density=1 - p, unit=unit) for p in at]
    entries = [ll.prune(a, density=1 - p) for p in at]
    assert found.structured == pytest.approx([score(one) for one in whole])
    assert found.unstructured == pytest.approx([score(one) for one in entries])
    assert found.structured[0] == found.unstructured[0] == found.whole
    assert len({*found.structured, *found.unstructured}) == 7
    calls = Share(a)
    again = ll.stability(a, calls, at=at, draws=2, unit=unit, pruning=True)
    assert again.evaluations == len(calls.asked)


def test_pruning_goes_by_projections_too():
    """q has the larger updates: of two projections it stays."""
    modules = {name: f.scaled(5.0 if name.endswith("q") else 1.0) for name, f in adapter().modules.items()}
    a = Adapter(adapter().config, modules)
    found = ll.stability(
        a, lambda v: float(all(n.endswith("q") for n in names_on(v))), at=[0.5], unit="projection", pruning=True
    )
    assert found.structured == (1.0,)


def never(_):
    raise AssertionError("scored")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"at": [1.0]}, r"at must hold chances in \[0, 1\), got 1.0; with all units off the score is the base's"),
        ({"at": [-0.1]}, r"got -0.1"),
        ({"at": ["0.5"]}, r"got '0.5'"),
        ({"at": [float("nan")]}, r"got nan"),
        ({"at": []}, r"at least one chance, none twice, got \[\]"),
        ({"at": [0.5, 0.5]}, r"none twice"),
        ({"draws": 1}, "draws must be a whole number of at least 2, got 1"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"unit": "layers"}, "did you mean 'layer'"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_scored(told, said):
    with pytest.raises(ValueError, match=said):
        ll.stability(adapter(), never, **told)


def test_entries_that_cannot_be_pruned_are_refused_before_anything_is_scored():
    moka = Adapter({"peft_type": "MOKA", "moka": {"modalities": {"image": 1}, "rank": 1}}, adapter().modules)
    with pytest.raises(UnsupportedKind, match="MokA"):
        ll.stability(moka, never, pruning=True)
    with pytest.raises(ValueError, match="there are no modules"):
        ll.stability(Adapter({"r": 1}, {}), never)
    with pytest.raises(ValueError, match="did you mean 'layer'"):
        stability_report(adapter(), "digits", unit="layers", model="nowhere")


def test_a_score_that_is_not_finite_is_named():
    a = adapter()
    with pytest.raises(ValueError, match=r"the score with layers.*layers.*on is nan"):
        ll.stability(a, lambda v: 0.0 if len(names_on(v)) in (0, 12) else float("nan"))
    with pytest.raises(ValueError, match=r"the score with 0\.5 of the entries pruned is inf"):
        whole = set(map(id, a.modules.values()))
        kept = lambda v: v is None or all(id(f) in whole for f in v.modules.values())  # noqa: E731
        ll.stability(a, lambda v: 0.0 if kept(v) else float("inf"), at=[0.5], pruning=True)


def test_the_report_shows_the_interval_and_the_share_of_the_gain():
    facts = {"scores": ((0.85, 0.95), (0.5, 0.7)), "unit": "layer", "units": 4, "whole": 1.0, "base": 0.5}
    facts |= {"structured": (0.9, 0.8), "unstructured": (1.0, 0.9), "evaluations": 9, "saved": 2}
    found = Stability((0.25, 0.5), (0.9, 0.6), (0.8, 0.5), (1.0, 0.7), **facts)
    report = stability_report_of(found, "mine", "digits")
    curve, table = report.panels
    assert isinstance(curve, Curve)
    assert [s.name for s in curve.series] == [
        "mine",
        "mine, pruned: units of the smallest update",
        "mine, pruned: smallest entries",
    ]
    assert (curve.series[0].low, curve.series[0].high) == ((0.8, 0.5), (1.0, 0.7))
    assert dict(row[:2] for row in table.rows) == pytest.approx(
        {"all on": 1.0, "all off": 0.5, "kept at 0.25": 0.8, "kept at 0.5": 0.2, "evaluations": 9}
    )
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.records[0]["scores"] == [[0.85, 0.95], [0.5, 0.7]]


def test_what_stays_on_in_no_unit_is_not_called_the_base():
    a = adapter()
    some, every = (ll.stability(a, Share(a), at=[0.5], unit=unit) for unit in (r"layers\.[0-2]\.", r"layers\.\d\."))
    assert (some.rest, some.base, every.rest, every.base) == (6, 0.5, 0, 0.0)
    report = stability_report_of(some, "mine", "digits")
    told = {row[0]: row[2] for row in report.panels[1].rows}
    assert told["all off"] == "the adapter without these units; 6 modules are in none and stay on"
    assert told["kept at 0.5"] == "share of what these units add"
    assert report.summary.endswith("(all on: 1.000, none of these units: 0.500).")
    told = {row[0]: row[2] for row in stability_report_of(every, "mine", "digits").panels[1].rows}
    assert (told["all off"], told["kept at 0.5"]) == ("the base", "share of the gain")


def test_it_is_registered_with_its_paper():
    assert probes["stability"].function is ll.stability and probes["stability"].paper.startswith("https://")
