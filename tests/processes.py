"""Processes of a test's own, forked from a server that has the libraries loaded and runs no thread.

A fork of pytest's own process may find a lock that a thread held which is not there any more, and wait for ever.
What runs in them must be a function of a module, and what it is given must pickle.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

clean = multiprocessing.get_context("forkserver")


@functools.cache
def _serve(pid: int) -> None:
    clean.set_forkserver_preload(["loraloom.cli", "loraloom.integrations.fit", "peft", "tiny_runs"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
        forkserver.ensure_running()


def process(target: Callable[..., object], *args: Any, **environment: str) -> BaseProcess:
    """A process that is to run ``target``, in this folder and environment, with one thread."""
    _serve(os.getpid())
    told = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return clean.Process(target=_as_here, args=(told, Path.cwd(), target, args))


def _as_here(environment: dict[str, str], folder: Path, target: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    target(*args)


def status_of(started: BaseProcess, seconds: float = 120) -> int:
    """Wait for its end: its exit status, or minus the signal; one that takes longer is killed."""
    started.join(seconds)
    if started.exitcode is None:
        started.kill()
        started.join()
        raise TimeoutError(f"{started.name} took more than {seconds} seconds")
    return started.exitcode


def answer_of(target: Callable[..., Any], *args: Any, seconds: float = 120) -> Any:
    """What ``target`` returns in a process of its own.

    Raises:
        AssertionError: it raised something; the words are its traceback.
    """
    ours, theirs = clean.Pipe(duplex=False)
    one = process(_answer, theirs, target, args)
    one.start()
    theirs.close()
    try:
        good, answer = ours.recv() if ours.poll(seconds) else (False, f"no answer in {seconds} seconds")
    except EOFError:
        good, answer = False, "it ended without an answer"
    finally:
        one.kill()
        one.join()
        ours.close()
    assert good, answer
    return answer


def _answer(pipe: Any, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, target(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def ranks(job: Callable[..., object], world: int, *args: Any) -> list[BaseProcess]:
    """Start ``job(rank, *args)`` in so many processes, each with the environment that a launcher gives it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    if world > 1:
        told |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    started = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        started.append(process(job, rank, *args, **told, **own))
        started[-1].start()
    return started
