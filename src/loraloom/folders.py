"""Output folders and files that appear whole or not at all.

Work is done in a hidden folder beside the target, which takes the target's place at the end in one step. A killed
process leaves ``.NAME.XXXX.loraloom-tmp`` behind: it is never taken for a result, and the next write of the same
target removes it, for nobody holds its lock any more. Where a system cannot exchange two names (Linux can), an
overwrite is two renames; killed between them, the old folder stays as ``.NAME.XXXX.loraloom-old``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

UNFINISHED, REPLACED = ".loraloom-tmp", ".loraloom-old"
_UNABLE = (
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EXDEV,
)  # a file system that has no such call


@contextlib.contextmanager
def whole_folder(target: Path, *, overwrite: bool, mark: str | Callable[[Path], bool], what: str) -> Iterator[Path]:
    """A folder to work in; it gets the name ``target`` when the block ends well, and is removed otherwise.

    Args:
        target: the new folder, absolute; its parents are made.
        overwrite: replace a folder that is there.
        mark: the file by which a folder that may be replaced is known, or a function that knows one.
        what: what such a folder is called in messages.

    Raises:
        FileExistsError: ``target`` is there, or holds more than is replaced, or another process was faster.
        OSError: the disk is full, or the place cannot be written to; it names ``target``.
    """
    refuse_taken(target, overwrite=overwrite, mark=mark, what=what)
    with _workplace(target) as work:
        yield work
        sync_folder(work)
        refuse_taken(target, overwrite=overwrite, mark=mark, what=what)
        _publish(work, target, overwrite)
        sync_folder(target.parent)


@contextlib.contextmanager
def whole_file(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path to write to; it gets the name ``target`` when the block ends well, and is removed otherwise.

    Raises:
        FileExistsError: ``target`` is there and ``overwrite`` is off, or is a folder, or another process was faster.
        OSError: the disk is full, or the place cannot be written to; it names ``target``.
    """
    if target.is_dir() or (target.exists() and not overwrite):
        raise _taken(target)
    with _workplace(target) as work:
        draft = work / target.name
        yield draft
        if overwrite or not _linked(draft, target):
            draft.replace(target)
        sync_folder(target.parent)


def refuse_taken(target: Path, *, overwrite: bool, mark: str | Callable[[Path], bool], what: str) -> None:
    """Refuse a path that is taken, or that --overwrite must not remove: only a folder with the mark may be replaced.

    With a file as the mark, a folder that has subfolders is not; an empty folder always is.

    Raises:
        FileExistsError: says which.
    """
    if not target.exists():
        return
    if not overwrite:
        raise _taken(target)
    known = _marked(mark) if isinstance(mark, str) else mark
    if not target.is_dir() or (any(target.iterdir()) and not known(target)):
        raise FileExistsError(f"{target} is not just {what}, so it is not overwritten; remove it yourself")


def _marked(mark: str) -> Callable[[Path], bool]:
    def known(folder: Path) -> bool:
        inner = any(item.is_dir() and not item.is_symlink() for item in folder.iterdir())
        return not inner and (folder / mark).is_file()

    return known


def _taken(target: Path) -> FileExistsError:
    return FileExistsError(f"{target} exists; give another path or --overwrite (overwrite=True)")


@contextlib.contextmanager
def alone(folder: Path, *, busy: str) -> Iterator[None]:
    """Hold the lock of a folder while the block runs; where the file system has no locks, nothing is held.

    Args:
        folder: it must be there.
        busy: what is said where another process holds the lock.

    Raises:
        BlockingIOError: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder))
        except BlockingIOError:
            raise BlockingIOError(busy) from None
        except FileNotFoundError:
            raise
        except OSError:
            pass
        yield


# --- the place to work in ---------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, locked while the block runs; what is left of it at the end is removed."""
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    work = target.with_name(_hidden(target, secrets.token_hex(8)))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        work.mkdir()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a file system without locks
                stack.enter_context(_locked(work))
            yield work
    except OSError as error:
        if error.errno is None or (error.filename and UNFINISHED not in str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error  # not the hidden name, or none
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in missing:  # where something came of it, they are not empty
                folder.rmdir()


def _hidden(target: Path, chance: str) -> str:
    return f".{target.name[:80]}.{chance}{UNFINISHED}"


def _sweep(target: Path) -> None:
    """Remove what killed processes left of the same target: nobody holds its lock."""
    left = re.compile(re.escape(_hidden(target, "#")).replace(r"\#", "[0-9a-f]{16}"))
    for path in target.parent.iterdir():
        if left.fullmatch(path.name) and not path.is_symlink():
            with contextlib.suppress(OSError), _locked(path):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with the process; an OSError if another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), folder.stat()):  # removed and made again since it was opened
            raise BlockingIOError
        yield
    finally:
        os.close(handle)


# --- the last step ----------------------------------------------------------------------------------------------------
def _publish(work: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name; where it is exchanged with an old one, that is under ``work`` then."""
    if overwrite and target.exists() and _exchanged(work, target):
        return
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


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot, or one of them is gone."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call is None or call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return call is not None
    if (number := ctypes.get_errno()) in (*_UNABLE, errno.ENOENT):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _linked(draft: Path, target: Path) -> bool:
    """Give a file a second name, which must be free; False where the file system cannot."""
    try:
        target.hardlink_to(draft)
    except FileExistsError:
        raise FileExistsError(f"{target} was written by another process meanwhile; use --overwrite") from None
    except OSError as error:
        if error.errno in (*_UNABLE, errno.EMLINK):
            return False
        raise
    return True


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
