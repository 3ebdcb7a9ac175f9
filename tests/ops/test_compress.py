"""compress(): dense SVDs as the oracle, the budget by an obvious greedy search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loraloom.adapter import Adapter, Factors, Modules, UnsupportedKind
from loraloom.ops.certificate import total
from loraloom.ops.compress import compress
from loraloom.ops.merge import merge
from loraloom.registry import UnknownName
from loraloom.store import load, save
from oracles.ops_dense import best, delta, random_adapter, random_factors

Q, V, FC = "layers.0.q", "layers.0.v", "layers.1.fc"
SIZES = {Q: (12, 9, 4), V: (6, 9, 3), FC: (9, 20, 6)}


def test_rank_is_the_best_of_that_rank_and_never_more_than_there_is():
    a = random_adapter(1, SIZES, 2.0)
    small = compress(a, rank=4)
    assert small.provenance["record"]["error"] == {}
    for name, (_, _, had) in SIZES.items():
        near, error = best(delta(a.modules[name]), min(4, had))
        assert small.shape(name).rank == small.modules[name].rank == min(4, had)
        assert np.allclose(delta(small.modules[name]), near, atol=1e-10)
        assert small.provenance["record"]["error"][name] == pytest.approx(error, abs=1e-9)
        assert small.provenance["record"]["norm"][name] == pytest.approx(np.linalg.norm(delta(a.modules[name])))
    assert small.modules[V] is a.modules[V]  # nothing to lose
    asked = [np.linalg.norm(delta(a.modules[name])) for name in SIZES]
    lost = [np.linalg.norm(delta(a.modules[name]) - delta(small.modules[name])) for name in SIZES]
    assert total(small.provenance["record"]) == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(asked))


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_energy_keeps_the_fewest_directions_that_make_it_up(energy):
    a = random_adapter(2, SIZES)
    small = compress(a, energy=energy)
    for name, (_, _, had) in SIZES.items():
        squares = np.linalg.svd(delta(a.modules[name]))[1][:had] ** 2
        want = next(k for k in range(1, had + 1) if squares[:k].sum() >= energy * squares.sum() * (1 - 1e-12))
        assert small.shape(name).rank == want
        kept = np.linalg.norm(delta(small.modules[name])) ** 2
        assert kept >= energy * squares.sum() * (1 - 1e-9)


def test_all_the_energy_of_a_shared_A_is_at_its_own_rank():
    a = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    adapters = [Adapter({"r": 3, "lora_alpha": 3}, {Q: Factors(torch.randn(7, 3), a)}) for _ in range(3)]
    whole = merge(adapters)
    small = merge(adapters, energy=1.0)
    assert whole.shape(Q).rank == 9 and small.shape(Q).rank == 3
    assert torch.allclose(small.modules[Q].delta(), whole.modules[Q].delta(), atol=1e-6)
    assert small.provenance["record"]["error"][Q] < 1e-6 and small.provenance["operation"] == "merge"


def greedy(a: Adapter, budget: float, worth: dict[str, float]) -> dict[str, int]:
    """The obvious search: look at every module's next direction, take the best that fits."""
    values = {n: np.linalg.svd(delta(a.modules[n]))[1][: a.modules[n].rank] ** 2 for n in a.modules}
    size = {n: (a.shape(n).out + a.shape(n).in_) * 8 for n in a.modules}
    ranks = dict.fromkeys(values, 0)
    while True:
        gains = {n: worth[n] * values[n][k] / size[n] for n, k in ranks.items() if k < len(values[n])}
        fits = {n: gain for n, gain in gains.items() if size[n] <= budget and gain > 0}
        if not fits:
            return {n: k for n, k in ranks.items() if k}
        taken = max(fits, key=fits.__getitem__)
        ranks[taken] += 1
        budget -= size[taken]


