"""The demo's page: CoTo against LoRA, the path between seeds, the merge, pruning, time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from loraloom import report
from loraloom.demo.study import STRUCTURED, Study

TITLE = "loraloom demo: LoRA and CoTo, taken apart and put together"


def page_of(study: Study, seconds: float) -> report.Report:
    """The page of a finished study."""
    return report.Report(
        title=TITLE,
        summary=_summary(study),
        panels=(
            report.Table(
                "CoTo against LoRA",
                ("measurement", "LoRA", "CoTo", "CoTo - LoRA", "95 % interval"),
                tuple(_comparison(study)),
                note="Accuracy on test. The interval is a paired bootstrap over test examples for these runs; it does "
                f"not cover the spread over seeds, of which there are {len(study.settings.seeds)}.",
                command="loraloom demo",
            ),
            _path_panel(study),
            _merge_panel(study),
            _prune_panel(study),
            _density_panel(study),
            _plan_panel(study),
            _time_panel(study),
        ),
        run={
            "seconds": round(seconds, 1),
            "test examples a task": f"at most {study.settings.limit}" if study.settings.limit else "all",
            "recipe": study.recipes["LoRA"].model_dump(mode="json", exclude={"task", "output", "seed"}),
            "CoTo differs in": _difference(*(recipe.model_dump(mode="json") for recipe in study.recipes.values())),
        },
        records=tuple(_records(study)),
    )


def _difference(plain: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``other`` that ``plain`` does not have alike; the outputs aside."""
    found: dict[str, Any] = {}
    for key, value in other.items():
        before = plain.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            found |= {f"{key}.{inner}": held for inner, held in _difference(before, value).items()}
        elif value != before and key != "output":
            found[key] = value
    return found


def _measurements(study: Study) -> Iterator[tuple[str, tuple]]:
    """Title and key (without the method) of every measurement that both methods have."""
    for task in study.tasks:
        yield f"alone: {task}", ("alone", task)
    for space in ("factors", "delta"):
        if 0.5 in study.settings.points:
            yield f"half way between two seeds ({space})", ("path", space, 0.5)
    for space in ("factors", "delta"):
        for task in study.tasks:
            yield f"three tasks merged ({space}): {task}", ("merged", space, task)
    for keep in STRUCTURED:
        yield f"layers kept: {keep}", ("kept", keep)
    for density in study.settings.densities:
        yield f"entries kept: {density:.0%}", ("density", density)


def _comparison(study: Study) -> Iterator[tuple[str, float, float, float, str]]:
    for title, key in _measurements(study):
        lora, coto, gap = study.estimate("LoRA", *key), study.estimate("CoTo", *key), study.advantage(*key)
        interval = f"[{gap.low:+.3f}, {gap.high:+.3f}]"
        yield title, round(lora.value, 4), round(coto.value, 4), round(gap.value, 4), interval


def _summary(study: Study) -> str:
    """What came out, in words that follow from the numbers alone."""
    gaps = [study.advantage(*key) for _, key in _measurements(study)]
    better, worse = sum(gap.low > 0 for gap in gaps), sum(gap.high < 0 for gap in gaps)
    total = {m: sum(v for (method, *_), v in study.seconds.items() if method == m) for m in study.recipes}
    base = study.estimate("base", "alone", study.main).value

    def both(*keys: tuple) -> str:
        means = {m: np.mean([study.estimate(m, *key).value for key in keys]) for m in study.recipes}
        return ", ".join(f"{method} {mean:.3f}" for method, mean in means.items())

    return (
        f"Alone on {study.main}: {both(('alone', study.main))} (frozen model {base:.3f}). "
        f"Half way between two seeds, factors averaged: {both(('path', 'factors', 0.5))}. "
        f"Three tasks in one adapter, updates averaged, mean of the tasks: "
        f"{both(*[('merged', 'delta', task) for task in study.tasks])}. "
        f"Only a third of the layers kept, mean of low, middle and high: "
        f"{both(*[('kept', keep) for keep in ('low', 'middle', 'high')])}. "
        f"Of {len(gaps)} measurements CoTo is better than LoRA beyond the 95 % interval in {better}, worse in {worse}, "
        f"and not told apart in {len(gaps) - better - worse}. "
        f"CoTo trained in {total['CoTo'] / total['LoRA']:.2f} of LoRA's time."
    )


