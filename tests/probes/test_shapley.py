"""Attribution on games whose values are known, on random games against the definition, and on adapters."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import permutations as orders

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loraloom as ll
from loraloom.adapter import Adapter, Factors, UnsupportedKind
from loraloom.probes import probes
from loraloom.probes.attribution import (
    averaged,
    banzhaf,
    banzhaf_weight,
    exact,
    multilinear,
    permutations,
    shapley_weight,
    stratified,
)
from loraloom.probes.game import Game, uniforms
from loraloom.probes.shapley import Shapley
from loraloom.probing import scores_in, shapley_report, shapley_report_of
from loraloom.registry import UnknownName
from loraloom.report import Bars, Heatmap, Report

LAWS = settings(derandomize=True, deadline=None, max_examples=25)
ONE = Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))


def adapter(names):
    return Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, dict.fromkeys(names, ONE))


def layers(n):
    return adapter([f"layers.{i}.q" for i in range(n)])


class Asked:
    """A score from a function of the set of layers that are on; keeps what it was asked."""

    def __init__(self, worth):
        self.worth, self.asked = worth, []

    def __call__(self, variant):
        on = frozenset() if variant is None else frozenset(int(name.split(".")[1]) for name in variant.modules)
        self.asked.append(on)
        return float(self.worth(on))


def by_definition(n, worth):
    """Mean over all orders of what each player adds."""
    sums = [Fraction(0)] * n
    for order in orders(range(n)):
        for at, i in enumerate(order):
            sums[i] += Fraction(worth(frozenset(order[: at + 1]))) - Fraction(worth(frozenset(order[:at])))
    return [float(total / math.factorial(n)) for total in sums]


def random_game(n, seed):
    draw = np.random.default_rng(seed)
    known = {}
    return lambda on: known.setdefault(on, round(float(draw.normal()), 3))


def voting(quota, weights):
    return lambda on: sum(weights[i] for i in on) >= quota


def glove(left, right):
    return lambda on: min(sum(i < left for i in on), sum(left <= i < left + right for i in on))


KNOWN = {
    "additive": (4, lambda on: sum((0.5, -1.0, 0.0, 2.0)[i] for i in on), (0.5, -1.0, 0.0, 2.0)),
    "majority": (5, lambda on: len(on) >= 3, (0.2,) * 5),
    "one left glove, two right": (3, glove(1, 2), (2 / 3, 1 / 6, 1 / 6)),
    "weighted voting": (4, voting(5, (4, 3, 2, 1)), (5 / 12, 3 / 12, 3 / 12, 1 / 12)),
    "unanimity with a dummy": (3, lambda on: {0, 2} <= on, (0.5, 0.0, 0.5)),
    "airport": (3, lambda on: -max((1.0, 2.0, 4.0)[i] for i in on) if on else 0.0, (-1 / 3, -5 / 6, -17 / 6)),
}
COUNCIL = voting(39, [7] * 5 + [1] * 10)  # the Security Council: five with a veto, nine votes needed


# Known games ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_known_games_are_exact(name):
    n, worth, values = KNOWN[name]
    score = Asked(worth)
    found = ll.shapley(layers(n), score)
    assert found.by == "exact" and found.stderr == (0.0,) * n and found.samples == 0
    assert found.values == pytest.approx(values, abs=1e-12)
    assert (found.whole, found.base) == (worth(frozenset(range(n))), worth(frozenset()))
    assert found.gap == pytest.approx(0, abs=1e-12) and found.adds_up
    assert found.evaluations == len(score.asked) == len(set(score.asked)) == 2**n


@pytest.mark.parametrize("by", ["multilinear", "permutations"])
@pytest.mark.parametrize("name", KNOWN)
def test_known_games_are_met_within_their_errors(name, by):
    n, worth, values = KNOWN[name]
    score = Asked(worth)
    found = ll.shapley(layers(n), score, samples=800, by=by, seed=1)
    assert found.by == by and found.samples == 800
    for value, true, stderr in zip(found.values, values, found.stderr, strict=True):
        assert abs(value - true) <= 4 * stderr + 1e-9
        assert stderr < 0.05
    assert found.adds_up
    assert found.evaluations == len(score.asked) == len(set(score.asked)) <= 2**n
    assert found.saved > 0


@pytest.mark.parametrize("by", ["multilinear", "permutations"])
def test_the_security_council(by):
    """15 players: 421/2145 for a veto, 4/2145 for the others."""
    found = ll.shapley(layers(15), Asked(COUNCIL), samples=400, by=by)
    for value, true, stderr in zip(found.values, [421 / 2145] * 5 + [4 / 2145] * 10, found.stderr, strict=True):
        assert abs(value - true) <= 4 * stderr + 3 / 400  # what happens once in so many draws may be in none
    assert np.mean(found.values[:5]) == pytest.approx(421 / 2145, abs=0.02)
    assert found.adds_up and found.evaluations < 2**15


@LAWS
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_exact_is_the_mean_over_all_orders(n, seed):
    worth = random_game(n, seed)
    found = ll.shapley(layers(n), Asked(worth), by="exact")
    assert found.values == pytest.approx(by_definition(n, worth), abs=1e-9)
    assert found.gap == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("draw", [multilinear, permutations, banzhaf])
def test_blocks_are_without_bias_and_their_errors_honest(draw):
    """Over many seeds: the mean is the truth, and deviations are as large as the standard errors say."""
    n, worth = 4, random_game(4, 3)
    game = Game("abcd", worth)
    truth = np.array(exact(game, banzhaf_weight) if draw is banzhaf else by_definition(n, worth))
    runs = [averaged(lambda block, seed=seed: draw(game, seed, block), 25) for seed in range(120)]
    values, errors = np.array([r.values for r in runs]), np.array([r.stderr for r in runs])
    scores = (values - truth) / errors
    assert np.abs(scores.mean(axis=0)).max() < 4 / math.sqrt(len(runs)) * 1.2
    assert scores.std(axis=0) == pytest.approx(1, abs=0.25)


def smooth_game(on):
    """13 players that help and hinder each other, with scores between -1 and 1."""
    return math.tanh(sum(math.sin(3 * i + 1) for i in on) + sum(math.cos(i * j) / 4 for i in on for j in on if i < j))


@pytest.mark.parametrize(("samples", "blocks", "least"), [(8, 2, 0.85), (32, 4, 0.92), (200, 25, 0.93)])
def test_intervals_cover_the_truth_as_often_as_they_say_with_few_blocks_too(samples, blocks, least):
    """Normal quantiles cover 67 %, 84 % and 94 % of the values; of 2 blocks both may be the same by chance."""
    truth = exact(Game(list(map(str, range(13))), smooth_game), shapley_weight)
    covered, off = [], 0
    for seed in range(30):
        found = ll.shapley(layers(13), Asked(smooth_game), samples=samples, by="multilinear", seed=seed)
        drawn = shapley_report_of(found, "a", "t").panels[0].series[0]
        covered += [low <= true <= high for low, true, high in zip(drawn.low, truth, drawn.high, strict=True)]
        off += not found.adds_up
        assert found.blocks == blocks
    assert np.mean(covered) >= least
    assert off == 0  # 4 standard errors of 2 blocks would be missed by chance in 15 % of the runs


def test_p_is_uniform_in_each_part_and_coalitions_are_in_antithetic_pairs():
    n = 4000
    drawn = [stratified(n, 3, block) for block in range(40)]
    shares = np.array([[len(on) / n for on in block] for block in drawn])
    within = 8 * shares[:, ::2] - np.arange(4)  # where each p lies in its part, but for sqrt(p (1 - p) / n) of 8
    assert within.min() > -0.2 and within.max() < 1.2
    assert within.mean(axis=0) == pytest.approx(0.5, abs=4 * (1 / 12 / 40) ** 0.5)
    assert within.std(axis=0) == pytest.approx(12**-0.5, abs=0.1)
    assert np.abs(np.corrcoef(within.T) - np.eye(4)).max() < 4 / 40**0.5  # each part has a p of its own
    assert all(block[2 * j] | block[2 * j + 1] == frozenset(range(n)) for block in drawn for j in range(4))
    assert shares[:, ::2] + shares[:, 1::2] == pytest.approx(1)
    members = np.array([[i in on for i in range(n)] for on in (block[6] for block in drawn)])
    assert np.abs(members.mean(axis=0) - shares[:, 6].mean()).max() < 6 * (0.25 / 40) ** 0.5  # nobody is preferred


def test_the_standard_error_is_that_of_a_mean():
    found = averaged(lambda block: [float(block), 1.0 - block], 3)
    assert found.values == (1.0, 0.0) and found.stderr == pytest.approx((3**-0.5,) * 2)
    assert found.sum_stderr == pytest.approx(0) and found.blocks == 3


def test_auto_is_exact_where_that_asks_no_more():
    for n, samples, by in (
        (12, 342, "exact"),
        (12, 341, "multilinear"),
        (13, 400, "multilinear"),
        (3, 2, "multilinear"),
    ):
        assert ll.shapley(layers(n), Asked(len), samples=samples, by="auto").by == by


def test_stratified_and_antithetic_draws_have_smaller_errors_than_plain_ones():
    n, worth = 6, glove(3, 3)
    game, draws = Game("abcdef", worth), 400

    def plain(block):
        drawn = uniforms(0, block, n + 1, 99)
        on = frozenset(i for i, u in enumerate(drawn[1:]) if u < drawn[0])
        return [game.value(on | {i}) - game.value(on - {i}) for i in range(n)]

    ours = averaged(lambda block: multilinear(game, 0, block), draws // 8)
    assert sum(ours.stderr) < 0.8 * sum(averaged(plain, draws).stderr)


# Banzhaf, leave-one-out ----------------------------------------------------------------------------------------------


def test_banzhaf_of_weighted_voting_exact_and_drawn():
    """51; 50, 49, 1: swings 3, 1, 1 of 4 coalitions of the others."""
    worth = voting(51, (50, 49, 1))
    found = ll.shapley(layers(3), Asked(worth), by="banzhaf")
    assert (found.by, found.values, found.slack, found.adds_up) == ("banzhaf-exact", (0.75, 0.25, 0.25), None, None)
    drawn = ll.shapley(layers(15), Asked(COUNCIL), samples=1000, by="banzhaf")
    assert drawn.by == "banzhaf" and drawn.samples == 1000
    for value, true, stderr in zip(drawn.values, [848 / 2**14] * 5 + [84 / 2**14] * 10, drawn.stderr, strict=True):
        assert abs(value - true) <= 4 * stderr + 6e-3


def test_leave_one_out_asks_n_plus_two_and_sees_no_redundancy():
    score = Asked(lambda on: float(bool(on & {0, 1})) + 0.5 * (2 in on))
    found = ll.shapley(layers(3), score, by="leave-one-out")
    assert found.values == (0.0, 0.0, 0.5)
    assert found.evaluations == len(score.asked) == 5  # all, each left out, none
    assert ll.shapley(layers(3), score).values == pytest.approx((0.5, 0.5, 0.5))


# Draws, stopping, truncation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["multilinear", "permutations", "banzhaf"])
def test_more_samples_go_on_where_fewer_stopped(by):
    short, long, other = Asked(COUNCIL), Asked(COUNCIL), Asked(COUNCIL)
    ll.shapley(layers(15), short, samples=16, by=by, seed=5)
    ll.shapley(layers(15), long, samples=48, by=by, seed=5)
    ll.shapley(layers(15), other, samples=48, by=by, seed=6)
    assert len(short.asked) > 30 and long.asked[: len(short.asked)] == short.asked
    assert other.asked[: len(short.asked)] != short.asked


def test_samples_round_up_to_whole_blocks():
    for by, asked, made in (("multilinear", 1, 16), ("multilinear", 17, 24), ("permutations", 3, 4)):
        assert ll.shapley(layers(4), Asked(glove(2, 2)), samples=asked, by=by).samples == made


def test_it_stops_at_the_error():
    worth = random_game(8, 1)
    full = ll.shapley(layers(8), Asked(worth), samples=4000, by="multilinear")
    target = 2 * max(full.stderr)
    found = ll.shapley(layers(8), Asked(worth), samples=4000, by="multilinear", error=target)
    assert max(found.stderr) <= target and 64 <= found.samples < 4000
    sure = ll.shapley(layers(3), Asked(KNOWN["additive"][1]), samples=4000, by="permutations", error=0.1)
    assert sure.samples == 16  # 8 blocks of 2, however sure the first two are


def test_truncation_saves_evaluations_and_says_what_it_may_miss():
    worth = lambda on: 1 - 0.5 ** len(on)  # noqa: E731
    whole, cut = Asked(worth), Asked(worth)
    plain = ll.shapley(layers(14), whole, samples=40, by="permutations")
    found = ll.shapley(layers(14), cut, samples=40, by="permutations", truncate=0.01)
    assert found.evaluations == len(cut.asked) < 0.6 * plain.evaluations
    assert plain.gap == pytest.approx(0, abs=1e-9)
    assert -0.01 <= found.gap < -0.001 and found.adds_up


def test_a_score_that_is_no_function_of_who_is_on_is_still_asked_once():
    score = Asked(lambda on: len(score.asked) % 7)
    found = ll.shapley(layers(5), score, samples=64, by="permutations")
    assert len(score.asked) == len(set(score.asked)) == found.evaluations
    assert found.gap == pytest.approx(0, abs=1e-9)  # every order telescopes


# Units ---------------------------------------------------------------------------------------------------------------

TOWERS = [f"{tower}.layers.{i}.attn.{p}" for tower in ("text", "vision") for i in (0, 1) for p in ("q", "v")]


def names_on(variant):
    return () if variant is None else tuple(variant.modules)


@pytest.mark.parametrize(
    ("unit", "units"),
    [
        ("layer", ("text.layers.0", "text.layers.1", "vision.layers.0", "vision.layers.1")),
        ("projection", ("attn.q", "attn.v")),
        ("tower", ("text.layers", "vision.layers")),
        ("module", tuple(TOWERS)),
        (r"layers\.(\d)", ("0", "1")),
    ],
)
def test_units_are_switched_whole(unit, units):
    """A score that adds up by module gives each unit the sum of its modules."""
    worth = {name: float(2**at) for at, name in enumerate(TOWERS)}
    seen = []

    def score(variant):
        seen.append(names_on(variant))
        return sum(worth[name] for name in names_on(variant))

    found = ll.shapley(adapter(TOWERS), score, unit=unit)
    assert found.units == units
    parts = {
        "layer": lambda n: n[:-7],
        "projection": lambda n: n[-6:],
        "tower": lambda n: n.split(".0")[0].split(".1")[0],
    }
    parts |= {"module": str, r"layers\.(\d)": lambda n: n.split(".")[2]}
    sums = {u: sum(w for name, w in worth.items() if parts[unit](name) == u) for u in units}
    assert dict(zip(found.units, found.values, strict=True)) == pytest.approx(sums)
    assert () in seen and tuple(TOWERS) in seen
    assert all(list(names) == [name for name in TOWERS if name in names] for names in seen)


def test_modules_in_no_unit_stay_on():
    seen = []
    found = ll.shapley(adapter(TOWERS), lambda a: seen.append(names_on(a)) or float(len(names_on(a))), unit=r"text.*q$")
    assert found.units == ("text.layers.0.attn.q", "text.layers.1.attn.q")
    assert len(seen) == 4 and min(map(len, seen)) == 6 and (found.base, found.whole) == (6.0, 8.0)


def test_what_is_scored_is_the_pruned_adapter():
    a = Adapter({"r": 1, "inference_mode": False}, {f"layers.{i}.q": ONE.scaled(float(i)) for i in range(4)})
    seen = {}

    def score(one):
        seen[names_on(one)] = one
        return 0.0

    ll.shapley(a, score)
    part = seen["layers.1.q", "layers.3.q"]
    pruned = ll.prune(a, keep="1,3")
    assert (part.config, list(part.modules)) == (pruned.config, list(pruned.modules))
    assert torch.equal(part.modules["layers.3.q"].delta(), pruned.modules["layers.3.q"].delta())
    assert part.shape("layers.3.q") == pruned.shape("layers.3.q")
    whole = seen[tuple(a.modules)]
    assert (whole.config, whole.modules) == (a.config, a.modules) and seen[()] is None


# Whole adapters ------------------------------------------------------------------------------------------------------


def test_adapters_of_a_merge_are_players():
    many = {name: Adapter({"r": 1, "lora_alpha": 1}, {"fc": ONE.scaled(w)}) for name, w in (("a", 1.0), ("b", 4.0))}

    def score(one):
        return 0.0 if one is None else float(one.modules["fc"].delta()[0, 0])

    found = ll.shapley(many, score, unit="adapter")
    # alone 1 and 4, merged 2.5: a = (1 + (2.5 - 4)) / 2, b = (4 + (2.5 - 1)) / 2
    assert found.units == ("a", "b") and found.values == pytest.approx((-0.25, 2.75))
    summed = ll.shapley(
        list(many.values()), score, unit="adapter", merge=lambda some: ll.merge(some, weights=[1.0] * len(some))
    )
    assert summed.units == ("adapter 1", "adapter 2") and summed.values == pytest.approx((1.0, 4.0))
    ties = ll.shapley(many, score, unit="adapter", merge="ties")
    assert ties.whole == score(ll.merge(list(many.values()), "ties"))


# Refusals ------------------------------------------------------------------------------------------------------------


def never(_):
    raise AssertionError("scored")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"samples": 2.0}, "samples must be a whole number"),
        ({"by": "shaply"}, "by 'shaply' is not known"),
        ({"by": "multilinear", "seed": -1}, r"seed must be a whole number in \[0, 2\*\*64\), got -1"),
        ({"error": 0}, "error must be a finite number above 0, got 0"),
        ({"error": float("nan")}, "error must be a finite number above 0, got nan"),
        ({"by": "permutations", "truncate": -0.1}, "truncate must be a finite number at least 0, got -0.1"),
        ({"truncate": 0.1}, "truncate goes with by='permutations', not 'auto'"),
        ({"merge": "ties"}, "a way to merge goes with several adapters; here is one, and merge='ties'"),
        ({"unit": "layers"}, "did you mean 'layer'"),
        ({"unit": "adapter"}, "unit of one adapter 'adapter' is not known"),
        ({"by": "exact"}, "by='exact' scores 2\\^n coalitions, at most 12 units; here are 13"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_scored(told, said):
    with pytest.raises(ValueError, match=said):
        ll.shapley(layers(13), never, **told)


def test_adapters_without_units_or_with_more_than_units_are_refused():
    with pytest.raises(ValueError, match="there are no modules"):
        ll.shapley(Adapter({"r": 1}, {}), never)
    with pytest.raises(ValueError, match="there are no adapters"):
        ll.shapley([], never, unit="adapter")
    with pytest.raises(ValueError, match="unit='adapter', not 'layer'"):
        ll.shapley([layers(2)], never)
    with pytest.raises(UnknownName, match="'linaer'"):
        ll.shapley([layers(2), layers(2)], lambda a: 0.0, unit="adapter", merge="linaer")
    with_head = Adapter({"r": 1}, layers(2).modules, {"classifier.weight": torch.ones(1)})
    with pytest.raises(UnsupportedKind, match=r"the first is classifier\.weight"):
        ll.shapley(with_head, never)


def test_a_score_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"the score with layers\.1 on is nan"):
        ll.shapley(layers(3), Asked(lambda on: float("nan") if on == {1} else 0.0))
    with pytest.raises(ValueError, match=r"the score with nothing on is inf"):
        ll.shapley(layers(3), Asked(lambda on: 0.0 if on else float("inf")))


# Results -------------------------------------------------------------------------------------------------------------


def found_of(values, unit="layer", units=None, stderr=0.0, slack=1e-9, base=0.0, by="exact", samples=0):
    units = units or tuple(f"layers.{i}" for i in range(len(values)))
    return Shapley(units, tuple(values), (stderr,) * len(values), by, unit, samples, 4, 1, base + 1.0, base, slack)


def test_values_go_to_prune_and_compress():
    a = Adapter({"r": 1}, {f"layers.{i}.{p}": ONE for i in range(4) for p in "qv"})
    found = ll.shapley(a, lambda one: sum((3.0, -1.0, 2.0, 1.0)[int(n[7])] for n in names_on(one)))
    kept = ll.prune(a, density=0.5, unit="layer", by=json.loads(json.dumps(found.to_json())))
    assert list(kept.modules) == ["layers.0.q", "layers.0.v", "layers.2.q", "layers.2.v"]
    assert found.worth == {"layers.0": 6.0, "layers.1": 0.0, "layers.2": 4.0, "layers.3": 2.0}
    small = ll.compress(a, budget="1x", scores=found.worth)
    assert {name[7] for name in small.modules} == {"0", "2", "3"}


def test_the_top_third_and_the_gap():
    found = found_of([0.5, 0.1, 0.2, 0.1, 0.1, 0.0])
    assert found.top_third == pytest.approx(0.7) and found.gap == pytest.approx(0) and found.adds_up
    assert found_of([0.5, 0.1]).top_third == pytest.approx(5 / 6)
    assert found_of([0.5, 0.25, 0.25, 0.0, -0.75, -0.05]).top_third == pytest.approx(0.75)
    assert found_of([-0.5, 0.0]).top_third is None
    off = found_of([0.5, 0.1])
    assert off.gap == pytest.approx(-0.4) and off.adds_up is False
    assert "They do not add up: the gap of -0.4" in shapley_report_of(off, "a", "digits").summary


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.5, 0.1], "; the highest 1 have 83 % of the sum. "),
        (
            [0.75, 0.25, -0.8],
            "; the highest 1 have 75 % of the sum of the values above 0; 1 of 3 values are below 0, -0.8",
        ),
        ([0.1, -0.5], "; the highest 1 have 100 % of the sum of the values above 0; 1 of 2 values are below 0, -0.5"),
        ([-0.5, -0.1], " on t; 2 of 2 values are below 0, -0.6 in sum"),
        ([0.0, 0.0], " on t. They do not add up"),
    ],
)
def test_shares_are_of_what_is_above_0(values, said):
    report = shapley_report_of(found_of(values), "a", "t")
    assert said in report.summary
    share = dict(row[:2] for row in report.panels[1].rows)["top third"]
    assert share is None or 0 < share <= 1


def test_the_report_is_a_map_where_units_allow_it():
    units = ("layers.0.q", "layers.0.v", "layers.1.q")
    report = shapley_report_of(found_of([0.25, 0.25, 0.5], "module", units), "a", "digits")
    first, table = report.panels
    assert isinstance(first, Heatmap) and (first.x, first.y) == (("q", "v"), ("layers.0", "layers.1"))
    assert first.z == ((0.25, 0.25), (0.5, None)) and first.note == "The values are exact."
    assert [row[0] for row in table.rows] == ["gain", "top third", "gap", "evaluations"]
    assert Report.from_json(report.to_json()) == report
    assert report.summary == (
        "exact values of 3 units (module) for a gain of +1.000 on digits; the highest 1 have 50 % of the sum."
    )
    experts = ("layers.0.experts.0.w", "layers.0.experts.1.w", "layers.1.experts.0.w", "layers.1.q")
    for held in (
        found_of([0.1] * 4, "module", experts),  # two modules in one cell
        found_of([0.5, 0.5], "module", ("layers.0.q", "layers.1.q")),  # one column
        found_of([0.5, 0.5]),
    ):
        assert isinstance(shapley_report_of(held, "a", "digits").panels[0], Bars)
    bars = shapley_report_of(found_of([0.6, 0.4], stderr=0.1, by="multilinear", samples=16), "a", "digits").panels[0]
    low, high = bars.series[0].low, bars.series[0].high  # 12.706 standard errors of two blocks
    assert low == pytest.approx((-0.6706, -0.8706), abs=1e-4) and high == pytest.approx((1.8706, 1.6706), abs=1e-4)
    assert "95 % intervals over the 2 blocks of draws (Student's t)" in bars.note
    assert shapley_report_of(found_of([0.5, 0.5], slack=None, by="banzhaf"), "a", "t").title == "Attribution"


def test_wrong_requests_fail_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="did you mean 'layer'"):
        shapley_report({"a": layers(2)}, "digits", unit="layers", model="nowhere")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"records": [{"tasks": []}]}, "is a report without values by unit"),
        ({"units": ["a"], "values": []}, "units and values must be lists of one length"),
        ({"units": "a", "values": [1]}, "units and values must be lists of one length"),
        ({"a": "1"}, "score of a is '1'; scores must be finite numbers"),
        ({"units": ["a"], "values": [True]}, "score of a is True"),
        ({"a": float("nan")}, "score of a is nan"),
    ],
)
def test_files_that_hold_no_scores_are_refused(held, said):
    with pytest.raises(ValueError, match=rf"^s\.json.*{said}"):
        scores_in(held, "s.json")


def test_scores_below_the_least_are_raised_in_lists_alone():
    assert scores_in({"units": ["a", "b"], "values": [-1, 2]}, "s", least=0.0) == {"a": 0.0, "b": 2}
    assert scores_in({"a": -1, "b": 2}, "s", least=0.0) == {"a": -1, "b": 2}


def test_it_is_registered_with_its_paper():
    assert probes["shapley"].function is ll.shapley and probes["shapley"].paper.startswith("https://")
