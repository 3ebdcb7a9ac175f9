"""How many training steps a second several processes beside each other make on one device.

    python benchmarks/processes.py --processes 1 8 16      # a minute on a GPU; under NVIDIA's MPS if its daemon runs

LoRA of rank 8 on random weights of ViT-S/14's size, digits at 28 pixels, batches of 16, one thread a process. Each
count is measured once, over STEPS steps that all its processes begin together; the slowest one counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch

from loraloom.integrations.processes import device_name, end_with_parent
from loraloom.recipe import read
from loraloom.run import bench_of, train_on

RECIPE = Path(__file__).parents[1] / "recipes" / "small" / "lora.yaml"


def model(folder: Path) -> None:
    """Random weights, as a folder."""
    from transformers import Dinov2Config, Dinov2Model

    size = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14, "image_size": 518}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    grey = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(grey))


def work(at: int, folder: Path, steps: int, counts: list[int], starts: list[Any], found: Any) -> None:
    """One process: it takes part in every count that is above its place."""
    end_with_parent()
    torch.set_num_threads(1)
    told = {"model": folder / "model", "task": "digits", "output": folder / f"adapter-{at}"}
    recipe = read(RECIPE, [f"{key}={value}" for key, value in told.items()])
    bench = bench_of(recipe)

    def seconds(steps: int) -> float:
        chosen = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
        with tempfile.TemporaryDirectory(dir=folder) as place:
            done = train_on(bench, chosen, work=Path(place), resume=False, progress=False, overwrite=True)
        return done.seconds

    seconds(min(10, steps))
    for count, start in zip(counts, starts, strict=True):
        start.wait()
        if at < count:
            found.put((count, seconds(steps)))


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options.add_argument("--steps", type=int, default=100)
    chosen = options.parse_args()
    counts, most = chosen.processes, max(chosen.processes)
    others = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model(folder / "model")
        starts, found = [others.Barrier(most) for _ in counts], others.Queue()
        shared = (folder, chosen.steps, counts, starts, found)
        children = [others.Process(target=work, args=(at, *shared), daemon=True) for at in range(most)]
        for child in children:
            child.start()
        took = [found.get(timeout=600) for _ in range(sum(counts))]
        for child in children:
            child.join()
    print(device_name())
    for count in counts:
        slowest = max(seconds for of, seconds in took if of == count)
        print(f"{count} processes: {count * chosen.steps / slowest:.1f} steps a second")


if __name__ == "__main__":
    main()
