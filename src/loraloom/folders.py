"""Output folders that appear whole or not at all.

Work is done in a hidden folder beside the target, which is renamed at the end. A killed process leaves
``.NAME.XXXX.loraloom-tmp`` behind (it is never taken for a result; remove it), and, killed in the instant between the
two renames of an overwrite, the old folder as ``.NAME.XXXX.loraloom-old``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNFINISHED, REPLACED = ".loraloom-tmp", ".loraloom-old"


@contextlib.contextmanager
def whole_folder(target: Path, *, overwrite: bool, mark: str, what: str) -> Iterator[Path]:
    """A folder to work in; it gets the name ``target`` when the block ends well, and is removed otherwise.

    Args:
        target: the new folder, absolute; its parents are made.
        overwrite: replace a folder that is there.
        mark: the file by which a folder that may be replaced is known.
        what: what such a folder is called in messages.

    Raises:
        FileExistsError: ``target`` is there, or holds more than is replaced, or another process was faster.
    """
    refuse_taken(target, overwrite=overwrite, mark=mark, what=what)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name[:80]}.{secrets.token_hex(8)}{UNFINISHED}")
    work.mkdir()
    try:
        yield work
        _publish(work, target, overwrite)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def whole_file(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path to write to; it gets the name ``target`` when the block ends well, and is removed otherwise.

    Raises:
        FileExistsError: ``target`` is there and ``overwrite`` is off, or is a folder.
    """
    if target.is_dir() or (target.exists() and not overwrite):
        raise FileExistsError(f"{target} exists; give another path or --overwrite (overwrite=True)")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name[:80]}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        yield work
        work.replace(target)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def refuse_taken(target: Path, *, overwrite: bool, mark: str, what: str) -> None:
    """Refuse a path that is taken, or that --overwrite must not remove: only a folder with the mark may be replaced.

    Raises:
        FileExistsError: says which.
    """
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; give another path or --overwrite (overwrite=True)")
    held = [] if not target.is_dir() else list(target.iterdir())
    plain = target.is_dir() and not any(item.is_dir() and not item.is_symlink() for item in held)
    if not plain or (held and not (target / mark).is_file()):
        raise FileExistsError(f"{target} is not just {what}, so it is not overwritten; remove it yourself")


def _publish(work: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name; an old one is put aside first and comes back if that fails."""
    sync_folder(work)
    aside = work.with_name(work.name.removesuffix(UNFINISHED) + REPLACED)
    if overwrite:
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside)
    try:
        work.rename(target)
    except OSError as error:
        if aside.exists() and not target.exists():
            aside.rename(target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(f"{target} was written by another process meanwhile; use --overwrite") from None
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.parent)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file and bring it to the disk."""
    with path.open("w", encoding="utf-8") as out:
        out.write(text)
        _sync(out)
