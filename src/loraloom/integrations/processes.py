"""Several processes of one run (``accelerate launch``): what one does for all, which one speaks, and the end."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from torch import Tensor, nn, no_grad

T = TypeVar("T")
_TOLD = "loraloom/told"


class Elsewhere(ValueError):
    """An error of the first process: that one tells it, this one only ends."""


def join() -> Any:
    """Connect with the other processes of the run, if there are any; Accelerate's state of this one.

    Example:
        >>> join().num_processes
        1
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def device_name() -> str:
    """What this machine computes on, for people: a GPU's name, another accelerator's kind, or ``processor``."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "processor"


def is_first() -> bool:
    """Whether this is the process that writes and prints; needs no connection."""
    return int(os.environ.get("RANK", "0")) == 0


def in_parts() -> bool:
    """Whether the launcher asks for models in parts (FSDP, DeepSpeed): after a training the base is not whole again."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def end_with_parent() -> None:
    """From now on this process, a child of multiprocessing, ends with the one that started it, be that killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True, name="loraloom-parent").start()


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os._exit(2)


def first(work: Callable[[], T]) -> T:
    """Let the first process do something for all; every process calls this, and waits.

    Args:
        work: called in the first process only; its value is sent to the others, so it should be small.

    Returns:
        What ``work`` gave, in every process.

    Raises:
        Elsewhere: ``work`` failed, in the other processes; the first one has the error itself.

    Example:
        >>> first(lambda: 3)
        3
    """
    state = join()
    if state.num_processes == 1:
        return work()
    from torch.distributed import broadcast_object_list

    held: list[Any] = [None, "the first process ended"]
    try:
        if state.is_main_process:
            held = [work(), None]
    except Exception as error:
        held = [None, f"{type(error).__name__}: {error}"]
        raise
    finally:
        broadcast_object_list(held, src=0)
    if held[1] is not None:
        raise Elsewhere(held[1])
    return held[0]


def first_of_all(check: Callable[[], object]) -> None:
    """Let the first process check something before any goes on; they stay processes that work each by itself.

    Raises:
        Elsewhere: ``check`` failed, in the other processes; the first one has the error itself.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        check()
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://"))
    name = f"loraloom/first_of_all/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank != 0:
        passed = store.get(name) == b"yes"
        store.set(f"{name}/{rank}", "")
        if not passed:
            raise Elsewhere("the first process refused")
        return
    passed = False
    try:
        check()
        passed = True
    finally:
        store.set(name, "yes" if passed else "no")
        store.wait([f"{name}/{other}" for other in range(1, world)])  # it goes when this process lets go of it


def speaks(error: BaseException) -> bool:
    """Whether this process tells the user of an error: of all the processes that fail, one does."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    store = store_of_processes()
    if isinstance(error, Elsewhere):
        return False
    if store is None:
        return is_first()
    try:
        return int(store.add(_TOLD, 1)) == 1
    except RuntimeError:  # the store went with the process that held it
        return False


def told() -> bool:
    """Whether another process has told the user of an error: what fails here now, fails because that one ended."""
    store = store_of_processes()
    try:
        return store is not None and int(store.add(_TOLD, 0)) > 0
    except RuntimeError:
        return True


def store_of_processes() -> Any:
    """The key-value store through which the processes found each other; None before that."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.distributed_c10d._get_default_store()


# --- parameters of which each process holds a part --------------------------------------------------------------------
def whole(tensor: Any) -> Tensor:
    """All of a tensor of which FSDP2 gives each process a part; every process calls this. Others come back as is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@no_grad()
def fill(parameter: Any, values: Tensor) -> None:
    """Write values into a parameter, or of a parameter in parts into the part that is here."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, trainable parameters that ZeRO 3 keeps in parts are whole; every process enters."""
    parts = [parameter for parameter in model.parameters() if parameter.requires_grad and hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield
