"""Disjoint splits: rows that share a text, an image or a context never lie on two sides.

Where a group of rows goes depends on its name and the seed alone, not on the other groups. So two tasks on the same
images (or the same articles) split alike, and an adapter merged from both has seen no test image of either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SHARES = {"test": 0.2, "validation": 0.1}
"""Share of the groups that a part gets where the source does not bring one."""

PARTS = ("train", "validation", "test")


class Row(NamedTuple):
    """What splitting needs to know of an example.

    Attributes:
        content: stands for the content; two rows with the same string have the same content.
        answer: the right answer, in words.
        group: what else binds rows together (a shared context, a twin); empty for nothing.
        part: the part it belongs to by its source (train, validation, test); empty where the source has none.
    """

    content: str
    answer: str
    group: str = ""
    part: str = ""


def split(rows: Sequence[Row], seed: int) -> dict[str, list[int]]:
    """Row numbers of train, validation and test, each in a random order fixed by the seed.

    Copies are kept once (in the part nearest to test), and contents with two different answers are dropped. Parts
    that the source brings are kept, less the training rows that are bound to one of theirs. Missing ones are taken
    out of train: about 20 % of the groups for test, 10 % for validation.

    Raises:
        ValueError: fewer groups than parts.

    Example:
        >>> parts = split([Row(f"text {i}", "yes", group=str(i // 2)) for i in range(200)], seed=0)
        >>> {part: len(rows) for part, rows in parts.items()}
        {'train': 142, 'validation': 12, 'test': 46}
    """
    names = components(_bonds(row) for row in rows)  # before copies are dropped: a copy may bind two groups
    groups: dict[str, list[int]] = {}
    for i in _distinct(rows):
        groups.setdefault(names[i], []).append(i)
    place = {name: _place(seed, name) for name in groups}
    order = sorted(groups, key=lambda name: (place[name], name))
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    free: list[str] = []
    for name in order:
        bound = {rows[i].part for i in groups[name]}
        part = next((part for part in ("test", "validation") if part in bound), "")
        if part:
            parts[part] += [i for i in groups[name] if rows[i].part == part]
        else:
            free.append(name)
    missing = [part for part in ("test", "validation") if not parts[part]]
    if len(free) < len(missing) + 1:
        raise ValueError(f"{len(free)} distinct groups of rows cannot be split into {len(missing) + 1} parts")
    start, upper = 0, 0.0
    for step, part in enumerate(missing):
        upper += SHARES[part]
        end = next((k for k, name in enumerate(free) if place[name] >= upper), len(free))
        end = min(max(end, start + 1), len(free) - len(missing) + step)
        parts[part] = [i for name in free[start:end] for i in groups[name]]
        start = end
    parts["train"] = [i for name in free[start:] for i in groups[name]]
    return parts


def components(bonds: Iterable[Sequence[str]]) -> list[str]:
    """For each item the smallest of all the bonds that it is tied to, directly or through other items.

    Example:
        >>> components([["a", "b"], ["b", "c"], ["d"]])
        ['a', 'a', 'd']
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    items = [list(keys) for keys in bonds]
    for keys in items:
        for key in keys[1:]:
            low, high = sorted((root(keys[0]), root(key)))
            parent[high] = low
    return [root(keys[0]) for keys in items]


def normal(text: str) -> str:
    """The text as it counts for equality: without case and with single spaces.

    Example:
        >>> normal(" A  Film\\n")
        'a film'
    """
    return " ".join(text.casefold().split())


def _bonds(row: Row) -> list[str]:
    """The names under which a row is tied to others; a group sorts before a content, so that it names the whole."""
    return [f"group {row.group}", f"is {row.content}"] if row.group else [f"is {row.content}"]


def _distinct(rows: Sequence[Row]) -> list[int]:
    """Row numbers without copies and without contents that have two answers."""
    answers: dict[str, dict[str, None]] = {}
    first: dict[str, int] = {}
    rank = {"test": 0, "validation": 1}
    for i, row in enumerate(rows):
        answers.setdefault(row.content, {})[row.answer] = None
        old = first.setdefault(row.content, i)
        if rank.get(row.part, 2) < rank.get(rows[old].part, 2):
            first[row.content] = i
    return sorted(i for content, i in first.items() if len(answers[content]) == 1)


def _place(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on seed and name alone."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
