"""Real data sets as prompts, choices and labels, with fixed disjoint splits.

A bundled task is one file of this folder: a function, registered with its facts, that gives its rows. What all tasks
share (copies, splits, limits) is done here. Data sets of the hub, or of a local folder, come through the same door.

    >>> load_task("digits", limit=5).splits["train"][0].content.shape
    (8, 8, 3)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loraloom.registry import Registry
from loraloom.tasks.splits import PARTS, Row, normal, split

if TYPE_CHECKING:
    from loraloom.tasks.hub import HubTask


Modality = Literal["text", "image", "image+text", "audio+text"]
HELD = 512  # pictures or sounds of a split that stay decoded


@dataclass(frozen=True)
class Example:
    """One question with its possible answers.

    Attributes:
        content: a text, or an image as uint8, height x width x 3. Of a task with media beside the text, the text.
        choices: the possible answers, in words.
        label: index of the right one.
        group: what binds it to other examples (a shared context); such examples are always in the same split.
        media: what stands beside the text, by modality: an ``image`` as above or several (frames of a video), ``audio``
            as float32 samples at 16 kHz.
    """

    content: str | np.ndarray
    choices: tuple[str, ...]
    label: int
    group: str = ""
    media: Mapping[str, np.ndarray | Sequence[np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A data set that is ready to train and to test on.

    Attributes:
        name: as it was asked for.
        modality: what the content is.
        labels: the classes; empty where the choices differ from example to example.
        prompt: a template with ``{content}`` for causal language models; the answer follows after a space. For
            images, which cannot stand in a text, a question without a place for the content. Media beside the text
            stand where the template has their name (``{image}``, ``{audio}``).
        splits: examples of ``train``, ``validation`` and ``test``, disjoint, in a random order fixed by the seed.
        source: the package or data set that it comes from.
        licence: of the data, as far as known.
        judge: name of the judge of generated answers (``judges.JUDGES``); empty where one of the choices is chosen.
        max_new_tokens: length at which a generated answer is cut off.
    """

    name: str
    modality: Modality
    labels: tuple[str, ...]
    prompt: str
    splits: Mapping[str, Sequence[Example]]
    source: str
    licence: str
    judge: str = ""
    max_new_tokens: int = 256


class Made(Sequence[Example]):
    """Examples that are made when they are asked for: all pictures of a large data set do not fit into memory at once.

    Example:
        >>> made = Made(lambda row: Example(f"text {row}", ("yes", "no"), 0), (4, 7, 1))
        >>> len(made), made[1].content, [example.content for example in made[1:]]
        (3, 'text 7', ['text 7', 'text 1'])
    """

    def __init__(self, make: Callable[[int], Example], rows: Sequence[int]) -> None:
        self._make, self._rows = make, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        return Made(self._make, self._rows[at]) if isinstance(at, slice) else self._make(self._rows[at])


@dataclass(frozen=True)
class Rows:
    """What a task file gives: enough on each row to split them, and a way to make the examples that are wanted.

    Attributes:
        rows: one for each example.
        make: the example of a row number.
        labels: the classes; empty where the choices differ.
        large: whether examples are made each time they are asked for, but for the last ones, and not held.
    """

    rows: Sequence[Row]
    make: Callable[[int], Example]
    labels: tuple[str, ...] = ()
    large: bool = False

    def examples(self, chosen: Sequence[int]) -> Sequence[Example]:
        """The examples of some rows; one that cannot be read is told now, not in the middle of a run."""
        if not self.large:
            return tuple(map(self.make, chosen))
        for row in chosen:
            self.make(row)
        return Made(lru_cache(HELD)(self.make), chosen)

    @classmethod
    def of_texts(cls, examples: Sequence[Example], labels: tuple[str, ...] = (), part: Sequence[str] = ()) -> Rows:
        """Rows of text examples that are in memory: equal texts with equal choices count as copies."""
        rows = []
        for i, example in enumerate(examples):
            asked = normal(str(example.content))
            if not labels:  # the same question about other choices is another question, but bound to this one
                asked = "\0".join([asked, *sorted(example.choices)])
            bond = example.group or ("" if labels else normal(str(example.content)))
            rows.append(Row(asked, example.choices[example.label], bond, part[i] if part else ""))
        return cls(rows, examples.__getitem__, labels)


tasks: Registry[[], Rows] = Registry("task", __name__)
"""Facts of each: ``modality``, ``prompt``, ``source`` and ``licence``."""


def load_task(
    name: str | HubTask, *, seed: int = 0, limit: int | Mapping[str, int] | None = None, **columns: Any
) -> Task:
    """The task of that name, split by the seed.

    Args:
        name: a registered name, ``hub:<data set id or local folder>``, or a ``hub.HubTask``.
        seed: fixes the splits; parts that the source brings stay what they are.
        limit: at most so many examples of each split, or by split (``{"train": 100}``). The first ones are taken,
            so that a limited split is part of a larger one, and no split depends on the limit of another.
        columns: for ``hub:`` the other fields of ``hub.HubTask`` (``content="text"``, ``label="label"``, ...).

    Raises:
        registry.UnknownName: there is no such task.
        ValueError: a limit is negative or names no split; a column is not there.
        OSError: the data cannot be fetched.

    Example:
        >>> task = load_task("digits", limit={"train": 100, "test": 50})
        >>> task.labels[3], len(task.splits["train"]), len(task.splits["test"])
        ('three', 100, 50)
    """
    from loraloom.tasks.hub import HubTask, hub_rows

    most = _limits(limit)
    if isinstance(name, str) and name.startswith("hub:"):
        name = HubTask(name.removeprefix("hub:"), **columns)
    elif columns:
        raise ValueError(f"task {name}: {', '.join(columns)} can be told only for 'hub:' tasks")
    if isinstance(name, HubTask):
        found = hub_rows(name)
        known: dict[str, Any] = {"modality": found.modality, "licence": found.licence}
        known |= {"prompt": name.prompt, "source": name.dataset}
        known |= {"judge": name.judge, "max_new_tokens": name.max_new_tokens}
        called, rows = f"hub:{name.dataset}", found.rows
    else:
        called, known, rows = name, dict(tasks[name].facts), tasks[name]()
    try:
        parts = split(rows.rows, seed)
    except ValueError as error:
        raise ValueError(f"task {called}: {error}") from error
    splits = {part: rows.examples(parts[part][: most[part]]) for part in PARTS}
    return Task(called, labels=rows.labels, splits=splits, **known)


def _limits(limit: int | Mapping[str, int] | None) -> dict[str, int | None]:
    """The limit of each split; None for no limit."""
    told = dict(limit) if isinstance(limit, Mapping) else dict.fromkeys(PARTS, limit)
    for part, most in told.items():
        if part not in PARTS:
            raise ValueError(f"limit: there is no split {part!r}; allowed: {', '.join(PARTS)}")
        if most is not None and most < 0:
            raise ValueError(f"limit: {part} must be at least 0, got {most}")
    return {part: told.get(part) for part in PARTS}


__all__ = ["Example", "Made", "Row", "Rows", "Task", "load_task", "tasks"]
