"""Commands that cannot write, or are stopped: one line, status 2 or 130, nothing lost and nothing left over."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from child import Child, quick_folder
from crash.operations import content, inputs
from loraloom.cli import app
from loraloom.safefile import Writer

ALL = bool(os.environ.get("LORALOOM_ALL_MOMENTS"))
COMMANDS = {
    "merge": ("merge", "a", "b", "-o", "out", "--extras", "average", "--overwrite"),
    "prune": ("prune", "a", "-o", "out", "--density", "0.5", "--overwrite"),
    "calibrate": ("calibrate", "a", "-o", "out.safetensors", "--overwrite"),
    "probe": ("probe", "interference", "a", "b", "-o", "out.json", "--overwrite"),
    "report": ("report", "results.json", "-o", "out.html", "--overwrite"),
}


@pytest.fixture
def place() -> Iterator[Path]:
    with quick_folder() as folder:
        folder.chmod(0o755)
        yield inputs(folder)


def told_by(words: tuple[str, ...], folder: Path, before: Callable[[], object]) -> tuple[int, list[str]]:
    """Run a command in a child after ``before``: its status, and the lines of its errors."""

    def work(tell: Callable[[str], None]) -> None:
        os.chdir(folder)
        sys.argv = ["loraloom", *words]
        before()
        done = CliRunner().invoke(app, list(words), prog_name="loraloom")
        tell(str(done.exit_code))
        for line in done.stderr.splitlines():
            tell(line)

    child = Child(work)
    lines = list(iter(partial(child.line, 120), None))
    assert child.end() == 0
    return int(lines[0]), lines[1:]


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))


def nobody() -> None:
    """Nobody may write to a folder of another; root may write anywhere."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    else:
        Path.cwd().chmod(0o555)


def ctrl_c() -> None:
    mock.patch.object(Writer, "finish", side_effect=KeyboardInterrupt).start()
    mock.patch("loraloom.report.files.write_text", side_effect=KeyboardInterrupt).start()


FAULTS = {
    "full": (small_files, 2, "File too large"),
    "rights": (nobody, 2, "Permission denied"),
    "stopped": (ctrl_c, 130, "stopped"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_and_all_is_as_before(place: Path, fault: str) -> None:
    before, status, said = FAULTS[fault]
    held = {path.name: content(path) for path in place.iterdir()}
    some = ("merge", "report", *(["probe"] if fault == "stopped" else []))
    for name, words in COMMANDS.items() if ALL else [(name, COMMANDS[name]) for name in some]:
        code, lines = told_by(words, place, before)
        place.chmod(0o755)
        assert (code, len(lines)) == (status, 1), (name, code, lines)
        assert ("is kept" in lines[-1]) == (fault == "stopped" and name == "probe")
        assert said in lines[-1] and lines[-1].startswith(f"loraloom {name}")
        assert ".loraloom-tmp" not in lines[-1]
        assert {path.name: content(path) for path in place.iterdir()} == held
