"""Updates formed by blocks of rows: the same as dense ones, whatever the blocks and the threads."""

from __future__ import annotations

import pytest
import torch

from loraloom import Adapter, Factors, merge
from loraloom.ops import products
from loraloom.ops.entrywise import by_blocks
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.products import Product, Products, blocks_of, each_block
from loraloom.ops.select import cutoff

BY_ROWS = [name for name, method in merge_methods.items() if method.facts.get("by_rows")]


def some(count: int = 3, out: int = 40, in_: int = 30, dtype=torch.float32) -> list[Product]:
    draw = torch.Generator().manual_seed(0)
    return [
        Product(*(torch.randn(size, generator=draw, dtype=dtype) for size in ((out, rank), (rank, in_))))
        for rank in range(1, count + 1)
    ]


@pytest.fixture(params=[(1, 1 << 18), (1, 70), (3, 70), (2, 1)], ids=str)
def blocks(request, monkeypatch):
    """Threads, and entries in a block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param[0])
    monkeypatch.setattr(products, "_BLOCK", request.param[1])
    yield request.param
    torch.set_num_threads(threads)


def test_rows_and_samples_are_those_of_the_dense_matrix(blocks):
    (one,) = some(1)
    dense = one.B @ one.A
    assert one.shape == dense.shape and one.numel() == dense.numel()
    assert torch.allclose(torch.cat(each_block(one, lambda rows: one[rows])), dense)
    assert torch.allclose(one.every(7), dense.flatten()[::7])
    assert [row for rows in blocks_of(one) for row in range(40)[rows]] == list(range(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_is_exact(blocks, dtype):
    for one in some(dtype=dtype):
        dense = torch.cat([one[rows] for rows in blocks_of(one)])
        order = dense.flatten().abs().sort(descending=True).values
        for count in (1, 7, 600, 1199, 1200):
            found = cutoff(one, count)
            assert found.last == order[count - 1] and int(found.mask(dense).sum()) == count
    nothing = Product(torch.zeros(4, 0), torch.zeros(0, 5))
    assert cutoff(nothing, 7) == (0.0, 6)  # of equal ones the first
    assert not nothing[:].any() and nothing[1:3].shape == (2, 5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        cutoff(Product(torch.tensor([[1.0], [float("inf")]]), torch.ones(1, 3)), 2)


@pytest.mark.parametrize("method", BY_ROWS)
def test_methods_give_what_they_give_for_the_stack(method, blocks):
    parts, weights = some(), torch.tensor([0.5, -0.25, 1.0])
    stack = torch.stack([torch.cat([part[rows] for rows in blocks_of(part)]) for part in parts])
    function = merge_methods[method].function
    takes = "generator" in function.__annotations__
    drawn = [{"generator": torch.Generator().manual_seed(3)} if takes else {} for _ in range(2)]
    assert torch.equal(function(Products(parts), weights, **drawn[0]), function(stack, weights, **drawn[1]))


@pytest.mark.parametrize("method", BY_ROWS)
def test_threads_change_nothing(method, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK", 70)
    before, made = torch.get_num_threads(), []
    factors = [{"fc": Factors(part.B, part.A, scale=0.5)} for part in some()]
    adapters = [
        Adapter({"r": 1}, {**modules, "other": modules["fc"]} if at else modules) for at, modules in enumerate(factors)
    ]
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            merged = merge(adapters, method, density=0.3, seed=1, rank=4)
            made.append([merged.modules[name] for name in ("fc", "other")])
    finally:
        torch.set_num_threads(before)
    for again in made[1:]:
        for one, other in zip(made[0], again, strict=True):
            assert torch.allclose(one.delta(), other.delta(), atol=1e-5)


def test_an_error_in_a_block_is_raised(blocks):
    def fail(rows, start):
        raise KeyError(start)

    with pytest.raises(KeyError, match="0"):
        by_blocks(torch.ones(2, 5, 5), fail)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.3, 1e-6])
def test_as_many_stay_as_the_density_says_and_the_mean_is_kept(density, blocks):
    kept = merge_methods["dare"].function(
        torch.ones(1, 300, 300), torch.ones(1), density=density, generator=torch.Generator().manual_seed(0)
    )
    share = max(1, round(density * 65536)) / 65536
    values = kept.unique().tolist()
    assert all(value == 0 or value == pytest.approx(1 / share) for value in values)
    spread = (share * (1 - share) / kept.numel()) ** 0.5
    assert abs(float((kept > 0).double().mean()) - share) <= 5 * spread
