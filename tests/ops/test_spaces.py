"""The spaces: what a method sees in each, and that nothing is lost on the way there and back; dense oracles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, UnsupportedKind
from loraloom.ops.merge import merge
from loraloom.ops.merge_methods import merge_methods
from loraloom.registry import Technique
from oracles.ops_dense import best, delta, ensemble, random_adapter

Q, V = "layers.0.q", "layers.0.v"
SIZES = [{Q: (30, 20, 2), V: (9, 11, 4)}, {Q: (30, 20, 3), V: (9, 11, 5)}, {Q: (30, 20, 1)}]
SCALES = [2.0, 0.5, 1.0]
WEIGHTS = [0.7, -0.4, 1.2]


def three() -> list[Adapter]:
    return [random_adapter(seed, sizes, scale) for seed, (sizes, scale) in enumerate(zip(SIZES, SCALES, strict=True))]


def seen(monkeypatch, result=None, **facts):
    """A method that keeps what it sees and gives the weighted sum."""
    stacks = []

    def spy(deltas, weights):
        stacks.append(deltas.clone())
        return torch.tensordot(weights, deltas, 1) if result is None else result(deltas)

    monkeypatch.setattr(
        "loraloom.ops.merge.merge_methods", {**merge_methods, "spy": Technique("spy", spy, facts=facts)}
    )
    return stacks


@pytest.mark.parametrize("space", ["core", "knots"])
def test_the_weighted_sum_goes_there_and_back_without_loss(space):
    merged = merge(three(), weights=WEIGHTS, space=space)
    for name in (Q, V):
        assert np.allclose(delta(merged.modules[name]), ensemble(three(), WEIGHTS, name), atol=1e-10)
        assert merged.shape(name) == merged.modules[name].shape
    assert merged.shape(Q).rank == 6 and merged.shape(V).rank == 9
    cut = merge(three(), weights=WEIGHTS, space=space, rank=2)
    near, error = best(ensemble(three(), WEIGHTS, Q), 2)
    assert np.allclose(delta(cut.modules[Q]), near, atol=1e-10)
    assert cut.provenance["record"]["error"][Q] == pytest.approx(error, abs=1e-10)
    assert cut.provenance["record"]["norm"][Q] == pytest.approx(np.linalg.norm(ensemble(three(), WEIGHTS, Q)))


def test_core_shows_inner_products_and_singular_values_of_the_updates(monkeypatch):
    stacks = seen(monkeypatch)
    merge(three(), "spy", WEIGHTS, space="core").modules[Q]
    cores = stacks[-1].numpy()
    dense = [delta(adapter.modules[Q]) for adapter in three()]
    assert cores.shape == (3, 6, 6)
    gram = [[(left * right).sum() for left in dense] for right in dense]
    assert np.allclose([[(left * right).sum() for left in cores] for right in cores], gram)
    for core, whole in zip(cores, dense, strict=True):
        assert np.allclose(np.linalg.svd(core)[1], np.linalg.svd(whole)[1][:6], atol=1e-10)
    # The bases are the singular vectors of the updates side by side, and on top of each other.
    assert np.allclose(np.hstack(cores) @ np.hstack(cores).T, np.diag(np.linalg.svd(np.hstack(dense))[1][:6] ** 2))
    assert np.allclose(np.vstack(cores).T @ np.vstack(cores), np.diag(np.linalg.svd(np.vstack(dense))[1][:6] ** 2))


def test_knots_shows_the_right_parts_of_the_svd_side_by_side(monkeypatch):
    stacks = seen(monkeypatch)
    merge(three(), "spy", WEIGHTS, space="knots").modules[Q]
    parts = np.hstack(stacks[-1].numpy())
    vh = np.linalg.svd(np.hstack([delta(adapter.modules[Q]) for adapter in three()]), full_matrices=False)[2][:6]
    assert parts.shape == (6, 60)
    signs = np.sign((parts * vh).sum(1, keepdims=True))
    assert np.allclose(parts, signs * vh, atol=1e-10)


def test_units_shows_rank_one_units_and_takes_any_number_back(monkeypatch):
    stacks = seen(monkeypatch, result=lambda deltas: deltas.flatten(0, 1))
    adapters = three()
    merged = merge(adapters, "spy", [1.0, 1.0, 1.0], space="units")
    assert np.allclose(delta(merged.modules[Q]), ensemble(adapters, [1.0] * 3, Q))
    rows = stacks[-1]
    assert rows.shape == (3, 3, 50)
    part = adapters[0].modules[Q]
    assert torch.allclose(rows[0, :2, :30], 2.0**0.5 * part.B.T) and torch.allclose(rows[0, :2, 30:], 2.0**0.5 * part.A)
    assert not rows[0, 2].any() and not rows[2, 1:].any()
    few = seen(monkeypatch, result=lambda deltas: deltas[0, :1], rank="largest")
    one = merge(adapters, "spy", space="units")
    assert one.modules[Q].shape == (30, 20, 3) == one.shape(Q) and few
    outer = part.scale * torch.outer(part.B[:, 0], part.A[0])
    assert torch.allclose(one.modules[Q].delta(), outer)


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_shared_A_shrinks_the_spaces_to_the_true_rank(monkeypatch, space, dtype):
    """LoRI's adapters of one A: the joint row space has the rank of one, and no null direction gets in."""
    stacks = seen(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 50, generator=generator).to(dtype)
    parts = [Factors(B=torch.randn(40, 4, generator=generator).to(dtype), A=a) for _ in range(3)]
    adapters = [Adapter({"r": 4, "lora_alpha": 4}, {Q: part}) for part in parts]
    merged = merge(adapters, "spy", [1.0, 1.0, 1.0], space=space)
    want = sum(part.B.double() @ part.A.double() for part in parts)
    got = merged.modules[Q]
    assert stacks[-1].shape == ((3, 12, 4) if space == "core" else (3, 12, 50))
    assert got.dtype == dtype and got.rank == 12
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    assert (got.B.double() @ got.A.double() - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("space", ["core", "knots", "units", "delta"])
def test_zero_updates_stay_zero(space):
    adapters = [Adapter({"r": 2}, {Q: Factors(B=torch.zeros(5, 2), A=torch.ones(2, 4))}) for _ in range(2)]
    merged = merge(adapters, space=space, rank=1)
    assert merged.modules[Q].shape == (5, 4, 1) and not merged.modules[Q].delta().any()
    assert merged.provenance["record"]["error"] == {Q: 0.0}


def test_units_have_no_place_for_a_bias():
    biased = replace(random_adapter(0, SIZES[0]).modules[Q], bias=torch.ones(30, dtype=torch.float64))
    adapters = [Adapter({"r": 2, "lora_bias": True}, {Q: biased}) for _ in range(2)]
    with pytest.raises(UnsupportedKind, match="bias"):
        merge(adapters, space="units").modules[Q]


# ---- weights by module, statistics, base, size ----


def test_weights_by_module():
    adapters = [random_adapter(seed, SIZES[0], 2.0) for seed in (1, 2)]
    merged = merge(adapters, weights={Q: [1.0, 2.0], V: [0.0, -1.0]})
    assert np.allclose(delta(merged.modules[Q]), ensemble(adapters, [1.0, 2.0], Q))
    assert np.allclose(delta(merged.modules[V]), ensemble(adapters, [0.0, -1.0], V))
    with pytest.raises(ValueError, match=r"layers\.0\.v has none"):
        merge(adapters, weights={Q: [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"'layers\.9'"):
        merge(adapters, weights={Q: [1.0, 2.0], V: [1.0, 1.0], "layers.9": [1.0, 1.0]})
    with pytest.raises(ValueError, match=r"layers\.0\.v: 1 weights for 2"):
        merge(adapters, weights={Q: [1.0, 2.0], V: [1.0]})
    one = merge(adapters[:1], weights={Q: [1.0], V: [1.0]})
    assert one.modules[Q] is adapters[0].modules[Q]


def test_weights_of_every_module_are_tried_before_anything_is_read():
    def unread(name):
        raise AssertionError("read")

    adapters = [random_adapter(seed, SIZES[0]) for seed in (1, 2)]
    lazy = [replace(one, modules=Modules(list(one.modules), unread, one.shape)) for one in adapters]
    with pytest.raises(ValueError, match="weights must not be negative"):
        merge(lazy, "slerp", weights={Q: [0.5, 0.5], V: [0.5, -0.5]})


@pytest.mark.parametrize("space", ["delta", "knots", "factors"])
def test_statistics_reach_the_method_in_the_form_of_the_space(monkeypatch, space):
    got = []

    def weighs(deltas, weights, *, statistics=None):
        if statistics is not None:
            got.append((deltas.shape, statistics))
        return torch.tensordot(weights, deltas, 1)

    facts = {"statistics": "gram", "spaces": ("delta", "knots", "factors")}
    known = {**merge_methods, "weighs": Technique("weighs", weighs, facts=facts)}
    monkeypatch.setattr("loraloom.ops.merge.merge_methods", known)
    adapters = [random_adapter(seed, {Q: (6, 5, 2)}) for seed in (1, 2)]
    size = 6 * 2 + 2 * 5 if space == "factors" else 25
    flat = [torch.arange(size, dtype=torch.float64) + 100 * at for at in range(2)]
    statistics = [{Q: one if space == "factors" else one.view(5, 5)} for one in flat]
    merge(adapters, "weighs", space=space, statistics=statistics).modules[Q]
    if space == "factors":
        (_, of_b), (_, of_a) = got
        assert of_b.shape == (2, 6, 2) and of_a.shape == (2, 2, 5) and of_a[1, 0, 0] == 112
    else:
        assert torch.equal(got[0][1], torch.stack(flat).view(2, 5, 5))
    with pytest.raises(ValueError, match="needs statistics"):
        merge(adapters, "weighs")
    with pytest.raises(ValueError, match="uses no statistics"):
        merge(adapters, "linear", statistics=statistics)
    with pytest.raises(ValueError, match="1 statistics for 2"):
        merge(adapters, "weighs", statistics=statistics[:1])
    with pytest.raises(ValueError, match="adapter 2 of 2 do not have"):
        merge(adapters, "weighs", statistics=[statistics[0], {}]).modules[Q]


@pytest.mark.parametrize("kind", ["dora", "hira"])
def test_with_the_base_whole_effective_updates_are_merged_to_a_lora(kind, monkeypatch):
    config = {"use_dora": True} if kind == "dora" else {"peft_type": "HIRA"}
    adapters = [random_adapter(seed, {Q: (8, 6, 2)}, **config) for seed in (1, 2)]
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    effective = []
    for at, adapter in enumerate(adapters):
        part = adapter.modules[Q]
        update = torch.from_numpy(delta(part))
        if kind == "dora":
            magnitude = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
            adapters[at] = replace(adapter, modules={Q: replace(part, magnitude=magnitude)})
            moved = torch.stack([row / row.norm() for row in w + update])
            effective.append(magnitude[:, None] * moved - w)
        else:
            effective.append(w * update)
    seen(monkeypatch, result=lambda deltas: deltas.sum(0))
    with pytest.raises(UnsupportedKind, match=r"base|magnitudes"):
        merge(adapters, "spy", space="delta")
    merged = merge(adapters, weights=[2.0, -1.0], base={Q: w}, rank=6)
    assert merged.kind == "lora" and merged.modules[Q].magnitude is None
    assert torch.allclose(merged.modules[Q].delta(), 2 * effective[0] - effective[1])
    alone = merge(adapters[:1], weights=[1.0], base={Q: w}, rank=2)
    near, error = best(effective[0].numpy(), 2)
    assert np.allclose(delta(alone.modules[Q]), near) and alone.provenance["record"]["error"][Q] == pytest.approx(error)
    with pytest.raises(AdapterMismatch, match="no such weight"):
        merge(adapters, base={V: w}).modules[Q]
    with pytest.raises(AdapterMismatch, match="8, 5"):
        merge(adapters, base={Q: w[:, :5]}).modules[Q]
    with pytest.raises(ValueError, match="base goes with"):
        merge([random_adapter(1, {Q: (8, 6, 2)})], base={Q: w})
