"""Putting an adapter on a model: weights swapped into layers that are there, against layers built anew each time.

    python benchmarks/seat.py --rounds 5

Adapters of rank 8 on all linear layers of the bundled models, random factors. Both ways take turns in one process; a
round puts an adapter on and takes it off, and a forward of 2 examples or texts is timed beside it. Writes
benchmarks/results/seat.json and seat.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from loraloom.adapter import Adapter, Factors
from loraloom.integrations.peft import attached, from_model
from loraloom.integrations.scoring import Bench, bench
from loraloom.integrations.seat import Seat

RESULTS = Path(__file__).parent / "results" / "seat.json"
CASES = (("vit-s14", "digits", {"image_size": 42}), ("smollm2-135m", "sent-movie", {"max_length": 32}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    chosen = options.parse_args()
    rows = [measured(bench(model, task, **more), chosen.rounds) for model, task, more in CASES]
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"load": round(os.getloadavg()[0], 1), "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"rounds": chosen.rounds, "machine": machine, "rows": rows}, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(rows, chosen.rounds, machine))
    print(RESULTS.with_suffix(".md").read_text())


def adapters(made: Bench) -> list[Adapter]:
    """Two of one shape."""
    from peft import LoraConfig, get_peft_model

    from loraloom.integrations.peft import Snapshot

    snapshot = Snapshot(made.model)
    try:
        one = from_model(get_peft_model(made.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")))
    finally:
        snapshot.restore()
    draw = torch.Generator().manual_seed(0)

    def drawn(held: Factors) -> Factors:
        b = 0.02 * torch.randn(held.B.shape, generator=draw)
        return Factors(B=b, A=0.02 * torch.randn(held.A.shape, generator=draw), scale=held.scale)

    return [Adapter(one.config, {name: drawn(held) for name, held in one.modules.items()}) for _ in range(2)]


def measured(made: Bench, rounds: int) -> dict:
    """Medians of wall and processor time in ms, and whether the outputs are the same bits."""
    both, seat = adapters(made), Seat(made.model)
    batch = made.collate(made.task.splits["train"][:2])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ways = {"built anew": lambda one: attached(made.model, one), "swapped": seat.attached}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ways, "forward")}
    same = True
    for turn in range(rounds + 1):  # the first builds the layers of the seat
        outputs = []
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            context = way(both[turn % 2])
            live = context.__enter__()
            on = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                outputs.append(live(**inputs)[0])
            done = time.perf_counter(), time.process_time()
            context.__exit__(None, None, None)
            end = time.perf_counter(), time.process_time()
            spent["forward"].append((done[0] - on[0], done[1] - on[1]))
            if turn:
                spent[name].append((end[0] - start[0] - done[0] + on[0], end[1] - start[1] - done[1] + on[1]))
        same = same and torch.equal(*outputs)
    told = {
        name: [1000 * statistics.median(column) for column in zip(*times, strict=True)] for name, times in spent.items()
    }
    return {"model": made.name, "modules": len(both[0].modules), "ms": told, "same": same, "swaps": seat.swaps}


def table(rows: list[dict], rounds: int, machine: dict) -> str:
    lines = [
        f"<!-- Made by benchmarks/seat.py --rounds {rounds}: {machine}. -->",
        "",
        "Median ms of wall time (of processor time) to put rank 8 on all linear layers and take it off.",
        "",
        "| model | modules | built anew | swapped | ratio (processor) | a forward of 2 | same bits |",
        "| --- | --: | --: | --: | --: | --: | --- |",
    ]
    for row in rows:
        anew, swapped, forward = (row["ms"][name] for name in ("built anew", "swapped", "forward"))
        cells = [f"{wall:.0f} ({cpu:.0f})" for wall, cpu in (anew, swapped)]
        lines.append(
            f"| {row['model']} | {row['modules']} | {' | '.join(cells)} | {anew[1] / swapped[1]:.1f} |"
            f" {forward[0]:.0f} ({forward[1]:.0f}) | {'yes' if row['same'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
