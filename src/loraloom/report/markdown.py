"""A report as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from loraloom.report.grid import flat, grid, spelled
from loraloom.report.panels import Cell, Table

if TYPE_CHECKING:
    from loraloom.report.document import Report


def escape(text: str) -> str:
    """Text that markdown shows as it is: no table break, no HTML, no emphasis, no line break."""
    for char in "\\`*_[]<>|#":
        text = text.replace(char, "\\" + char)
    return " ".join(text.split())


def _table(columns: tuple[str, ...], rows: list[tuple[Cell, ...]]) -> str:
    numeric = [all(not isinstance(row[j], str) for row in rows) for j in range(len(columns))]
    lines = [[escape(column) for column in columns], ["--:" if right else ":--" for right in numeric]]
    lines += [[escape(text) for text in row] for row in spelled(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def markdown(report: Report, figures: Sequence[str] = ()) -> str:
    """The whole report; every panel as a heading, its image where there is one, its note, a table and the command.

    A command that makes all panels is told once, before them.
    """
    images, commands = iter(figures), {panel.command for panel in report.panels}
    shared = len(report.panels) > 1 and len(commands) == 1
    parts = [f"# {escape(report.title)}"]
    parts += [escape(part) for part in report.summary.split("\n\n") if part.strip()]
    parts += [f"All of it is made by:\n\n{_code(command)}" for command in commands if shared and command]
    for panel in report.panels:
        parts.append(f"## {escape(panel.title)}")
        if not isinstance(panel, Table) and (image := next(images, "")):
            parts.append(f"![{escape(panel.title)}]({quote(image)})")
        if panel.note:
            parts.append(escape(panel.note))
        parts.append(_table(*grid(panel)))
        if panel.command and not shared:
            parts.append(f"Made by:\n\n{_code(panel.command)}")
    if report.run:
        rows: list[tuple[Cell, ...]] = [(key, "–" if value is None else str(value)) for key, value in flat(report.run)]
        parts += ["## What was run", _table(("key", "value"), rows)]
    return "\n\n".join(parts) + "\n"
