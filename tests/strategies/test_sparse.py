"""LoRI as a plan: exact masks against sorting, masks as sets, the frozen A."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.masks import MASK, Mask, load_mask, save_mask, support, union
from loraloom.ops.merge import merge
from loraloom.overview import cosines
from loraloom.registry import UnknownName
from loraloom.store import load, save
from loraloom.strategies.sparse import LoRI, calibrate

SHAPES = {"h.0.q": (7, 3), "h.0.v": (5, 2), "h.1.q": (7, 3), "h.1.v": (4, 2)}
POOLS = {
    "model": [list(SHAPES)],
    "layer": [["h.0.q", "h.0.v"], ["h.1.q", "h.1.v"]],
    "projection": [["h.0.q", "h.1.q"], ["h.0.v", "h.1.v"]],
    "module": [[name] for name in SHAPES],
}
calm = settings(max_examples=60, deadline=None)


def trained(seed: int, ties: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (out, rank) in SHAPES.items():
        b = torch.randn(out, rank, generator=generator)
        modules[name] = Factors(
            B=(2 * b).round() if ties else b, A=torch.randn(rank, 6, generator=generator), scale=2.0
        )
    return Adapter({"peft_type": "LORA", "r": 3, "lora_alpha": 6}, modules)


def chosen(values: np.ndarray, count: int) -> np.ndarray:
    """The obvious version: sort by falling size, then by index."""
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    mask = np.zeros(len(values), bool)
    mask[order[:count]] = True
    return mask


@calm
@given(st.integers(0, 999), st.floats(0.1, 1), st.sampled_from(list(POOLS)), st.booleans())
def test_a_mask_is_what_sorting_keeps(seed, density, scope, ties):
    adapter = trained(seed, ties)
    mask = calibrate(adapter, density=density, scope=scope)
    for pool in POOLS[scope]:
        values = np.concatenate([adapter.modules[name].B.numpy().ravel() for name in pool])
        count = round(density * len(values))
        want = chosen(values, count)
        got = np.concatenate([mask[name].numpy().ravel() for name in pool])
        assert got.sum() == count and np.array_equal(got, want)


@calm
@given(st.integers(0, 999), st.sampled_from(list(POOLS)), st.booleans())
def test_excluded_entries_are_not_taken(seed, scope, ties):
    adapter, first = trained(seed, ties), calibrate(trained(seed + 1), density=0.4, scope="module")
    second = calibrate(adapter, density=0.3, scope=scope, exclude=first)
    assert second.overlap(first) == first.overlap(second) == (second & first).kept == 0
    third = calibrate(adapter, density=0.2, scope=scope, exclude=[first, second])
    assert (third & (first | second)).kept == 0
    for pool in POOLS[scope]:
        left = np.concatenate([~first[name].numpy().ravel() for name in pool])
        values = np.concatenate([adapter.modules[name].B.numpy().ravel() for name in pool])
        want = np.zeros(len(values), bool)
        want[np.flatnonzero(left)[chosen(values[left], round(0.3 * len(values)))]] = True
        assert np.array_equal(want, np.concatenate([second[name].numpy().ravel() for name in pool]))


def test_the_official_faults_of_counting_are_not_here():
    assert calibrate({"fc": torch.randn(400, 3)}, density=1 - 0.9).kept == 120  # int((1 - 0.9) * 1200) is 119
    never = {"a": torch.randn(10, 4), "b": torch.zeros(10, 4)}
    assert calibrate(never, density=0.75).kept == 60  # ties at 0 do not keep all of b
    assert calibrate(never, density=1.0).kept == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"\(0, 1\]"),
        ({"density": 1.5}, r"\(0, 1\]"),
        ({"density": float("nan")}, r"\(0, 1\]"),
        ({"density": 1e-6}, "0 entries of the model; from 1 to"),
        ({"scope": "tower"}, "allowed: model, layer, projection, module"),
        ({"density": 0.7, "exclude": calibrate(trained(0), density=0.5)}, "from 1 to"),
        ({"exclude": Mask.of({"fc": torch.ones(2, 2) > 0})}, "other modules"),
    ],
)
def test_refused_masks(arguments, message):
    with pytest.raises((ValueError, UnknownName), match=message):
        calibrate(trained(0), **arguments)
    with pytest.raises(ValueError, match=r"NaN or infinite|negative or NaN"):
        calibrate({"fc": torch.tensor([[1.0, float("nan")]])}, density=0.5)


# --- masks ------------------------------------------------------------------------------------------------------------


@calm
@given(st.integers(0, 999), st.integers(0, 9), st.integers(0, 5))
def test_masks_are_sets(seed, out, rank):
    rng = np.random.default_rng(seed)
    raw = [rng.random((2, out, rank)) < 0.5 for _ in range(2)]
    a, b = (Mask.of({name: torch.from_numpy(part) for name, part in zip("xy", each, strict=True)}) for each in raw)
    for name, left, right in zip("xy", raw[0], raw[1], strict=True):
        assert np.array_equal(a[name].numpy(), left) and a.count(name) == left.sum()
        assert np.array_equal((a & b)[name].numpy(), left & right)
        assert np.array_equal((a | b)[name].numpy(), left | right)
        assert np.array_equal((a - b)[name].numpy(), left & ~right)
    assert a.kept == raw[0].sum() and a.entries == 2 * out * rank
    assert union([a, b]).kept == (raw[0] | raw[1]).sum()


def test_a_mask_file_is_packed_and_comes_back(tmp_path):
    big = Mask.of(
        {"h.0.q": torch.rand(4096, 16, generator=torch.Generator().manual_seed(0)) < 0.1, "e": torch.ones(0, 3) > 0}
    )
    path = save_mask(replace(big, provenance={"density": 0.1}), tmp_path / "sub" / MASK)
    assert path.stat().st_size < 4096 * 16 / 8 + 5000
    again = load_mask(path)
    assert all(torch.equal(again[name], big[name]) for name in big) and list(again) == list(big)
    assert again.provenance == {"density": 0.1} and load_mask(path.parent).kept == big.kept
    with pytest.raises(FileExistsError):
        save_mask(big, path)
    save_mask(big, path, overwrite=True)
    assert [item.name for item in path.parent.iterdir()] == [MASK]


def test_damaged_mask_files(tmp_path):
    path = save_mask(Mask.of({"fc": torch.ones(3, 3) > 0}), tmp_path / "m.safetensors")
    whole = path.read_bytes()
    for cut in (0, 7, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_mask(path)
    about = {"shapes": {"fc": [3, 3]}, "provenance": {}}
    for tensors, told, message in (
        ({"fc": torch.zeros(3, dtype=torch.uint8)}, about, "does not hold the 2 bytes"),
        ({"fc": torch.full((2,), 255, dtype=torch.uint8)}, about, "behind its last entry"),
        ({"fc": torch.zeros(2, dtype=torch.uint8), "x": torch.zeros(1)}, about, "not those that it names"),
        ({"fc": torch.zeros(2, dtype=torch.uint8)}, {}, "no mask"),
    ):
        save_file(tensors, path, metadata={"loraloom_mask": json.dumps(told)})
        with pytest.raises(ValueError, match=message):
            load_mask(path)
    save_file({"fc": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no mask"):
        load_mask(path)
    (tmp_path / "m.pt").write_bytes(b"x")
    with pytest.raises(UnsupportedKind, match="pickle"):
        load_mask(tmp_path / "m.pt")
    with pytest.raises(AdapterMismatch, match="fc is"):
        Mask.of({"fc": torch.ones(3, 3) > 0}) & Mask.of({"fc": torch.ones(3, 2) > 0})
    with pytest.raises(ValueError, match="boolean matrix"):
        Mask.of({"fc": torch.ones(3, 3)})


def test_support_is_where_b_is_not_zero():
    adapter = trained(0, ties=True)
    assert all(torch.equal(support(adapter)[name], adapter.modules[name].B != 0) for name in SHAPES)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_a_is_a_function_of_seed_task_and_module():
    plan = LoRI(seed=1, task="digits")
    a = plan.a("h.0.q", 4, 100)
    torch.rand(3)
    assert torch.equal(a, plan.a("h.0.q", 4, 100)) and a.abs().max() <= 0.1
    assert abs(float(a.std()) - 1 / (3 * 100) ** 0.5) < 0.005
    others = [replace(plan, seed=2), replace(plan, task="fashion"), replace(plan, start="fresh")]
    for other in (*(plan.a("h.0.q", 4, 100) for plan in others), plan.a("h.1.q", 4, 100)):
        assert abs(torch.nn.functional.cosine_similarity(a.flatten(), other.flatten(), dim=0)) < 0.2
    shared = [LoRI(seed=1, task=task, shared=True).a("h", 2, 3) for task in ("digits", "fashion")]
    assert torch.equal(*shared)


def test_reuse_draws_the_a_of_the_calibration_run():
    first = LoRI(seed=5, task="digits")
    made = replace(trained(0), provenance={"operation": "train", "record": {"lori": {"a": first.origin}}, "name": "d"})
    mask = calibrate(made, density=0.5)
    again = LoRI(mask=mask, seed=9, task="other")
    assert torch.equal(again.a("h.0.q", 3, 6), first.a("h.0.q", 3, 6))
    fresh = LoRI(mask=mask, seed=5, task="digits", start="fresh")
    assert not torch.equal(fresh.a("h.0.q", 3, 6), first.a("h.0.q", 3, 6))
    with pytest.raises(ValueError, match="give that adapter as start, or start='fresh'"):
        LoRI(mask=calibrate(trained(0), density=0.5))
    with pytest.raises(ValueError, match="not drawn"):
        LoRI(start="keep").a("h", 1, 1)


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": True}, {"seed": 2**64}, {"start": "again"}])
def test_refused_plans(arguments):
    with pytest.raises((ValueError, UnknownName)):
        LoRI(**arguments)


def test_protected_entries_are_not_allowed():
    first, second = (
        Mask.of({"fc": torch.rand(5, 4, generator=torch.Generator().manual_seed(s)) < 0.5}) for s in (0, 1)
    )
    plan = LoRI(mask=first, start="fresh", protect=(second,))
    assert torch.equal(plan.allowed("fc", (5, 4)), first["fc"] & ~second["fc"])
    assert torch.equal(LoRI(protect=(second,)).allowed("fc", (5, 4)), ~second["fc"])
    assert LoRI().allowed("fc", (5, 4)) is None
    for name, shape in (("fc", (4, 4)), ("other", (5, 4))):
        with pytest.raises(ValueError, match="mask"):
            plan.allowed(name, shape)


# --- what follows for merging -----------------------------------------------------------------------------------------


def of_task(task: str, *, shared: bool, common: torch.Tensor, width: int = 1024, rank: int = 8) -> Adapter:
    """An adapter whose B has a part in common with those of other tasks (cosine about 0.5)."""
    own = torch.randn(common.shape, generator=torch.Generator().manual_seed(hash_of(task)))
    factors = Factors(B=common + own, A=LoRI(task=task, shared=shared).a("fc", rank, width), scale=2.0)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["fc"]}
    return Adapter(config, {"fc": factors})


def hash_of(task: str) -> int:
    return sum(map(ord, task))


def test_updates_of_independent_a_are_orthogonal_and_of_a_shared_a_are_not():
    common = torch.randn(512, 8, generator=torch.Generator().manual_seed(99))
    for shared in (False, True):
        a, b = (of_task(task, shared=shared, common=common) for task in ("digits", "fashion"))
        ((_, found), _) = cosines([a, b])
        between = torch.nn.functional.cosine_similarity(a.modules["fc"].B.flatten(), b.modules["fc"].B.flatten(), dim=0)
        assert between > 0.4
        assert abs(found - float(between)) < 0.02 if shared else abs(found) < 0.02


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tasks", [2, 4])
def test_merging_is_the_weighted_sum_also_with_a_shared_a(method, shared, tasks, tmp_path):
    common = torch.randn(64, 4, generator=torch.Generator().manual_seed(99))
    parts = [of_task(f"t{k}", shared=shared, common=common, width=32, rank=4) for k in range(tasks)]
    merged = load(save(merge(parts, method=method, weights=[0.4] * tasks), tmp_path / "m"))
    want = sum(0.4 * part.modules["fc"].delta() for part in parts)
    assert torch.allclose(merged.modules["fc"].delta(), want, atol=1e-5)
