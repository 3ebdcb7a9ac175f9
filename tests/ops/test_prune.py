"""prune(): which modules and which entries stay, against sorting by hand."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.adapter import Adapter, Factors, Modules, UnsupportedKind, truncate
from loraloom.experts import as_stored
from loraloom.ops.align import align
from loraloom.ops.arithmetic import scale
from loraloom.ops.certificate import total
from loraloom.ops.compress import compress
from loraloom.ops.merge import merge
from loraloom.ops.prune import prune
from loraloom.registry import UnknownName
from loraloom.store import load, save
from oracles.ops_dense import best, delta, largest, random_adapter, random_factors

calm = settings(derandomize=True, deadline=None, max_examples=40)


def tower(
    path: str, layers, roles=("self_attn.q_proj", "self_attn.v_proj", "mlp.fc")
) -> dict[str, tuple[int, int, int]]:
    return {f"{path}.{number}.{role}": (3, 4, 2) for number in layers for role in roles}


def layers_of(adapter: Adapter, path: str = "model.layers") -> list[int]:
    found = [name.removeprefix(path + ".").split(".")[0] for name in adapter.modules if name.startswith(path + ".")]
    return list(dict.fromkeys(int(number) for number in found))


TWELVE = random_adapter(1, tower("model.layers", range(12)), target_modules=["q_proj", "v_proj", "fc"])
TOWERS = random_adapter(1, tower("text.encoder.layers", range(3)) | tower("vision.encoder.layers", range(12)))


# ---- structured ----


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("every-other", [0, 2, 4, 6, 8, 10]),
        ("low", [0, 1, 2, 3]),
        ("middle", [4, 5, 6, 7]),
        ("high", [8, 9, 10, 11]),
        ("0,2,5-7", [0, 2, 5, 6, 7]),
        (" 11 , 3 - 4 ", [3, 4, 11]),
    ],
)
def test_keep_of_twelve_layers(keep, expected):
    pruned = prune(TWELVE, keep=keep)
    assert layers_of(pruned, "model.layers") == expected
    assert len(pruned.modules) == 3 * len(expected)
    assert all(pruned.modules[name] is TWELVE.modules[name] for name in pruned.modules)
    assert all(pruned.shape(name) == TWELVE.shape(name) for name in pruned.modules)


@calm
@given(st.integers(3, 40).flatmap(lambda count: st.permutations(range(count))))
def test_thirds_part_the_layers_evenly_and_in_order(order):
    count = len(order)
    adapter = random_adapter(1, tower("h", order, roles=("q",)))
    thirds = [sorted(layers_of(prune(adapter, keep=keep), "h")) for keep in ("low", "middle", "high")]
    assert thirds[0] + thirds[1] + thirds[2] == list(range(count))
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1
    assert len(thirds[0]) == len(thirds[2])


def test_each_tower_is_pruned_by_itself():
    every = prune(TOWERS, keep="every-other")
    assert layers_of(every, "text.encoder.layers") == [0, 2]
    assert layers_of(every, "vision.encoder.layers") == [0, 2, 4, 6, 8, 10]
    high = prune(TOWERS, keep="high")
    assert layers_of(high, "text.encoder.layers") == [2]
    assert layers_of(high, "vision.encoder.layers") == [8, 9, 10, 11]
    some = prune(TOWERS, keep="1,9")
    assert layers_of(some, "text.encoder.layers") == [1] and layers_of(some, "vision.encoder.layers") == [1, 9]


def test_every_other_counts_the_layers_that_are_there_and_numbers_name_them():
    half = prune(TWELVE, keep="every-other")
    assert layers_of(prune(half, keep="every-other"), "model.layers") == [0, 4, 8]
    assert layers_of(prune(half, keep="0-5"), "model.layers") == [0, 2, 4]
    with pytest.raises(ValueError, match=r"keep='0,3': 3 names no layer; layers are 0,2,4,6,8,10"):
        prune(half, keep="0,3")


def test_nested_numbers_count_by_place():
    swin = random_adapter(
        1, {f"encoder.layers.{s}.blocks.{b}.q": (2, 2, 1) for s, n in ((0, 2), (1, 3)) for b in range(n)}
    )
    assert list(prune(swin, keep="2,4").modules) == ["encoder.layers.1.blocks.0.q", "encoder.layers.1.blocks.2.q"]


def test_modules_outside_layers_stay_unless_named_away():
    adapter = random_adapter(1, tower("h", range(3), roles=("q", "v")) | {"lm_head": (5, 4, 2)})
    assert list(prune(adapter, keep="low").modules) == ["h.0.q", "h.0.v", "lm_head"]
    assert list(prune(adapter, keep="low", modules="q").modules) == ["h.0.q"]
    assert list(prune(adapter, modules="lm_head").modules) == ["lm_head"]


def test_projections_by_role_or_last_part_and_with_layers():
    both = prune(TWELVE, modules="self_attn.q_proj, fc")
    assert list(both.modules) == [n for n in TWELVE.modules if n.endswith(("q_proj", "fc"))]
    assert list(prune(TWELVE, modules=["q_proj"], keep="high").modules) == [
        f"model.layers.{n}.self_attn.q_proj" for n in range(8, 12)
    ]


@pytest.mark.parametrize("config", [{"use_dora": True}, {"peft_type": "HIRA"}, {"init_lora_weights": "olora"}])
def test_whole_modules_of_any_kind(config):
    adapter = random_adapter(1, tower("h", range(4)), **config)
    pruned = prune(replace(adapter, extras={"head": torch.ones(1)}), keep="every-other")
    assert layers_of(pruned, "h") == [0, 2] and set(pruned.extras) == {"head"}
    assert pruned.config == {**adapter.config, "inference_mode": True}
    assert pruned.provenance["record"] == {"modules": 6, "modules_before": 12}


def test_structured_reads_nothing():
    def unread(name):
        raise AssertionError("read")

    lazy = replace(TWELVE, modules=Modules(list(TWELVE.modules), unread, TWELVE.shape))
    assert len(prune(lazy, keep="low").modules) == 12


# ---- unstructured ----


def entries(adapter: Adapter) -> list[float]:
    return [x for f in adapter.modules.values() for t in (f.B, f.A) for x in t.flatten().tolist()]


small_tables = st.lists(st.integers(-3, 3).map(float), min_size=7, max_size=7)


@calm
@given(
    st.lists(small_tables, min_size=1, max_size=4), st.floats(0.05, 1), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_exactly_the_largest_stay_and_of_equals_the_first(tables, density, dtype):
    modules = {}
    for at, table in enumerate(tables):
        t = torch.tensor(table, dtype=dtype)
        modules[f"h.{at}.q"] = Factors(B=t[:4].reshape(4, 1), A=t[4:].reshape(1, 3), scale=2.0)
    adapter = Adapter({"r": 1}, modules)
    values = entries(adapter)
    kept = round(density * len(values))
    if kept == 0:
        with pytest.raises(ValueError, match="keeps none"):
            prune(adapter, density=density)
        return
    pruned = prune(adapter, density=density)
    expected = [x if stays else 0.0 for x, stays in zip(values, largest(values, kept), strict=True)]
    assert entries(pruned) == expected
    if density < 1:
        assert sum(pruned.provenance["record"]["kept"].values()) == kept == pruned.provenance["record"]["entries_kept"]


@calm
@given(st.integers(0, 1000), st.floats(0.01, 0.99))
def test_threshold_over_modules_of_any_size(seed, density):
    adapter = random_adapter(seed, {"h.0.q": (9, 7, 3), "h.1.q": (2, 11, 1), "lm_head": (13, 3, 2)}, 4.0)
    adapter = replace(
        adapter, modules={n: replace(f, B=1e-6 * f.B.float(), A=f.A.float()) for n, f in adapter.modules.items()}
    )
    values = entries(adapter)
    kept = largest(values, round(density * len(values)))
    pruned = prune(adapter, density=density)
    read_backwards = {name: pruned.modules[name] for name in reversed(list(pruned.modules))}
    assert entries(Adapter({}, {n: read_backwards[n] for n in pruned.modules})) == [
        x if stays else 0.0 for x, stays in zip(values, kept, strict=True)
    ]
    assert all(pruned.modules[n].scale == 4.0 and pruned.shape(n) == adapter.shape(n) for n in pruned.modules)
    assert entries(adapter) == values


def test_an_untrained_b_of_zeros_fills_up_with_ties():
    zeros = Factors(B=torch.zeros(4, 2), A=torch.ones(2, 3))
    adapter = Adapter({"r": 2}, {"h.0.q": zeros, "h.1.q": zeros})
    pruned = prune(adapter, density=0.75)  # 21 of 28: all 12 ones, 9 of 16 zeros
    assert entries(pruned) == entries(adapter)
    pruned.loaded()
    assert pruned.provenance["record"]["kept"] == {"h.0.q": 14, "h.1.q": 7}


def test_density_one_is_the_adapter_itself():
    for space in ("factors", "delta"):
        assert prune(TWELVE, density=1.0, space=space).modules is TWELVE.modules


def test_three_readings_of_each_module_one_at_a_time():
    reads = []

    def read(name):
        reads.append(name)
        return TOWERS.modules[name]

    pruned = prune(replace(TOWERS, modules=Modules(list(TOWERS.modules), read, TOWERS.shape)), density=0.5)
    assert reads == []
    pruned.loaded()
    assert sorted(reads) == sorted(list(TOWERS.modules) * 3)


def test_dora_keeps_its_magnitudes_and_lora_its_bias():
    one = random_factors(1, 4, 3, 2, magnitude=torch.ones(4), bias=torch.full((4,), 1e-9))
    pruned = prune(Adapter({"r": 2, "use_dora": True}, {"h.0.q": one}), density=0.5).modules["h.0.q"]
    assert pruned.magnitude is one.magnitude and pruned.bias is one.bias


@pytest.mark.parametrize("rank", [None, 1, 5])
def test_delta_entries_go_back_to_factors(rank):
    adapter = random_adapter(3, {"h.0.q": (6, 5, 2), "h.1.q": (4, 5, 3)}, 3.0, rank_pattern={"h.1.q": 3})
    adapter = replace(adapter, modules={**adapter.modules, "h.1.q": replace(adapter.modules["h.1.q"], scale=1.5)})
    dense = {name: delta(f) for name, f in adapter.modules.items()}
    stays = largest([x for d in dense.values() for x in d.flatten()], round(0.4 * 50))
    pruned = prune(adapter, density=0.4, space="delta", rank=rank)
    start = 0
    for name, d in dense.items():
        mask = np.array(stays[start : start + d.size]).reshape(d.shape)
        start += d.size
        wanted = rank or adapter.shape(name).rank
        near, error = best(d * mask, wanted)
        assert np.allclose(delta(pruned.modules[name]), near, atol=1e-10)
        assert pruned.modules[name].shape == pruned.shape(name) and pruned.shape(name).rank == wanted
        assert pruned.provenance["record"]["error"][name] == pytest.approx(error, abs=1e-12)
        assert pruned.provenance["record"]["kept"][name] == mask.sum()


def test_delta_keeps_the_bias_of_the_update():
    one = random_factors(1, 4, 3, 2, 5.0, bias=torch.ones(4))
    pruned = prune(Adapter({"r": 2, "lora_bias": True}, {"h.0.q": one}), density=0.5, space="delta").modules["h.0.q"]
    assert torch.equal(pruned.scale * pruned.bias, torch.full((4,), 5.0))


def test_random_is_exact_seeded_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two, other = (entries(prune(TWELVE, density=0.3, by="random", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert one == two != other
    assert sum(x != 0 for x in one) == sum(x != 0 for x in other) == round(0.3 * len(one))
    assert one != entries(prune(TWELVE, density=0.3))


# ---- scopes, patterns, directions, scores ----

THREE = random_adapter(5, {"h.0.q": (6, 5, 2), "h.0.v": (4, 5, 3), "h.1.q": (6, 5, 2)}, 2.0)
NAMES = list(THREE.modules)


def mask_of(values: list[np.ndarray], density: float) -> list[np.ndarray]:
    flat = np.concatenate([v.ravel() for v in values])
    kept = np.array(largest(flat.tolist(), round(density * flat.size)))
    return [
        part.reshape(v.shape)
        for part, v in zip(np.split(kept, np.cumsum([v.size for v in values])[:-1]), values, strict=True)
    ]


POOLS = {
    "model": [NAMES],
    "layer": [NAMES[:2], NAMES[2:]],
    "projection": [[n for n in NAMES if n.endswith(role)] for role in dict.fromkeys(n[-1] for n in NAMES)],
    "module": [[n] for n in NAMES],
}


@pytest.mark.parametrize("scope", POOLS)
@pytest.mark.parametrize("space", ["factors", "balanced", "delta"])
def test_density_holds_in_every_scope(scope, space):
    pools = POOLS[scope]
    pruned = prune(THREE, density=0.4, scope=scope, space=space, rank=5 if space == "delta" else None)
    for pool in pools:
        parts = {n: THREE.modules[n] for n in pool}
        if space == "balanced":
            parts = {n: truncate(f, f.rank)[0] for n, f in parts.items()}
        whole = {n: [delta(f)] if space == "delta" else [f.B.numpy(), f.A.numpy()] for n, f in parts.items()}
        masks = iter(mask_of([m for matrices in whole.values() for m in matrices], 0.4))
        for name, matrices in whole.items():
            want = [m * next(masks) for m in matrices]
            got = pruned.modules[name]
            made = [delta(got)] if space == "delta" else [got.B.numpy(), got.A.numpy()]
            assert all(np.allclose(left, right, atol=1e-10) for left, right in zip(made, want, strict=True))
    record = pruned.provenance["record"]
    assert sum(record["kept"].values()) == record["entries_kept"] and abs(record["density"] - 0.4) < 0.05


def test_balanced_entries_do_not_depend_on_the_gauge_and_spare_a_small_B():
    p = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = random_factors(1, 30, 20, 2)
    young = replace(f, B=1e-4 * f.B)
    other = replace(f, B=1e-4 * f.B @ torch.linalg.inv(p), A=p @ f.A)
    one, two = (prune(Adapter({"r": 2}, {"h.0.q": part}), density=0.3, space="balanced") for part in (young, other))
    assert torch.allclose(one.modules["h.0.q"].delta(), two.modules["h.0.q"].delta(), atol=1e-12)
    assert one.modules["h.0.q"].norm() > 0.3 * young.norm()
    assert prune(Adapter({"r": 2}, {"h.0.q": young}), density=0.3).modules["h.0.q"].norm() == 0


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "3:3"])
def test_a_pattern_keeps_the_largest_of_every_few_neighbours(space, pattern):
    most, of = map(int, pattern.split(":"))
    pruned = prune(THREE, pattern=pattern, space=space, rank=5 if space == "delta" else None)
    for name in NAMES:
        f, got = THREE.modules[name], pruned.modules[name]
        pairs = (
            [(delta(f), delta(got))]
            if space == "delta"
            else [(f.B.numpy(), got.B.numpy()), (f.A.numpy(), got.A.numpy())]
        )
        for before, after in pairs:
            want = np.zeros_like(before)
            for i, row in enumerate(before):
                for start in range(0, len(row), of):
                    piece = row[start : start + of]
                    for at in sorted(range(len(piece)), key=lambda j: (-abs(piece[j]), j))[:most]:
                        want[i, start + at] = piece[at]
            assert np.allclose(after, want, atol=1e-10)
        assert pruned.provenance["record"]["kept"][name] > 0
    record = pruned.provenance["record"]
    assert record["entries_kept"] == sum(record["kept"].values()) <= record["entries"]
    assert record["density"] == record["entries_kept"] / record["entries"]


@pytest.mark.parametrize("scope", POOLS)
def test_directions_stay_by_singular_value(scope):
    pools = POOLS[scope]
    pruned = prune(THREE, density=0.5, unit="rank", scope=scope)
    want = {}
    for pool in pools:
        values = [(s, n) for n in pool for s in np.linalg.svd(delta(THREE.modules[n]))[1][: THREE.modules[n].rank]]
        for _, name in sorted(values, reverse=True)[: max(1, round(0.5 * len(values)))]:
            want[name] = want.get(name, 0) + 1
    assert {n: pruned.shape(n).rank for n in pruned.modules} == {n: want[n] for n in NAMES if n in want}
    for name in pruned.modules:
        near, error = best(delta(THREE.modules[name]), want[name])
        assert np.allclose(delta(pruned.modules[name]), near) and pruned.modules[name].rank == want[name]
        assert pruned.provenance["record"]["error"][name] == pytest.approx(error, abs=1e-10)
    record = pruned.provenance["record"]
    lost = [np.linalg.norm(delta(THREE.modules[n]) - (delta(pruned.modules[n]) if n in want else 0)) for n in NAMES]
    asked = [np.linalg.norm(delta(THREE.modules[n])) for n in NAMES]
    assert total(record) == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(asked))
    assert (record["directions"], record["directions_kept"]) == (7, sum(want.values()))


def test_two_threads_look_for_a_threshold_once(tmp_path):
    reads = []

    def read(name: str) -> Factors:
        reads.append(name)
        time.sleep(0.02)
        return TWELVE.modules[name]

    slow = replace(TWELVE, modules=Modules(tuple(TWELVE.modules), read, TWELVE.shape))
    save(prune(slow, density=0.5), tmp_path / "out")
    assert Counter(reads) == dict.fromkeys(TWELVE.modules, 3)  # twice for the threshold, once for the result


def test_what_is_made_of_heavy_modules_is_heavy(tmp_path):
    dense = merge([TWELVE, random_adapter(2, tower("model.layers", range(12)))], "ties")
    loaded = replace(TWELVE, modules={name: dense.modules[name] for name in dense.modules})
    made = {
        "compress": compress(dense, rank=1),
        "budget": merge([TWELVE, loaded], "ties", budget="0.5x"),
        "scale": scale(dense, 2.0),
        "keep": prune(dense, keep="low"),
        "entries": prune(dense, density=0.5),
        "ranks": prune(dense, density=0.5, unit="rank"),
        "align": align(dense, to=loaded),
        "align to": align(loaded, to=dense),
        "stored": as_stored(dense),
    }
    assert {name for name, one in made.items() if not one.modules.heavy} == set()
    assert prune(TWELVE, density=0.5, space="delta").modules.heavy and not scale(TWELVE, 2.0).modules.heavy


def test_a_module_that_keeps_no_direction_counts_as_lost():
    a = Adapter({"r": 1}, {f"h.{n}.q": Factors(torch.tensor([[10.0 - n]]), torch.eye(1)) for n in range(2)})
    pruned = prune(a, density=0.5, unit="rank").loaded()
    assert list(pruned.modules) == ["h.0.q"]
    assert pruned.provenance["record"]["error"] == {"h.1.q": 1.0, "h.0.q": 0.0}
    assert total(pruned.provenance["record"]) == pytest.approx((81 / 181) ** 0.5)


@pytest.mark.parametrize("by", ["magnitude", "random"])
def test_directions_of_hira_stay_at_one_rank_that_peft_loads(tmp_path, by):
    a = random_adapter(1, {f"h.{n}.q": (6, 5, 3) for n in range(3)}, peft_type="HIRA", target_modules=["q"])
    pruned = prune(a, density=0.55, unit="rank", by=by)
    again = load(save(pruned, tmp_path / "pruned"))
    assert len({again.shape(name).rank for name in again.modules}) == 1
    ranks = [int(np.linalg.matrix_rank(delta(again.modules[name]))) for name in again.modules]
    assert len(set(ranks)) > 1 and sum(ranks) == pruned.provenance["record"]["directions_kept"] == 5
    assert all(pruned.shape(name) == pruned.modules[name].shape == again.shape(name) for name in again.modules)


def test_all_directions_are_the_adapter_as_it_is():
    a = random_adapter(1, {"h.0.q": (6, 5, 3), "h.1.q": (6, 5, 3)}, scale=2.0)
    a = replace(a, modules={**a.modules, "h.2.q": Factors(torch.zeros(6, 3), torch.ones(3, 5))})
    pruned = prune(a, density=1, unit="rank")
    assert list(pruned.modules) == list(a.modules)
    for name, factors in a.modules.items():
        got = pruned.modules[name]
        assert pruned.shape(name) == got.shape and got.scale == factors.scale
        assert torch.equal(got.B, factors.B) and torch.equal(got.A, factors.A)
    assert set(pruned.provenance["record"]["error"].values()) == {0.0}


def test_directions_at_random_are_seeded_parts_of_the_update():
    one, two, other = (prune(THREE, density=0.6, unit="rank", by="random", seed=seed).loaded() for seed in (0, 0, 3))
    assert all(torch.equal(one.modules[n].B, two.modules[n].B) for n in one.modules)
    assert any(n not in other.modules or one.shape(n) != other.shape(n) for n in one.modules) or any(
        not torch.equal(one.modules[n].B, other.modules[n].B) for n in one.modules
    )
    for name, part in one.modules.items():
        whole = THREE.modules[name]
        assert whole.norm() ** 2 == pytest.approx(part.norm() ** 2 + (replace_delta(whole, part)) ** 2)


def replace_delta(whole: Factors, part: Factors) -> float:
    return float(np.linalg.norm(delta(whole) - delta(part)))


def test_whole_units_stay_by_norm_by_chance_or_by_score(tmp_path):
    by_norm = prune(TWELVE, density=0.25, unit="layer")
    norms = {n: sum(f.norm() ** 2 for m, f in TWELVE.modules.items() if f".{n}." in m) for n in range(12)}
    loudest = sorted(sorted(norms, key=norms.__getitem__, reverse=True)[:3])
    assert layers_of(by_norm) == loudest
    assert by_norm.provenance["record"]["units"] == [f"model.layers.{n}" for n in loudest]
    scores = {f"model.layers.{n}": float(-n % 5) for n in range(12)}
    assert layers_of(prune(TWELVE, density=0.25, unit="layer", by=scores)) == [1, 6, 11]
    pair = {"units": list(scores), "values": list(scores.values()), "stderr": [0.1] * 12}
    assert layers_of(prune(TWELVE, density=0.25, unit="layer", by=pair)) == [1, 6, 11]
    one, two, other = (layers_of(prune(TWELVE, density=0.5, unit="layer", by="random", seed=s)) for s in (0, 0, 1))
    assert one == two != other and len(one) == 6
    each = prune(TWELVE, density=0.34, unit="module", scope="layer")
    assert len(each.modules) == 12 and layers_of(each) == list(range(12))
    saved = load(save(prune(THREE, density=0.5, unit="rank"), tmp_path / "ranks"))
    assert {n: saved.shape(n).rank for n in saved.modules}


# ---- refusals ----

HEADS = random_adapter(1, {"lm_head": (3, 4, 2)})
REFUSED = [
    (TWELVE, {}, ValueError, "either keep and/or modules"),
    (TWELVE, {"keep": "low", "density": 0.5}, ValueError, "either keep and/or modules"),
    (TWELVE, {"modules": "fc", "density": 0.5}, ValueError, "either keep and/or modules"),
    (TWELVE, {"keep": "99"}, ValueError, "keep='99': 99 names no layer; layers are 0-11"),
    (TWELVE, {"keep": "3,20-30"}, ValueError, "keep='3,20-30': 20-30 names no layer"),
    (TWELVE, {"keep": "7-5"}, ValueError, "7-5 names no layer"),
    (TWELVE, {"keep": "lows"}, UnknownName, "keep 'lows' is not known .did you mean 'low'"),
    (TWELVE, {"keep": ""}, UnknownName, "allowed: every-other, low, middle, high, layer numbers"),
    (TWELVE, {"keep": "1,,2"}, UnknownName, "layer numbers such as 0,2,5-7"),
    (HEADS, {"keep": "low"}, ValueError, "keep='low': none of the 1 modules is in a numbered layer"),
    (random_adapter(1, tower("h", [0, 1])), {"keep": "middle"}, ValueError, "keep='middle' keeps no layer of 2"),
    (TWELVE, {"modules": "q_prj"}, UnknownName, "projection 'q_prj' is not known"),
    (TWELVE, {"modules": "fc,k_proj"}, UnknownName, "allowed: mlp.fc, self_attn.q_proj, self_attn.v_proj"),
    (TWELVE, {"modules": []}, ValueError, "modules=.. keeps none of the 36 modules"),
    (Adapter({}, {}), {"keep": "low"}, ValueError, "no modules to prune"),
    (TWELVE, {"density": 0.0}, ValueError, r"density must be in \(0, 1\], got 0.0"),
    (TWELVE, {"density": 1.5}, ValueError, r"density must be in \(0, 1\]"),
    (TWELVE, {"density": float("nan")}, ValueError, r"density must be in \(0, 1\]"),
    (TWELVE, {"density": 1e-6}, ValueError, "density=1e-06 keeps none of the 504 entries"),
    (TWELVE, {"density": 0.5, "space": "dleta"}, UnknownName, "space 'dleta' is not known .did you mean 'delta'"),
    (TWELVE, {"density": 0.5, "by": "magnitud"}, UnknownName, "did you mean 'magnitude'"),
    (TWELVE, {"density": 0.5, "rank": 2}, ValueError, "rank .* goes with space='delta'"),
    (TWELVE, {"density": 0.5, "unit": "head"}, UnknownName, "allowed: entry, rank, layer, module"),
    (TWELVE, {"density": 0.5, "scope": "tower"}, UnknownName, "allowed: model, layer, projection, module"),
    (TWELVE, {"density": 0.5, "unit": "layer", "scope": "layer"}, ValueError, "scope 'layer' holds no choice"),
    (TWELVE, {"density": 0.5, "unit": "layer", "space": "delta"}, ValueError, "go with unit='entry'"),
    (TWELVE, {"density": 0.5, "by": {"model.layers.0": 1.0}}, ValueError, "scores by name go with"),
    (TWELVE, {"density": 0.5, "unit": "layer", "by": {"model.layers.0": 1.0}}, ValueError, "layers.1 has no score"),
    (TWELVE, {"density": 0.5, "unit": "layer", "by": {"layers.77": 1.0}}, UnknownName, "layer 'layers.77'"),
    (TWELVE, {"density": 0.5, "unit": "layer", "by": {"model.layers.0": float("nan")}}, ValueError, "finite numbers"),
    (TWELVE, {"pattern": "4:2"}, ValueError, "expected N:M"),
    (TWELVE, {"pattern": "1:99999999999"}, ValueError, "expected N:M with 1 <= N <= M <= 1024"),
    (TWELVE, {"keep": "0", "unit": "rank"}, ValueError, "unit, by and scope go with density"),
    (TWELVE, {"modules": "q", "by": "random"}, ValueError, "unit, by and scope go with density"),
    (TWELVE, {"pattern": "2-4"}, ValueError, "expected N:M"),
    (TWELVE, {"pattern": "2:4", "density": 0.5}, ValueError, "either keep and/or modules"),
    (TWELVE, {"pattern": "2:4", "unit": "layer"}, ValueError, "pattern goes with unit='entry'"),
    (TWELVE, {"density": 0.5, "space": "delta", "rank": 0}, ValueError, "rank must be at least 1"),
    (random_adapter(1, tower("h", [0]), peft_type="HIRA"), {"density": 0.5, "space": "delta"}, UnsupportedKind, "HiRA"),
    (random_adapter(1, tower("h", [0]), use_dora=True), {"density": 0.5, "space": "delta"}, UnsupportedKind, "DoRA"),
    (random_adapter(1, tower("h", [0]), init_lora_weights="pissa"), {"density": 0.5}, UnsupportedKind, "'pissa'"),
]


@pytest.mark.parametrize(("adapter", "arguments", "kind", "message"), REFUSED)
def test_refused_at_once_by_name(adapter, arguments, kind, message):
    with pytest.raises(kind, match=message) as caught:
        prune(adapter, **arguments)
    assert "\n" not in str(caught.value)


def test_nan_is_refused_by_module_when_read():
    bad = replace(TWELVE.modules["model.layers.3.mlp.fc"], A=torch.full((2, 4), float("nan"), dtype=torch.float64))
    pruned = prune(replace(TWELVE, modules={**TWELVE.modules, "model.layers.3.mlp.fc": bad}), density=0.5)
    with pytest.raises(ValueError, match=r"model.layers.3.mlp.fc: NaN or infinite"):
        pruned.modules["model.layers.0.mlp.fc"]
