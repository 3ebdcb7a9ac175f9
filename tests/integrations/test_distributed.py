"""Runs of several processes (gloo, on this CPU) are runs of one: CoTo, LoRI and MokA under DDP and FSDP2.

Accelerate has no FSDP for processors; here it is told that they are accelerators. DeepSpeed is not run here.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import tiny_runs as tiny
from loraloom.integrations.fit import FitOptions, fit
from loraloom.integrations.gates import Gates
from loraloom.integrations.peft import from_model
from loraloom.strategies.modality import MokA
from loraloom.strategies.progressive import CoTo
from loraloom.strategies.sparse import LoRI, calibrate
from tiny_multimodal import image_batch, lively, tiny_llava
from tiny_vision import recipe_content, tiny_model  # noqa: F401

STEPS = 6
PLAN = CoTo(None, seed=1)
# A server that has the libraries loaded forks a process for each rank: no wait for imports.
children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["loraloom.integrations.fit", "peft", "tiny_runs"])


def begun(job: Callable[..., Any], world: int, *args: Any) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [children.Process(target=rank_of, args=(rank, world, port, job, args)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def run(job: Callable[..., Any], world: int, *args: Any) -> list[int | None]:
    """A job in so many processes, each of which has the environment that a launcher gives it; their exit codes."""
    ranks = begun(job, world, *args)
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def rank_of(rank: int, world: int, port: str, job: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if world > 1:
        told |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ.update(told)
    job(rank, *args)


# --- what is trained --------------------------------------------------------------------------------------------------
def sparse() -> torch.nn.Module:
    model = tiny.model()
    generator = torch.Generator().manual_seed(0)
    adapter = from_model(model)
    drawn = {n: torch.rand(adapter.shape(n).out, adapter.shape(n).rank, generator=generator) for n in adapter.modules}
    LoRI(mask=calibrate(drawn, density=0.2), start="fresh").attach(model)
    return model


def moka() -> Any:
    return lively(MokA({"image": 1, "audio": 2}, rank=2, alpha=4, dropout=0.0).wrap(tiny_llava())).train()


MODELS: dict[str, Callable[[], Any]] = {"lora": tiny.model, "lori": sparse, "moka": moka}


def pictures() -> list[dict[str, Tensor]]:
    made = image_batch(rows=8, seed=0)
    return [{key: value[at] for key, value in made.items()} for at in range(8)]


def stacked(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


class Watch(TrainerCallback):
    """In each step: units whose parameters have a gradient, and units whose parameters the optimizer moved."""

    def __init__(self) -> None:
        self.graded: list[tuple[bool, ...]] = []
        self.moved: list[tuple[bool, ...]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.units = Gates(kwargs["model"]).parameters()
        self.graded.append(tuple(all(w.grad is not None for w in some) for some in self.units.values()))
        none = [all(w.grad is None for w in some) for some in self.units.values()]
        assert none == [not some for some in self.graded[-1]]
        self.before = {unit: [w.detach().clone() for w in some] for unit, some in self.units.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pairs = [zip(some, self.before[unit], strict=True) for unit, some in self.units.items()]
        self.moved.append(tuple(any(not torch.equal(now, then) for now, then in some) for some in pairs))


def fitted(rank: int, folder: Path, what: str, how: str, stop: int | None = None) -> None:
    """Train, and write what came of it to ``folder/rankN.pt``; with ``stop`` only until the checkpoint of that step."""
    if how == "fsdp":
        pretend_accelerators()
    model, watch = MODELS[what](), Watch()
    options = FitOptions(
        folder / "run",
        steps=STEPS,
        batch_size=4,
        lr=1e-2,
        seed=0,
        accumulate=2,
        weight_decay=0.1,
        save_every=3,
        resume=True,
        scheduler="constant",
    )
    data, collate = (pictures(), stacked) if what == "moka" else (tiny.sentences(), tiny.collate)
    plan = PLAN if what != "moka" or how == "ddp" else None
    done = fit(model, data, collate=collate, options=options, plan=plan, callbacks=[watch])
    held = from_model(model)
    weights = {f"{n}.{side}": getattr(f, side) for n, f in held.modules.items() for side in ("A", "B")}
    assert done.resumed_from == (0 if stop is None else stop)
    torch.save({"weights": weights, "graded": watch.graded, "moved": watch.moved}, folder / f"rank{rank}.pt")


def pretend_accelerators() -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "RANK": os.environ.get("RANK", "0")}
    os.environ |= {name: os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def results(folder: Path, world: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.allclose(found[n], wanted[n], atol=1e-5) for n in wanted)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model trained by one process."""
    folders = {}
    for what in MODELS:
        folders[what] = tmp_path_factory.mktemp(what)
        assert run(fitted, 1, folders[what], what, "ddp") == [0]
    return folders


@pytest.fixture(scope="module")
def alone_without_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("what", ["lora", "lori"])
def test_two_processes_are_one(tmp_path: Path, alone: dict[str, Path], what: str, how: str) -> None:
    assert run(fitted, 2, tmp_path, what, how) == [0, 0]
    first, second = results(tmp_path, 2)
    (one,) = results(alone[what], 1)
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert same(first["weights"], one["weights"])
    # gradients of switched-off adapters are absent; were they zero, AdamW would move and decay these
    drawn = [PLAN_OF_ALL.active(step, tiny.UNITS) for step in range(STEPS)]
    assert not all(map(all, drawn))
    for result in (first, second, one):
        assert result["graded"] == result["moved"] == drawn
    for world in (1, 2):  # begun by two processes and ended by one, and the other way round
        begun_by = alone[what] if world == 2 else tmp_path
        if how == "fsdp" and world == 2:
            continue  # begun by one process without FSDP: refused, see below
        moved = tmp_path / f"on{world}"
        shutil.copytree(begun_by / "run", moved / "run")
        shutil.rmtree(moved / "run" / f"checkpoint-{STEPS}")
        assert run(fitted, world, moved, what, how, 3) == [0] * world
        assert same(results(moved, world)[0]["weights"], one["weights"])


PLAN_OF_ALL = replace(PLAN, total_steps=STEPS)
