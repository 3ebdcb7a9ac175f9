"""What writes an output, with an old one in its place: run, and seen to be there whole, old or new."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import loraloom as ll
from fuzz.readers import adapter, results
from loraloom import report
from loraloom.masks import Mask, save_mask, support
from loraloom.measured import Statistics, save_statistics
from loraloom.store import load, save


@dataclass(frozen=True)
class Operation:
    """One way to write an output.

    Attributes:
        run: writes it, from inputs in a folder; an old one is replaced.
        old: writes the old one.
    """

    run: Callable[[Path, Path], object]
    old: Callable[[Path], object]


def _old_adapter(out: Path) -> object:
    return save(adapter(1), out)


def _old_page(out: Path) -> object:
    out.parent.mkdir(exist_ok=True)
    return out.write_text("old")


def _save(inputs: Path, out: Path) -> object:
    return save(load(inputs / "a"), out, overwrite=True)


def _merge(inputs: Path, out: Path) -> object:
    merged = ll.merge([load(inputs / name) for name in "ab"], method="ties", space="delta", rank=2, extras="average")
    return save(merged, out, overwrite=True)


def _prune(inputs: Path, out: Path) -> object:
    return save(ll.prune(load(inputs / "a"), density=0.5), out, overwrite=True)


def _mask(inputs: Path, out: Path) -> object:
    return save_mask(support(load(inputs / "a")), out, overwrite=True)


def _statistics(inputs: Path, out: Path) -> object:
    return save_statistics(Statistics("gram", {"fc": torch.eye(2), "fc2": torch.ones(3)}), out, overwrite=True)


def _page(inputs: Path, out: Path) -> object:
    return report.page([inputs], out, overwrite=True)


OPERATIONS = {
    "save": Operation(_save, _old_adapter),
    "merge": Operation(_merge, _old_adapter),
    "prune": Operation(_prune, _old_adapter),
    "mask": Operation(_mask, lambda out: save_mask(Mask.of({"fc": torch.eye(3) > 0}), out)),
    "statistics": Operation(_statistics, lambda out: save_statistics(Statistics("gram", {"fc": torch.eye(3)}), out)),
    "page": Operation(_page, _old_page),
}


def inputs(folder: Path) -> Path:
    """Two adapters and a report."""
    save(adapter(), folder / "a")
    save(adapter(seed=1), folder / "b")
    results(folder)
    return folder


def content(path: Path) -> Any:
    """All that is in a file or folder; None where there is nothing."""
    if path.is_dir():
        return {item.name: item.read_bytes() for item in path.iterdir()}
    return path.read_bytes() if path.exists() else None


class Place:
    """A folder with an old output of an operation, and what it is to become."""

    def __init__(self, name: str, folder: Path, given: Path) -> None:
        self.name, self.given, self._operation = name, given, OPERATIONS[name]
        self._operation.old(folder / "old" / "out.md")
        self._operation.old(folder / "new" / "out.md")
        self._operation.run(given, folder / "new" / "out.md")
        self._old, self._new = content(folder / "old" / "out.md"), content(folder / "new" / "out.md")
        assert self._old and self._new and self._old != self._new
        self._home = folder / "place"
        self.out = self._home / "out.md"

    def reset(self) -> None:
        """The old output, and nothing else."""
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.mkdir(parents=True)
        self._operation.old(self.out)

    def run(self) -> None:
        """Write the new output."""
        self._operation.run(self.given, self.out)

    def state(self) -> str:
        """Which output is there: old, new, or torn."""
        found = content(self.out)
        return "old" if found == self._old else "new" if found == self._new else "torn"

    def whole(self) -> dict[str, bytes | None]:
        """All that is there, half-written things too; what a kill would leave."""
        return {str(path): None if path.is_dir() else path.read_bytes() for path in sorted(self._home.rglob("*"))}

    def debris(self) -> list[str]:
        """What lies beside the output."""
        return [path.name for path in self._home.iterdir() if path != self.out]
