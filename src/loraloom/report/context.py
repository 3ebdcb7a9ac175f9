"""What was run: the command, versions and machine, and where adapters came from; a report without it proves little."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from loraloom.report.document import Report
from loraloom.report.grid import flat
from loraloom.report.panels import JSON
from loraloom.store import RECORD
from loraloom.untrusted import read_json

PACKAGES = ("loraloom", "torch", "transformers", "peft", "accelerate")


def ran(report: Report, command: str, sources: Iterable[Path] = ()) -> Report:
    """The report with the command on every panel that has none, and what it ran on.

    Args:
        report: what was found.
        command: the command line that makes it again.
        sources: adapter folders that it is about; of each the recipe and seed are told, as its record has them.

    Example:
        >>> from loraloom.report.panels import Table
        >>> made = ran(Report("r", "s", (Table("t", ("a",), ((1,),)),)), "loraloom probe ...")
        >>> made.panels[0].command, made.run["command"], sorted(made.run["machine"])
        ('loraloom probe ...', 'loraloom probe ...', ['cores', 'processor', 'python', 'system'])
    """
    panels = tuple(replace(panel, command=panel.command or command) for panel in report.panels)
    sources = list(sources)
    names = [path.name for path in sources]
    made = {
        (path.name if names.count(path.name) == 1 else str(path)): told for path in sources if (told := _origin(path))
    }
    about = {"command": command, **({"adapters": _compared(made)} if made else {})}
    return replace(report, panels=panels, run={**report.run, **about, "versions": versions(), "machine": machine()})


def _compared(made: Mapping[str, Mapping[str, JSON]]) -> dict[str, JSON]:
    """What all have in common once, under ``all`` where they are several, and of each what it has of its own.

    Example:
        >>> _compared({"a": {"seed": 0, "model": "m"}, "b": {"seed": 1, "model": "m"}})
        {'all': {'model': 'm'}, 'a': {'seed': 0}, 'b': {'seed': 1}}
    """
    if len(made) == 1:
        return {name: dict(told) for name, told in made.items()}
    first = next(iter(made.values()))
    same = {key: value for key, value in first.items() if all(told.get(key) == value for told in made.values())}
    own = {name: {key: value for key, value in told.items() if key not in same} for name, told in made.items()}
    return {"all": same, **own} if same else own


def versions() -> dict[str, JSON]:
    """Versions of what computes, by package."""
    found: dict[str, JSON] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a source tree that is not installed
            continue
    return found


def machine() -> dict[str, JSON]:
    """Processor, cores, system and Python."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _origin(path: Path) -> dict[str, JSON]:
    """Operation, seed and arguments of an adapter folder by dotted keys; nothing where it tells none."""
    file = path / RECORD
    told = read_json(file) if file.is_file() else None
    if not isinstance(told, dict):
        return {}
    arguments = told.get("arguments")
    held = {key: told.get(key) for key in ("operation", "seed")} | (arguments if isinstance(arguments, dict) else {})
    return {key: value for key, value in flat(held) if value not in (None, "")}