@pytest.mark.parametrize("budget", [200, 700, 1500, "1kb", "1KiB", "0.5x", "1x"])
@pytest.mark.parametrize("scores", [None, {"layers.0": 0.1, FC: 2.0}, {Q: 0.0}])
def test_a_budget_is_shared_out_by_singular_value(budget, scores):
    a = random_adapter(3, SIZES)
    whole = sum((o + i) * r * 8 for o, i, r in SIZES.values())
    asked = {"1kb": 1000, "1KiB": 1024, "0.5x": whole / 2, "1x": whole}.get(budget, budget)
    worth = dict.fromkeys(SIZES, 1.0)
    if scores:
        worth |= {Q: 0.1, V: 0.1, FC: 2.0} if "layers.0" in scores else scores
    small = compress(a, budget=budget, scores=scores)
    want = greedy(a, asked, worth)
    assert {name: small.shape(name).rank for name in small.modules} == want
    assert sum(f.B.numel() * 8 + f.A.numel() * 8 for f in small.modules.values()) <= asked


def test_a_merge_within_a_budget_has_the_certificate_of_both_steps(tmp_path):
    adapters = [random_adapter(seed, SIZES, 2.0) for seed in (1, 2)]
    small = merge(adapters, "ties", density=0.5, budget="0.6x")
    dense = merge(adapters, "ties", density=0.5, rank=100)
    for name in small.modules:
        asked = delta(dense.modules[name])
        error = np.linalg.norm(asked - delta(small.modules[name])) / np.linalg.norm(asked)
        assert small.provenance["record"]["error"][name] == pytest.approx(error, abs=1e-7)
        assert small.provenance["record"]["norm"][name] == pytest.approx(np.linalg.norm(asked))
    again = load(save(small, tmp_path / "small"))
    assert again.provenance["record"]["error"].keys() == set(small.modules)
    for name in small.modules:
        assert torch.allclose(again.modules[name].delta(), small.modules[name].delta())


def falling(norms: list[float]) -> Adapter:
    """Modules of rank 1 with updates of these norms."""
    one = {f"layers.{n}.q": Factors(torch.eye(4)[:, :1] * norm, torch.eye(1, 4)) for n, norm in enumerate(norms)}
    return Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, one)


def test_a_module_that_the_budget_drops_counts_as_lost(tmp_path):
    two = falling([10.0, 9.0])
    whole, few = falling([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), falling([3.0, 2.0, 0.0])
    for a, budget in ((two, 32), (whole, 76), (few, 48)):  # a direction takes 32 bytes
        merged = merge([a, a], "ties", density=1.0, budget=budget)
        for small in (compress(a, budget=budget), merged):
            record = load(save(small, tmp_path / "small", overwrite=True)).provenance["record"]
            lost = [a.modules[name].norm() for name in a.modules if name not in small.modules]
            asked = [one.norm() for one in a.modules.values()]
            assert total(record) == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(asked), abs=1e-6)
            assert record["error"].keys() == set(a.modules)
    assert record["error"]["layers.2.q"] == 0.0  # there was nothing to lose


def stored(folder) -> int:
    """Bytes of the tensors in an adapter folder."""
    return sum(one.numel() * one.element_size() for one in load_file(folder / "adapter_model.safetensors").values())


def experts() -> Adapter:
    """Two layers of 8 experts at rank 4, the first expert far ahead, and a linear module."""
    names = [f"h.{layer}.mlp.experts[{at}/8]" for layer in range(2) for at in range(8)]
    modules = {name: random_factors(at, 64, 64, 4, 9.0 if at == 0 else 1.0) for at, name in enumerate(names)}
    modules["h.0.q"] = random_factors(99, 64, 64, 4)
    return Adapter(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_parameters": ["mlp.experts.up_proj"]}, modules
    )


def groups() -> Adapter:
    """A convolution of 4 groups."""
    modules = {f"conv[{at}/4]": random_factors(at, 6, 8, 4, 9.0 if at == 0 else 1.0, kernel=(8, 1)) for at in range(4)}
    return Adapter({"peft_type": "LORA", "r": 16, "lora_alpha": 16}, modules)


