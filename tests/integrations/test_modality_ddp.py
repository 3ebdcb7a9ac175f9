"""MokA under DDP: two processes on half a batch each are one process on the whole, also where one has no images."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.strategies.modality import MokA
from tiny_multimodal import IMAGE, image_batch, lively, tiny_llava

STEPS = 3
SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import test_modality_ddp as here
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
model = here.moka()
wrapped = DistributedDataParallel(model)
here.train(wrapped, model, slice(rank, None, 2))
torch.save(here.held(model), sys.argv[1] + f"/rank{rank}.pt")
dist.destroy_process_group()
"""


def moka() -> Any:
    return lively(MokA({"image": 1, "audio": 2}, rank=2, alpha=4, dropout=0.0).wrap(tiny_llava())).train()


def batch(step: int, part: slice) -> dict[str, Tensor]:
    """Four rows; in the first step the second process has no images, in the last nobody has."""
    made = image_batch(rows=4, seed=step)
    ids, images = made["input_ids"][part], made.pop("pixel_values")
    bare = torch.zeros(4, dtype=torch.bool)
    bare[1::2] = step == 0
    bare[:] |= step == STEPS - 1
    ids = torch.where((ids == IMAGE) & bare[part][:, None], 7, ids)
    mine = {"input_ids": ids, "labels": made["labels"][part], "attention_mask": made["attention_mask"][part]}
    kept = images[part][~bare[part]]
    return {**mine, "pixel_values": kept} if len(kept) else mine


def train(model: Any, inner: Any, part: slice) -> None:
    chosen = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=0.3)
    for step in range(STEPS):
        model(**batch(step, part)).loss.backward()
        chosen.step()
        chosen.zero_grad()


def held(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    told["GLOO_SOCKET_IFNAME"] = "lo"
    told["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env={**told, "RANK": str(rank)})
        for rank in (0, 1)
    ]
    alone = moka()
    start = held(alone)
    train(alone, alone, slice(None))
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() == start.keys()
    for name, want in held(alone).items():
        assert torch.equal(first[name], second[name])
        assert not torch.equal(want, start[name]) and torch.allclose(first[name], want, atol=1e-5), name
