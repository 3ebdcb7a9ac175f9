"""Probes as a user asks for them: adapters and tasks to a report, the model loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.forgetting import Forgetting, forgetting
from loraloom.registry import edge
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
    scoring = edge("scoring")
    base = model or phases[0].base
    if not base:
        raise ValueError("no base model is named; say which with --model")
    data = {key: value for key, value in scoring.trained_with(phases[0]).items() if key in ("image_size", "max_length")}
    first = scoring.bench(base, tasks[0], **data)
    benches = [first]
    for task in tasks[1:]:  # the model is loaded once
        options = {"family": first.family, "processor": first.processor}
        benches.append(scoring.bench(first.model, task, **options, **data))
    scores = {made.task.name: lambda adapter, made=made: made.evaluate(adapter, split, limit).value for made in benches}
    return report_of(forgetting(phases, scores), names or [f"phase {i + 1}" for i in range(len(phases))])


def report_of(found: Forgetting, names: Sequence[str]) -> Report:
    """The result as a page: the matrix and its three summaries.

    Example:
        >>> r = Forgetting(("one",), (0.5,), ((0.9,),), 0.9, None, None)
        >>> report_of(r, ["first"]).panels[0].z
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
    lost = min(
        (
            (after - row[j], task)
            for j, (task, row) in enumerate(zip(found.tasks, found.scores, strict=True))
            for after in [found.scores[-1][j]]
        ),
        default=(0.0, ""),
    )
    worst = f"; most is lost on {lost[1]} ({lost[0]:+.3f})" if lost[0] < 0 else "; no task lost anything"
    return Report(
        "Forgetting",
        f"After {len(names)} phases the tasks score {found.accuracy:.3f} on average{worst}.",
        (matrix, table),
        run={"tasks": list(found.tasks), "phases": list(names)},
        records=(found.to_json(),),
    )
