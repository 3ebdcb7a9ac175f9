"""Partial-modality inference as a user asks for it: an adapter and a task to a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraloom.adapter import Adapter
from loraloom.probes.partial_modality import PartialModality, partial_modality, told_apart
from loraloom.probing.asking import asked
from loraloom.report import Bars, Report, Series, Table


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
    score = asked(moka, task, model, split, limit)
    return partial_modality_report_of(partial_modality(moka, score), name, score.task)


def partial_modality_report_of(found: PartialModality, name: str, task: str) -> Report:
    """The result as a page: the scores, and what each modality keeps of the gain.

    Example:
        >>> r = PartialModality(("text", "image"), (0.75, 0.5), 1.0, 0.5)
        >>> partial_modality_report_of(r, "a", "vqa").summary
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
