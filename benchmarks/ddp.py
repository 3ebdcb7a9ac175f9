"""CoTo under DistributedDataParallel: how gradients of switched-off adapters are kept out, and what it costs.

    python benchmarks/ddp.py             # two minutes on 2 cores; results/ddp.{json,md}
    python benchmarks/ddp.py --rounds 3

Two gloo processes of one thread each, a random Llama-like model of 12 layers, LoRA of rank 16 on all linear layers.
Three ways do the same step (forward, backward, mean of gradients over processes; no optimizer):

- find_unused: DDP with ``find_unused_parameters=True``, which walks the graph and sends every parameter;
- active: DDP's reducer off, one all-reduce over the active adapters' gradients (what loraloom does);
- all: the active way with every adapter's gradient, zeros for those that are off.

The ways take turns within a round; draws are those of CoTo at this p, the same for each way. Figures are medians over
rounds, with quartiles, of the ratio to find_unused in the same round: of the processor time of a process, which other
work on the machine disturbs little, and of wall time, which it does.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from loraloom.integrations.gates import Gates
from loraloom.integrations.reduction import reduce_gradients, taking_part
from loraloom.strategies.progressive import CoTo

HERE = Path(__file__).parent
LAYERS, RANK = 12, 16
WAYS = ("find_unused", "active", "all")
SIZES = {"1 x 16 tokens": (256, 1, 16), "1 x 128 tokens": (256, 1, 128)}
SHARES = (0.5, 1.0)
DRAWS = 2  # steps of one turn


def adapted(hidden: int) -> nn.Module:
    """The same random model in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        use_cache=False,
    )
    lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


class Step:
    """One way of doing a step."""

    def __init__(self, way: str, hidden: int) -> None:
        self.way, model = way, adapted(hidden)
        self.ddp = DistributedDataParallel(model, find_unused_parameters=way == "find_unused")
        self.gates = Gates(model)
        self.by_unit = self.gates.parameters()

    def __call__(self, ids: torch.Tensor, active: tuple[bool, ...]) -> int:
        """The bytes that were sent."""
        self.gates.set(active)
        with nullcontext() if self.way == "find_unused" else self.ddp.no_sync():
            self.ddp(input_ids=ids, labels=ids).loss.backward()
        on = active if self.way == "active" else (True,) * len(active)
        weights = taking_part(self.ddp.module, self.by_unit, on)
        if self.way != "find_unused":
            reduce_gradients(weights)
        self.ddp.zero_grad()
        return sum(weight.numel() * weight.element_size() for weight in weights)


def worker(out: Path, rounds: int) -> None:
    """One of the two processes; the first one writes what it measured."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    rows = []
    for size, (hidden, batch, tokens) in SIZES.items():
        steps = {way: Step(way, hidden) for way in WAYS}
        ids = torch.randint(0, 512, (batch, tokens), generator=torch.Generator().manual_seed(rank))
        for share in SHARES:
            coto = CoTo(10**6, curve="constant", start=share, seed=1)
            clocks = {"cpu": time.process_time, "wall": time.perf_counter}
            seconds: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in WAYS} for kind in clocks}
            sent: dict[str, list[int]] = {way: [] for way in WAYS}
            for turn in range(-1, rounds):  # the first one warms up
                for way in WAYS:
                    torch.distributed.barrier()
                    began = {kind: clock() for kind, clock in clocks.items()}
                    for at in range(DRAWS):
                        sent[way].append(steps[way](ids, coto.active(max(turn, 0) * DRAWS + at, LAYERS)))
                    for kind, clock in clocks.items() if turn >= 0 else ():
                        seconds[kind][way].append((clock() - began[kind]) / DRAWS)
            for way in WAYS:
                told: dict[str, Any] = {
                    "size": size,
                    "p": share,
                    "way": way,
                    "sent_kB": statistics.mean(sent[way]) / 1e3,
                }
                for kind, had in seconds.items():
                    ratios = [a / b for a, b in zip(had[way], had["find_unused"], strict=True)]
                    low, middle, high = statistics.quantiles(ratios, n=4)
                    ms = 1e3 * statistics.median(had[way])
                    told[kind] = {"ms": ms, "ratio": middle, "from": low, "to": high}
                rows.append(told)
    if rank == 0:
        out.write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


def table(report: dict[str, Any]) -> str:
    """The figures as a page."""
    made = ", ".join(f"{key} {value}" for key, value in report["made"].items())
    lines = [
        "# CoTo under DDP",
        "",
        f"`python benchmarks/ddp.py`: {made}. Ratios to `find_unused_parameters=True`: median (quartiles).",
        "",
        "| size | p | way | CPU, ms | ratio | wall, ms | ratio | sent, kB |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        cells = [row["size"], str(row["p"]), row["way"]]
        for kind in ("cpu", "wall"):
            had = row[kind]
            cells += [f"{had['ms']:.1f}", f"{had['ratio']:.2f} ({had['from']:.2f} to {had['to']:.2f})"]
        lines.append(f"| {' | '.join([*cells, format(row['sent_kB'], '.0f')])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Start the two processes, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker, asked.rounds)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    told |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        words = [sys.executable, __file__, "--worker", str(file), "--rounds", str(asked.rounds)]
        both = [subprocess.Popen(words, env={**os.environ, **told, "RANK": str(rank)}) for rank in (0, 1)]
        if sum(abs(process.wait()) for process in both):
            raise SystemExit("a process failed")
        rows = json.loads(file.read_text())
    made = {"processes": 2, "backend": "gloo", "cores": os.cpu_count(), "torch": torch.__version__}
    report = {"made": {**made, "rounds": asked.rounds}, "rows": rows}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "ddp.json").write_text(json.dumps(report, indent=1) + "\n")
    (asked.out / "ddp.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
