"""What noting the balance costs: CPU time of one measurement beside that of one training step, ViT-S/14 of the demo.

    python benchmarks/balance.py            # a minute; writes results/balance.json, which `loraloom report` shows

LoRA of rank 8 on all 72 linear layers, batches of 16 pictures as `recipes/demo` has them. Steps and measurements take
turns in one process; figures are medians, and the share is that of `every=10`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from loraloom.integrations.adapting import training
from loraloom.integrations.balance import BalanceMeter
from loraloom.recipe import bundled_recipe
from loraloom.run import bench_of

OUT = Path(__file__).parent / "results" / "balance.json"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = bench_of(bundled_recipe("demo/lora.yaml"))
    batch = bench.collate([bench.training[at] for at in range(16)])
    labels = batch.pop("labels")
    steps, notes = [], []
    with training(bench.model, rank=8) as model:
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-4)
        meter = BalanceMeter(model)
        for step in range(asked.steps):
            began = time.process_time()
            bench.loss(model(**batch), labels, num_items_in_batch=len(labels)).backward()
            optimizer.step()
            done = time.process_time()
            meter.note(step + 1)
            _ = meter.result
            notes.append(time.process_time() - done)
            steps.append(done - began)
            optimizer.zero_grad()
    step, note = (1000 * statistics.median(values[2:]) for values in (steps, notes))
    row = {"model": "vit-s14", "modules": len(meter.result.modules), "every": asked.every, "torch": torch.__version__}
    row |= {"step, ms": round(step, 1), "measurement, ms": round(note, 1)}
    row["share of a step, %"] = round(100 * note / asked.every / step, 2)
    OUT.write_text(json.dumps([row], indent=1) + "\n", encoding="utf-8")
    print(row)


if __name__ == "__main__":
    main()
