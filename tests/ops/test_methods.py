"""Merge methods against their oracles, by hand, and by what their papers promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.ops.merge import merge
from loraloom.ops.merge_methods import inner_method, merge_methods
from loraloom.ops.select import cutoff, largest, threshold
from oracles import methods as oracle
from oracles.ops_dense import delta, random_adapter

calm = settings(derandomize=True, deadline=None, max_examples=40)
ENTRYWISE = ["ties", "magnitude", "breadcrumbs", "sce", "consensus"]
SPECTRAL = ["iso_c", "iso_cts", "tsv_m", "cart", "model_stock"]


def run(name, deltas, weights, seed=0, **knobs):
    if name in ("dare", "dare_ties", "della"):
        knobs["generator"] = torch.Generator().manual_seed(seed)
    return merge_methods[name](torch.as_tensor(deltas), torch.as_tensor(weights, dtype=torch.float64), **knobs)


@st.composite
def stacks(draw):
    """Small whole numbers: many ties in magnitude and sign, and zeros."""
    k, m, n = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    values = draw(st.lists(st.integers(-3, 3), min_size=k * m * n, max_size=k * m * n))
    weights = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), min_size=k, max_size=k))
    return torch.tensor(values, dtype=torch.float64).view(k, m, n), weights


@calm
@given(stacks(), st.sampled_from(ENTRYWISE), st.sampled_from([None, 0.01, 0.3, 0.5, 1.0]))
def test_entrywise_methods_are_their_oracles(case, name, density):
    deltas, weights = case
    knobs = {} if density is None or name == "consensus" else {"density": density}
    want = getattr(oracle, name)([d.numpy() for d in deltas], weights, **knobs)
    assert np.allclose(run(name, deltas, weights, **knobs).numpy(), want), (name, knobs)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("seed", range(4))
def test_spectral_methods_are_their_oracles_and_do_not_depend_on_the_basis(name, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    deltas = torch.stack([draw(12, 2) @ draw(2, 9) for _ in range(3)])
    weights = [0.7, 0.2, 0.4]
    got = run(name, deltas, weights)
    assert np.allclose(got, getattr(oracle, name)([d.numpy() for d in deltas], weights), atol=1e-9)
    left, right = torch.linalg.qr(draw(12, 12)).Q, torch.linalg.qr(draw(9, 9)).Q
    assert torch.allclose(run(name, left @ deltas @ right, weights), left @ got @ right, atol=1e-9)


@pytest.mark.parametrize("name", [*SPECTRAL, "slerp", "karcher", "pico", "ctm"])
def test_core_space_gives_what_dense_updates_give(name):
    adapters = [random_adapter(seed, {"layers.0.q": (30, 20, 3)}, 2.0) for seed in (1, 2, 3)]
    one, two = (merge(adapters, name, [0.5, 0.3, 0.4], space=space, rank=9) for space in ("core", "delta"))
    assert np.allclose(delta(one.modules["layers.0.q"]), delta(two.modules["layers.0.q"]), atol=1e-8)


def right_parts(adapters, name):
    """U S and the V_t of ``[D_1 ... D_k] = U S [V_1 ... V_k]``."""
    dense = [delta(one.modules[name]) for one in adapters]
    u, s, vh = np.linalg.svd(np.hstack(dense), full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    return u[:, :rank] * s[:rank], torch.from_numpy(np.stack(np.hsplit(vh[:rank], len(dense))))


@pytest.mark.parametrize("name", ["slerp", "karcher", "cart", "iso_c", "iso_cts", "ctm", "ties"])
@pytest.mark.parametrize("out", [30, 7])  # B of all together independent, or not
def test_knots_runs_a_method_on_the_right_parts(name, out):
    adapters = [random_adapter(seed, {"layers.0.q": (out, 20, 3)}, 2.0) for seed in (1, 2, 3)]
    whole, parts = right_parts(adapters, "layers.0.q")
    want = whole @ run(name, parts, [0.5, 0.3, 0.4]).numpy()
    got = merge(adapters, name, [0.5, 0.3, 0.4], space="knots", rank=9).modules["layers.0.q"]
    assert np.allclose(delta(got), want, atol=1e-8)


def test_why_some_methods_lack_knots():
    """Where the B of all together are independent, right parts are orthonormal and at right angles to each other."""
    adapters = [random_adapter(seed, {"layers.0.q": (30, 20, 3)}, scale) for seed, scale in ((1, 2.0), (2, 0.1))]
    parts = right_parts(adapters, "layers.0.q")[1]
    assert torch.allclose(parts.flatten(1) @ parts.flatten(1).T, 3 * torch.eye(2, dtype=torch.float64))
    for part in parts:
        assert torch.allclose(torch.linalg.svdvals(part)[:3], torch.ones(3, dtype=torch.float64))
    assert run("model_stock", parts, [0.5, 0.5]).norm() < 1e-12
    turned = run("pico", parts, [0.7, 0.3])
    plain = run("linear", parts, [0.7, 0.3])
    assert torch.allclose(turned / turned.norm(), plain / plain.norm())


def test_ties_by_hand_where_peers_disagree():
    """[1, -.8, -.8] weighed [1, .2, .2], nothing trimmed: PEFT -0.16, mergekit 1.0; ours 1.0 times the weights' sum."""
    got = run("ties", torch.tensor([[1.0], [-0.8], [-0.8]]).double(), [1.0, 0.2, 0.2], density=1.0)
    assert torch.allclose(got, torch.tensor([1.4]).double())


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della"])
def test_random_drops_keep_the_expected_share_and_the_expectation(name):
    deltas, knobs = torch.ones(1, 200, 50, dtype=torch.float64), {"density": 0.4}
    runs = [run(name, deltas, [1.0], seed=seed, **knobs) for seed in range(30)]
    shares = [float((one != 0).double().mean()) for one in runs]
    assert abs(np.mean(shares) - 0.4) < 0.01
    if name == "dare":
        assert abs(float(torch.stack(runs).mean()) - 1) < 0.01


