"""RegMean and Fisher merging against least squares on the inputs themselves and entry by entry."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped

from loraloom.adapter import Adapter
from loraloom.ops.merge import merge
from loraloom.ops.merge_methods.fisher import fisher
from loraloom.ops.merge_methods.regmean import regmean
from oracles.data_methods import by_information, grams, inputs, regression
from oracles.ops_dense import delta, random_adapter

SIZES = {"layers.0.q": (6, 5, 2), "layers.1.fc": (7, 4, 3)}
WEIGHTS = [0.5, 0.2, 0.3]
DELTAS = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
INFORMATION = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
METHODS = {"regmean": (regmean, grams(inputs(1, 40, 5, 3))), "fisher": (fisher, INFORMATION)}


def weighted(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, -0.5, 2.0], [1.0, 0.0, 0.0]])
def test_regmean_is_the_regression_on_the_inputs(alpha, weights):
    data = inputs(1, 40, 5, 3)
    found = regmean(DELTAS, weighted(weights), alpha=alpha, statistics=grams(data))
    expected = torch.from_numpy(regression(DELTAS, weights, data, alpha))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - sum(w * d for w, d in zip(weights, DELTAS, strict=True))).abs().max() > 0.1 or weights[1] == 0


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_inputs_that_no_task_has_seen_take_the_mean(alpha):
    data = inputs(2, 40, 5, 3)
    for x in data:
        x[:, 3] = 0.0  # dead
        x[:, 4] = x[:, 0]  # the same input twice: only their sum is told, at alpha 1
    data[1][:, 2] = 0.0
    found = regmean(DELTAS, weighted(WEIGHTS), alpha=alpha, statistics=grams(data))
    expected = torch.from_numpy(regression(DELTAS, WEIGHTS, data, alpha))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mean = torch.tensordot(weighted(WEIGHTS), DELTAS, 1)
    torch.testing.assert_close(found[:, 3], mean[:, 3])
    nothing = regmean(DELTAS, weighted(WEIGHTS), alpha=alpha, statistics=torch.zeros(3, 5, 5, dtype=torch.float64))
    torch.testing.assert_close(nothing, mean)


def test_fewer_rows_than_inputs_in_32_bits():
    """Rounding makes such a Gram matrix indefinite; what was seen is honoured all the same."""
    data = [x + 5.0 for x in inputs(3, 2, 1024, 2)]
    known = grams(data).float()
    assert torch.linalg.eigvalsh(known.double().sum(dim=0))[0] < -1e-6 * known.diagonal(dim1=1, dim2=2).mean()
    deltas = torch.randn(2, 3, 1024, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = regmean(deltas.float(), torch.tensor([0.5, 0.5]), alpha=1.0, statistics=known)
    for x, delta_ in zip(map(torch.from_numpy, data), deltas, strict=True):  # 4 rows in all, 1024 columns: all are met
        assert (x @ (found.double() - delta_).T).norm() < 0.02 * (x @ delta_.T).norm()
    assert found.norm() < 2 * deltas.norm()


def test_a_diagonal_alone_is_the_gram_matrix_without_the_rest():
    full = METHODS["regmean"][1]
    diagonal = full.diagonal(dim1=1, dim2=2)
    found = regmean(DELTAS, weighted(WEIGHTS), statistics=diagonal)
    torch.testing.assert_close(found, regmean(DELTAS, weighted(WEIGHTS), alpha=0.0, statistics=full))


def test_knots_is_the_same_as_delta():
    adapters = [random_adapter(seed, SIZES, 2.0) for seed in (1, 2, 3)]
    known = [{n: torch.from_numpy(g) for n, g in gram.items()} for gram in map(_gram, range(3))]
    found, dense = (merge(adapters, "regmean", WEIGHTS, space=space, statistics=known) for space in ("knots", "delta"))
    for at, name in enumerate(SIZES):
        assert found.modules[name].rank == min(3 * SIZES[name][2], *SIZES[name][:2])
        data = [inputs(10 * task + at, 30, SIZES[name][1], 1)[0] for task in range(3)]
        deltas = torch.stack([torch.from_numpy(delta(a.modules[name])) for a in adapters])
        expected = torch.from_numpy(regression(deltas, WEIGHTS, data, 0.9))
        torch.testing.assert_close(found.modules[name].delta(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dense.modules[name].delta(), expected, rtol=1e-4, atol=1e-4)
    assert merge(adapters, "regmean", statistics=known).provenance["arguments"]["space"] == "knots"


def _gram(task):
    return {
        name: grams(inputs(10 * task + at, 30, size[1], 1))[0].numpy() for at, (name, size) in enumerate(SIZES.items())
    }


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, -0.5, 2.0], [1.0, 0.0, 0.0]])
def test_fisher_is_the_weighted_mean_of_every_entry(weights):
    information = INFORMATION.clone()
    information[:, 2] = 0.0  # nobody knows of a row
    information[1:, 3] = 0.0  # one alone does
    expected = by_information(DELTAS, weights, information)
    found = fisher(DELTAS, weighted(weights), floor=1e-12, statistics=information)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    tiny = fisher(DELTAS, weighted(weights), statistics=1e-12 * information)  # the floor is relative
    torch.testing.assert_close(tiny, expected, rtol=1e-3, atol=1e-4)
    none = fisher(DELTAS, weighted(weights), statistics=torch.zeros_like(DELTAS))
    torch.testing.assert_close(none, torch.tensordot(weighted(weights), DELTAS, 1))
    if all(weights):
        high = fisher(DELTAS, weighted(weights), floor=10.0, statistics=information)
        assert not torch.allclose(high, expected, rtol=0.1)


def test_fisher_in_factors_takes_b_and_a_apart():
    adapters = [random_adapter(seed, SIZES, 4.0) for seed in (1, 2)]
    generator = torch.Generator().manual_seed(5)
    known = [
        {n: torch.rand((out + in_) * r, generator=generator, dtype=torch.float64) for n, (out, in_, r) in SIZES.items()}
        for _ in adapters
    ]
    merged = merge(adapters, "fisher", [0.25, 0.75], statistics=known)
    for name, (out, _, rank) in SIZES.items():
        cut = out * rank
        for part, at in (("B", slice(cut)), ("A", slice(cut, None))):
            stack = torch.stack([getattr(a.modules[name], part) for a in adapters])
            information = torch.stack([one[name][at] for one in known]).view_as(stack)
            expected = by_information(stack, [0.25, 0.75], information)
            torch.testing.assert_close(getattr(merged.modules[name], part), expected, rtol=1e-4, atol=1e-4)
        assert merged.modules[name].scale == 4.0


# ---- the laws of the contract, with statistics ----


@pytest.mark.parametrize("name", METHODS)
def test_laws(name):
    method, known = METHODS[name]
    deltas, weights, given = DELTAS.clone(), weighted(WEIGHTS), known.clone()
    result = jaxtyped(typechecker=beartype)(method)(deltas, weights, statistics=given)
    assert torch.equal(deltas, DELTAS) and torch.equal(given, known) and torch.equal(weights, weighted(WEIGHTS))
    assert result.shape == DELTAS.shape[1:] and result.dtype == DELTAS.dtype
    turned = torch.tensor([2, 0, 1])
    assert torch.allclose(method(DELTAS[turned], weights[turned], statistics=known[turned]), result)
    assert torch.allclose(method(DELTAS, 2 * weights, statistics=known), 2 * result)
    assert torch.equal(method(DELTAS[:1], weighted([1.0]), statistics=known[:1]), DELTAS[0])
    assert torch.allclose(method(DELTAS[:1], weighted([-2.0]), statistics=known[:1]), -2 * DELTAS[0])
    same = method(DELTAS[:1].repeat(3, 1, 1), weights, statistics=known)
    assert torch.allclose(same, DELTAS[0])  # all agree
    assert not method(torch.zeros_like(DELTAS), weights).any()
    assert not method(torch.zeros_like(DELTAS), weights, statistics=known).any()
    assert not method(DELTAS, 0 * weights, statistics=known).any()
    small = method(DELTAS.float(), weights.float(), statistics=known.float())
    assert small.dtype == torch.float32
    torch.testing.assert_close(small.double(), result, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_thin_matrices(shape):
    deltas = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = inputs(4, 9, shape[1], 2)
    found = regmean(deltas, weighted([0.5, 0.5]), statistics=grams(data))
    expected = torch.from_numpy(regression(deltas, [0.5, 0.5], data, 0.9))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert fisher(deltas, weighted([0.5, 0.5]), statistics=deltas.square()).shape == shape


# ---- refusals ----

K, ONE = METHODS["regmean"][1], weighted(WEIGHTS)
REFUSED = [
    (regmean, {}, "regmean needs statistics: a Gram matrix of 5 x 5 per update, got none"),
    (regmean, {"statistics": K[:, :3, :3]}, "of 5 x 5 per update, got 3 x 3"),
    (regmean, {"statistics": K, "alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    (regmean, {"statistics": -K}, "not positive semi-definite|not finite"),
    (regmean, {"statistics": K * float("nan")}, "NaN or infinite"),
    (regmean, {"statistics": torch.ones(3, 5, 5, dtype=torch.float64) - 3 * torch.eye(5), "alpha": 1.0}, "semi-def"),
    (regmean, {"statistics": 2 * torch.ones(3, 5, 5, dtype=torch.float64) - torch.eye(5), "alpha": 1.0}, "semi-def"),
    (regmean, {"statistics": -K.diagonal(dim1=1, dim2=2)}, "not positive semi-definite"),
    (fisher, {}, "fisher needs statistics: the Fisher information of 6 x 5 entries per update, got none"),
    (fisher, {"statistics": INFORMATION[:, :2]}, "of 6 x 5 entries per update, got 2 x 5"),
    (fisher, {"statistics": INFORMATION, "floor": 0.0}, "floor must be a number above 0, got 0.0"),
    (fisher, {"statistics": -INFORMATION}, "finite numbers from 0 on"),
    (fisher, {"statistics": INFORMATION / 0}, "finite numbers from 0 on"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), REFUSED)
def test_refused(method, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        method(DELTAS, ONE, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_fisher_information_of_another_size_is_refused_by_module(space):
    adapters = [random_adapter(seed, {"layers.0.q": (6, 5, 2)}) for seed in (1, 2)]
    size = (22,) if space == "factors" else (6, 5)
    for sizes in ([(3,), (3,)], [(40,), (40,)], [(5, 6), (5, 6)], [size, (3,)], [(*size, 2)] * 2):
        known = [{"layers.0.q": torch.ones(size)} for size in sizes]
        with pytest.raises(ValueError, match=r"layers\.0\.q: statistics of|needs statistics.*got"):
            merge(adapters, "fisher", space=space, statistics=known).modules["layers.0.q"]


def test_merge_refuses_missing_statistics_and_bad_knobs_before_reading():
    adapters = [random_adapter(seed, SIZES) for seed in (1, 2)]
    unread = [Adapter(a.config, dict.fromkeys(a.modules)) for a in adapters]
    for method in METHODS:
        with pytest.raises(ValueError, match=f"method '{method}' needs statistics"):
            merge(unread, method)
    with pytest.raises(ValueError, match="alpha must be"):
        merge(unread, "regmean", statistics=[{}, {}], alpha=-1.0)
    with pytest.raises(ValueError, match="floor must be"):
        merge(unread, "fisher", statistics=[{}, {}], floor=-1.0)
