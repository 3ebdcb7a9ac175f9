"""Reports on disk: read and merge results.json files, write results and pages whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraloom.folders import whole_file, write_text
from loraloom.report.document import Report
from loraloom.untrusted import read_json

RESULTS = "results.json"


def read(paths: Sequence[Path | str]) -> Report:
    """One report from one or more results.json files or folders that hold one.

    Several are put one after the other: panel titles and the entries of ``run`` get the title of their report, and the
    folder's name where two have the same title.

    Raises:
        FileNotFoundError: a path or its results.json is not there.
        ValueError: no path is given, or a file is torn or not a report; one line says which file and why.
    """
    if not paths:
        raise ValueError("no results are named; give results.json files or folders that hold one")
    files = [path / RESULTS if path.is_dir() else path for path in map(Path, paths)]
    reports = [_read(file) for file in files]
    return reports[0] if len(reports) == 1 else _join(files, reports)


def _read(file: Path) -> Report:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; a run folder holds {RESULTS}")
    content = read_json(file)
    try:
        return Report.from_json(content)
    except ValueError as fault:
        raise ValueError(f"{file}: {fault}") from None


def _join(files: Sequence[Path], reports: Sequence[Report]) -> Report:
    titles = [report.title for report in reports]
    names = [
        title if titles.count(title) == 1 else f"{title} ({file.absolute().parent.name})"
        for file, title in zip(files, titles, strict=True)
    ]
    names = [name if names.count(name) == 1 else f"{name} #{i + 1}" for i, name in enumerate(names)]
    pairs = list(zip(names, reports, strict=True))
    return Report(
        title=f"{len(reports)} reports: {', '.join(names)}",
        summary="\n\n".join(f"{name}: {report.summary}" for name, report in pairs),
        panels=tuple(
            replace(panel, title=f"{panel.title} ({name})") for name, report in pairs for panel in report.panels
        ),
        run={name: report.run for name, report in pairs},
        records=tuple({"report": name, **record} for name, report in pairs for record in report.records),
    )


def write(report: Report, folder: Path | str) -> None:
    """Write results.json, report.md and report.html into the folder (made if needed), each whole or not at all."""
    folder = Path(folder)
    texts = {
        RESULTS: json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": report.to_markdown(),
        "report.html": report.to_html(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        replace_file(folder / name, text)


def page(paths: Sequence[Path | str], out: Path | str = "report.html", *, overwrite: bool = False) -> Path:
    """One HTML page from results.json files or folders that hold one (see ``read``); returns where it is.

    Raises:
        FileExistsError: ``out`` is there already and ``overwrite`` is off.
    """
    out = Path(out)
    if out.is_dir() or (out.exists() and not overwrite):
        raise FileExistsError(f"{out} is {'a folder' if out.is_dir() else 'there already; --overwrite replaces it'}")
    html = read(paths).to_html()
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, html)
    return out


def replace_file(path: Path | str, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new and nothing between."""
    with whole_file(Path(path), overwrite=True) as draft:
        write_text(draft, text)
