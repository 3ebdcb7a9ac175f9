"""merge(): everything that is equal for all methods, against dense oracles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, UnsupportedKind
from loraloom.ops.merge import merge, module_generator
from loraloom.ops.merge_methods import merge_methods
from loraloom.registry import Technique, UnknownName
from loraloom.store import as_configured, load, save
from oracles.ops_dense import best, delta, ensemble, fusion, random_adapter, random_factors

Q, V, FC = "layers.0.q", "layers.0.v", "layers.1.fc"
SIZES = {Q: (6, 5, 2), V: (4, 5, 2), FC: (7, 6, 2)}
calm = settings(derandomize=True, deadline=None, max_examples=25)


def largest(deltas, weights, *, density: float = 1.0, sign: int = 1):
    """Of each entry the update that is largest after weighting (not linear)."""
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign}")
    weighted = deltas * weights.reshape(-1, *[1] * (deltas.ndim - 1))
    return sign * weighted.gather(0, weighted.abs().argmax(0, keepdim=True))[0]


def noisy(deltas, weights, *, generator: torch.Generator):
    """Keeps half of the entries at random."""
    return torch.tensordot(weights, deltas, 1) * (torch.rand(deltas.shape[1:], generator=generator) < 0.5)


@pytest.fixture
def methods(monkeypatch):
    """The registry and two methods of the tests."""
    extra = {"largest": Technique("largest", largest), "noisy": Technique("noisy", noisy, breaks=("single",))}
    extra["only_delta"] = Technique("only_delta", largest, facts={"spaces": ("delta",)})
    extra["factors_first"] = Technique("factors_first", largest, facts={"space": "factors"})
    monkeypatch.setattr("loraloom.ops.merge.merge_methods", {**merge_methods, **extra})


@st.composite
def some_adapters(draw):
    """Adapters of mixed ranks and scales, some without some modules."""
    adapters = []
    for seed in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, unique=True))
        rank, scale = draw(st.integers(1, 3)), draw(st.sampled_from([0.25, 1.0, 2.0, 16 / 2**0.5]))
        sizes = {name: (*SIZES[name][:2], rank) for name in names}
        adapters.append(random_adapter(seed, sizes, scale))
    weights = draw(st.lists(st.floats(-2, 2, width=16), min_size=len(adapters), max_size=len(adapters)))
    return adapters, weights


def matches(factors: Factors, dense: np.ndarray) -> bool:
    return np.allclose(delta(factors), dense, rtol=1e-10, atol=1e-10)


# ---- spaces ----


@calm
@given(some_adapters())
def test_delta_is_the_exact_sum_of_updates(case):
    adapters, weights = case
    merged = merge(adapters, weights=weights)
    assert set(merged.modules) == {name for a in adapters for name in a.modules}
    for name in merged.modules:
        assert matches(merged.modules[name], ensemble(adapters, weights, name))
        assert merged.shape(name) == merged.modules[name].shape
        assert as_configured(merged.config, name, merged.modules[name]) or weights == [1.0]
        if weights != [1.0]:
            assert merged.shape(name).rank == sum(a.shape(name).rank for a in adapters if name in a.modules)


@calm
@given(st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=2, max_size=4), st.integers(0, 5))
def test_factors_is_linear_fusion_for_any_scales(scales, seed):
    adapters = [random_adapter(seed + at, SIZES, scale) for at, scale in enumerate(scales)]
    weights = [0.5 + at for at in range(len(adapters))]
    merged = merge(adapters, weights=weights, space="factors")
    for name in SIZES:
        assert matches(merged.modules[name], fusion(adapters, weights, name))
        assert merged.shape(name) == merged.modules[name].shape == adapters[0].shape(name)
        assert as_configured(merged.config, name, merged.modules[name])


def test_factors_of_equal_scale_are_the_papers_formula_under_the_same_configuration():
    a, b = (random_adapter(seed, SIZES, 8.0) for seed in (1, 2))
    merged = merge([a, b], weights=[0.25, 0.75], space="factors")
    for name in SIZES:
        left, right, made = a.modules[name], b.modules[name], merged.modules[name]
        assert torch.allclose(made.B, 0.25 * left.B + 0.75 * right.B, rtol=0, atol=1e-15)
        assert torch.allclose(made.A, 0.25 * left.A + 0.75 * right.A, rtol=0, atol=1e-15)
        assert made.scale == 8.0
    assert merged.config["lora_alpha"] == a.config["lora_alpha"] and merged.config["r"] == a.config["r"]


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"peft_type": "HIRA"}, {"init_lora_weights": "pissa"}])
def test_one_adapter_of_weight_one_is_itself(space, config):
    a = random_adapter(1, SIZES, 4.0, **config)
    merged = merge([a], weights=[1.0], space=space)
    assert all(merged.modules[name] is a.modules[name] for name in SIZES)
    assert merged.config == a.config
    assert merged.provenance["operation"] == "merge" and merged.provenance["inputs"] == [a.provenance]


def test_default_weights_are_equal_shares():
    adapters = [random_adapter(seed, SIZES) for seed in range(3)]
    assert merge(adapters).provenance["arguments"]["weights"] == [1 / 3] * 3
    assert matches(merge(adapters).modules[Q], ensemble(adapters, [1 / 3] * 3, Q))


# ---- rank, record, streaming ----


@calm
@given(some_adapters(), st.integers(1, 8))
def test_asked_rank_is_the_best_approximation_and_its_error_is_recorded(case, rank):
    adapters, weights = case
    weights = [w + 3 for w in weights]  # none vanishes
    merged = merge(adapters, weights=weights, rank=rank)
    errors = merged.provenance["record"]["error"]
    assert errors == {}
    for name in merged.modules:
        near, error = best(ensemble(adapters, weights, name), rank)
        factors = merged.modules[name]
        assert factors.rank == merged.shape(name).rank == rank
        assert np.allclose(delta(factors), near, atol=1e-8)
        assert errors[name] == pytest.approx(error, abs=1e-7)
        assert as_configured(merged.config, name, factors)
    assert list(errors) == list(merged.modules)


def test_rank_is_honoured_for_one_adapter_and_in_factors():
    a, b = random_adapter(1, SIZES, 2.0), random_adapter(2, SIZES, 2.0)
    alone = merge([a], weights=[1.0], rank=1)
    assert alone.shape(Q).rank == 1 and matches(alone.modules[Q], best(delta(a.modules[Q]), 1)[0])
    fused = merge([a, b], space="factors", rank=1)
    assert matches(fused.modules[Q], best(fusion([a, b], [0.5, 0.5], Q), 1)[0])
    assert fused.config["lora_alpha"] == fused.config["r"] == 1


def counted(seed: int, reads: list) -> Adapter:
    """An adapter that notes which of its modules is read."""
    adapter = random_adapter(seed, SIZES)

    def read(name):
        reads.append((seed, name))
        return adapter.modules[name]

    return replace(adapter, modules=Modules(list(SIZES), read, adapter.shape))


def test_nothing_is_read_before_it_is_asked_for_and_only_that():
    reads = []
    merged = merge([counted(seed, reads) for seed in (1, 2)], rank=1)
    assert reads == []
    merged.modules[V]
    assert reads == [(1, V), (2, V)]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_budget_reads_every_module_once_and_once_more_when_it_is_asked_for(method):
    reads = []
    merged = merge([counted(seed, reads) for seed in (1, 2)], method, budget="0.5x")
    assert reads == [(seed, name) for name in SIZES for seed in (1, 2)]
    reads.clear()
    merged.modules[V]
    assert reads == [(1, V), (2, V)]


def test_no_two_modules_are_made_at_once_where_large_matrices_are_formed():
    adapters = [random_adapter(seed, SIZES) for seed in (1, 2)]
    grams = [{name: torch.eye(size[1]) for name, size in SIZES.items()}] * 2
    flat = [{name: torch.ones((out + in_) * rank) for name, (out, in_, rank) in SIZES.items()}] * 2
    assert merge(adapters, "regmean", statistics=grams).modules.heavy
    assert merge(adapters, "ties").modules.heavy and not merge(adapters, "ties", space="core").modules.heavy
    assert not merge(adapters).modules.heavy and not merge(adapters, "fisher", statistics=flat).modules.heavy


def test_a_key_error_in_reading_is_not_taken_for_a_missing_module():
    def broken(name):
        raise KeyError("torn file")

    a = random_adapter(1, SIZES)
    with pytest.raises(KeyError, match="torn file"):
        merge([a, replace(a, modules=Modules(list(SIZES), broken, a.shape))]).modules[Q]


@pytest.mark.parametrize("arguments", [{}, {"rank": 2}, {"space": "factors"}, {"method": "largest"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_stored_type_is_kept(arguments, dtype, methods):
    def stored(adapter):
        return replace(
            adapter, modules={n: replace(f, B=f.B.to(dtype), A=f.A.to(dtype)) for n, f in adapter.modules.items()}
        )

    adapters = [stored(random_adapter(seed, SIZES)) for seed in (1, 2)]
    merged = merge(adapters, **arguments).modules[Q]
    assert merged.B.dtype == merged.A.dtype == dtype


def test_small_weights_reach_the_folder_in_float16(tmp_path):
    a, b = (random_adapter(seed, {Q: (30, 20, 4)}) for seed in (1, 2))
    a, b = (
        replace(one, modules={Q: replace(one.modules[Q], B=(one.modules[Q].B / 1e3).half(), A=one.modules[Q].A.half())})
        for one in (a, b)
    )
    again = load(save(merge([a, b], weights=[1e-3, -1e-3]), tmp_path / "out"))
    want = ensemble([a, b], [1e-3, -1e-3], Q)
    assert np.linalg.norm(delta(again.modules[Q]) - want) < 1e-3 * np.linalg.norm(want)


def test_saved_and_loaded_it_is_the_same_adapter(tmp_path):
    a = random_adapter(1, {Q: (6, 5, 2), V: (4, 5, 2)}, 2.0, target_modules=["q", "v"])
    b = random_adapter(2, {Q: (6, 5, 3), FC: (7, 6, 3)}, 0.5, target_modules=["q", "fc"])
    save(merge([a, b], weights=[0.5, -1.0]), tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert {name: loaded.shape(name).rank for name in loaded.modules} == {Q: 5, V: 2, FC: 3}
    for name in loaded.modules:
        assert matches(loaded.modules[name], ensemble([a, b], [0.5, -1.0], name))


def test_the_errors_of_a_cut_reach_the_folder(tmp_path):
    a, b = (random_adapter(seed, SIZES, target_modules=["q", "v", "fc"]) for seed in (1, 2))
    save(merge([a, b], rank=3), tmp_path / "cut")
    written = load(tmp_path / "cut").provenance["record"]["error"]
    expected = {name: best(ensemble([a, b], [0.5, 0.5], name), 3)[1] for name in SIZES}
    assert written == pytest.approx(expected) and min(expected.values()) > 0


@pytest.mark.parametrize("energy", [0.99, 0.6, 1.0])
def test_energy_and_budget_are_of_the_whole_result_where_a_method_has_a_rank_of_its_own(energy):
    adapters = [random_adapter(seed, {Q: (9, 8, 4)}) for seed in (1, 2)]
    whole = ensemble(adapters, [0.5, 0.5], Q)
    kept = merge(adapters, "svd", energy=energy)
    values = np.linalg.svd(whole)[1] ** 2
    rank = int((values.cumsum() < energy * values.sum() * (1 - 1e-9)).sum()) + 1
    assert kept.shape(Q).rank == rank and matches(kept.modules[Q], best(whole, rank)[0])
    assert kept.provenance["record"]["error"][Q] == pytest.approx(best(whole, rank)[1], abs=1e-7)
    assert merge(adapters, "svd", budget="2x").shape(Q).rank == 8


@pytest.mark.parametrize(("method", "knob"), [("ctm", "size"), ("lego", "clusters")])
def test_the_size_that_is_a_methods_own_is_the_rank_of_the_result(method, knob):
    adapters = [random_adapter(seed, {Q: (9, 8, 2)}) for seed in (1, 2)]
    for size in (1, 3, 4):
        merged = merge(adapters, method, **{knob: size})
        assert merged.shape(Q).rank == merged.modules[Q].rank == size
        assert np.linalg.matrix_rank(delta(merged.modules[Q])) == size
        assert merged.provenance["record"]["error"][Q] < 1e-7
    assert merge(adapters, method, **{knob: 9}).modules[Q].rank == 4
    assert merge(adapters, method, **{knob: 4}, rank=3).modules[Q].rank == 3
    assert merge(adapters, method, **{knob: 3}, energy=1.0).modules[Q].rank == 3
    assert merge(adapters, method).modules[Q].rank == 2


# ---- biases, kinds, layouts, extras ----


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 0.5)])
def test_bias_is_the_sum_of_scaled_biases_and_missing_is_zero(space, scales):
    bias = torch.arange(6.0, dtype=torch.float64)
    a = Adapter({"r": 2, "lora_bias": True}, {Q: random_factors(1, 6, 5, 2, scales[0], bias=bias)})
    b = Adapter({"r": 2, "lora_bias": True}, {Q: random_factors(2, 6, 5, 2, scales[1], bias=-3 * bias)})
    plain = Adapter({"r": 2}, {Q: random_factors(3, 6, 5, 2, scales[0])})
    for adapters, expected in (
        ([a, b], (0.5 * scales[0] - 1.5 * scales[1]) * bias),
        ([plain, a], 0.5 * scales[0] * bias),
    ):
        made = merge(adapters, space=space)
        factors = made.modules[Q]
        assert torch.allclose(factors.scale * factors.bias, expected)
        assert made.config["lora_bias"] is True
    none = merge([plain, Adapter({"r": 2, "lora_bias": True}, {V: random_factors(4, 4, 5, 2, bias=bias[:4])})])
    assert torch.equal(none.modules[Q].bias, torch.zeros(6, dtype=torch.float64))  # PEFT wants one in every module


@pytest.mark.parametrize(("config", "embedding"), [({}, True), ({"target_parameters": [f"{V}.weight"]}, False)])
@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_a_bias_of_B_does_not_merge_with_what_has_none_in_peft(config, embedding, places):
    bias = torch.ones(6, dtype=torch.float64)
    biased = Adapter({"r": 2, "lora_bias": True}, {Q: random_factors(1, 6, 5, 2, bias=bias)})
    plain = Adapter({"r": 2, **config}, {V: random_factors(2, 4, 5, 2, embedding=embedding)})
    with pytest.raises(AdapterMismatch, match=rf"^{V}: .*lora_bias.* embedding or a single parameter$"):
        merge([(biased, plain)[at] for at in places])
    assert merge([plain, plain]).modules[V].bias is None


def test_bias_survives_an_asked_rank():
    bias = torch.ones(6, dtype=torch.float64)
    a = Adapter({"r": 2, "lora_bias": True}, {Q: random_factors(1, 6, 5, 2, 4.0, bias=bias)})
    factors = merge([a], weights=[1.0], rank=1).modules[Q]
    assert torch.allclose(factors.scale * factors.bias, 4 * bias)


def test_hira_merges_through_its_factors_without_alpha(methods):
    adapters = [random_adapter(seed, SIZES, peft_type="HIRA") for seed in (1, 2)]
    for adapter in adapters:
        adapter.config.pop("lora_alpha")
    merged = merge(adapters, weights=[2.0, -1.0])
    assert matches(merged.modules[Q], ensemble(adapters, [2.0, -1.0], Q))
    assert merged.config["r"] == 4 and "lora_alpha" not in merged.config and merged.modules[Q].scale == 1
    with pytest.raises(UnsupportedKind, match="HiRA multiplies by the base weights"):
        merge(adapters, "largest")
    assert merge(adapters, "largest", space="factors").modules[Q].rank == 2


@pytest.mark.parametrize("arguments", [{}, {"method": "svd"}, {"space": "core"}, {"energy": 0.9}, {"rank": 3}])
def test_hira_of_different_modules_merges_at_one_rank_that_peft_loads(tmp_path, arguments):
    said = {"peft_type": "HIRA", "target_modules": ["q", "v"]}
    a, b = random_adapter(1, {Q: (6, 5, 2)}, **said), random_adapter(2, {Q: (6, 5, 2), V: (4, 5, 2)}, **said)
    merged = merge([a, b], weights=[2.0, -1.0], **arguments)
    again = load(save(merged, tmp_path / "merged"))
    assert len({again.shape(name).rank for name in (Q, V)}) == 1
    for name in (Q, V):
        assert merged.shape(name) == merged.modules[name].shape == again.shape(name)
        assert np.allclose(delta(again.modules[name]), delta(merged.modules[name]))
        if not arguments or "space" in arguments:
            assert matches(merged.modules[name], ensemble([a, b], [2.0, -1.0], name))


@pytest.mark.parametrize("layout", [{"kernel": (1, 5, 1)}, {"embedding": True}])
@pytest.mark.parametrize("arguments", [{}, {"rank": 1}, {"space": "factors"}, {"method": "largest"}])
def test_layouts_are_carried_and_must_agree(layout, arguments, methods):
    a, b, plain = (
        Adapter({"r": 2}, {Q: random_factors(seed, 6, 5, 2, **(layout if seed < 3 else {}))}) for seed in (1, 2, 3)
    )
    merged = merge([a, b], **arguments).modules[Q]
    assert (merged.kernel, merged.embedding) == (a.modules[Q].kernel, a.modules[Q].embedding)
    with pytest.raises(AdapterMismatch, match=f"{Q}: different kinds of layer"):
        merge([a, plain], **arguments).modules[Q]


def test_extras():
    a, b, c = (random_adapter(seed, SIZES) for seed in (1, 2, 3))
    head = {"score.weight": torch.tensor([1.0, 2.0])}
    b = replace(b, extras=head, config={**b.config, "modules_to_save": ["score"]})
    carried = merge([a, b])
    assert carried.extras == head and carried.config["modules_to_save"] == ["score"]
    c = replace(c, extras={"score.weight": torch.tensor([3.0, 6.0])}, config={**c.config, "bias": "all"})
    with pytest.raises(AdapterMismatch, match=r"2 of 3 adapters hold whole tensors \(score.weight\)"):
        merge([a, b, c])
    averaged = merge([a, b, c], weights=[5.0, 1.0, 3.0], extras="average")
    assert torch.equal(averaged.extras["score.weight"], torch.tensor([2.5, 5.0]))  # over the holders, by weight
    assert averaged.config["bias"] == "all"
    with pytest.raises(ValueError, match=r"score.weight: the weights .* add up to 0"):
        merge([b, c], weights=[1.0, -1.0], extras="average")
    with pytest.raises(AdapterMismatch, match=r"score.weight: tensors that do not average"):
        merge([b, replace(c, extras={"score.weight": torch.ones(3)})], extras="average")
    with pytest.raises(UnknownName, match="did you mean 'average'"):
        merge([b, c], extras="avarage")


# ---- other methods through the same driver ----


def test_a_method_that_is_not_linear_sees_dense_updates(methods):
    adapters = [random_adapter(1, SIZES, 2.0), random_adapter(2, {Q: (6, 5, 1)}, 0.5)]
    full = merge(adapters, "largest", weights=[1.0, 3.0], rank=5)
    merged = merge(adapters, "largest", weights=[1.0, 3.0])
    stack = np.stack([delta(adapters[0].modules[Q]), 3 * delta(adapters[1].modules[Q])])
    dense = np.take_along_axis(stack, np.abs(stack).argmax(0)[None], 0)[0]
    assert matches(full.modules[Q], dense) and full.provenance["record"]["error"][Q] < 1e-12
    near, error = best(dense, 3)
    assert merged.shape(Q).rank == 3 and matches(merged.modules[Q], near)
    assert merged.provenance["record"]["error"][Q] == pytest.approx(error) and error > 0.01
    assert matches(merged.modules[V], delta(adapters[0].modules[V]))  # the other one counts as zero there


def test_default_rank_of_dense_results_is_at_most_full(methods):
    adapters = [random_adapter(seed, {Q: (6, 5, 4)}) for seed in (1, 2)]
    assert merge(adapters, "largest").modules[Q].shape == (6, 5, 5)
    assert merge(adapters, "linear").modules[Q].shape == (6, 5, 8)


def test_draws_depend_on_seed_and_module_alone(methods):
    adapters = [random_adapter(seed, SIZES) for seed in (1, 2)]
    before = torch.get_rng_state()
    one, two, other = (merge(adapters, "noisy", seed=seed, rank=5) for seed in (7, 7, 8))
    forward = {name: one.modules[name].delta() for name in SIZES}
    backward = {name: two.modules[name].delta() for name in reversed(SIZES)}
    assert all(torch.equal(forward[name], backward[name]) for name in SIZES)
    assert not torch.equal(forward[Q], other.modules[Q].delta())
    assert torch.equal(before, torch.get_rng_state())
    pair = [torch.rand(4, generator=module_generator(0, name)) for name in (Q, V)]
    assert not torch.equal(*pair)


def test_facts_choose_and_limit_the_space(methods):
    adapters = [random_adapter(seed, SIZES) for seed in (1, 2)]
    assert merge(adapters, "factors_first").provenance["arguments"]["space"] == "factors"
    assert merge(adapters, "largest").provenance["arguments"]["space"] == "delta"
    with pytest.raises(ValueError, match="method 'only_delta' has no space 'factors'; allowed: delta"):
        merge(adapters, "only_delta", space="factors")


def test_knobs_are_checked_before_anything_is_read(methods):
    def unread(name):
        raise AssertionError("read")

    a = random_adapter(1, SIZES)
    adapters = [replace(a, modules=Modules(list(SIZES), unread, a.shape))] * 2
    with pytest.raises(ValueError, match="method 'linear' takes no 'density'; it takes: no such arguments"):
        merge(adapters, density=0.5)
    with pytest.raises(ValueError, match="method 'largest' takes no 'lam'; it takes: density, sign"):
        merge(adapters, "largest", lam=1.0)
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 2"):
        merge(adapters, "largest", sign=2)
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
            merge(adapters, "largest", density=density)
    given_ = merge(adapters, "largest", density=0.5, sign=-1).provenance["arguments"]
    assert given_["density"] == 0.5 and given_["sign"] == -1


# ---- refusals: all before anything is read ----

A, B = random_adapter(1, SIZES), random_adapter(2, SIZES)
NAN, INF = float("nan"), float("inf")
EACH = {name: [1, 1] for name in SIZES}
REFUSED = [
    ([], {}, ValueError, "nothing to merge: at least one adapter"),
    ([A, B], {"weights": [1.0]}, ValueError, "1 weights for 2 adapters"),
    ([A, B], {"weights": [1.0, NAN]}, ValueError, "weight 2 of 2 is nan"),
    ([A, B], {"weights": [-INF, 1.0]}, ValueError, "weight 1 of 2 is -inf"),
    ([A, B], {"weights": 3}, ValueError, "weights must be a list of 2 numbers, got 3"),
    ([A, B], {"weights": "12"}, ValueError, "weights must be a list of 2 numbers, got '12'"),
    ([A, B], {"weights": [True, False]}, ValueError, "weight 1 of 2 is True; weights must be finite numbers"),
    ([A, B], {"weights": [1.0, 10**400]}, ValueError, "weight 2 of 2 is 10000.*; weights must be finite numbers"),
    ([A, B], {"weights": EACH | {V: 3}}, ValueError, f"^{V}: weights must be a list of 2 numbers, got 3"),
    ([A, B], {"weights": EACH | {Q: {1: 0, 2: 0}}}, ValueError, f"^{Q}: weights must be a list of 2 numbers"),
    ([A, B], {"weights": EACH | {Q: [1, None]}}, ValueError, f"^{Q}: weight 2 of 2 is None"),
    ([A, B], {"weights": EACH | {Q: [1, "x"]}}, ValueError, f"^{Q}: weight 2 of 2 is 'x'"),
    ([A, B], {"weights": [2.0, -1.0], "space": "factors"}, ValueError, "weight -1.0: in space 'factors'"),
    ([A, B], {"method": "linaer"}, UnknownName, "merge method 'linaer' is not known .did you mean 'linear'"),
    ([A, B], {"space": "factor"}, UnknownName, "space 'factor' is not known .did you mean 'factors'"),
    ([A, B], {"rank": 0}, ValueError, "rank must be a whole number of at least 1, got 0"),
    ([A, B], {"rank": 2.5}, ValueError, "rank must be a whole number of at least 1, got 2.5"),
    ([A, B], {"rank": True}, ValueError, "rank must be a whole number"),
    ([A, B], {"rank": 100_000}, ValueError, "rank must be at most 16384, got 100000"),
    ([Adapter({}, {})], {"weights": [2.0]}, ValueError, "the adapters have no modules"),
    ([A, random_adapter(2, SIZES, peft_type="HIRA")], {}, AdapterMismatch, "different kinds do not merge: lora, hira"),
    ([A, random_adapter(2, SIZES, use_dora=True)], {}, AdapterMismatch, "different kinds do not merge: lora, dora"),
    ([random_adapter(1, SIZES, use_dora=True)] * 2, {}, UnsupportedKind, "cannot merge DoRA adapters"),
    ([random_adapter(1, SIZES, use_dora=True)], {"weights": [0.5]}, UnsupportedKind, "DoRA"),
    ([random_adapter(1, SIZES, use_dora=True)], {"rank": 1}, UnsupportedKind, "DoRA"),
    ([random_adapter(1, SIZES, use_dora=True)], {"energy": 0.9}, UnsupportedKind, "DoRA"),
    ([random_adapter(1, SIZES, use_dora=True)], {"budget": "0.5x"}, UnsupportedKind, "DoRA"),
    ([random_adapter(1, SIZES, peft_type="LOHA")] * 2, {}, UnsupportedKind, "kind 'loha'; allowed: lora, hira"),
    ([A, random_adapter(2, SIZES, init_lora_weights="pissa_niter_4")], {}, UnsupportedKind, "'pissa_niter_4'.*convert"),
    ([A, random_adapter(2, SIZES, base_model_name_or_path="org/other")], {}, AdapterMismatch,
     "adapter 1 of 2 is of base model 'org/base', adapter 2 of 2 of 'org/other'.*same_base=False"),
    ([A, random_adapter(2, {**SIZES, V: (4, 6, 2)})], {}, AdapterMismatch,
     "layers.0.v: adapter 1 of 2 is 4 x 5, adapter 2 of 2 is 4 x 6"),
    ([A, random_adapter(2, {**SIZES, V: (4, 5, 3)})], {"space": "factors"}, AdapterMismatch,
     "layers.0.v: adapter 1 of 2 has rank 2, adapter 2 of 2 has rank 3;.*use space='delta'"),
    ([A, random_adapter(2, {Q: SIZES[Q]})], {"space": "factors"}, AdapterMismatch,
     "layers.0.v: adapter 2 of 2 has no such module;.*use space='delta'"),
]  # fmt: skip


@pytest.mark.parametrize(("adapters", "arguments", "kind", "message"), REFUSED)
def test_refused_at_once_by_name(adapters, arguments, kind, message):
    def unread(name):
        raise AssertionError("read")

    lazy = [replace(a, modules=Modules(list(a.modules), unread, a.shape)) for a in adapters]
    with pytest.raises(kind, match=message) as caught:
        merge(lazy, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", ["org/base", "/models/base/", "C:\\models\\base", ""])
def test_the_same_base_is_found_under_many_paths(base):
    other = random_adapter(2, SIZES, base_model_name_or_path=base)
    assert len(merge([A, other, B]).modules) == 3


def test_different_bases_on_request():
    other = random_adapter(2, SIZES, base_model_name_or_path="org/other")
    assert merge([A, other], same_base=False).base == "org/base"


@pytest.mark.parametrize("arguments", [{"rank": 1}, {"method": "largest"}])
def test_svd_of_nan_is_refused_by_module(arguments, methods):
    bad = replace(A.modules[Q], B=torch.full_like(A.modules[Q].B, NAN))
    merged = merge([A, replace(B, modules={**B.modules, Q: bad})], **arguments)
    merged.modules[V]
    with pytest.raises(ValueError, match=f"{Q}: a matrix with NaN"):
        merged.modules[Q]


def test_weights_may_be_arrays_or_tensors():
    wanted = merge([A, B], weights=[0.25, 0.75])
    for weights in (
        np.array([0.25, 0.75], np.float32),
        torch.tensor([0.25, 0.75]),
        [np.float32(0.25), torch.tensor(0.75)],
    ):
        found = merge([A, B], weights=weights)
        assert all(torch.equal(found.modules[name].delta(), wanted.modules[name].delta()) for name in wanted.modules)
