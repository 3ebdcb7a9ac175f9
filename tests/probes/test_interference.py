"""Interference and geometry: against dense float64 oracles, on planted angles, and free of the gauge."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orth, subspace_angles

import loraloom as ll
from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.masks import Mask, support
from loraloom.probes.interference import Interference
from loraloom.probing import interference_report_of
from oracles.ops_dense import delta, random_adapter, random_factors

SIZES = {"layers.0.q": (9, 7, 3), "layers.0.v": (6, 7, 2), "layers.1.q": (9, 7, 3)}


def one_module(*parts: Factors) -> list[Adapter]:
    return [Adapter({"peft_type": "LORA"}, {"fc": part}) for part in parts]


def dense(adapters: list[Adapter], name: str) -> list[np.ndarray]:
    like = next(delta(a.modules[name]) for a in adapters if name in a.modules)
    return [delta(a.modules[name]) if name in a.modules else np.zeros_like(like) for a in adapters]


def flat(adapters: list[Adapter], names: list[str]) -> np.ndarray:
    return np.stack(
        [np.concatenate([dense(adapters, name)[at].ravel() for name in names]) for at in range(len(adapters))]
    )


def dense_interference(deltas: list[np.ndarray]) -> tuple[float, float]:
    """The paper's formula with the singular vectors of dense matrices; and the sum of singular values."""
    triples = []
    for each in deltas:
        u, s, vh = np.linalg.svd(each, full_matrices=False)
        kept = s > 1e-10 * s[0]
        triples.append((u[:, kept], s[kept], vh[kept]))
    u, s, v = (
        np.hstack([t[0] for t in triples]),
        np.concatenate([t[1] for t in triples]),
        np.vstack([t[2] for t in triples]),
    )
    one = np.eye(len(s))
    return float(np.abs((u.T @ u - one) @ np.diag(s) @ (v @ v.T - one)).sum()), float(s.sum())


def inside(one: np.ndarray, others: list[np.ndarray]) -> float:
    left, right = orth(np.hstack(others)), orth(np.hstack([other.T for other in others]))
    return float(np.linalg.norm(left.T @ one @ right) ** 2 / np.linalg.norm(one) ** 2)


def compare(found: Interference, adapters: list[Adapter], names: list[str]) -> None:
    vectors = flat(adapters, names)
    norms = np.linalg.norm(vectors, axis=1)
    assert np.allclose(found.norms, norms)
    assert np.allclose(found.cosine, vectors @ vectors.T / np.outer(norms, norms))
    assert np.allclose(found.distance, np.linalg.norm(vectors[:, None] - vectors, axis=2), atol=1e-12)
    for i, j in combinations(range(len(adapters)), 2):
        a, b = vectors[i], vectors[j]
        both = a * b != 0
        assert found.sign_conflict[i][j] == found.sign_conflict[j][i] == np.mean((a * b < 0)[both])
        weight = np.abs(a * b)
        assert found.sign_conflict_weighted[j][i] == pytest.approx(weight[a * b < 0].sum() / weight.sum())


