"""Forgetting as a user asks for it: the adapters of a chain and their tasks to a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.forgetting import Forgetting, forgetting
from loraloom.probing.asking import asked_all
from loraloom.report import Heatmap, Report, Table


def forgetting_report(
    phases: Sequence[Adapter],
    tasks: Sequence[Any],
    *,
    names: Sequence[str] = (),
    model: str = "",
    split: str = "test",
    limit: int | None = None,
) -> Report:
    """What a chain of adapters keeps of each task (:func:`loraloom.forgetting`), as a heat map and a table.

    Args:
        phases: the adapter after each phase.
        tasks: one a phase, in order.
        names: of the phases.
        model: base model; by default what the first adapter names.
        split: train, validation or test.
        limit: only the first so many examples.

    Raises:
        ValueError: their numbers differ, or no model is named.
    """
    if len(phases) != len(tasks) or not phases:
        raise ValueError(f"{len(phases)} adapters and {len(tasks)} tasks; one task an adapter is needed, in order")
    scores = asked_all(phases[0], tasks, model, split, limit)
    return forgetting_report_of(forgetting(phases, scores), names or [f"phase {i + 1}" for i in range(len(phases))])


def forgetting_report_of(found: Forgetting, names: Sequence[str]) -> Report:
    """The result as a page: the matrix and its three summaries.

    Example:
        >>> r = Forgetting(("one",), (0.5,), ((0.9,),), 0.9, None, None)
        >>> forgetting_report_of(r, ["first"]).panels[0].z
        ((0.5,), (0.9,))
    """
    rows = ("before", *names)
    matrix = Heatmap(
        "Score of each task after each phase", "task", "phase", found.tasks, rows, (found.before, *found.scores)
    )
    told = {"ACC": found.accuracy, "BWT": found.backward, "FWT": found.forward}
    means = {
        "ACC": "mean over the tasks at the end",
        "BWT": "change of earlier tasks since they were learned; below 0 is forgetting",
        "FWT": "what earlier phases gave a task before its own, against the base",
    }
    table = Table("Summaries", ("figure", "value", "meaning"), tuple((k, v, means[k]) for k, v in told.items()))
    rest = zip(found.tasks, found.scores[-1], strict=True)
    lost, where = min((last - found.scores[j][j], task) for j, (task, last) in enumerate(rest))
    worst = f"; most is lost on {where} ({lost:+.3f})" if lost < 0 else "; no task lost anything"
    return Report(
        "Forgetting",
        f"After {len(names)} phases the tasks score {found.accuracy:.3f} on average{worst}.",
        (matrix, table),
        run={"tasks": list(found.tasks), "phases": list(names)},
        records=(found.to_json(),),
    )
