"""What a reader of others' files is, to the tests that damage its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reader:
    """One kind of input.

    Attributes:
        make: writes a whole example into an empty folder.
        read: reads it from there to the end.
        further: what costs more, for one case in ten.
        command: the same on the command line, in that folder; empty if there is none.
        fixed: cases of it in `make test`, and its share of the cases of `make fuzz`.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    further: Callable[[Path], object] = lambda folder: None
    command: tuple[str, ...] = ()
    fixed: int = 16