def test_della_keeps_large_entries_more_often_and_rescales_each_by_its_chance():
    row = torch.arange(1.0, 6.0, dtype=torch.float64).repeat(4000, 1)[None]
    got = run("della", row, [1.0], density=0.5, epsilon=0.4)
    chance = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7], dtype=torch.float64)
    assert torch.allclose((got != 0).double().mean(0), chance, atol=0.03)
    for column in range(5):
        values = got[:, column].unique()
        assert torch.allclose(values, torch.tensor([0.0, (column + 1) / chance[column]], dtype=torch.float64))
    with pytest.raises(ValueError, match="epsilon"):
        run("della", row, [1.0], density=0.5, epsilon=1.2)


def test_breadcrumbs_loses_no_small_tensor():
    """With gamma * n rounding to 0, or gamma 0, nothing is taken for an outlier."""
    one = torch.ones(1, 8, 8, dtype=torch.float64) * 3
    for gamma in (0.0, 0.001):
        assert torch.equal(run("breadcrumbs", one, [1.0], density=1.0, gamma=gamma), one[0])
    assert run("breadcrumbs", one[:, :1, :1], [1.0], gamma=0.9).item() == 3


def test_sce_elects_by_the_sum_and_weighs_by_energy():
    """Two small votes against one large update: the sum says minus, sums times energies would say plus."""
    got = run("sce", torch.tensor([[10.0, 1.0], [1.0, -2.0], [1.0, 0.5]]).double(), [1 / 3] * 3, density=1.0)
    assert torch.allclose(got, torch.tensor([(1010 + 5 + 1.25) / (101 + 5 + 1.25), -2.0]).double())


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_is_the_sine_formula_and_the_karcher_mean_of_two(t):
    deltas = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = [1 - t, t]
    want = oracle.slerp([d.numpy() for d in deltas], weights)
    for name in ("slerp", "karcher"):
        assert np.allclose(run(name, deltas, weights), want, atol=1e-9)
        assert torch.allclose(run(name, -2 * deltas, weights), -2 * torch.from_numpy(want))


