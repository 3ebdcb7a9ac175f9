"""Weight search: near the best, never above the budget, the same again, and never worse than where it starts."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from loraloom.adapter import Adapter, Factors
from loraloom.ops.merge import merge
from loraloom.ops.search import search
from loraloom.registry import UnknownName
from oracles.ops_dense import random_adapter

NAMES = ("layers.0.q", "layers.0.v", "layers.1.q")


def unit_adapter(at: int, count: int) -> Adapter:
    """The update of every module is the ``at``-th diagonal entry: merged updates show the weights."""
    pick = torch.eye(count, dtype=torch.float64)[:, at : at + 1]
    return Adapter({"r": 1, "lora_alpha": 1}, {name: Factors(B=pick, A=pick.T) for name in NAMES})


def shown(adapter: Adapter, name: str) -> torch.Tensor:
    return adapter.modules[name].delta().diagonal()


def target_score(targets: dict[str, torch.Tensor]):
    """Highest, 0, where every module's weights are its target; counts its calls."""

    def score(adapter: Adapter) -> float:
        score.calls += 1
        return -float(sum((shown(adapter, name) - target).square().sum() for name, target in targets.items()))

    score.calls = 0
    return score


def everywhere(*values: float) -> dict[str, torch.Tensor]:
    return dict.fromkeys(NAMES, torch.tensor(values, dtype=torch.float64))


ADAPTERS = [unit_adapter(at, 3) for at in range(3)]


def test_it_finds_the_weights_of_the_highest_score():
    score = target_score(everywhere(0.9, -0.4, 0.2))
    found = search(ADAPTERS, score, budget=150, l1=0.0)
    assert np.allclose(found.weights, [0.9, -0.4, 0.2], atol=0.1)
    assert found.score > -0.05 > found.trace[0].score
    assert found.evaluations == score.calls == len(found.trace) == 150
    assert torch.allclose(shown(found.adapter, NAMES[0]), torch.tensor(found.weights, dtype=torch.float64))
    assert score(found.adapter) == found.score
    assert found.adapter.provenance["operation"] == "search"
    assert found.adapter.provenance["arguments"]["weights"] == list(found.weights)
    record = found.adapter.provenance["record"]["search"]
    assert record == {"score": found.score, "evaluations": 150, "unit": "adapter"}
    json.dumps(found.adapter.provenance)