def _series(study: Study, name: str, x: Sequence[Any], keys: Sequence[tuple]) -> report.Series:
    found = [study.estimate(*key) for key in keys]
    return report.Series(
        name,
        x=tuple(x),
        y=tuple(one.value for one in found),
        low=tuple(one.low for one in found),
        high=tuple(one.high for one in found),
    )


def _path_panel(study: Study) -> report.Curve:
    points = study.settings.points
    series = tuple(
        _series(study, f"{method}, {space}", points, [(method, "path", space, at) for at in points])
        for method in study.recipes
        for space in ("factors", "delta")
    )
    return report.Curve(
        f"From seed {study.settings.seeds[0]} to seed {study.settings.seeds[1]} on {study.main}",
        "position between the two adapters",
        "accuracy",
        series,
        note="factors: (1-t) B_0 + t B_1 and the same for A; delta: (1-t) times one update plus t times the other.",
        command=f"loraloom interpolate adapters/coto-{study.main}-0 adapters/coto-{study.main}-1 --at 0.5 -o half",
    )


def _merge_panel(study: Study) -> report.Bars:
    series = [_series(study, "base", study.tasks, [("base", "alone", task) for task in study.tasks])]
    for method in study.recipes:
        series.append(
            _series(study, f"{method}, alone", study.tasks, [(method, "alone", task) for task in study.tasks])
        )
        for space in ("factors", "delta"):
            keys = [(method, "merged", space, task) for task in study.tasks]
            series.append(_series(study, f"{method}, merged ({space})", study.tasks, keys))
    return report.Bars(
        "Three tasks in one adapter",
        "accuracy",
        study.tasks,
        tuple(series),
        note="Equal weights of 1/3.",
        command="loraloom merge adapters/coto-*-0 -o merged --space delta",
    )


def _prune_panel(study: Study) -> report.Bars:
    names = ("all", *STRUCTURED)
    series = tuple(
        _series(study, method, names, [(method, "alone", study.main), *((method, "kept", keep) for keep in STRUCTURED)])
        for method in study.recipes
    )
    return report.Bars(
        f"Layers kept, {study.main}",
        "accuracy",
        names,
        series,
        note="The adapters of all other layers are dropped; nothing is trained again.",
        command=f"loraloom prune adapters/coto-{study.main}-0 --keep every-other -o pruned",
    )


def _density_panel(study: Study) -> report.Curve:
    densities = (1.0, *study.settings.densities)
    series = tuple(
        _series(
            study,
            method,
            densities,
            [(method, "alone", study.main), *((method, "density", d) for d in study.settings.densities)],
        )
        for method in study.recipes
    )
    return report.Curve(
        f"Entries kept by magnitude, {study.main}",
        "share of the factors' entries kept",
        "accuracy",
        series,
        command=f"loraloom prune adapters/coto-{study.main}-0 --density 0.25 -o pruned",
    )


def _plan_panel(study: Study) -> report.Curve:
    recipe = study.recipes["CoTo"]
    plan, steps = recipe.plan(), range(0, recipe.train.steps, max(1, recipe.train.steps // 60))
    series = (report.Series("CoTo", x=tuple(steps), y=tuple(plan.probability(step) for step in steps)),)  # type: ignore[union-attr]
    return report.Curve("Probability that a layer's adapter takes part", "optimizer step", "p(t)", series)


def _time_panel(study: Study) -> report.Table:
    rows = tuple(
        (f"{method}, {task}, seed {seed}", round(value, 1)) for (method, task, seed), value in study.seconds.items()
    )
    return report.Table("Training time", ("run", "seconds"), rows, note="Two runs at a time, one of each method.")


def _records(study: Study) -> Iterator[dict[str, Any]]:
    for key, outcomes in study.outcomes.items():
        names = dict(zip(("method", "measurement", "of", "at"), key, strict=False))
        yield {**names, "by_seed": [float(one.mean()) for one in outcomes], **study.estimate(*key).to_json()}
