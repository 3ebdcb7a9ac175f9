"""Checkpoints that a kill cannot tear: sealed when they are whole, and told from torn ones by the seal.

HF Trainer writes a ``checkpoint-N`` folder file by file. A run that is killed in between leaves a folder that looks
like a checkpoint, and ``resume_from_checkpoint=True`` takes it. A *seal* is one small file with the size and SHA-256 of
each file of the folder, written last and at once: a folder without a seal, or one that does not keep it, is torn.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback

from loraloom.integrations.processes import store_of_processes
from loraloom.packages import file_digest
from loraloom.untrusted import read_json

SEAL = "complete.json"
_FULL = ("No space left on device", "File too large", "PytorchStreamWriter failed", "unexpected pos ")

_RUNS = count()  # the same in every process

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def seal(folder: str | Path) -> None:
    """Bring every file of ``folder`` to the disk, then write the seal in one step.

    Raises:
        FileNotFoundError: there is no such folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "weights").write_bytes(b"1234")
        >>> is_whole(folder), seal(folder), is_whole(folder)
        (False, None, True)
        >>> _ = (folder / "weights").write_bytes(b"12")
        >>> is_whole(folder)
        False
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder to seal at {folder}")
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(SEAL):
            _sync(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    draft = folder / f"{SEAL}.draft"
    draft.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(draft)
    draft.replace(folder / SEAL)
    _sync(folder)
    _sync(folder.parent)


def is_whole(folder: str | Path) -> bool:
    """Whether ``folder`` has a seal, and each file named there still has its size and hash; others do not matter."""
    folder = Path(folder)
    try:
        files = read_json(folder / SEAL)["files"]
        return all(
            (folder / name).is_file()
            and (folder / name).stat().st_size == entry["bytes"]
            and file_digest(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # unreadable is torn too
        return False


def last_complete(output: str | Path) -> Path | None:
    """The newest whole checkpoint in a Trainer's output folder, or None; torn ones are passed over and left alone.

    Example:
        >>> last_complete("no/such/run") is None
        True
    """
    return next((folder for folder in reversed(_checkpoints(output)) if is_whole(folder)), None)


def remove_torn(output: str | Path) -> list[Path]:
    """Delete the checkpoints that are not whole, and return their paths.

    For output folders of runs with :class:`SafeCheckpoints` only: a checkpoint that was never sealed counts as torn.
    """
    torn = [folder for folder in _checkpoints(output) if not is_whole(folder)]
    for folder in torn:
        _remove(folder)
    return torn


class SafeCheckpoints(TrainerCallback):
    """Seal each checkpoint of an HF Trainer once it is whole; resume from ``last_complete(output_dir)``.

    ``save_total_limit`` is kept by this callback and not by the Trainer, which deletes old checkpoints before the new
    one is sealed: with a limit of 1 a kill at that moment would leave nothing. Here the old one goes afterwards. A
    checkpoint is only written on the main process; the others wait for it.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[SafeCheckpoints()])
        remove_torn(args.output_dir)
        trainer.train(resume_from_checkpoint=last_complete(args.output_dir))
    """

    def __init__(self) -> None:
        self._keep: int | None = None
        self._args: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the rotation from the Trainer."""
        if args.save_total_limit or args is not self._args:  # the same again, without a limit: a run that was cut off
            self._keep, args.save_total_limit = args.save_total_limit, None
        self._args = args

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the rotation back."""
        args.save_total_limit = self._keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal what was just saved, then delete what is older than the limit allows."""
        from accelerate import PartialState

        PartialState().wait_for_everyone()  # each process has written its own random state by then
        if not args.should_save:
            return
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal(newest)
        if self._keep:
            best = state.best_model_checkpoint
            protected = [newest, *([Path(best)] if best and Path(best) != newest else [])]
            sealed = [folder for folder in _checkpoints(args.output_dir) if (folder / SEAL).exists()]
            spare = [folder for folder in sealed if folder not in protected]
            for folder in spare[: max(len(sealed) - max(self._keep, len(protected)), 0)]:
                _remove(folder)


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends a run of an HF Trainer after the step that is under way, with a checkpoint; a second one, at once.

    Of several processes all stop after the same step, whichever of them was asked to: it writes the number of that step
    into the store through which they found each other, two steps ahead, since the others may be one step further but
    cannot end the next one without it. Asked in the last two steps, they come to their end. Launchers pass Ctrl-C on to
    processes that have had it already, so that a second one counts there only after a second.

    Example:
        stop = StopOnInterrupt()
        trainer = Trainer(model, args, train_dataset=data, callbacks=[stop, SafeCheckpoints()])
        with stop.listening():  # KeyboardInterrupt at the end if Ctrl-C came
            trainer.train()
    """

    def __init__(self) -> None:
        self._asked: float | None = None  # when
        self._stopped = False
        self._several = False
        self._name = f"loraloom/stop/{next(_RUNS)}"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C as a wish to stop while the block runs.

        Raises:
            KeyboardInterrupt: at the end of the block, if there was one.
        """
        from accelerate import PartialState

        self._several = PartialState().num_processes > 1
        listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            if listens:
                signal.signal(signal.SIGINT, self._note)
        except ValueError:  # another thread than the main one: signals do not come here
            listens = False
        try:
            yield
        finally:
            if listens:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._stopped or (self._asked is not None and not self._several):
            raise KeyboardInterrupt

    def _note(self, *_: Any) -> None:
        if self._asked is not None and time.monotonic() - self._asked < 1:
            return
        again, self._asked = self._asked is not None, time.monotonic()
        if not self._several:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        elif again:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if that was asked for."""
        asked = self._asked is not None
        if self._several:
            last = self._agreed(state.global_step + 2 if asked else None)
            asked = last is not None and last <= state.global_step < state.max_steps
        if asked:
            self._stopped = control.should_save = control.should_training_stop = True

    def _agreed(self, step: int | None) -> int | None:
        """The last step of all processes, if one of them has named it; the first one that asks for one names it."""
        store = store_of_processes()
        if step is not None:
            return int(store.compare_set(self._name, "", str(step)))
        return int(store.get(self._name)) if store.check([self._name]) else None


@contextlib.contextmanager
def disk_faults_told(output: str | Path) -> Iterator[None]:
    """Torch and safetensors tell of a full disk by errors of their own; here it is an OSError as everywhere.

    Raises:
        OSError: nothing more could be written to ``output``.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in _FULL):
            raise
        told = "no space left to write a checkpoint; free some and go on with --resume (resume=True)"
        raise OSError(errno.ENOSPC, told, str(output)) from error


def _checkpoints(output: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    output = Path(output)
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _CHECKPOINT.match(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def _remove(folder: Path) -> None:
    """Delete a checkpoint, its seal first: if we are killed on the way, the rest is known to be torn."""
    (folder / SEAL).unlink(missing_ok=True)
    _sync(folder)
    shutil.rmtree(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