def test_a_layer_each_has_weights_of_its_own():
    targets = {"layers.0.q": (1.0, 0.0), "layers.0.v": (1.0, 0.0), "layers.1.q": (0.0, 1.0)}
    score = target_score({name: torch.tensor(target, dtype=torch.float64) for name, target in targets.items()})
    pair = [unit_adapter(at, 2) for at in range(2)]
    found = search(pair, score, unit="layer", budget=150, l1=0.0)
    assert list(found.weights) == list(NAMES)
    assert found.weights["layers.0.q"] == found.weights["layers.0.v"]
    for name, target in targets.items():
        assert np.allclose(found.weights[name], target, atol=0.1)
    again = merge(pair, weights=found.weights)
    assert all(torch.equal(shown(again, name), shown(found.adapter, name)) for name in NAMES)
    assert search(pair, score, budget=150, l1=0.0).score < -0.5 < found.score
    by_module = search(pair, score, unit="module", budget=20, l1=0.0)
    assert len({by_module.weights[name] for name in NAMES}) == 3 or by_module.weights == found.weights
    alone = by_module.trace[2]  # the second adapter, everywhere
    assert alone.weights == (0.0, 1.0) * 3 and alone.score == score(pair[1])
    assert len(by_module.trace[-1].weights) == 6 and len(found.trace[-1].weights) == 4


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 11])
def test_the_budget_is_kept_and_the_start_comes_first(budget):
    score = target_score(everywhere(0.3, 0.3, 0.3))
    found = search(ADAPTERS, score, budget=budget)
    assert found.evaluations == score.calls == budget
    first = [(1 / 3, 1 / 3, 1 / 3), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    assert [trial.weights for trial in found.trace[:4]] == first[:budget]
    assert found.score >= found.trace[0].score


@pytest.mark.parametrize("method", ["model_stock", "tsv_m", "pico", "sce", "ctm"])
def test_every_adapter_alone_is_scored_as_it_is_by_methods_that_look_at_all(method):
    adapters = [random_adapter(seed, {NAMES[0]: (6, 5, 2)}) for seed in range(3)]

    def score(adapter):
        return -float(adapter.modules[NAMES[0]].delta().norm())

    found = search(adapters, score, method=method, budget=4)
    assert [trial.score for trial in found.trace[1:]] == pytest.approx([score(one) for one in adapters])


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_worse_than_equal_shares_and_every_adapter_alone(seed):
    noise = np.random.default_rng(seed)
    found = search(ADAPTERS, lambda adapter: float(noise.normal()), budget=12, seed=seed)  # a score of mere noise
    best = max(trial.objective for trial in found.trace)
    assert best == found.score - 0.05 * sum(map(abs, found.weights))
    assert best >= max(trial.objective for trial in found.trace[:4])


def test_one_seed_one_search():
    runs = [search(ADAPTERS, target_score(everywhere(0.9, -0.4, 0.2)), seed=seed) for seed in (3, 3, 4)]
    assert runs[0].trace == runs[1].trace and runs[0].to_json() == runs[1].to_json()
    assert runs[0].trace != runs[2].trace and runs[0].trace[:4] == runs[2].trace[:4]


def test_chance_outside_is_left_alone():
    """In a fresh interpreter: nevergrad draws from the global streams when it is imported for the first time."""
    script = (
        "import random, warnings, numpy, torch\n"
        "warnings.simplefilter('error')\n"
        "from loraloom.adapter import Adapter, Factors\n"
        "from loraloom.ops.search import search\n"
        "def chance():\n"
        "    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()\n"
        "def score(adapter):\n"
        "    assert chance() == before\n"
        "    return 0.0\n"
        "one = Adapter({'r': 1}, {'fc': Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))})\n"
        "before = chance()\n"
        "search([one, one], score, budget=15)\n"
        "assert chance() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_price_on_weights_makes_them_small():
    score = target_score(everywhere(0.9, 0.4, 0.0))
    dear = search(ADAPTERS, score, budget=120, l1=1.0)
    cheap = search(ADAPTERS, score, budget=120, l1=0.0)
    assert sum(map(abs, dear.weights)) < 0.8 * sum(map(abs, cheap.weights))
    for trial in dear.trace:
        assert trial.objective == pytest.approx(trial.score - sum(map(abs, trial.weights)))
    layered = search(ADAPTERS, score, budget=9, l1=1.0, unit="layer")  # two layers: their mean
    for trial in layered.trace:
        assert trial.objective == pytest.approx(trial.score - sum(map(abs, trial.weights)) / 2)


def test_bounds_hold_and_clip_the_start():
    found = search(ADAPTERS, target_score(everywhere(2.0, -2.0, 0.0)), budget=60, bounds=(-0.25, 0.25), l1=0.0)
    values = [value for trial in found.trace for value in trial.weights]
    assert min(values) >= -0.25 and max(values) <= 0.25
    assert found.trace[0].weights == (0.25, 0.25, 0.25)
    free = search(ADAPTERS, target_score(everywhere(2.0, -2.0, 0.0)), budget=60, l1=0.0)
    values = [value for trial in free.trace for value in trial.weights]
    assert -1.5 <= min(values) < -0.5 and 1 < max(values) <= 1.5
    wide = search(ADAPTERS, target_score(everywhere(2.0, -2.0, 0.0)), budget=100, bounds=(-3.1, 2.9), l1=0.0)
    assert wide.score > -0.1 and wide.trace[0].weights == (1 / 3, 1 / 3, 1 / 3)


def test_in_factors_weights_start_at_zero():
    adapters = [random_adapter(seed, {"fc": (4, 3, 2)}) for seed in (1, 2)]
    found = search(adapters, lambda adapter: -adapter.modules["fc"].norm(), space="factors", budget=20)
    assert min(value for trial in found.trace for value in trial.weights) >= 0
    assert found.adapter.provenance["arguments"]["space"] == "factors"
    with pytest.raises(ValueError, match=r"weight -1\.0: in space 'factors'"):
        search(adapters, lambda adapter: pytest.fail("scored"), space="factors", bounds=(-1.0, 1.0))


def test_one_adapter_alone():
    found = search([unit_adapter(0, 2)], target_score(everywhere(0.5, 0.0)), budget=25, l1=0.0)
    assert found.trace[0].weights == (1.0,) and found.evaluations == 25
    assert found.weights[0] == pytest.approx(0.5, abs=0.1)


def test_options_go_to_the_merge():
    adapters = [random_adapter(seed, {"fc": (6, 5, 2)}) for seed in (1, 2)]
    found = search(adapters, lambda adapter: 1.0, method="ties", density=0.5, rank=1, budget=3)
    arguments = found.adapter.provenance["arguments"]
    assert (arguments["method"], arguments["density"], arguments["rank"]) == ("ties", 0.5, 1)
    drawn = search(adapters, lambda adapter: 1.0, method="dare", density=0.5, budget=1, seed=9)
    assert drawn.adapter.provenance["seed"] == 9


REFUSED = [
    ({"budget": 0}, ValueError, "budget must be a whole number of at least 1, got 0"),
    ({"budget": 2.5}, ValueError, "budget must be a whole number"),
    ({"budget": True}, ValueError, "budget must be a whole number"),
    ({"l1": -1.0}, ValueError, "l1 must be a finite number from 0 on"),
    ({"bounds": (1.0, -1.0)}, ValueError, "bounds must be two finite numbers, the lower first"),
    ({"bounds": (0.0, float("inf"))}, ValueError, "bounds must be two finite numbers"),
    ({"unit": "layers"}, UnknownName, "unit 'layers' is not known .did you mean 'layer'"),
    ({"method": "linaer"}, UnknownName, "merge method 'linaer'"),
    ({"method": "ties", "density": 2.0}, ValueError, "density must be in"),
    ({"method": "slerp"}, ValueError, "negative"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED)
def test_refused_before_anything_is_scored(arguments, kind, message):
    with pytest.raises(kind, match=message) as caught:
        search(ADAPTERS, lambda adapter: pytest.fail("scored"), **arguments)
    assert "\n" not in str(caught.value)


def test_no_adapters_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="at least one adapter is needed"):
        search([], lambda adapter: 0.0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"the score of weights .* is {value}; a search needs finite scores"):
            search(ADAPTERS, lambda adapter, value=value: value)


def test_without_nevergrad_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ValueError, match=r"needs nevergrad: pip install 'loraloom\[search\]'"):
        search(ADAPTERS, lambda adapter: pytest.fail("scored"))
