"""Reports on disk: read results and records of any kind, write pages whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loraloom.folders import whole_file, whole_folder, write_text
from loraloom.report.document import Report
from loraloom.report.figures import write_figures
from loraloom.report.records import report_of
from loraloom.store import RECORD
from loraloom.untrusted import read_json

RESULTS = "results.json"


def read(paths: Sequence[Path | str]) -> Report:
    """One report from one or more files, or folders that hold results or an adapter.

    A file holds a report (``results.json``, what a probe wrote), the record of an adapter (``loraloom.json``) or rows
    (``loraloom evaluate --json``). Several are put one after the other: panel titles and the entries of ``run`` get the
    title of their report, and the folder's name where two have the same title.

    Raises:
        FileNotFoundError: a path is not there, or a folder holds neither results nor an adapter's record.
        ValueError: no path is given, or a file is torn or of another kind; one line says which file and why.
    """
    if not paths:
        raise ValueError("no results are named; give results.json files or folders that hold one")
    files = [_file(Path(path)) for path in paths]
    reports = [_read(file) for file in files]
    return reports[0] if len(reports) == 1 else _join(files, reports)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in (RESULTS, RECORD) if (path / name).is_file()]
    return found[0] if found else path / RESULTS


def _read(file: Path) -> Report:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; a run folder holds {RESULTS}, an adapter {RECORD}")
    content = read_json(file)
    name = file.absolute().parent.name if file.name in (RESULTS, RECORD) else file.stem
    try:
        return report_of(content, name)
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


def page(
    paths: Sequence[Path | str],
    out: Path | str = "report.html",
    *,
    figures: Path | str | None = None,
    overwrite: bool = False,
) -> Path:
    """One page from results (see ``read``); returns where it is.

    Args:
        paths: what to read.
        out: HTML, or markdown where it ends in ``.md``.
        figures: a folder for every figure as SVG and PNG; of markdown, the figures stand in the page.
        overwrite: replace what is there; a folder only if it holds figures of a report and nothing else.

    Raises:
        FileExistsError: ``out`` or ``figures`` is there, now or in the end, and is not to be replaced.
        ValueError: ``out`` ends in neither ``.html`` nor ``.md``, or is within ``figures``.
    """
    out, kept = Path(out), None if figures is None else Path(figures)
    if out.is_dir():
        raise FileExistsError(f"{out} is a folder")
    for path in (out, *([kept] if kept else [])):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} is there already; --overwrite replaces it")
    if out.suffix.lower() not in (".html", ".htm", ".md"):
        raise ValueError(f"{out}: a page ends in .html or .md")
    if kept and out.resolve().is_relative_to(kept.resolve()):
        raise ValueError(f"{kept} would hold the page, too; figures take a folder of their own")
    report = read(paths)
    with whole_file(out, overwrite=overwrite) as draft, _drawn(report, kept, overwrite) as drawn:
        shown = [Path(os.path.relpath(path, out.parent)).as_posix() for path in drawn]
        write_text(draft, report.to_markdown(shown) if out.suffix.lower() == ".md" else report.to_html())
    return out


@contextlib.contextmanager
def _drawn(report: Report, folder: Path | None, overwrite: bool) -> Iterator[list[Path]]:
    """The figures as SVG, which all lie in the folder when the block ends well."""
    if folder is None:
        yield []
        return
    target, what = Path(os.path.realpath(folder)), "figures of a report"
    with whole_folder(target, overwrite=overwrite, mark=_are_figures, what=what) as work:
        yield [folder / path.name for path in write_figures(report, work) if path.suffix == ".svg"]


def _are_figures(folder: Path) -> bool:
    """Whether a folder holds what ``write_figures`` wrote, and nothing else."""
    return all(re.fullmatch(r"figure-\d+(-[a-z0-9-]+)?\.(svg|png)", path.name) for path in folder.iterdir())


def replace_file(path: Path | str, text: str, *, overwrite: bool = True) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new and nothing between.

    Raises:
        FileExistsError: it is there, now or when it is to be replaced, and ``overwrite`` is off.
    """
    with whole_file(Path(path), overwrite=overwrite) as draft:
        write_text(draft, text)
