"""Panels as figures for a paper: drawn here, so that neither a browser nor a plotting library is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.folders import whole_file
from loraloom.report.drawing import Drawing, fitted, width
from loraloom.report.labels import LEGEND, ROW, shortened
from loraloom.report.look import DASHES, LIGHT, MARKED, SYMBOLS, colour, contrast, sign, span, ticks
from loraloom.report.panels import Bars, Curve, Heatmap, Panel, Series, Table, numbers

if TYPE_CHECKING:
    from loraloom.report.document import Report

WIDE, HIGH = 640.0, 400.0
TEXT, LABEL = 12.0, 13.0
MOST_LABEL = 150.0  # px that the name of a category may take
INK, MUTED, GRID, LINE, PAPER = (LIGHT[name] for name in ("ink", "muted", "grid", "line", "paper"))


def figure(panel: Panel, groups: Sequence[str] = ()) -> Drawing:
    """A curve, bars or a heat map as a drawing, dark on white.

    Args:
        panel: what to draw.
        groups: what series are called before their first comma, in the order of their colours; so that one name has
            one colour in all figures of a report.

    Raises:
        ValueError: the panel is a table.

    Example:
        >>> curve = Curve("Path", "t", "accuracy", (Series("CoTo", (0, 1), (0.9, 0.8)),))
        >>> ">accuracy</text>" in figure(curve).svg()
        True
    """
    if isinstance(panel, Table):
        raise ValueError(f"{panel.title!r} is a table, which is no figure")
    if isinstance(panel, Heatmap):
        return _heatmap(panel)
    return _curve(panel, groups) if isinstance(panel, Curve) else _bars(panel, groups)


def groups_of(report: Report) -> list[str]:
    """What the series of a report are called before their first comma, once each, in order."""
    series = (one for panel in report.panels if isinstance(panel, Curve | Bars) for one in panel.series)
    return list(dict.fromkeys(one.name.partition(", ")[0] for one in series))


def figures(report: Report) -> dict[str, Drawing]:
    """Every figure of a report by a name for its file: ``figure-1-share-of-...``.

    Example:
        >>> from loraloom.report.document import Report
        >>> list(figures(Report("r", "s", (Curve("The path", "t", "p", (Series("a", (0,), (1,)),)),))))
        ['figure-1-the-path']
    """
    shown = [panel for panel in report.panels if not isinstance(panel, Table)]
    groups = groups_of(report)
    names = [re.sub(r"[^a-z0-9]+", "-", panel.title.lower()).strip("-")[:60].strip("-") for panel in shown]
    return {
        f"figure-{at + 1}" + (f"-{name}" if name else ""): figure(panel, groups)
        for at, (panel, name) in enumerate(zip(shown, names, strict=True))
    }


def write_figures(report: Report, folder: Path | str) -> list[Path]:
    """Every figure of a report as SVG and PNG in a folder, made if needed; files of their names are replaced.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, drawing in figures(report).items():
        for form, content in (("svg", drawing.svg().encode()), ("png", drawing.png())):
            with whole_file(folder / f"{name}.{form}", overwrite=True) as draft:
                draft.write_bytes(content)
            made.append(folder / f"{name}.{form}")
    return made


# --- axes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where the plot lies on the sheet, and how values become places."""

    left: float
    top: float
    right: float
    bottom: float
    x: Callable[[float], float]
    y: Callable[[float], float]


def _frame(
    sheet: Drawing,
    top: float,
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
    labels: Sequence[str],
    below: float,
) -> Frame:
    left = 44.0 + max((width(text, TEXT) for text in labels), default=0.0)
    right, bottom = sheet.width - 16.0, sheet.height - below

    def x(value: float) -> float:
        return left + (value - x_ends[0]) / (x_ends[1] - x_ends[0]) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - y_ends[0]) / (y_ends[1] - y_ends[0]) * (bottom - top)

    return Frame(left, top, right, bottom, x, y)


