"""A report as one self-contained HTML page: layout and words here, plots drawn in the reader's browser by page.js."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from loraloom.report.grid import flat, grid, spelled
from loraloom.report.labels import LEGEND, ROW, shortened
from loraloom.report.look import LOOK
from loraloom.report.panels import JSON, Bars, Cell, Curve, Heatmap, Panel, Table, number, to_json
from loraloom.report.words import words_of

if TYPE_CHECKING:
    from loraloom.report.document import Report


def webpage(report: Report) -> str:
    """The whole page; every text of the report is escaped, and nothing in it is fetched from anywhere."""
    from plotly.offline import get_plotlyjs

    labels, breadths = _labels(report.panels), _breadths(report.panels)
    return Template(_file("page.html")).substitute(
        title=escape(report.title),
        style=_file("page.css"),
        summary="\n".join(f"<p>{escape(part.strip())}</p>" for part in report.summary.split("\n\n") if part.strip()),
        contents=_contents(report.panels, labels),
        panels="\n".join(_panel(i, panel, labels[i], breadths[i]) for i, panel in enumerate(report.panels)),
        run=_run(report),
        words=_words(report),
        data=_script_json({"panels": [_drawn(panel) for panel in report.panels], "look": LOOK}),
        plotly=get_plotlyjs(),
        script=_file("page.js"),
    )


def _file(name: str) -> str:
    return files("loraloom.report").joinpath(name).read_text(encoding="utf-8")


def _script_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _drawn(panel: Panel) -> dict[str, JSON]:
    """A panel as page.js draws it: with the short forms of its names."""
    short: dict[str, list[str]] = {}
    if isinstance(panel, Heatmap):
        short = {"x": shortened(panel.x), "y": shortened(panel.y, ROW)}
    elif isinstance(panel, Bars | Curve):
        short = {"series": shortened([one.name for one in panel.series], LEGEND)}
        short |= {"x": shortened(panel.categories)} if isinstance(panel, Bars) else {}
    return to_json(panel) | {"short": short}


def _labels(panels: tuple[Panel, ...]) -> list[str]:
    """``Figure 1``, ``Table 1``, ``Figure 2``, ...: each kind counts for itself."""
    words = ["Table" if isinstance(panel, Table) else "Figure" for panel in panels]
    return [f"{word} {words[: i + 1].count(word)}" for i, word in enumerate(words)]


def _contents(panels: tuple[Panel, ...], labels: list[str]) -> str:
    links = (
        f'<li><a href="#panel-{i}">{label}: {escape(panel.title)}</a></li>'
        for i, (panel, label) in enumerate(zip(panels, labels, strict=True))
    )
    return f'<nav aria-label="Figures and tables"><ol>{"".join(links)}</ol></nav>' if len(panels) > 1 else ""


def _panel(index: int, panel: Panel, label: str, breadth: str) -> str:
    note = escape(panel.note)
    parts = [
        f'<section class="panel{breadth}" id="panel-{index}" aria-labelledby="title-{index}">',
        f'<h2 id="title-{index}"><span class="label">{label}</span> {escape(panel.title)}</h2>',
    ]
    if isinstance(panel, Table):
        parts += [
            f'<p class="note">{note}</p>' if note else "",
            _table(panel, f"{label}: {panel.title}", sortable=True),
        ]
    else:
        parts += [
            f'<figure><div class="plot" id="plot-{index}" role="img" aria-label="{escape(describe(panel))}"></div>',
            f"<figcaption>{note}</figcaption>" if note else "",
            f'</figure><div class="tools"><details><summary>Values of {label.lower()}</summary>',
            _table(panel, f"Values of {label}: {panel.title}", sortable=False),
            f"</details>{_save(index, label, 'svg')}{_save(index, label, 'png')}</div>",
        ]
    if panel.command:
        parts.append(
            f'<div class="command"><pre tabindex="0" aria-label="Command that makes {label.lower()} again">'
            f'<code>{escape(panel.command)}</code></pre><button type="button">Copy</button></div>'
        )
    return "\n".join([part for part in parts if part] + ["</section>"])


def _breadths(panels: tuple[Panel, ...]) -> list[str]:
    """Classes of panels in two columns: ``wide`` takes a whole row, and so does one that is ``alone`` in its row."""
    found = [" wide" if _is_wide(panel) else "" for panel in panels]
    column = 0
    for at, breadth in enumerate(found):
        if breadth:
            column = 0
        elif column == 0 and (at + 1 == len(found) or found[at + 1]):
            found[at] = " wide alone"
        else:
            column = 1 - column
    return found


def _is_wide(panel: Panel) -> bool:
    """Whether the panel asks for the whole width of the page."""
    if isinstance(panel, Table):
        return len(panel.columns) > 4 or any(
            isinstance(cell, str) and len(cell) > 48 for row in panel.rows for cell in row
        )
    if isinstance(panel, Heatmap):
        return len(panel.x) > 14
    return isinstance(panel, Bars) and len(panel.categories) * len(panel.series) > 36


def _save(index: int, label: str, form: str) -> str:
    name = label.lower().replace(" ", "-")
    return (
        f'<button type="button" data-plot="{index}" data-format="{form}" data-name="{name}" '
        f'aria-label="Save {label.lower()} as {form.upper()}">{form.upper()}</button>'
    )


def describe(panel: Panel) -> str:
    """What a plot shows, in words, for those who do not see it.

    Example:
        >>> from loraloom.report.panels import Series
        >>> describe(Curve("Path", "t", "accuracy", (Series("CoTo", (0, 1), (0.9, 0.8)),)))
        'Line chart of accuracy by t. CoTo: from 0.9 at 0 to 0.8 at 1, lowest 0.8 at 1, highest 0.9 at 0.'
    """
    if isinstance(panel, Table):
        return f"Table of {', '.join(panel.columns)}."
    if isinstance(panel, Heatmap):
        return f"Heat map of {panel.y_label} by {panel.x_label}. {_extremes(panel)}"
    lines = isinstance(panel, Curve)
    about = f"Line chart of {panel.y_label} by {panel.x_label}." if isinstance(panel, Curve) else ""
    words = [about or f"Bar chart of {panel.y_label}."]
    for series in panel.series:
        points = [(y, number(x)) for x, y in zip(series.x, series.y, strict=True)]
        if not points:
            words.append(f"{series.name}: empty.")
            continue
        (low, low_at), (high, high_at) = min(points, key=lambda p: p[0]), max(points, key=lambda p: p[0])
        ends = f"from {number(points[0][0])} at {points[0][1]} to {number(points[-1][0])} at {points[-1][1]}, "
        span = f"lowest {number(low)} at {low_at}, highest {number(high)} at {high_at}."
        words.append(f"{series.name}: {ends if lines else ''}{span}")
    return " ".join(words)


def _extremes(panel: Heatmap) -> str:
    cells = [
        (z, f"{number(y)}, {number(x)}")
        for y, row in zip(panel.y, panel.z, strict=True)
        for x, z in zip(panel.x, row, strict=True)
        if z is not None
    ]
    if not cells:
        return "It is empty."
    (low, low_at), (high, high_at) = min(cells, key=lambda c: c[0]), max(cells, key=lambda c: c[0])
    return f"Lowest {number(low)} at {low_at}, highest {number(high)} at {high_at}."


def _table(panel: Panel, name: str, *, sortable: bool) -> str:
    columns, rows = grid(panel)
    numeric = [(isinstance(panel, Bars | Curve | Heatmap) and j > 0) or _numeric(rows, j) for j in range(len(columns))]
    kinds = [' class="number"' if right else "" for right in numeric]
    button = '<button type="button">{}</button>' if sortable else "{}"
    head = "".join(
        f'<th scope="col"{kinds[j]}>{button.format(escape(column)) if sortable or column else "<span></span>"}</th>'
        for j, column in enumerate(columns)
    )
    lines = []
    for row, texts in zip(rows, spelled(rows), strict=True):
        cells = (_cell(cell, text, j, kinds[j]) for j, (cell, text) in enumerate(zip(row, texts, strict=True)))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    css = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table{css}>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


def _numeric(rows: list[tuple[Cell, ...]], column: int) -> bool:
    return all(not isinstance(row[column], str) for row in rows)


def _cell(cell: Cell, text: str, column: int, css: str) -> str:
    value = "" if cell is None else f' data-value="{escape(str(cell))}"'
    shown = escape(text)
    return f'<th scope="row"{css}{value}>{shown}</th>' if column == 0 else f"<td{css}{value}>{shown}</td>"


def _words(report: Report) -> str:
    """A list of the words that stand in titles, notes, labels and the summary."""
    texts = [report.title, report.summary]
    for panel in report.panels:
        texts += [panel.title, panel.note, *(getattr(panel, name, "") for name in ("x_label", "y_label", "z_label"))]
        texts += [one.name for one in getattr(panel, "series", ())]
        texts += [str(cell) for row in panel.rows for cell in row] if isinstance(panel, Table) else []
    found = words_of(texts)
    if not found:
        return ""
    told = "\n".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in found)
    head = '<section class="words" aria-labelledby="words-title"><h2 id="words-title">Words</h2>'
    return f"{head}\n<dl>\n{told}\n</dl></section>"


def _run(report: Report) -> str:
    rows = [*flat(report.run), ("raw measurements in results.json", len(report.records))]
    body = []
    for key, value in rows:
        text = escape(str(value) if isinstance(value, float) else number(value))  # settings are shown exactly
        shown = f"<pre>{text}</pre>" if "\n" in text else text
        body.append(f'<tr><th scope="row">{escape(key)}</th><td>{shown}</td></tr>')
    head = '<thead><tr><th scope="col">key</th><th scope="col">value</th></tr></thead>'
    return f"<table>{head}\n<tbody>\n{chr(10).join(body)}\n</tbody></table>"
