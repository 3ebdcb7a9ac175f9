"""How the demo's recipes were tuned: learning rate of LoRA and of CoTo from one grid, on the validation split.

    python benchmarks/tune_demo.py --rates 5e-4,1e-3,2e-3 --seeds 0,1

The demo takes, for each method, the rate with the best mean validation accuracy of the finished adapter alone; how it
merges or prunes plays no part. Every run is written to benchmarks/results/tune_demo.json as it comes; a run that is
there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from loraloom.demo import METHODS
from loraloom.integrations.scoring import bench
from loraloom.ops.interpolate import interpolate
from loraloom.ops.prune import prune
from loraloom.recipe import bundled_recipe, parse
from loraloom.run import train_on

RESULTS = Path(__file__).parent / "results" / "tune_demo.json"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rates", default="5e-4,1e-3,2e-3")
    options.add_argument("--seeds", default="0,1")
    options.add_argument("--set", action="append", default=[], help="override a key of both recipes: section.key=value")
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args()
    rates = [float(rate) for rate in chosen.rates.split(",")]
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    runs = json.loads(chosen.results.read_text()) if chosen.results.exists() else []
    recipes = {method: bundled_recipe(name, chosen.set) for method, name in METHODS.items()}
    plain = recipes["LoRA"]
    size, most = plain.data.image_size, plain.data.train_limit
    made = bench(plain.model, plain.task, image_size=size, train_limit=most)
    for rate in rates:
        for method, recipe in recipes.items():
            key = {"task": recipe.task, "method": method, "rate": rate, "set": chosen.set}
            if any(all(run.get(name) == value for name, value in key.items()) for run in runs):
                continue
            runs.append(key | measure(made, recipe, rate, seeds))
            print(runs[-1], flush=True)
            chosen.results.parent.mkdir(exist_ok=True)
            chosen.results.write_text(json.dumps(runs, indent=1) + "\n")
    for method in METHODS:
        best = max((run for run in runs if run["method"] == method), key=lambda run: run["validation"])
        print(f"{method}: learning rate {best['rate']:g}, validation {best['validation']:.3f}")


def measure(made, recipe, rate: float, seeds: list[int]) -> dict:
    """Validation accuracy of each seed alone; for the map of regimes also half way between two and with layers kept."""
    adapters, alone, seconds = [], [], []
    for seed in seeds:
        content = recipe.model_dump(mode="json")
        content["train"]["learning_rate"] = rate
        work = Path(tempfile.mkdtemp())
        one = parse({**content, "seed": seed, "output": str(work / "adapter")})
        scratch = work / "scratch"
        scratch.mkdir()
        trained = train_on(made, one, work=scratch, resume=False, progress=False, overwrite=False)
        adapters.append(trained.adapter.loaded())
        alone.append(made.evaluate(adapters[-1], "validation").value)
        seconds.append(round(trained.seconds, 1))
        shutil.rmtree(work)
    found = {"seeds": seeds, "alone": alone, "validation": float(np.mean(alone)), "seconds": seconds}
    for space in ("factors", "delta"):
        found[f"half way, {space}"] = made.evaluate(interpolate(*adapters[:2], at=0.5, space=space), "validation").value
    for keep in ("every-other", "low", "middle", "high"):
        found[keep] = float(np.mean([made.evaluate(prune(a, keep=keep), "validation").value for a in adapters]))
    return found


if __name__ == "__main__":
    main()