def test_every_number_is_that_of_dense_matrices():
    adapters = [random_adapter(seed, SIZES, scale=0.5 + seed) for seed in range(3)]
    found = ll.interference(adapters)
    assert list(found.modules) == list(SIZES)
    compare(found, adapters, list(SIZES))
    raw = dict.fromkeys(combinations(range(3), 2), 0.0)
    sums = dict.fromkeys(raw, 0.0)
    energy = np.zeros((3, 3))
    for name, module in found.modules.items():
        deltas = dense(adapters, name)
        compare(module, adapters, [name])
        assert module.tsv_all == pytest.approx(dense_interference(deltas)[0])
        for i, j in raw:
            value, nuclear = dense_interference([deltas[i], deltas[j]])
            assert module.tsv[i][j] == module.tsv[j][i] == pytest.approx(value / nuclear)
            raw[i, j] += value
            sums[i, j] += nuclear
            for turned, space in ((lambda d: d, "columns"), (lambda d: d.T, "rows")):
                expected = sorted(subspace_angles(orth(turned(deltas[i])), orth(turned(deltas[j]))))
                assert getattr(module.angles, space)[j][i] == pytest.approx(expected, abs=1e-7)
                assert getattr(module.grassmann, space)[i][j] == pytest.approx(np.linalg.norm(expected), abs=1e-7)
        for i in range(3):
            others = [each for at, each in enumerate(deltas) if at != i]
            assert module.core_rest[i] == pytest.approx(inside(deltas[i], others))
            for j in range(3):
                share = inside(deltas[i], [deltas[j]])
                assert module.core[i][j] == pytest.approx(share)
                energy[i, j] += share * np.linalg.norm(deltas[i]) ** 2
    for (i, j), value in raw.items():
        assert found.tsv[i][j] == pytest.approx(value / sums[i, j])
        every = sorted(angle for module in found.modules.values() for angle in module.angles.columns[i][j])
        assert found.angles.columns[i][j] == pytest.approx(every)
        assert found.grassmann.columns[i][j] == pytest.approx(np.linalg.norm(every))
    assert np.allclose(found.core, energy / np.square(found.norms)[:, None])
    assert found.tsv_all == pytest.approx(sum(module.tsv_all for module in found.modules.values()))


def test_planted_angles_down_to_the_last_digits():
    """Column spaces turned against each other by known angles, row spaces the same."""
    planted = torch.tensor([1e-9, 0.4, math.pi / 2 - 1e-9], dtype=torch.float64)
    basis = torch.linalg.qr(random_factors(0, 12, 12, 6).delta().double() + torch.eye(12)).Q[:, :6]
    first, away = basis[:, :3], basis[:, 3:]
    a = random_factors(1, 5, 5, 3).A
    turned = first * planted.cos() + away * planted.sin()
    mix = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -3.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    found = ll.interference(one_module(Factors(B=first, A=a), Factors(B=turned @ mix, A=a)))
    assert found.angles.columns[0][1] == pytest.approx(planted.tolist(), rel=0, abs=1e-13)
    assert found.grassmann.columns[1][0] == pytest.approx(float(planted.norm()))
    assert max(found.angles.rows[0][1]) < 1e-14
    assert found.grassmann.columns[0][0] == 0.0 and found.angles.columns[0][0] == ()


def test_the_same_update_twice_whatever_its_factors():
    part = random_factors(3, 8, 6, 2, scale=2.0)
    other = replace(part, B=part.B @ part.B.new_tensor([[1.0, 100.0], [0.0, 1.0]]) * 2, scale=1.0)
    other = replace(other, A=torch.linalg.solve(part.B.new_tensor([[1.0, 100.0], [0.0, 1.0]]), part.A))
    found = ll.interference(one_module(part, other))
    assert found.cosine[0][1] == pytest.approx(1.0)
    assert found.distance[0][1] == pytest.approx(0.0, abs=1e-11)
    assert max(*found.angles.columns[0][1], *found.angles.rows[0][1]) < 1e-12
    assert found.tsv[0][1] == pytest.approx(1.0) and found.sign_conflict[0][1] == 0.0
    assert found.core[0] == pytest.approx((1.0, 1.0)) and found.core_rest == pytest.approx((1.0, 1.0))


def test_opposite_and_orthogonal_updates():
    part = random_factors(4, 8, 6, 2)
    found = ll.interference(one_module(part, part.scaled(-0.5)))
    assert found.cosine[0][1] == pytest.approx(-1.0)
    assert found.sign_conflict[0][1] == found.sign_conflict_weighted[0][1] == 1.0
    assert found.sign_conflict[0][0] == 0.0
    eye = torch.eye(6, dtype=torch.float64)
    apart = ll.interference(one_module(Factors(B=eye[:, :2], A=eye[:2]), Factors(B=eye[:, 2:4], A=eye[2:4])))
    assert apart.cosine[0][1] == 0.0 and apart.tsv[0][1] == 0.0 and apart.core[0][1] == 0.0
    assert apart.angles.columns[0][1] == apart.angles.rows[0][1] == pytest.approx((math.pi / 2,) * 2)
    assert apart.grassmann.rows[0][1] == pytest.approx(math.pi / 2 * math.sqrt(2))
    assert apart.sign_conflict[0][1] is None  # no entry that both have


