"""Probes as a user asks for them: adapters and tasks to a report, the model loaded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.forgetting import Forgetting, forgetting
from loraloom.probes.partial_modality import PartialModality, partial_modality, told_apart
from loraloom.registry import edge
from loraloom.report import Bars, Heatmap, Report, Series, Table


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


def partial_modality_report(
    adapter: Adapter,
    task: Any,
    *,
    modalities: Mapping[str, int] | None = None,
    name: str = "adapter",
    model: str = "",
    split: str = "test",
    limit: int | None = None,
) -> Report:
    """What an adapter does for each modality's tokens alone (:func:`loraloom.partial_modality`), as bars and a table.

    Args:
        adapter: MokA, or a LoRA with ``modalities``.
        task: what to score.
        modalities: number by name, for a LoRA.
        name: of the adapter.
        model: base model; by default what the adapter names.
        split: train, validation or test.
        limit: only the first so many examples.

    Raises:
        ValueError: no model is named, or the adapter does not tell modalities apart.
    """
    moka = told_apart(adapter, modalities)  # before a model is loaded
    bench = edge("statistics").bench_for(moka, task, model)
    found = partial_modality(moka, lambda variant: bench.evaluate(variant, split, limit).value)
    return partial_report_of(found, name, bench.task.name)


def partial_report_of(found: PartialModality, name: str, task: str) -> Report:
    """The result as a page: the scores, and what each modality keeps of the gain.

    Example:
        >>> r = PartialModality(("text", "image"), (0.75, 0.5), 1.0, 0.5)
        >>> partial_report_of(r, "a", "vqa").summary
        'Of its gain of +0.500 on vqa the adapter keeps, on for one modality alone, 50 % for text, 0 % for image.'
    """
    places = ("none", *(f"{group} alone" for group in found.modalities), "all")
    values = (found.base, *found.values, found.whole)
    bars = Bars("Score with the update on for", task, places, (Series(name, places, values),))
    shares = found.shares or (None,) * len(found.modalities)
    rows = zip(found.modalities, shares, found.values, strict=True)
    table = Table("Each modality alone", ("modality", "share of the gain", "score"), tuple(rows))
    gain = f"{found.whole - found.base:+.3f}"
    told = f"On {task} the adapter gains nothing over the base ({gain}), so there are no shares to tell."
    if found.shares:
        kept = (f"{100 * s:.0f} % for {group}" for group, s in zip(found.modalities, found.shares, strict=True))
        told = f"Of its gain of {gain} on {task} the adapter keeps, on for one modality alone, {', '.join(kept)}."
    return Report(
        "Partial modality",
        told,
        (bars, table),
        run={"task": task, "adapter": name},
        records=(found.to_json(),),
    )
