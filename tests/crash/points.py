"""Exact moments at which something happens to a run: a line of our code that is reached, or a call of the system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import loraloom
from loraloom.adapter import Adapter  # noqa: F401 - so that nothing is imported while lines are counted

ROOT = str(Path(loraloom.__file__).parent)
WATCHED = tuple(
    f"{ROOT}/{name}.py" for name in ("folders", "safefile", "store", "masks", "measured", "report/files", "stream")
)
CALLS = ("fsync", "fdatasync", "mkdir", "rename", "replace", "link")  # of `os`, that write or name something


def die() -> None:
    """As a kill or a power cut does it: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """As Ctrl-C does it."""
    raise KeyboardInterrupt


def at_line(nth: int, happens: Callable[[], None], run: Callable[[], object]) -> int:
    """Let something happen just before the nth line of the code that writes files; how many lines were reached."""

    def look(reached: int) -> None:
        if reached == nth:
            happens()

    return at_every_line(look, run)


def at_every_line(look: Callable[[int], None], run: Callable[[], object]) -> int:
    """Call ``look`` with their number just before each of these lines; how many there were."""
    reached = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal reached
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            reached += 1
            look(reached)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return reached


def at_call(nth: int, number: int, run: Callable[[], object]) -> bool:
    """Let the nth call that opens to write, makes, syncs or names something fail; whether there were so many."""
    calls = 0

    def faulty(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(
                    number, os.strerror(number), *map(str, args[:1] if isinstance(args[0], str | Path) else ())
                )
            return call(*args, **more)

        return instead

    opened = faulty(Path.open)

    def open_to_write(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        return (opened if set(mode) & set("wx+a") else open_as_ever)(path, mode, *args, **more)

    open_as_ever = Path.open
    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, faulty(getattr(os, name))))
        stack.enter_context(mock.patch.object(Path, "open", open_to_write))
        run()
    return calls >= nth
