"""Commands that cannot write, or are stopped: one line, status 2 or 130, nothing lost and nothing left over."""

from __future__ import annotations

import json
import os
import resource
import subprocess
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


@pytest.fixture(scope="module")
def told_by() -> Iterator[Callable[[Path, str, str], tuple[int, list[str]]]]:
    """Runs a command that a fault meets: its status, and the lines of its errors.

    Each is forked from a process without threads. A fork of one that has some, as pytest's workers do, may find a lock
    that nobody is left to open.
    """
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with subprocess.Popen(
        [sys.executable, "-m", "crash.test_commands"],
        cwd=Path(__file__).parents[1],
        env=os.environ | alone,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forking:
        assert forking.stdin and forking.stdout
        requests, answers = forking.stdin, forking.stdout

        def told_by(folder: Path, name: str, fault: str) -> tuple[int, list[str]]:
            print(json.dumps([str(folder), name, fault]), file=requests, flush=True)
            status, lines = json.loads(answers.readline())
            return status, lines

        yield told_by
        requests.close()


def answer() -> None:
    """Do in forked processes what the lines of the standard input ask for.

    All is done once without a fault before: nobody may read the files of a Python that lies in a folder of root's.
    """
    with quick_folder() as folder:
        os.chdir(inputs(folder))
        for words in COMMANDS.values():
            done = CliRunner().invoke(app, words, prog_name="loraloom")
            assert done.exit_code == 0, done.stderr
    for line in sys.stdin:
        folder, name, fault = json.loads(line)

        def work(tell: Callable[[str], None], folder: str = folder, name: str = name, fault: str = fault) -> None:
            os.chdir(folder)
            sys.argv = ["loraloom", *COMMANDS[name]]
            FAULTS[fault][0]()
            done = CliRunner().invoke(app, COMMANDS[name], prog_name="loraloom")
            tell(str(done.exit_code))
            for line in done.stderr.splitlines():
                tell(line)

        child = Child(work)
        status, *lines = iter(partial(child.line, 120), None)
        assert child.end() == 0
        print(json.dumps([int(status), lines]), flush=True)


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
def test_one_line_and_all_is_as_before(
    told_by: Callable[[Path, str, str], tuple[int, list[str]]], place: Path, fault: str
) -> None:
    _, status, said = FAULTS[fault]
    held = {path.name: content(path) for path in place.iterdir()}
    some = ("merge", "report", *(["probe"] if fault == "stopped" else []))
    for name in COMMANDS if ALL else some:
        code, lines = told_by(place, name, fault)
        place.chmod(0o755)
        assert (code, len(lines)) == (status, 1), (name, code, lines)
        assert ("is kept" in lines[-1]) == (fault == "stopped" and name == "probe")
        assert said in lines[-1] and lines[-1].startswith(f"loraloom {name}")
        assert ".loraloom-tmp" not in lines[-1]
        assert {path.name: content(path) for path in place.iterdir()} == held


if __name__ == "__main__":
    answer()
