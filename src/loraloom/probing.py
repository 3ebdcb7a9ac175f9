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
    bench_for = edge("statistics").bench_for
    first = bench_for(phases[0], tasks[0], model)
    told = {"family": first.family, "processor": first.processor}
    benches = [first, *(bench_for(phases[0], task, first.model, **told) for task in tasks[1:])]  # one model for all
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
