"""What a long probe has found so far, in a file beside its result: an interrupted one goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedRandom
from pathlib import Path
from typing import Any

from loraloom.untrusted import MOST_JSON, is_number, parse_json

SUFFIX = ".part"


class Journal:
    """Scores by key, each on the disk before the next is asked for.

    A text file, one JSON object a line. The first holds what was asked for, the others scores. A last line that was cut
    off by a crash is dropped. It is locked while it is open.

    Args:
        path: the file; made where there is none.
        request: what is asked for, plain JSON.
        fresh: forget one of another request, or of what has changed since, instead of refusing it.

    Attributes:
        known: the scores by key.

    Raises:
        ValueError: it is of another request, damaged, or held open by another process.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     one = Journal(Path(folder) / "out.json.part", {"probe": "shapley"})
        ...     one.add("base", 0.5)
        ...     one.close()
        ...     again = Journal(one.path, {"probe": "shapley"})
        ...     again.remove()
        >>> again.known
        {'base': 0.5}
    """

    def __init__(self, path: Path, request: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.known: dict[str, float] = {}
        self._marks: dict[str, str] = {}
        self._request, self._fresh = json.loads(json.dumps(request)), fresh
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BufferedRandom = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            found = os.fstat(self._file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_JSON:
                raise ValueError(f"{path} is damaged: no file, or one of more than {MOST_JSON} bytes; remove it")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path} is being written by another process; give another output") from None
        except BaseException:
            self._file.close()
            raise

    def mark(self, name: str, value: str) -> bool:
        """Note what scores depend on and what may change between runs, such as the model.

        Returns:
            Whether it was another one before, so that all scores are forgotten.

        Raises:
            ValueError: it was another one before, and is not ``fresh``.
        """
        changed = self._marks.get(name, value) != value
        if changed and not self._fresh:
            raise ValueError(f"{self.path} holds scores of another {name}; remove it, or --overwrite")
        if changed:
            self.known.clear()
            self._begin({**self._marks, name: value})
        elif name not in self._marks:
            self._marks[name] = value
            self._write({"mark": name, "is": value})
        return changed

    def add(self, key: str, score: float) -> None:
        """Note a score."""
        self.known[key] = score
        self._write({"of": key, "score": score})

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def remove(self) -> None:
        """Let go of the file and remove it: the result is written."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _read(self) -> None:
        request, fresh = self._request, self._fresh
        whole, end, _ = self._file.read().rpartition(b"\n")
        lines = whole.split(b"\n") if end else []
        try:
            entries = [parse_json(line, self.path) for line in lines]
            held = entries[0]["request"] if entries else None
            if held == request:
                self._marks = {one["mark"]: one["is"] for one in entries[1:] if "mark" in one}
                told = {one["of"]: one["score"] for one in entries[1:] if "mark" not in one}
                self.known = {str(of): float(score) for of, score in told.items()}
                if not all(map(is_number, told.values())) or not all(isinstance(of, str) for of in told):
                    raise ValueError("a score is no number")
        except (ValueError, TypeError, LookupError, AttributeError):
            if not fresh:
                raise ValueError(f"{self.path} is damaged; remove it to begin anew") from None
            held = ()
        if entries_end := (len(whole) + 1 if held == request else 0):
            self._file.truncate(entries_end)
            self._file.seek(entries_end)
            return
        if lines and not fresh:
            raise ValueError(f"{self.path} is of another request{_differs(held, request)}; remove it, or --overwrite")
        self._begin({})

    def _begin(self, marks: Mapping[str, str]) -> None:
        """Empty the file, but for the request and these marks."""
        self._file.truncate(0)
        self._file.seek(0)
        self._write({"request": self._request})
        self._marks = {}
        for name, value in marks.items():
            self.mark(name, value)

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _differs(held: Any, request: Any) -> str:
    """The first thing in which two requests differ."""
    if not isinstance(held, dict):
        return ""
    for name in [*request, *held]:
        if held.get(name) != request.get(name):
            return f" ({name}: {held.get(name)!r}, now {request.get(name)!r})"
    return ""