def test_interference_is_above_1_where_spaces_are_shared_but_vectors_turned():
    """Two updates of equal singular values in one plane, turned by 45 degrees: each vector meets two of the other's."""
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double() / math.sqrt(2)
    values = torch.diag(torch.tensor([2.0, 1.0])).double()
    a = Factors(B=torch.eye(3, 2).double(), A=values @ torch.eye(2, 3).double())
    b = Factors(B=torch.eye(3, 2).double() @ turn, A=values @ turn.T @ torch.eye(2, 3).double())
    found = ll.interference(one_module(a, b))
    assert found.tsv[0][1] > 1.05
    assert found.grassmann.columns[0][1] == pytest.approx(0, abs=1e-6)


def test_ranks_that_differ_and_factors_of_less_rank():
    """The angles are those of the smaller space; columns of B that A does not reach do not count."""
    wide = random_factors(5, 9, 8, 4)
    narrow = replace(wide, B=wide.B[:, :2], A=wide.A[:2])
    found = ll.interference(one_module(wide, narrow))
    assert found.angles.columns[0][1] == pytest.approx((0.0, 0.0), abs=1e-12)
    assert found.grassmann.rows[0][1] == pytest.approx(0.0, abs=1e-12)
    assert found.core[1][0] == pytest.approx(1.0) and found.core[0][1] < 0.9
    mute = replace(wide, A=torch.cat([wide.A[:1], 2 * wide.A[:1], torch.zeros_like(wide.A[:2])]))
    assert len(ll.interference(one_module(wide, mute)).angles.columns[0][1]) == 1
    for dtype in (torch.float32, torch.bfloat16):  # rounding must not pass for a direction
        stored = replace(wide, B=wide.B[:, :3].to(dtype), A=wide.A[[0, 1, 0]].to(dtype))
        assert len(ll.interference(one_module(stored, stored)).angles.columns[0][1]) == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 4), st.floats(-3, 3))
def test_the_gauge_does_not_matter(seed, r, s, exponent):
    first, second = random_factors(seed, 9, 7, r), random_factors(seed + 1, 9, 7, s, scale=0.3)
    turn = random_factors(seed + 2, s, s, s).delta() + 3 * torch.eye(s, dtype=torch.float64)
    turn = turn * 10.0**exponent
    other = replace(second, B=second.B @ turn, A=torch.linalg.solve(turn, second.A))
    plain, turned = (ll.interference(one_module(first, part)) for part in (second, other))
    for name in ("norms", "cosine", "distance", "tsv", "core", "sign_conflict", "sign_conflict_weighted"):
        assert np.allclose(getattr(plain, name), getattr(turned, name), atol=1e-6), name
    for space in ("columns", "rows"):
        assert getattr(plain.angles, space)[0][1] == pytest.approx(getattr(turned.angles, space)[0][1], abs=1e-6)


def test_an_adapter_without_the_module_or_with_a_zero_update():
    a, b = random_adapter(0, SIZES), random_adapter(1, {"layers.0.q": SIZES["layers.0.q"]})
    found = ll.interference([a, b])
    compare(found, [a, b], list(SIZES))
    alone = found.modules["layers.0.v"]
    assert alone.cosine == ((1.0, 0.0), (0.0, 0.0)) and alone.norms[1] == 0.0
    assert alone.angles.columns[0][1] == () and alone.grassmann.columns[0][1] is None
    assert alone.sign_conflict[0][1] is None and alone.tsv[0][1] == 0.0
    assert alone.core == ((pytest.approx(1.0), 0.0), (None, None)) and alone.core_rest == (0.0, None)
    three = ll.interference([b, a, Adapter(b.config, {"layers.1.q": a.modules["layers.1.q"]})])
    assert three.modules["layers.0.v"].core_rest == (None, 0.0, None)  # nothing else is there
    assert three.modules["layers.1.q"].core_rest == (None, pytest.approx(1.0), pytest.approx(1.0))
    zero = random_factors(0, 4, 4, 2)
    both = ll.interference(one_module(*[replace(zero, B=torch.zeros_like(zero.B))] * 2))
    assert both.tsv[0][1] is None and both.cosine == ((0.0, 0.0), (0.0, 0.0)) and both.core[0] == (None, None)


