"""What the second pair of compiled graphs costs, and what it saves in a CoTo schedule.

    python benchmarks/graphs.py                       # about ten minutes on 2 cores; results/graphs.{json,md}
    python benchmarks/graphs.py --layers 4 --rounds 2 --out FOLDER

LoRA on the Llama-like model of train_step.py (random weights, float32), fast paths, compiled layer by layer, a CoTo
schedule of 12 steps. "four": nothing below the lowest open layer requires a gradient; graphs are for adapters on or
off, with an input that requires a gradient or does not. "two": the model's input requires a gradient, so all layers'
inputs do. Both take turns at each step in one process; a figure is the median over rounds of the ratio of sums over the
schedule, with the lowest and the highest round. Compile time is that of this process and the compilers that it starts,
beyond a later walk through the schedule; it begins without cached kernels. Memory is what the graph holds for backward
at the end of the forward pass, the mean over a schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WAYS = ("two", "four")


def spent() -> float:
    """Processor seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def holding() -> Iterator[dict[int, int]]:
    """Bytes of the storages that are kept for backward, by address."""
    import torch

    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield seen


def measured(size: argparse.Namespace) -> dict[str, Any]:
    """Compile time and graphs by pair, time and memory of both ways."""
    import torch
    from torch._dynamo.utils import counters
    from train_step import STEPS, Subject, timed

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    subject = Subject("llama", "lora", "ours, CoTo", size)
    embeds = subject.inputs["inputs_embeds"]
    weights = {weight.untyped_storage().data_ptr() for weight in subject.model.parameters()}

    def one(way: str, step: int, turn: int) -> float:
        embeds.requires_grad_(way == "two")
        subject.prepare(step, turn)
        took = timed(subject.run, "cpu")
        subject.clear()
        return took

    compiling, graphs = {}, {}
    for way in WAYS:  # four needs the two of "two" as well
        before, known = spent(), counters["stats"]["unique_graphs"]
        for step in range(STEPS):
            one(way, step, 0)
        first = spent() - before
        compiling[way] = first - sum(one(way, step, 0) for step in range(STEPS))
        graphs[way] = counters["stats"]["unique_graphs"] - known
        print(way, graphs[way], "graphs", round(compiling[way]), "s", flush=True)
    order, sums = random.Random(0), []
    for turn in range(1, size.rounds + 1):
        sums.append(dict.fromkeys(WAYS, 0.0))
        for step in range(STEPS):
            for way in order.sample(WAYS, 2):
                sums[-1][way] += one(way, step, turn)
    held = dict.fromkeys(WAYS, 0)
    for step in range(STEPS):
        for way in WAYS:
            embeds.requires_grad_(way == "two")
            subject.prepare(step, 1)
            subject.plan.apply(subject.gates, step)
            with holding() as seen:
                subject.model(**subject.inputs)
            held[way] += sum(many for at, many in seen.items() if at not in weights) // STEPS
    ratios = sorted(one["two"] / one["four"] for one in sums)
    return {
        "size": {name: getattr(size, name) for name in ("hidden", "layers", "rows", "tokens", "rounds")},
        "torch": torch.__version__,
        "graphs": graphs,
        "compile_s": compiling,
        "ms": {way: 1e3 * statistics.median(one[way] for one in sums) / STEPS for way in WAYS},
        "two_over_four": [statistics.median(ratios), ratios[0], ratios[-1]],
        "held": held,
    }


def page(found: dict[str, Any]) -> str:
    """The table."""
    told = [" ".join(part.split()) for part in (__doc__ or "").strip().split("\n\n")]
    form = ", ".join(f"{name} {value}" for name, value in found["size"].items())
    middle, low, high = found["two_over_four"]
    held = found["held"]
    return "\n".join(
        [
            f"# {told[0].rstrip('.')}",
            "",
            told[2],
            "",
            f"{form}; torch {found['torch']}.",
            "",
            "| | graphs | compiled in, s | ms a step | held for backward, MiB |",
            "|---|--:|--:|--:|--:|",
            *(
                f"| {way} | {found['graphs'][way] + (way == 'four') * found['graphs']['two']} "
                f"| {found['compile_s'][way] + (way == 'four') * found['compile_s']['two']:.0f} "
                f"| {found['ms'][way]:.0f} | {held[way] / 2**20:.1f} |"
                for way in WAYS
            ),
            "",
            f"Two over four: time {middle:.3f} ({low:.3f} to {high:.3f}), memory {held['two'] / held['four']:.3f}.",
            "",
        ]
    )


def main() -> None:
    """Measure, then write the JSON and the page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 12), ("rows", 4), ("tokens", 64), ("rounds", 5)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--out", type=Path, default=HERE / "results")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        import torch

        fixed = {"dtype": torch.float32, "device": "cpu", "checkpointing": False, "compile": True}
        found = measured(argparse.Namespace(**{**vars(chosen), **fixed}))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "graphs.json").write_text(json.dumps(found, indent=1) + "\n")
    (chosen.out / "graphs.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
