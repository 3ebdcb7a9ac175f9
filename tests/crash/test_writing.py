"""Killed, interrupted, out of disk or refused by the system at any moment: the old output is there, or the new one.

`make test` looks at some moments, `make crash` at all; of kills and full disks these are the ones that can differ.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from child import quick_folder, status_of
from crash.operations import OPERATIONS, Place, content, inputs
from crash.points import at_call, at_every_line, at_line, die, interrupt
from loraloom.cli.shell import line_of
from processes import answer_of

ALL = bool(os.environ.get("LORALOOM_ALL_MOMENTS"))


@pytest.fixture(scope="module")
def given() -> Iterator[Path]:
    with quick_folder() as folder:
        yield inputs(folder)


@pytest.fixture(params=OPERATIONS if ALL else ["save", "mask", "page"])
def place(request: pytest.FixtureRequest, given: Path) -> Iterator[Place]:
    with quick_folder() as folder:
        yield Place(request.param, folder, given)


def moments(place: Place, some: int) -> list[int]:
    """Numbers of lines: all, or some of them and the last ones, where the new output takes its place."""
    place.reset()
    lines = at_line(0, die, place.run)
    assert lines > 50
    every = range(1, lines + 1)
    return list(every) if ALL else sorted({*random.Random(0).sample(every, some), *every[-20::5]})


def states(place: Place) -> list[tuple[int, dict[str, bytes | None]]]:
    """All that the folder comes to hold, with the first line before which it does: kills in between leave the same."""
    place.reset()
    seen: list[tuple[int, dict[str, bytes | None]]] = []

    def look(nth: int) -> None:
        found = place.whole()
        if not seen or seen[-1][1] != found:
            seen.append((nth, found))

    at_every_line(look, place.run)
    assert len(seen) > 5
    return seen


def killed_at_every_line(name: str, given: Path) -> list[str]:
    """What is there after a kill at each line before which something else lies there."""
    seen = []
    with quick_folder() as folder:
        place = Place(name, folder, given)
        for nth, _ in states(place):
            place.reset()
            assert status_of(partial(at_line, nth, die, place.run)) == -signal.SIGKILL
            seen.append(place.state())
            place.run()  # what is left over is in nobody's way, and goes
            assert (place.state(), place.debris()) == ("new", [])
    return seen


def test_killed_at_any_line(place: Place) -> None:
    seen = answer_of(killed_at_every_line, place.name, place.given)
    assert set(seen) == {"old", "new"} and seen == sorted(seen, reverse=True)


# Between opening a file and entering its `with` an interrupt leaves it to the garbage collector, which says so.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning")
def test_interrupted_at_any_line(place: Place) -> None:
    left = 0
    for nth in moments(place, 2):
        place.reset()
        with pytest.raises(KeyboardInterrupt):
            at_line(nth, interrupt, place.run)
        assert place.state() in ("old", "new")
        if place.debris():  # where tidying up itself is interrupted
            left += 1
            place.run()
            assert (place.state(), place.debris()) == ("new", [])
    assert left <= 12


def test_refused_by_the_system_at_any_call(place: Place) -> None:
    """A full disk, a folder that is read-only, rights that are lost."""
    nth = 0
    while True:
        nth += 1
        number = (errno.ENOSPC, errno.EROFS, errno.EACCES)[nth % 3]
        place.reset()
        try:
            if not at_call(nth, number, place.run):
                break
        except OSError as error:
            assert os.strerror(number) in line_of(error) and str(place.out) in line_of(error)
        assert place.state() in ("old", "new")
        assert place.debris() == []
    assert place.state() == "new" and nth > 5


def test_a_disk_that_is_full_after_so_many_bytes(place: Place) -> None:
    """The limit of a process for its files acts as a full disk does: before, at and behind every end of a write."""

    def full(most: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            with pytest.raises(OSError) as caught:
                place.run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert line_of(caught.value) == f"{place.out}: File too large"

    held = [len(one) for _, found in states(place) for one in found.values() if one is not None]
    largest = max(map(len, content(place.out).values() if place.out.is_dir() else [content(place.out)]))
    ends = sorted({near for size in held for near in (size - 1, size, size + 1) if 0 <= near < largest})
    place.reset()
    for most in ends if ALL else range(0, largest, largest // 4):
        full(most)
        assert (place.state(), place.debris()) == ("old", [])


def test_parents_that_were_made_go_again(given: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        at_line(80, interrupt, lambda: OPERATIONS["save"].run(given, tmp_path / "deep" / "er" / "out"))
    assert list(tmp_path.iterdir()) == []
