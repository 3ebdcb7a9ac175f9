"""Forgetting: what each phase of continual learning leaves of the tasks before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes import probes
from loraloom.probes.game import finite, many


@dataclass(frozen=True)
class Forgetting:
    """Scores of every task after every phase, and what they come to.

    Attributes:
        tasks: in the order in which they were learned, one a phase.
        before: score of each task before the first phase.
        scores: ``scores[i][j]`` is that of task j after phase i.
        accuracy: mean over the tasks after the last phase (ACC).
        backward: mean of what the last phase changed on the tasks before it, against what they were when they had
            just been learned (BWT); below 0 is forgetting. None with one task.
        forward: mean of what earlier phases did for a task before its own, against ``before`` (FWT). None with one.
    """

    tasks: tuple[str, ...]
    before: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    accuracy: float
    backward: float | None
    forward: float | None

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists."""
        held = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return held | {"scores": [list(row) for row in self.scores]}


@probes.register("forgetting", paper="https://arxiv.org/abs/1706.08840")
def forgetting(phases: Sequence[Adapter], scores: Mapping[str, Callable[[Adapter | None], float]]) -> Forgetting:
    """The matrix of scores R and its summaries (Lopez-Paz and Ranzato 2017, section 2, equations 2 to 4).

    ACC = mean_j R[T-1][j]; BWT = mean_{j < T-1} R[T-1][j] - R[j][j]; FWT = mean_{j > 0} R[j-1][j] - b[j], with b the
    scores of the base alone (there: of a random start).

    Args:
        phases: the adapter after each phase; phase i learned task i.
        scores: by task, in the same order; called with each adapter and with None for the base.

    Raises:
        ValueError: the numbers of phases and tasks differ, there is none, or a score is not finite.

    Example:
        >>> adapters = [Adapter({"r": 1}, {}), Adapter({"r": 2}, {})]
        >>> one = lambda a: 0.5 if a is None else {1: 0.9, 2: 0.7}[a.config["r"]]
        >>> two = lambda a: 0.5 if a is None else {1: 0.6, 2: 0.8}[a.config["r"]]
        >>> r = forgetting(adapters, {"one": one, "two": two})
        >>> round(r.accuracy, 3), round(r.backward, 3), round(r.forward, 3)
        (0.75, -0.2, 0.1)
    """
    if not phases or len(phases) != len(scores):
        raise ValueError(f"{len(phases)} phases and {len(scores)} tasks; one task a phase is needed, at least one")

    when = ["before", *(f"after phase {i}" for i in range(len(phases)))]
    columns = []  # of each task, a score before and after each phase
    for task, score in scores.items():
        values = many(score, [None, *phases])
        columns.append([finite(value, f"of {task} {at}") for at, value in zip(when, values, strict=True)])
    before, *found = zip(*columns, strict=True)
    last, rest = len(phases) - 1, len(phases) - 1
    return Forgetting(
        tuple(scores),
        before,
        tuple(found),
        math.fsum(found[last]) / len(phases),
        math.fsum(found[last][j] - found[j][j] for j in range(last)) / rest if rest else None,
        math.fsum(found[j - 1][j] - before[j] for j in range(1, len(phases))) / rest if rest else None,
    )
