"""Every panel as a table of its values: what markdown shows, and what the page has below each plot."""

from __future__ import annotations

from collections.abc import Sequence

from loraloom.report.panels import Bars, Cell, Curve, Heatmap, Panel, Table, numbers


def grid(panel: Panel) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """Column names and rows of a panel; a series has one column, each value with its interval.

    Example:
        >>> from loraloom.report.panels import Series
        >>> grid(Curve("c", "t", "p", (Series("a", (0, 1), (0.5, 1)), Series("b", (1, 2), (2, 3)))))
        (('t', 'a', 'b'), [(0, '0.5', None), (1, '1.0', '2'), (2, None, '3')])
    """
    if isinstance(panel, Table):
        return panel.columns, list(panel.rows)
    if isinstance(panel, Heatmap):
        corner = f"{panel.y_label} \\ {panel.x_label}"
        return (corner, *map(str, panel.x)), [(y, *row) for y, row in zip(panel.y, panel.z, strict=True)]
    places = panel.categories if isinstance(panel, Bars) else _places(panel)
    by_place = [dict(zip(series.x, series.said(), strict=True)) for series in panel.series]
    head = ("" if isinstance(panel, Bars) else panel.x_label, *(series.name for series in panel.series))
    return head, [(place, *(values.get(place) for values in by_place)) for place in places]


def _places(panel: Curve) -> list[float | str]:
    """Every x of the series once; in order of size where all are numbers, of appearance where some are names."""
    places = list(dict.fromkeys(x for series in panel.series for x in series.x))
    numeric = [place for place in places if not isinstance(place, str)]
    return sorted(numeric) if len(numeric) == len(places) else places


def spelled(rows: Sequence[Sequence[Cell]]) -> list[tuple[str, ...]]:
    """Rows of a table as people read them, each column lined up.

    Example:
        >>> spelled([("a", 1.25), ("b", 2.0)])
        [('a', '1.25'), ('b', '2.00')]
    """
    return list(zip(*(numbers(column) for column in zip(*rows, strict=True)), strict=True))


def flat(run: object, path: str = "") -> list[tuple[str, Cell]]:
    """A nested map as (dotted key, value) rows; a list of plain values is one row.

    Example:
        >>> flat({"seeds": [0, 1], "recipe": {"rank": 8}})
        [('seeds', '0, 1'), ('recipe.rank', 8)]
    """
    if isinstance(run, dict):
        rows = [flat(item, f"{path}.{key}" if path else key) for key, item in run.items()]
        return [row for part in rows for row in part]
    if isinstance(run, list):
        if any(isinstance(item, dict | list) for item in run):
            rows = [flat(item, f"{path}[{i}]") for i, item in enumerate(run)]
            return [row for part in rows for row in part]
        return [(path, ", ".join("none" if item is None else str(item) for item in run))]
    return [(path, str(run).lower() if isinstance(run, bool) else run)]  # type: ignore[list-item]
