"""Laws of the splits: nothing is lost or doubled, and nothing that belongs together lies on two sides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.tasks.splits import PARTS, SHARES, Row, components, split

LAW = settings(derandomize=True, deadline=None, max_examples=80)

rows_of = st.lists(
    st.builds(
        Row,
        content=st.integers(0, 40).map(lambda i: f"text {i}"),
        answer=st.sampled_from(["yes", "yes", "yes", "no"]),
        group=st.one_of(st.just(""), st.integers(0, 12).map(str)),
    ),
    min_size=0,
    max_size=80,
)
with_parts = rows_of.flatmap(
    lambda rows: st.lists(
        st.sampled_from(["", "", "train", "validation", "test"]), min_size=len(rows), max_size=len(rows)
    ).map(lambda parts: [row._replace(part=part) for row, part in zip(rows, parts, strict=True)])
)
seeds = st.integers(0, 3)


def try_split(rows: list[Row], seed: int) -> dict[str, list[int]] | None:
    try:
        return split(rows, seed)
    except ValueError as error:
        assert "cannot be split" in str(error)
        return None


def linked(a: Row, b: Row) -> bool:
    return a.content == b.content or (a.group != "" and a.group == b.group)


def clean(rows: list[Row]) -> list[Row]:
    """Distinct contents with one answer, by comparing all pairs."""
    return [row for row in rows if all(row.answer == other.answer for other in rows if other.content == row.content)]


@LAW
@given(rows_of, seeds)
def test_nothing_is_lost_or_doubled(rows: list[Row], seed: int) -> None:
    parts = try_split(rows, seed)
    if parts is not None:
        taken = [rows[i].content for part in PARTS for i in parts[part]]
        assert len(taken) == len(set(taken))
        assert set(taken) == {row.content for row in clean(rows)}
        assert all(parts[part] for part in PARTS)


@LAW
@given(st.one_of(rows_of, with_parts), seeds)
def test_what_is_linked_lies_on_one_side(rows: list[Row], seed: int) -> None:
    parts = try_split(rows, seed)
    if parts is not None:
        where = {i: part for part in PARTS for i in parts[part]}
        for i, one in where.items():
            for j, other in where.items():
                if linked(rows[i], rows[j]) and one != other:  # only between parts that the source itself made
                    assert {rows[i].part, rows[j].part} == {one, other} == {"validation", "test"}


@LAW
@given(with_parts, seeds)
def test_parts_of_the_source_stay(rows: list[Row], seed: int) -> None:
    parts = try_split(rows, seed)
    if parts is not None:
        good = clean(rows)
        own = {part: {row.content for row in good if row.part == part} for part in ("validation", "test")}
        if own["test"]:
            assert {rows[i].content for i in parts["test"]} == own["test"]
            assert {rows[i].part for i in parts["test"]} == {"test"}
        assert not {rows[i].part for i in parts["train"]} & {"validation", "test"}


@LAW
@given(rows_of, seeds)
def test_the_seed_decides_and_the_order_of_rows_does_not(rows: list[Row], seed: int) -> None:
    parts, turned = try_split(rows, seed), try_split(rows[::-1], seed)
    assert (parts is None) == (turned is None)
    if parts is not None and turned is not None:
        for part in PARTS:
            assert {rows[i].content for i in parts[part]} == {rows[::-1][i].content for i in turned[part]}


def test_more_data_moves_no_group() -> None:
    rows = [Row(f"text {i}", "yes", group=str(i // 3)) for i in range(600)]
    small, large = split(rows[:300], 0), split(rows, 0)
    for part in PARTS:
        assert [i for i in large[part] if i < 300] == small[part]


def test_seeds_differ_and_shares_hold() -> None:
    rows = [Row(f"text {i}", "yes") for i in range(5000)]
    parts = split(rows, 0)
    assert parts != split(rows, 1)
    for part, share in SHARES.items():
        assert abs(len(parts[part]) / len(rows) - share) < 0.02
    order = parts["train"]
    assert order != sorted(order)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_smallest_data_sets_have_every_part(n: int) -> None:
    for seed in range(30):
        parts = split([Row(str(i), "yes") for i in range(n)], seed)
        assert sum(map(len, parts.values())) == n
        assert all(parts.values())


def test_too_few_groups() -> None:
    with pytest.raises(ValueError, match="1 distinct groups of rows cannot be split into 3 parts"):
        split([Row(str(i), "yes", group="all") for i in range(10)], 0)
    with pytest.raises(ValueError, match="0 distinct groups"):
        split([], 0)
    rows = [Row("a", "yes", part="test"), Row("b", "yes", part="validation"), Row("c", "yes")]
    assert split(rows, 0) == {"train": [2], "validation": [1], "test": [0]}


def test_a_copy_in_test_is_taken_out_of_train() -> None:
    rows = [Row("same", "yes"), *(Row(str(i), "yes") for i in range(9)), Row("same", "yes", part="test")]
    parts = split(rows, 0)
    assert parts["test"] == [10]
    assert 0 not in parts["train"] + parts["validation"]


@LAW
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), max_size=10))
def test_components_against_walking_about(bonds: list[list[str]]) -> None:
    expected = []
    for start in bonds:
        reached = set(start)
        while True:
            more = reached.union(*(keys for keys in bonds if reached & set(keys)))
            if more == reached:
                break
            reached = more
        expected.append(min(reached))
    assert components(bonds) == expected
