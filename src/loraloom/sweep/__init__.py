"""Sweeps: a table of training runs and of what is measured of their adapters, done by many processes, in one report.

``loraloom sweep table.yaml -o runs/table`` does it; ``table.py`` says what a table is, ``operations.py`` what is done
to adapters, ``plan.py`` what the jobs are, ``work.py`` how each is done once, ``results.py`` what the report shows.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import torch

from loraloom import report
from loraloom.integrations.processes import end_with_parent, first_of_all
from loraloom.sweep.known import NOTHING, Known, known
from loraloom.sweep.plan import read
from loraloom.sweep.results import summarised
from loraloom.sweep.table import Sweep
from loraloom.sweep.work import Say, Worker

__all__ = ["Known", "Sweep", "known", "read", "run"]

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def run(
    sweep: Sweep,
    out: Path,
    *,
    resume: bool = False,
    jobs: int = 1,
    known: Known = NOTHING,
    say: Say = print,
    command: str = "",
) -> report.Report:
    """Do a sweep, or the rest of one, and write ``results.json``, ``report.html`` and ``report.md`` into ``out``.

    Under a launcher (``accelerate launch -m loraloom sweep``) every rank is such a process: they share ``out``, each
    trains by itself, and the first one writes the report. Adapters lie in ``out/adapters``, what each job found in
    ``out/journal``. A sweep whose file was changed may go on in the same folder: what it shares is read.

    Args:
        sweep: the table.
        out: a folder that all processes see.
        resume: go on with what is there.
        jobs: processes on this machine, started for each rank.
        known: arms that are not run, and their results.
        say: told one line for each finished job.
        command: the command line, for the page.

    Raises:
        FileExistsError: ``out`` exists and ``resume`` is off.
        ValueError: a run or an operation is refused; what was done until then stays.

    Example:
        >>> found = run(read("recipes/small/sweep-regime.yaml"), Path("runs/regime"), jobs=2)   # doctest: +SKIP
        >>> found.panels[0].title                                                         # doctest: +SKIP
        'Learning rates chosen on validation'
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    told = zip(_LAUNCHED[:4], "0101", strict=True)
    rank, ranks, local, beside = (int(os.environ.get(name, usual)) for name, usual in told)
    first_of_all(lambda: _refuse(out, resume))
    processes = jobs * ranks
    for line in known.said:
        say(line)
    began, own = time.perf_counter(), known.own(sweep)
    others = multiprocessing.get_context("spawn")
    children = [
        others.Process(target=_join, args=(own, out, jobs * beside, processes, local * jobs + at))
        for at in range(1, jobs)
    ]
    for child in children:
        child.start()
    try:
        worker = _settled(own, out, jobs * beside, processes, local * jobs, say)
        worker.complete()
    except BaseException:
        for child in children:
            child.terminate()
        raise
    finally:
        for child in children:
            child.join()
    made = summarised(sweep, worker.journal, seconds=time.perf_counter() - began, processes=processes, known=known)
    made = report.ran(made, command)
    if rank == 0:
        report.write(made, out)
        say(f"{made.summary}\n{out / 'report.html'}, {out / report.files.RESULTS}")
    return made


def _refuse(out: Path, resume: bool) -> None:
    if out.exists() and not resume:
        raise FileExistsError(f"{out} exists; go on with --resume, or choose another folder")


def _settled(sweep: Sweep, out: Path, here: int, processes: int, place: int, say: Say | None) -> Worker:
    """A worker of this process, one of ``here`` on this machine: from now on by itself, its own device, no ranks."""
    for name in list(os.environ):
        if name in _LAUNCHED or name.startswith(("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "TORCHELASTIC_")):
            del os.environ[name]
    if devices := torch.cuda.device_count():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[place % devices]
    torch.set_num_threads(sweep.threads or max(1, (os.cpu_count() or 1) // here))
    return Worker(sweep, out, processes=processes, say=say)


def _join(sweep: Sweep, out: Path, here: int, processes: int, place: int) -> None:
    """What a further process does; an error is met, and told, by the first one too, which takes the job over."""
    end_with_parent()
    try:
        _settled(sweep, out, here, processes, place, None).complete()
    except (ValueError, OSError, KeyboardInterrupt):
        raise SystemExit(2) from None