def test_signs_of_a_module_in_many_blocks_and_of_tiny_updates():
    parts = [random_factors(seed, 700, 800, 2) for seed in (0, 1)]
    small = [replace(part, B=part.B.float() * 1e-25, A=part.A.float()) for part in parts]
    for some in (parts, small):
        a, b = (delta(part) for part in some)
        found = ll.interference(one_module(*some))
        assert found.sign_conflict[0][1] == pytest.approx(np.mean(np.sign(a) != np.sign(b)), abs=1e-4)
        weight = np.abs(a * b)
        expected = weight[np.sign(a) != np.sign(b)].sum() / weight.sum()
        assert found.sign_conflict_weighted[0][1] == pytest.approx(expected, rel=1e-5)
    skipped = ll.interference(one_module(*parts), entries=False)
    assert skipped.sign_conflict is None and skipped.sign_conflict_weighted is None
    assert skipped.cosine == ll.interference(one_module(*parts)).cosine


def test_masks_overlap_as_masks_do():
    adapters = []
    for seed in range(2):
        adapter = random_adapter(seed, SIZES)
        keep = {
            name: torch.rand(f.B.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
            for name, f in adapter.modules.items()
        }
        adapters.append(replace(adapter, modules={n: replace(f, B=f.B * keep[n]) for n, f in adapter.modules.items()}))
    masks = [support(adapter) for adapter in adapters]
    found = ll.interference(adapters)
    assert found.mask_overlap[0][1] == pytest.approx(masks[0].overlap(masks[1]))
    assert found.mask_overlap[1][0] == pytest.approx(masks[1].overlap(masks[0]))
    own = {name: int((masks[0][name] & masks[1][name]).sum()) / masks[0].count(name) for name in SIZES}
    assert {name: module.mask_overlap[0][1] for name, module in found.modules.items()} == pytest.approx(own)
    given_ = ll.interference(
        adapters, masks=[Mask.of({n: torch.ones(SIZES[n][0], SIZES[n][2]) > 0 for n in SIZES}), None]
    )
    assert given_.mask_overlap[1][0] == 1.0 and given_.mask_overlap[0][1] == pytest.approx(masks[1].density)
    assert ll.interference([random_adapter(0, SIZES), random_adapter(1, SIZES)]).mask_overlap is None
    longer = random_adapter(2, {"layers.0.q": (9, 7, 5)})  # entries of another rank are other entries
    assert ll.interference([adapters[0], longer]).mask_overlap[0][1] is None


def test_experts_are_compared_one_by_one_and_their_masks_as_they_are_stored():
    sizes = {"mlp[0/2]": (6, 5, 2), "mlp[1/2]": (6, 5, 2)}
    adapters = []
    for seed in range(2):
        modules = random_adapter(seed, sizes).modules
        part = modules["mlp[1/2]"]
        adapters.append(Adapter({}, {**modules, "mlp[1/2]": replace(part, B=part.B * (part.B > 0))}))
    found = ll.interference(adapters)
    compare(found, adapters, list(sizes))
    masks = [support(adapter) for adapter in adapters]
    assert found.mask_overlap[0][1] == pytest.approx(masks[0].overlap(masks[1]))
    assert found.modules["mlp[1/2]"].mask_overlap is None


def test_kinds_are_told_and_what_cannot_be_compared_is_refused():
    a, b = random_adapter(0, SIZES), random_adapter(1, SIZES)
    for probe in (ll.interference, ll.geometry):
        with pytest.raises(ValueError, match="at least two are needed, got 1"):
            probe([a])
        with pytest.raises(AdapterMismatch, match=r"layers\.0\.q: updates of sizes \(9, 7\) and \(9, 8\) cannot"):
            probe([a, random_adapter(1, {"layers.0.q": (9, 8, 3)})])
        with pytest.raises(AdapterMismatch, match="different kinds"):
            probe([a, replace(b, config={**b.config, "use_dora": True})])
        with pytest.raises(AdapterMismatch, match="base model 'org/base', adapter 2 of 2 of 'org/other'"):
            probe([a, replace(b, config={**b.config, "base_model_name_or_path": "org/other"})])
        with pytest.raises(UnsupportedKind, match="cannot compare an adapter with init_lora_weights='pissa'"):
            probe([a, replace(b, config={**b.config, "init_lora_weights": "pissa"})])
        with pytest.raises(UnsupportedKind, match="cannot compare adapters of kind 'loha'"):
            probe([replace(each, config={**each.config, "peft_type": "LOHA"}) for each in (a, b)])
        with pytest.raises(ValueError, match="adapter 2 of 2 has no module"):
            probe([a, replace(b, modules={})])
        bad = {**b.modules, "layers.0.v": replace(b.modules["layers.0.v"], B=torch.full((6, 2), math.nan))}
        with pytest.raises(ValueError, match=r"layers\.0\.v: adapter 2 of 2 has NaN or infinite entries"):
            probe([a, replace(b, modules=bad)])
        kernels = [replace(random_factors(0, 4, 9, 2), kernel=kernel) for kernel in ((1, 3, 3), (3, 3))]
        with pytest.raises(AdapterMismatch, match=r"fc: kernels of sizes \(1, 3, 3\) and \(3, 3\)"):
            probe(one_module(*kernels))
    with pytest.raises(ValueError, match="1 masks for 2 adapters"):
        ll.interference([a, b], masks=[None])
    kept = {"layers.0.q": torch.ones(9, 2, dtype=torch.bool)}
    with pytest.raises(AdapterMismatch, match=r"layers\.0\.q: the mask is of 9 x 2, adapter 1 of 2 has a B of 9 x 3"):
        ll.interference([a, b], masks=[Mask.of(kept), None])
    with pytest.raises(AdapterMismatch, match="fc: the mask is of 9 x 2, adapter 2 of 2 has no such module"):
        ll.interference([a, b], masks=[None, Mask.of({"fc": kept["layers.0.q"]})])
    doras = [replace(each, config={**each.config, "use_dora": True}) for each in (a, b)]
    assert ll.interference(doras).kind == "dora" and ll.interference(doras).cosine == ll.interference([a, b]).cosine


def test_moka_is_compared_by_modality():
    plan = {"modalities": {"image": 1}, "rank": 2}
    config = {"peft_type": "MOKA", "moka": plan, "r": 2}
    sizes = {"q[text]": (6, 5, 2), "q[image]": (6, 5, 2)}
    adapters = []
    for seed in range(2):
        made = random_adapter(seed, sizes).modules
        shared = made["q[text]"].B
        adapters.append(Adapter(config, {name: replace(part, B=shared) for name, part in made.items()}))
    found = ll.interference(adapters)
    assert found.kind == "moka" and list(found.modules) == list(sizes)
    compare(found, adapters, list(sizes))


def test_json_holds_every_number_once():
    found = ll.interference([random_adapter(seed, SIZES) for seed in range(3)])
    told = found.to_json()
    assert told["cosine"] == [list(row) for row in found.cosine] and told["kind"] == "lora"
    assert told["grassmann"]["rows"][0][1] == found.grassmann.rows[0][1]
    assert "angles" not in told and "modules" not in told["modules"]["layers.0.q"]
    angles = told["modules"]["layers.0.q"]["angles"]
    assert [each["pair"] for each in angles] == [[0, 1], [0, 2], [1, 2]]
    assert angles[1]["rows"] == list(found.modules["layers.0.q"].angles.rows[0][2])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 999))
