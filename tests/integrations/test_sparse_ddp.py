"""LoRI-S under DDP: two processes on half a batch each are one process on the whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import tiny_runs as tiny
from loraloom.integrations.peft import from_model
from loraloom.masks import Mask
from loraloom.strategies.sparse import LoRI, calibrate

STEPS = 3
SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import test_sparse_ddp as here
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
model = here.sparse()
wrapped = DistributedDataParallel(model)
here.train(wrapped, model, slice(rank, None, 2))
torch.save(here.held(model), sys.argv[1] + f"/rank{rank}.pt")
dist.destroy_process_group()
"""


def sparse() -> torch.nn.Module:
    model = tiny.model()
    generator = torch.Generator().manual_seed(0)
    adapter = from_model(model)
    drawn = {n: torch.rand(adapter.shape(n).out, adapter.shape(n).rank, generator=generator) for n in adapter.modules}
    mask: Mask = calibrate(drawn, density=0.2)
    LoRI(mask=mask, start="fresh").attach(model)
    return model


def train(model: torch.nn.Module, inner: torch.nn.Module, part: slice) -> None:
    chosen = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        batch = tiny.sentences()[8 * step : 8 * step + 8]
        model(**tiny.collate(batch[part])).loss.backward()
        chosen.step()
        chosen.zero_grad()


def held(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: factors.B for name, factors in from_model(model).modules.items()}


def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    told = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    told["PYTHONPATH"] = os.pathsep.join(paths)
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env={**told, "RANK": str(rank)})
        for rank in (0, 1)
    ]
    alone = sparse()
    train(alone, alone, slice(None))
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, want in held(alone).items():
        assert torch.equal(first[name], second[name])
        assert want.any() and torch.allclose(first[name], want, atol=1e-5), name