def test_karcher_is_where_the_steps_cancel():
    from loraloom.ops.sphere import log_map

    deltas = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
    weights = [0.1, 0.4, 0.3, 0.2]
    mean = run("karcher", deltas, weights).flatten()
    step = sum(w * log_map(mean / mean.norm(), d.flatten() / d.norm()) for d, w in zip(deltas, weights, strict=True))
    assert step.norm() < 1e-10
    norms = torch.stack([d.norm() for d in deltas])
    assert torch.allclose(mean.norm(), norms @ torch.tensor(weights, dtype=torch.float64))
    with pytest.raises(ValueError, match="negative"):
        run("karcher", deltas, [1.0, -1.0, 0.5, 0.5])


def test_antipodal_directions_fall_back_to_the_line():
    d = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("slerp", "karcher"):
        assert not run(name, torch.stack([d, -d]), [0.5, 0.5]).any()
        assert torch.allclose(run(name, torch.stack([d, 0 * d]), [0.5, 0.5]), d / 2)
        for weights in ([0.7, 0.3], [0.5001, 0.4999]):
            line = (weights[0] - weights[1]) * d
            assert torch.allclose(run(name, torch.stack([d, -d]), weights), line)
            noise = 1e-8 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            assert torch.allclose(run(name, torch.stack([d, noise - d]), weights), line, atol=1e-7)
        assert torch.allclose(run(name, torch.stack([d, d, -d]), [0.4, 0.3, 0.3]), 0.4 * d)
    across = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)  # the mean is opposite to one
    assert torch.allclose(run("slerp", across, [0.2, 0.4, 0.4]), torch.tensor([-0.6, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ["slerp", "karcher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_opposite_adapters_merge_on_the_line_in_every_space(name, dtype):
    one = random_adapter(1, {"layers.0.q": (30, 20, 3)}, 2.0)
    part = one.modules["layers.0.q"]
    part = replace(part, B=part.B.to(dtype), A=part.A.to(dtype))
    pair = [replace(one, modules={"layers.0.q": part.scaled(sign)}) for sign in (1.0, -1.0)]
    for space in ("core", "delta"):
        merged = merge(pair, name, [0.7, 0.3], space=space).modules["layers.0.q"].delta().double()
        want = 0.4 * part.delta().double()
        assert (merged - want).norm() < (0.02 if dtype == torch.bfloat16 else 1e-5) * want.norm()


def test_iso_has_a_flat_spectrum_of_the_true_rank():
    adapters = [random_adapter(seed, {"layers.0.q": (40, 30, 2)}) for seed in (1, 2)]
    s = np.linalg.svd(delta(merge(adapters, "iso_c").modules["layers.0.q"]))[1]
    assert np.allclose(s[:4], s[0]) and np.allclose(s[4:], 0, atol=1e-9)


def in_type(adapter, dtype):
    modules = {name: replace(f, B=f.B.to(dtype), A=f.A.to(dtype)) for name, f in adapter.modules.items()}
    return replace(adapter, modules=modules)


def sum_of(adapters):
    return sum(delta(one.modules["layers.0.q"]) for one in adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("space", ["core", "delta"])
@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("size", [{"rank": 6}, {"energy": 0.5}, {"budget": "0.5x"}])
def test_a_cut_of_a_flat_spectrum_keeps_the_largest_directions_whatever_rounding_says(name, space, size, dtype):
    adapters = [in_type(random_adapter(seed, {"layers.0.q": (40, 30, 4)}), dtype) for seed in (1, 2, 3)]
    merged = merge(adapters, name, [1.0] * 3, space=space, **size)
    cut = delta(merged.modules["layers.0.q"])
    assert merged.provenance["record"]["error"]["layers.0.q"] == pytest.approx(0.5**0.5, rel=1e-3)
    again = delta(merge(adapters, name, [1 + 1e-6, 1 - 1e-6, 1.0], space=space, **size).modules["layers.0.q"])
    assert np.linalg.norm(again - cut) < 0.05 * np.linalg.norm(cut)
    if name == "iso_c":
        u = np.linalg.svd(sum_of(adapters))[0][:, :6]
        assert np.linalg.norm(u.T @ cut) > 0.999 * np.linalg.norm(cut)


def test_a_cut_of_a_flat_spectrum_keeps_the_largest_directions_of_a_large_update():
    adapters = [in_type(random_adapter(seed, {"layers.0.q": (600, 520, 20)}), torch.float32) for seed in (1, 2, 3)]
    cut = delta(merge(adapters, "iso_c", [1.0] * 3, space="delta", rank=20).modules["layers.0.q"])
    u = np.linalg.svd(sum_of(adapters))[0][:, :20]
    assert np.linalg.norm(u.T @ cut) > 0.999 * np.linalg.norm(cut)


def test_cart_keeps_directions_of_equal_size_together():
    """With one A the right parts of KnOTS deviate from their mean by singular values that are equal in pairs."""
    adapters = [random_adapter(seed, {"layers.0.q": (20, 14, 3)}) for seed in (1, 2, 3)]
    a = adapters[0].modules["layers.0.q"].A.float()
    shared = [replace(one, modules={n: replace(f, A=a.double()) for n, f in one.modules.items()}) for one in adapters]
    merged = (
        merge([in_type(one, dtype) for one in shared], "cart", [0.5, 0.3, 0.2], space="knots")
        for dtype in (torch.float32, torch.float64)
    )
    single, double = (delta(one.modules["layers.0.q"]) for one in merged)
    assert np.linalg.norm(single - double) < 1e-4 * np.linalg.norm(double)


def test_ctm_has_the_rank_of_one_adapter_by_construction():
    adapters = [random_adapter(seed, {"layers.0.q": (40, 30, 3)}) for seed in (1, 2, 3)]
    for knobs in ({}, {"inner": "ties", "density": None}):
        made = merge(adapters, "ctm", **{key: value for key, value in knobs.items() if value is not None})
        assert made.shape("layers.0.q").rank == 3
        assert made.provenance["record"]["error"] == {} and made.modules["layers.0.q"].norm() > 0
        assert made.provenance["record"]["error"]["layers.0.q"] < 1e-9  # nothing was cut afterwards
    shared = merge([adapters[0], adapters[0]], "ctm", [0.3, 0.7])
    assert np.allclose(delta(shared.modules["layers.0.q"]), delta(adapters[0].modules["layers.0.q"]))


@pytest.mark.parametrize("seed", range(3))
def test_pico_is_the_published_calibration_where_factors_are_orthonormal(seed):
    """With A_t of orthonormal rows the directions of ``[B_1 ... B_k]`` are those of the updates."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    b, a = [draw(10, 2) + draw(10, 1) for _ in range(3)], [torch.linalg.qr(draw(8, 2)).Q.T for _ in range(3)]
    deltas, mean = torch.stack([x @ y for x, y in zip(b, a, strict=True)]), [1 / 3] * 3
    want = oracle.pico([x.numpy() for x in b], [y.numpy() for y in a])
    assert np.allclose(run("pico", deltas, mean), want)
    size = float(deltas.flatten(1).norm(dim=1).mean())
    assert run("pico", deltas, mean).norm() == pytest.approx(size)
    plain = run("linear", deltas, mean)
    assert torch.allclose(run("pico", deltas, mean, strength=0.0), plain * size / plain.norm())


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_ctm_keeps_the_most_of_the_evened_updates(beta):
    """No turn of U or V, and no other start, keeps more; it is well above what the plain singular vectors keep."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)[:, None, None]
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    deltas = torch.stack([draw(12, 3) @ draw(3, 9) for _ in range(3)]) * sizes
    norms = deltas.flatten(1).norm(dim=1)
    aims = deltas * ((beta * norms + (1 - beta) * norms.mean()) / norms)[:, None, None]
    energy = lambda u, v: float((u.T @ aims @ v).square().sum())  # noqa: E731
    got = torch.linalg.svd(run("ctm", deltas, [1.0, 0.3, 2.0], beta=beta))
    u, v = got.U[:, :3], got.Vh[:3].T
    assert got.S[3] < 1e-9 * got.S[0]
    kept = energy(u, v)
    best_u = torch.linalg.svd(torch.cat(list(aims @ v), dim=1)).U[:, :3]
    best_v = torch.linalg.svd(torch.cat(list(aims.mT @ u), dim=1)).U[:, :3]
    assert energy(best_u, v) <= kept * (1 + 1e-5) and energy(u, best_v) <= kept * (1 + 1e-5)
    plain = torch.linalg.svd(torch.cat(list(deltas), dim=1)).U[:, :3], torch.linalg.svd(deltas.flatten(0, 1)).Vh[:3].T
    assert kept > energy(*plain) * (1 if beta == 1 else 1.02)


def test_lego_gives_back_clusters_that_are_there():
    generator = torch.Generator().manual_seed(0)
    units = 5 * torch.randn(3, 12, generator=generator, dtype=torch.float64)
    deltas = torch.stack([units[torch.randperm(3, generator=generator)] for _ in range(4)])
    noisy = deltas + 0.01 * torch.randn(deltas.shape, generator=generator, dtype=torch.float64)
    got = run("lego", noisy, [0.25] * 4)
    assert got.shape == (3, 12)
    assert torch.cdist(got, units).min(dim=1).values.max() < 0.05
    assert run("lego", noisy, [0.25] * 4, clusters=7).shape == (7, 12)
    assert not run("lego", 0 * noisy, [0.25] * 4).any()


def test_lego_brings_centroids_to_the_largest_entries_and_the_update_to_its_rank():
    """Two adapters of two units: one cluster of three units and one of one; then as many clusters as units."""
    deltas = torch.tensor([[[4.0, 0.0, 3.0], [0.0, 2.0, 0.0]], [[4.0, 1.0, 0.0], [3.0, 0.0, 0.0]]]).double()
    mean = torch.tensor([11.0, 1.0, 3.0]).double() / 3
    want = torch.stack([mean * (11 / 3) / mean.max(), deltas[0, 1]])
    assert torch.allclose(run("lego", deltas, [0.5, 0.5]), want)
    assert torch.allclose(run("lego", deltas, [0.5, 0.5], clusters=4), deltas.flatten(0, 1) * 0.5**0.25)


@pytest.mark.parametrize("name", ["dare", "fisher", "lego", "nothing"])
def test_what_cannot_run_inside_another_method(name):
    with pytest.raises(ValueError, match=name):
        inner_method(name)


# ---- selection ----


@calm
@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_selection_is_sorting(seed, share, dtype):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(37, 11, generator=generator).to(dtype)
    if seed % 3 == 0:
        values = (values * 2).round()  # many ties
    if seed % 5 == 0:
        values[values.abs() < 1] = 0
    count = round(share * values.numel())
    want = oracle.kept(values.double().numpy(), count)
    assert np.array_equal(largest(values, count).numpy(), want)


def test_selection_on_a_large_tensor_and_when_the_sample_misleads(monkeypatch):
    from loraloom.ops import products, select

    monkeypatch.setattr(products, "_BLOCK", 10_000)
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    order = values.abs().sort(descending=True).values
    for count in (1, 2, 150_000, 299_999, 300_000):
        assert threshold(values, count) == order[count - 1]
    step = (300_000 // select._SAMPLE) | 1
    values[::step] = 100.0 + torch.arange(len(values[::step]))  # what is looked at is nothing like the rest
    order = values.abs().sort(descending=True).values
    for count in (5, 100_000, 250_000):
        assert threshold(values, count) == order[count - 1]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            threshold(torch.tensor([1.0, bad]), 1)
    with pytest.raises(ValueError, match="from 1 to 2"):
        threshold(torch.ones(2), 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 4, 7, 40])
def test_blocks_keep_what_the_whole_keeps(dtype, width):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (40,), generator=generator).to(dtype) * 1e-3  # many ties, many zeros
    for count in range(41):
        found = cutoff(values, count)
        want = torch.where(found.mask(values), values, 0.0)
        assert (found.mask(values).sum(), int((want != 0).sum())) == (count, min(count, int((values != 0).sum())))
        blocks = [found.kept(block, start * width) for start, block in enumerate(values.split(width))]
        assert torch.equal(torch.cat(blocks), want)