def test_the_geometry_is_that_of_dense_vectors(k, seed):
    adapters = [random_adapter(seed + at, SIZES if at else {"layers.0.q": (9, 7, 3)}, scale=1.5) for at in range(k)]
    found = ll.geometry(adapters)
    vectors = flat(adapters, list(SIZES))
    assert np.allclose(found.distance, np.linalg.norm(vectors[:, None] - vectors, axis=2), atol=1e-6)
    assert np.allclose(found.cosine, ll.interference(adapters, entries=False).cosine)
    middle = vectors - vectors.mean(axis=0)
    u, s, _ = np.linalg.svd(middle, full_matrices=False)
    axes = min(2, k - 1)
    assert np.allclose(found.explained, s[:axes] ** 2 / (s**2).sum())
    assert np.allclose(np.abs(found.positions), np.abs(u[:, :axes] * s[:axes]), atol=1e-6)
    for axis in np.array(found.positions).T:
        assert axis[np.abs(axis).argmax()] > 0
    if k <= 3:  # a plane holds them all
        places = np.array(found.positions)
        assert np.allclose(np.linalg.norm(places[:, None] - places, axis=2), found.distance, atol=1e-6)


def test_the_geometry_of_equal_adapters():
    one = random_adapter(0, SIZES)
    found = ll.geometry([one, one, one])
    assert found.explained == (0.0, 0.0) and set(map(tuple, found.positions)) == {(0.0, 0.0)}
    assert max(max(row) for row in found.distance) < 1e-6
    assert found.to_json()["cosine"][0] == pytest.approx([1.0, 1.0, 1.0])


