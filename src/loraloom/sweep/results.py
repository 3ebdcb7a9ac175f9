"""What a finished sweep says: chosen rates, every measurement by arm, each arm against the first, maps over rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from loraloom.report import Curve, Heatmap, Panel, Report, Series, Table
from loraloom.sweep.found import Found, gap_of, means, rounded, spread
from loraloom.sweep.gaps import OVER_SEEDS, gaps_over_tasks
from loraloom.sweep.known import NOTHING, TIMES, Known
from loraloom.sweep.operations import ALONE, operations
from loraloom.sweep.plan import Cell, about, cells, column, where
from loraloom.sweep.table import Sweep
from loraloom.sweep.work import Journal

Place = tuple[tuple[str, ...], str]  # axes and task


def summarised(sweep: Sweep, journal: Journal, *, seconds: float, processes: int, known: Known = NOTHING) -> Report:
    """The report of a sweep whose jobs are all done, but for those of arms that are known."""
    found = Found(sweep, journal, known)
    names = ["alone", *dict.fromkeys(operation.name for operation in operations(sweep))]
    optional: list[Panel | None] = []
    if len(sweep.arms) > 1:
        optional += gaps_over_tasks(found, names)
        optional.append(_by_setting(found, names))
    optional.append(_barriers(found))
    panels = [*(panel for panel in optional if panel is not None), *_paths(found), *_densities(found)]
    panels += [*_maps(found, names), _rates(found), _time(found)]
    panels += [_against(found, names)] if len(sweep.arms) > 1 else []
    panels.append(_all(found, names))  # the longest ones last
    told = {
        **about(sweep),
        **({"arms read from": dict(found.known.source)} if found.known.source else {}),
        "seconds of the last call": round(seconds, 1),
        "processes of the last call": processes,
        "jobs": len(found.jobs),
    }
    return Report(sweep.title, _summary(found), tuple(panels), run=told, records=tuple(_records(found)))


def _where(sweep: Sweep, cell: Cell) -> tuple[Any, ...]:
    return tuple(where(sweep, cell).values())


def _columns(sweep: Sweep) -> tuple[str, ...]:
    return tuple(where(sweep, next(cells(sweep))))


def _rates(found: Found) -> Table:
    sweep = found.sweep
    grids = {arm: ", ".join(f"{rate:g}" for rate in sweep.grid(arm)) for arm in sweep.arms}
    usual = max(dict.fromkeys(grids.values()), key=list(grids.values()).count)
    others = "".join(f", {arm} from {grid}" for arm, grid in grids.items() if grid != usual)
    rows = []
    for cell in found.chosen:
        grid = sweep.grid(cell.arm)
        edge = cell.rate in (min(grid), max(grid)) and len(grid) > 1
        rows.append((*_where(sweep, cell), cell.arm, cell.rate, found.validation[cell], "yes" if edge else ""))
    return Table(
        "Learning rates chosen on validation",
        (*_columns(sweep), "arm", "rate", "validation", "at the end of the grid"),
        tuple(rows),
        note=f"Every arm chose from {usual}{others}, by its mean over seeds "
        f"{', '.join(map(str, sweep.tuned_on or sweep.seeds))}. At an end of the grid a better rate may lie beyond.",
    )


def _all(found: Found, names: Sequence[str]) -> Table:
    rows = []
    for cell in found.chosen:
        for name in names:
            if outcomes := found.by.get((cell, name)):
                told = (*rounded(*spread(means(outcomes))), len(outcomes))
                rows.append((*_where(found.sweep, cell), name, cell.arm, *told))
    return Table(
        "Accuracy at the chosen rates",
        (*_columns(found.sweep), "measurement", "arm", "mean", "low", "high", "n"),
        tuple(rows),
        note=f"On {found.sweep.measure.split}. Means of n seeds, or n groups of seeds; {OVER_SEEDS}.",
    )


def _against(found: Found, names: Sequence[str]) -> Table:
    rows = []
    for cell in found.chosen:
        other = found.first(cell)
        for name in names if other.arm != cell.arm else ():
            gap = gap_of(found.by.get((cell, name)), found.by.get((other, name)))
            if gap is not None:
                rows.append((*_where(found.sweep, cell), name, cell.arm, *gap))
    reference = next(iter(found.sweep.arms))
    told = ("difference", "low, seeds", "high, seeds", "low, examples", "high, examples")
    return Table(
        f"Against {reference}",
        (*_columns(found.sweep), "measurement", "arm", *told),
        tuple(rows),
        note=f"Accuracy on {found.sweep.measure.split} minus that of {reference} on the same examples and seeds, each "
        f"arm at its own chosen rate. Over seeds: {OVER_SEEDS}; over examples: a paired bootstrap for these seeds, "
        "none for arms that are read from a page.",
    )


def _by_setting(found: Found, names: Sequence[str]) -> Table | None:
    """Where every rate was measured: mean gaps to the first arm, everywhere and at each rate and value of an axis."""
    sweep = found.sweep
    reference, *others = sweep.arms
    every = [cell for cell in cells(sweep) if cell.arm == reference]
    settings = {f"rate {rate:g}": [cell for cell in every if cell.rate == rate] for rate in sweep.grid(reference)}
    for at, key in enumerate(sweep.axes):
        for value in dict.fromkeys(cell.axes[at] for cell in every):
            settings[f"{column(sweep, key)} {value}"] = [cell for cell in every if cell.axes[at] == value]
    settings = {name: there for name, there in settings.items() if len(there) < len(every)}
    if sweep.measure.rates != "all" or not settings:
        return None
    rows = []
    for name, arm in product(names, others):
        gaps = {}
        for cell in every:
            gap = gap_of(found.by.get((replace(cell, arm=arm), name)), found.by.get((cell, name)))
            if gap is not None and gap[0] is not None:
                gaps[cell] = gap[0]
        if gaps:
            parts = [[gaps[cell] for cell in there if cell in gaps] for there in (every, *settings.values())]
            better = f"{sum(gap > 0 for gap in gaps.values())} of {len(gaps)}"
            rows.append((name, arm, better, *(round(float(np.mean(one)), 4) if one else None for one in parts)))
    return Table(
        f"Where the gap to {reference} grows",
        ("measurement", "arm", "better in", "everywhere", *settings),
        tuple(rows),
        note=f"Accuracy minus that of {reference} at the same rate, averaged over all places of the table with that "
        "setting; all seeds. No intervals: places are not drawn at random.",
    )


def _barriers(found: Found) -> Table | None:
    """How far the path between two seeds sags below the line between its ends."""
    asked = found.sweep.measure.interpolate
    rows = []
    for cell in found.chosen if asked else ():
        for space in asked.spaces if asked else ():
            points = [one for one in operations(found.sweep) if one.arguments.get("space") == space]
            path = [(one.arguments["at"], found.by[cell, one.name]) for one in points if one.how == "interpolate"]
            heights = {}
            for group in path[0][1]:
                a, b = (float(found.by[cell, "alone"][end,].mean()) for end in group)
                heights[group] = max((1 - at) * a + at * b - float(outcomes[group].mean()) for at, outcomes in path)
            told = rounded(*spread(heights))
            rows.append((*_where(found.sweep, cell), space, cell.arm, *told, len(heights)))
    if not rows:
        return None
    return Table(
        "Barriers between seeds",
        (*_columns(found.sweep), "space", "arm", "height", "low", "high", "n"),
        tuple(rows),
        note="The most that accuracy on the path between two seeds lies below the line between its ends; below 0 the "
        f"path is above the line at every point that was measured. Means of n pairs; {OVER_SEEDS}.",
    )


def _paths(found: Found) -> Iterator[Panel]:
    asked = found.sweep.measure.interpolate
    if asked is None or len(asked.at) < 2:
        return
    places = dict.fromkeys((cell.axes, cell.task) for cell in found.chosen)
    for place in places:
        series = []
        for cell in found.chosen:
            if (cell.axes, cell.task) != place:
                continue
            for space in asked.spaces:
                points = [one for one in operations(found.sweep) if one.arguments.get("space") == space]
                points = sorted(
                    (one for one in points if one.how == "interpolate"), key=lambda one: one.arguments["at"]
                )
                values = [spread(means(found.by[cell, one.name]))[0] for one in points]
                series.append(
                    Series(f"{cell.arm}, {space}", tuple(one.arguments["at"] for one in points), tuple(values))
                )
        title = f"Between two seeds: {', '.join(map(str, (*place[0], place[1])))}"
        yield Curve(title, "position between the two adapters", "accuracy", tuple(series), note="Means over pairs.")


def _densities(found: Found) -> Iterator[Panel]:
    """Accuracy by the share of single entries that pruning keeps, averaged over the tasks."""
    pruned = {one.arguments["density"]: one.name for one in operations(found.sweep) if [*one.arguments] == ["density"]}
    kept = dict(sorted({**pruned, 1.0: "alone"}.items()))
    for axes in dict.fromkeys(cell.axes for cell in found.chosen) if len(kept) > 2 else ():
        series = []
        for arm in found.sweep.arms:
            places = [found.at(arm, axes, task) for task in found.sweep.tasks]
            scores = [[means(found.by[place, name]) for place in places] for name in kept.values()]
            ends = [spread({seed: float(np.mean([one[seed] for one in each])) for seed in each[0]}) for each in scores]
            values, *around = zip(*(rounded(*each) for each in ends), strict=True)
            told = [None, None] if any(None in one for one in around) else around
            series.append(Series(arm, tuple(kept), values, *told))
        yield Curve(
            ": ".join(["Entries kept", *([", ".join(axes)] if axes else [])]),
            "share of the factors' entries kept, by magnitude",
            "accuracy",
            tuple(series),
            note=f"Means over the tasks. Over seeds: {OVER_SEEDS}.",
        )


def _maps(found: Found, names: Sequence[str]) -> Iterator[Panel]:
    """Where every rate was measured: accuracy by rate, alone and after each operation, and gaps to the first arm."""
    sweep = found.sweep
    places = list(dict.fromkeys((cell.axes, cell.task) for cell in found.validation))
    told = [(*axes, task) for axes, task in places]
    differ = [at for at, values in enumerate(zip(*told, strict=True)) if len(set(values)) > 1] or [-1]
    labels = tuple(", ".join(one[at] for at in differ) for one in told)
    first = next(iter(sweep.arms))

    def mean(name: str, arm: str, place: Place, rate: float) -> float | None:
        outcomes = found.by.get((Cell(arm, *place, rate), name), {})
        return float(np.mean([one.mean() for one in outcomes.values()])) if outcomes else None

    def gap(name: str, arm: str, place: Place, rate: float) -> float | None:
        told = gap_of(*(found.by.get((Cell(one, *place, rate), name)) for one in (arm, first)))
        return None if told is None else told[0]

    for name in names if sweep.measure.rates == "all" else ["alone"]:
        for arm in sweep.arms:
            by_itself = arm == first or not {*sweep.grid(arm)} & {*sweep.grid(first)}
            title, value = (f"{name}: {arm}", mean) if by_itself else (f"{name}: {arm} minus {first}", gap)
            z = tuple(tuple(value(name, arm, place, rate) for rate in sweep.grid(arm)) for place in places)
            if len(sweep.grid(arm)) > 1:
                yield Heatmap(title, "learning rate", "place", sweep.grid(arm), labels, z)


def _time(found: Found) -> Table:
    told: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)  # by arm and device
    for job in found.jobs:
        one = found.journal.get(job) or {}
        told[job.cell.arm, str(one.get("device", "not noted"))].append(one)
    rows, order = list(found.known.times), list(found.sweep.arms)
    for (arm, device), ones in told.items():
        times = [one["seconds"] for one in ones if one.get("seconds") is not None]
        mean, broken = round(float(np.mean(times)), 1) if times else None, sum(one["broken"] for one in ones)
        if times or broken:  # else the device only scored
            rows.append((arm, device, len(times), mean, broken))
    return Table(
        *TIMES,
        tuple(sorted(rows, key=lambda row: (order.index(str(row[0])), str(row[1])))),
        note="Wall time on machines that others may have used too; to be compared on one device only. Where weights "
        "are not finite, no answer is right.",
    )


def _summary(found: Found) -> str:
    """What came out, in words that follow from the numbers alone."""
    sweep, reference = found.sweep, next(iter(found.sweep.arms))
    pages: dict[str, list[str]] = defaultdict(list)
    for arm, source in found.known.source.items():
        pages[source].append(arm)
    read = "".join(f"; {', '.join(arms)} read from {page}" for page, arms in pages.items())
    text = f"{len(found.jobs)} jobs{read}; {len(sweep.seeds)} seeds; learning rate of each arm chosen on validation."
    names = ["alone", *dict.fromkeys(operation.name for operation in operations(sweep))]
    counts = []
    for arm in list(sweep.arms)[1:]:
        cells = [cell for cell in found.chosen if cell.arm == arm]
        gaps = [gap_of(found.by.get((c, name)), found.by.get((found.first(c), name))) for c in cells for name in names]
        ends = [(gap[1], gap[2]) for gap in gaps if gap is not None]
        told = [(low, high) for low, high in ends if low is not None and high is not None]
        if told:
            better, worse = sum(low > 0 for low, _ in told), sum(high < 0 for _, high in told)
            counts.append(f"{arm} is better in {better} and worse in {worse} of {len(told)}")
    if counts:
        text += f" Beside {reference}, in measurements on several seeds, beyond the interval over seeds: "
        text += f"{'; '.join(counts)}. The rest is not told apart."
    return text


def _records(found: Found) -> Iterator[dict[str, Any]]:
    for (cell, name), outcomes in found.by.items():
        if cell.arm in found.known.source:
            continue
        values = {str(group[0]): value for group, value in means(outcomes).items()}
        yield {
            **where(found.sweep, cell),
            "arm": cell.arm,
            "rate": cell.rate,
            "measurement": name,
            "examples": len(next(iter(outcomes.values()))),
            "by_seed": values,
            "chosen": cell.rate == found.choose(cell),
            **({"validation": found.validation[cell]} if name == ALONE.name else {}),
        }
    yield from map(dict, found.known.records)
