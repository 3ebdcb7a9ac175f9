"""prune(): which modules and which entries stay, against sorting by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.adapter import Adapter, Factors, Modules, UnsupportedKind
from loraloom.ops.prune import prune
from loraloom.registry import UnknownName
from oracles.ops_dense import best, delta, largest, random_adapter, random_factors

calm = settings(derandomize=True, deadline=None, max_examples=40)


def tower(
    path: str, layers, roles=("self_attn.q_proj", "self_attn.v_proj", "mlp.fc")
) -> dict[str, tuple[int, int, int]]:
    return {f"{path}.{number}.{role}": (3, 4, 2) for number in layers for role in roles}


def layers_of(adapter: Adapter, path: str) -> list[int]:
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