def _ends(values: Sequence[float], around: float) -> tuple[float, float]:
    """Ends of an axis with some room around the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * around or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _y_axis(sheet: Drawing, frame: Frame, places: Sequence[float], texts: Sequence[str], label: str) -> None:
    for place, text in zip(places, texts, strict=True):
        sheet.line([(frame.left, frame.y(place)), (frame.right, frame.y(place))], GRID)
        sheet.line([(frame.left - 4, frame.y(place)), (frame.left, frame.y(place))], LINE)
        sheet.text((frame.left - 8, frame.y(place)), text, MUTED, TEXT, "end")
    sheet.line([(frame.left, frame.top), (frame.left, frame.bottom)], LINE)
    sheet.line([(frame.left, frame.bottom), (frame.right, frame.bottom)], LINE)
    middle = (frame.top + frame.bottom) / 2
    sheet.text((14, middle), fitted(label, LABEL, frame.bottom - frame.top + 40), INK, LABEL, "middle", turned=True)


def _x_axis(sheet: Drawing, frame: Frame, places: Sequence[float], texts: Sequence[str], label: str) -> None:
    """Names that do not fit side by side stand upright."""
    upright = _upright(texts, (frame.right - frame.left) / max(1, len(places)))
    for place, text in zip(places, texts, strict=True):
        x = frame.x(place)
        sheet.line([(x, frame.bottom), (x, frame.bottom + 4)], LINE)
        if upright:
            sheet.text((x, frame.bottom + 8), fitted(text, TEXT, MOST_LABEL), MUTED, TEXT, "end", turned=True)
        else:
            sheet.text((x, frame.bottom + 15), text, MUTED, TEXT, "middle")
    middle = (frame.left + frame.right) / 2
    sheet.text((middle, sheet.height - 14), fitted(label, LABEL, sheet.width - 40), INK, LABEL, "middle")


def _upright(texts: Sequence[str], room: float) -> bool:
    return any(width(text, TEXT) > room - 8 for text in texts)


def _below(texts: Sequence[str], room: float) -> float:
    """Room below the plot for its tick labels and the axis label."""
    most = max((width(text, TEXT) for text in texts), default=0.0)
    return 34.0 + (min(most, MOST_LABEL) + 12 if _upright(texts, room) else 22.0)


def _legend(sheet: Drawing, series: Sequence[Series], draw: Callable[[int, float, float], None]) -> float:
    """Names with their signs above the plot, in rows; returns where the plot may begin."""
    x, y = 16.0, 18.0
    if len(series) < 2:
        return 16.0
    for at, name in enumerate(shortened([one.name for one in series], LEGEND)):
        if x > 16 and x + 46 + width(name, TEXT) > sheet.width - 16:
            x, y = 16.0, y + 20
        draw(at, x, y)
        sheet.text((x + 34, y), name, INK, TEXT)
        x += 34 + width(name, TEXT) + 20
    return y + 20


def _hue(series: Sequence[Series], at: int, groups: Sequence[str]) -> tuple[str, int, int]:
    """Colour, marker and variant: the name up to the first comma gives colour and marker, the rest the dash."""
    own = [one.name.partition(", ") for one in series]
    known = list(dict.fromkeys([*groups, *(name for name, _, _ in own)]))
    variants = list(dict.fromkeys(rest for _, _, rest in own))
    group = known.index(own[at][0])
    hue, marker = sign(group)
    return LIGHT["hues"][hue], marker, variants.index(own[at][2])


# --- kinds --------------------------------------------------------------------------------------------------------


def _curve(panel: Curve, groups: Sequence[str]) -> Drawing:
    sheet = Drawing(WIDE, HIGH, PAPER, f"{panel.title}: {panel.y_label} by {panel.x_label}")
    named = [x for one in panel.series for x in one.x if isinstance(x, str)]
    places = list(dict.fromkeys(str(x) for one in panel.series for x in one.x)) if named else []

    def at(x: float | str) -> float:
        return float(places.index(str(x))) if places else float(x)

    def dash(index: int, variant: int) -> str:
        return DASHES[(variant if len(panel.series[index].x) <= MARKED else index) % len(DASHES)]

    def draw(index: int, x: float, y: float) -> None:
        hue, symbol, variant = _hue(panel.series, index, groups)
        sheet.line([(x, y), (x + 28, y)], hue, 2.2, dash(index, variant))
        if len(panel.series[index].x) <= MARKED:
            sheet.mark((x + 14, y), SYMBOLS[symbol], hue, open_=variant % 2 == 1)

    top = _legend(sheet, panel.series, draw)
    values = [v for one in panel.series for v in (*one.y, *(one.low or ()), *(one.high or ()))]
    y_ends = _ends(values, 0.05)
    x_ends = _ends([at(x) for one in panel.series for x in one.x], 0.03)
    y_ticks = ticks(*y_ends)
    x_ticks = [float(i) for i in range(len(places))] if places else ticks(*x_ends, 8)
    x_texts = shortened(places) or numbers(x_ticks)
    labels = numbers(y_ticks)
    frame = _frame(sheet, top, x_ends, y_ends, labels, _below(x_texts, (WIDE - 80) / max(1, len(x_texts))))
    _y_axis(sheet, frame, y_ticks, labels, panel.y_label)
    _x_axis(sheet, frame, x_ticks, x_texts, panel.x_label)
    for index, one in enumerate(panel.series):
        if one.low is not None and one.high is not None:
            forth = [(frame.x(at(x)), frame.y(v)) for x, v in zip(one.x, one.high, strict=True)]
            back = [(frame.x(at(x)), frame.y(v)) for x, v in zip(one.x, one.low, strict=True)]
            sheet.area([*forth, *back[::-1]], _hue(panel.series, index, groups)[0], 0.15)
    for index, one in enumerate(panel.series):
        hue, symbol, variant = _hue(panel.series, index, groups)
        points = [(frame.x(at(x)), frame.y(v)) for x, v in zip(one.x, one.y, strict=True)]
        if len(points) > 1:
            sheet.line(points, hue, 2.2, dash(index, variant))
        for point in points if len(points) <= MARKED else ():
            sheet.mark(point, SYMBOLS[symbol], hue, open_=variant % 2 == 1)
    return sheet


def _bars(panel: Bars, groups: Sequence[str]) -> Drawing:
    sheet = Drawing(WIDE, HIGH, PAPER, f"{panel.title}: {panel.y_label} of {', '.join(panel.categories[:20])}")

    def bar(index: int, x: float, y: float, wide: float, high: float) -> None:
        """Variants are told by stripes, too."""
        hue, _, _ = _hue(panel.series, index, groups)
        sheet.box(x, y, wide, high, hue, 1.0 if index == 0 else 0.35)
        around = [(x, y), (x + wide, y), (x + wide, y + high), (x, y + high), (x, y)]
        sheet.line(around, hue, 1.2)
        gap = (0.0, 3.0, 6.0, 9.0, 4.5, 12.0, 7.5)[index % 7]
        for at in range(1, int(high / gap) + 1) if gap else ():
            sheet.line([(x, y + high - at * gap), (x + wide, y + high - at * gap)], hue, 1.2)

    top = _legend(sheet, panel.series, lambda index, x, y: bar(index, x + 4, y - 6, 22, 12))
    values = [0.0, *(v for one in panel.series for v in (*one.y, *(one.low or ()), *(one.high or ())))]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 1.0
    y_ends = (low - room if low < 0 else 0.0, high + room if high > 0 or low == high else 0.0)
    y_ticks = ticks(*y_ends)
    labels = numbers(y_ticks)
    count = len(panel.categories)
    names = shortened(panel.categories)
    below = _below(names, (WIDE - 80) / max(1, count))
    frame = _frame(sheet, top, (-0.5, count - 0.5), y_ends, labels, below - 8)
    _y_axis(sheet, frame, y_ticks, labels, panel.y_label)
    _x_axis(sheet, frame, list(map(float, range(count))), names, "")
    wide = (frame.right - frame.left) / max(1, count) * 0.76 / len(panel.series)
    for index, one in enumerate(panel.series):
        for at, (name, value) in enumerate(zip(one.x, one.y, strict=True)):
            middle = frame.x(panel.categories.index(str(name))) + (index - (len(panel.series) - 1) / 2) * wide
            ends = sorted((frame.y(0.0), frame.y(value)))
            bar(index, middle - wide * 0.46, ends[0], wide * 0.92, ends[1] - ends[0])
            if one.low is not None and one.high is not None:
                _whisker(sheet, middle, frame.y(one.low[at]), frame.y(one.high[at]), min(4.0, wide / 3))
    sheet.line([(frame.left, frame.y(0.0)), (frame.right, frame.y(0.0))], LINE)
    return sheet


def _whisker(sheet: Drawing, x: float, low: float, high: float, half: float) -> None:
    sheet.line([(x, low), (x, high)], INK, 1.4)
    for y in (low, high):
        sheet.line([(x - half, y), (x + half, y)], INK, 1.4)


def _heatmap(panel: Heatmap) -> Drawing:
    columns, rows = len(panel.x), len(panel.y)
    each = 16.0 if rows > 24 else max(24.0, 72.0 / max(1, rows))
    x_texts, y_texts = shortened(numbers(panel.x)), shortened(numbers(panel.y), ROW)
    left = 44.0 + max((width(text, TEXT) for text in y_texts), default=0.0)
    known = [z for row in panel.z for z in row if z is not None]
    low, high, both = span(known)
    scale_texts = numbers(ticks(low, high, 5))
    aside = 34.0 + max(width(text, TEXT) for text in scale_texts) + (22 if panel.z_label else 0)
    wide = (WIDE - left - aside - 16) / max(1, columns)
    below = _below(x_texts, wide) if columns <= 24 else 56.0
    sheet = Drawing(WIDE, round(24 + each * rows + below), PAPER, f"{panel.title}: {panel.y_label} by {panel.x_label}")
    right, bottom = left + wide * columns, 16 + each * rows
    scale = LIGHT["diverging" if both else "scale"]
    few = columns <= 12 and rows <= 24 and columns * rows <= 250 and wide >= 34
    shown = dict(
        zip(
            [(i, j) for i, row in enumerate(panel.z) for j, z in enumerate(row) if z is not None],
            numbers(known, 3),
            strict=True,
        )
    )
    for i, row in enumerate(panel.z):
        for j, z in enumerate(row):
            share = 0.5 if z is None or high == low else (z - low) / (high - low)
            fill = LIGHT["empty"] if z is None else colour(scale, share)
            sheet.box(left + j * wide, 16 + i * each, wide - 1, each - 1, fill)
            if few and z is not None:
                ink = max((INK, PAPER), key=lambda hue, fill=fill: contrast(hue, fill))  # type: ignore[misc]
                sheet.text((left + (j + 0.5) * wide, 16 + (i + 0.5) * each), shown[i, j], ink, 11, "middle")
    frame = Frame(left, 16, right, bottom, lambda j: left + (j + 0.5) * wide, lambda i: 16 + (i + 0.5) * each)
    every = 1 if columns <= 24 else -(-columns // 12)
    kept = list(range(0, columns, every))
    _x_axis(sheet, frame, list(map(float, kept)), [x_texts[j] for j in kept], panel.x_label)
    for i, text in enumerate(y_texts):
        sheet.text((left - 8, 16 + (i + 0.5) * each), text, MUTED, TEXT, "end")
    label = fitted(panel.y_label, LABEL, max(40.0, bottom))
    sheet.text((14, (16 + bottom) / 2), label, INK, LABEL, "middle", turned=True)
    if high > low and known:
        _colourbar(sheet, (right + 14, 16, bottom), (low, high), scale, panel.z_label)
    return sheet


def _colourbar(
    sheet: Drawing, place: tuple[float, float, float], ends: tuple[float, float], scale: list, label: str
) -> None:
    x, top, bottom = place
    steps = 64
    high = (bottom - top) / steps
    for at in range(steps):
        sheet.box(x, bottom - (at + 1) * high, 12, high + 0.3, colour(scale, (at + 0.5) / steps))
    marks = ticks(*ends, 5 if bottom - top > 90 else 2)
    for value, text in zip(marks, numbers(marks), strict=True):
        share = 0.5 if ends[0] == ends[1] else (value - ends[0]) / (ends[1] - ends[0])
        sheet.text((x + 18, bottom - share * (bottom - top)), text, MUTED, TEXT)
    if label:
        middle = (top + bottom) / 2
        sheet.text(
            (sheet.width - 12, middle), fitted(label, LABEL, max(40.0, bottom)), INK, LABEL, "middle", turned=True
        )