@pytest.mark.parametrize("a", [experts(), groups()], ids=["experts", "groups"])
def test_what_is_stored_as_one_keeps_to_the_budget(a, tmp_path):
    whole = stored(save(a, tmp_path / "whole"))
    for share in (0.25, 0.5, 0.8, 1.0):
        small = compress(a, budget=f"{share}x")
        folder = save(small, tmp_path / f"small{share}")
        assert stored(folder) <= share * whole
        again = load(folder)
        for name in small.modules:
            assert torch.allclose(again.modules[name].delta(), small.modules[name].delta())
    assert stored(folder) == whole


def test_experts_of_a_layer_without_worth_leave():
    small = compress(experts(), budget="0.6x", scores={"h.1": 0.0})
    assert {name.split(".")[1] for name in small.modules} == {"0"}


def test_a_budget_reads_each_module_once_before_the_result_is_read():
    a, read = random_adapter(3, SIZES), []
    modules = Modules(tuple(SIZES), lambda name: read.append(name) or a.modules[name], a.shape)
    compress(replace(a, modules=modules), budget="0.5x")
    assert sorted(read) == sorted(SIZES)


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.8}, {"budget": "0.5x"}])
def test_on_another_device_the_result_is_in_main_memory_and_the_same(how, monkeypatch):
    a, moved = random_adapter(3, SIZES), []
    plain = compress(a, **how)
    to = Factors.to
    monkeypatch.setattr(Factors, "to", lambda self, device: moved.append(device) or to(self, device))
    small = compress(a, device="cpu:0", **how).loaded()
    assert set(moved) == {"cpu:0", "cpu"} and list(small.modules) == list(plain.modules)
    for name in small.modules:
        assert small.modules[name].B.device == torch.device("cpu")
        assert torch.equal(small.modules[name].delta(), plain.modules[name].delta())


def test_bias_magnitude_and_type_stay():
    part = random_factors(1, 6, 5, 3, 2.0, bias=torch.ones(6, dtype=torch.float64))
    small = compress(Adapter({"r": 3, "lora_bias": True}, {Q: part}), rank=1).modules[Q]
    assert torch.equal(small.scale * small.bias, 2 * torch.ones(6, dtype=torch.float64))
    dora = replace(part, bias=None, magnitude=torch.ones(6, dtype=torch.float64))
    assert torch.equal(compress(Adapter({"use_dora": True}, {Q: dora}), rank=1).modules[Q].magnitude, dora.magnitude)
    half = Factors(B=part.B.half(), A=part.A.half())
    assert compress(Adapter({"r": 3}, {Q: half}), rank=1).modules[Q].dtype == torch.float16


def test_hira_keeps_one_rank():
    a = random_adapter(4, SIZES, peft_type="HIRA")
    ranks = {compress(a, energy=0.7).shape(name).rank for name in SIZES}
    assert ranks == {max(compress(random_adapter(4, SIZES), energy=0.7).shape(name).rank for name in SIZES)}
    with pytest.raises(UnsupportedKind, match="budget"):
        compress(a, budget="1x")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "one of rank, energy and budget"),
        ({"rank": 1, "energy": 0.5}, "one of rank, energy and budget"),
        ({"rank": 0}, "at least 1"),
        ({"rank": True}, "at least 1"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\]"),
        ({"energy": float("nan")}, r"energy must be in \(0, 1\]"),
        ({"budget": "ten"}, "10MB"),
        ({"budget": -5}, "10MB"),
        ({"budget": 10}, "smallest direction takes 120"),
        ({"rank": 1, "scores": {}}, "share out a budget"),
        ({"budget": "1x", "scores": {Q: -1.0}}, "at least 0"),
        ({"budget": "1x", "scores": dict.fromkeys(SIZES, 0.0)}, "no module has both an update and a score above 0"),
    ],
)
def test_wrong_requests_are_refused(how, says):
    with pytest.raises(ValueError, match=says):
        compress(random_adapter(1, SIZES), **how)
    with pytest.raises(UnknownName, match=r"layers\.7"):
        compress(random_adapter(1, SIZES), budget="1x", scores={"layers.7": 1.0})