def test_the_geometry_of_an_update_that_cancels_in_its_factors():
    draw = torch.Generator().manual_seed(0)
    b, a, turn = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((37, 4), (4, 53), (4, 4)))
    turn = torch.linalg.qr(turn).Q
    nothing = Factors(B=torch.cat([b, -b @ turn], dim=1), A=torch.cat([a, turn.T @ a]))
    for scale in range(1, 20):  # what rounding leaves is of either sign
        found = ll.geometry(one_module(Factors(B=b, A=a), nothing.scaled(scale)))
        assert 0 <= found.norms[1] < 1e-4 and found.distance[0][1] == pytest.approx(found.norms[0])


def rank_one(column: list[float], row: list[float], scale: float = 1.0) -> Factors:
    return Factors(B=torch.tensor(column)[:, None], A=torch.tensor(row)[None], scale=scale)


def test_the_summary_names_the_worst_module_of_the_pair_that_it_names() -> None:
    """a and b interfere most, in layer 0; b and c are the same in a module that hardly counts."""
    near, one, other = [0.8, 0.6], [1.0, 0.0], [0.0, 1.0]
    adapters = [
        Adapter({}, {"layers.0.q": rank_one(one, one, 9.0), "layers.1.q": rank_one(other, other)}),
        Adapter({}, {"layers.0.q": rank_one(near, one, 9.0), "layers.1.q": rank_one(one, one)}),
        Adapter({}, {"layers.0.q": rank_one(other, other, 9.0), "layers.1.q": rank_one(one, one)}),
    ]
    report = interference_report_of(ll.interference(adapters), ["a", "b", "c"])
    assert report.summary.startswith("Of 3 pairs a | b interfere most: ")
    assert report.summary.endswith("; worst in layers.0.q.")
    rows = next(panel for panel in report.panels if panel.title.startswith("The worst module")).rows
    assert [row[:3] for row in rows] == [("layers.0", "layers.0.q", "a | b"), ("layers.1", "layers.1.q", "b | c")]


def test_figures_of_one_pair_are_written_each_for_itself() -> None:
    """A distance of 718.4 beside a cosine of -0.003 must not make it -0.0."""
    a = Adapter({}, {"fc": rank_one([1.0, 0.0], [1.0, 0.0], 500.0)})
    b = Adapter({}, {"fc": rank_one([-0.003, 1.0], [1.0, 0.0], 500.0)})
    page = interference_report_of(ll.interference([a, b]), ["a", "b"]).to_markdown()
    assert "| distance | 708.2 |" in page and "| cosine | -0.003 |" in page and "| column angle | 89.83 |" in page
