"""How far a long probe is, on a terminal."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A line on stderr with the time left, where that is a terminal.

    Args:
        name: what runs.
        shown: off in all processes but the first.
    """

    def __init__(self, name: str, *, shown: bool = True) -> None:
        self._name, self._shown = name, shown
        self._bar: Any = None
        self._line: Any = None
        self._total = 0

    def expect(self, scores: int, known: int) -> None:
        """So many more scores are asked for, of which some are known from an earlier run."""
        if not self._shown or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._line = self._bar.add_task(self._name, total=0)
            self._bar.start()
        self._total += scores - known
        self._bar.update(self._line, total=self._total)

    def say(self, line: str) -> None:
        """Tell something, terminal or not."""
        if self._shown:
            print(f"loraloom {self._name}: {line}", file=sys.stderr)

    def advance(self) -> None:
        """One score more."""
        if self._bar is not None:
            self._bar.advance(self._line)

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
