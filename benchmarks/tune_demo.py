"""How the demo's recipes were tuned: the learning rate of LoRA and of CoTo, from one grid, on validation splits.

    python benchmarks/tune_demo.py --rates 2.5e-4,5e-4,1e-3,2e-3,4e-3

The demo uses one rate a method on all its tasks. It is the one with the best validation accuracy of the finished
adapters alone, first averaged over seeds, then over tasks; how they merge or prune plays no part. Every run is written
to benchmarks/results/tune_demo.json as it comes; a run that is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from loraloom.demo import METHODS, Settings
from loraloom.integrations.scoring import bench
from loraloom.ops.interpolate import interpolate
from loraloom.ops.prune import prune
from loraloom.recipe import bundled_recipe, parse
from loraloom.run import train_on

RESULTS = Path(__file__).parent / "results" / "tune_demo.json"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rates", default="2.5e-4,5e-4,1e-3,2e-3,4e-3")
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args()
    rates = [float(rate) for rate in chosen.rates.split(",")]
    runs = json.loads(chosen.results.read_text()) if chosen.results.exists() else []
    recipes = {method: bundled_recipe(name) for method, name in METHODS.items()}
    plain, settings = recipes["LoRA"], Settings()
    seeds = {plain.task: settings.seeds} | dict.fromkeys(settings.others, settings.seeds[:1])
    for task in seeds:
        made = bench(plain.model, task, image_size=plain.data.image_size, train_limit=plain.data.train_limit)
        for rate in rates:
            for method, recipe in recipes.items():
                key = {"task": task, "method": method, "rate": rate}
                if any(all(run[name] == value for name, value in key.items()) for run in runs):
                    continue
                runs.append(key | measure(made, recipe, rate, seeds[task]))
                print(runs[-1], flush=True)
                chosen.results.parent.mkdir(exist_ok=True)
                chosen.results.write_text(json.dumps(runs, indent=1) + "\n")
    for method in METHODS:
        means = {
            rate: float(np.mean([r["validation"] for r in runs if (r["method"], r["rate"]) == (method, rate)]))
            for rate in rates
        }
        best = max(means, key=lambda rate: means[rate])
        print(f"{method}: learning rate {best:g}; {', '.join(f'{rate:g}: {mean:.3f}' for rate, mean in means.items())}")


def measure(made, recipe, rate: float, seeds: tuple[int, ...]) -> dict:
    """Validation accuracy of each seed alone; for the map also with layers kept, and half way between two."""
    adapters, alone, seconds = [], [], []
    for seed in seeds:
        content = recipe.model_dump(mode="json")
        content["train"]["learning_rate"] = rate
        work = Path(tempfile.mkdtemp())
        one = parse({**content, "task": made.task.name, "seed": seed, "output": str(work / "adapter")})
        scratch = work / "scratch"
        scratch.mkdir()
        trained = train_on(made, one, work=scratch, resume=False, progress=False, overwrite=False)
        adapters.append(trained.adapter.loaded())
        alone.append(made.evaluate(adapters[-1], "validation").value)
        seconds.append(round(trained.seconds, 1))
        shutil.rmtree(work)
    found = {"seeds": list(seeds), "alone": alone, "validation": float(np.mean(alone)), "seconds": seconds}
    for space in ("factors", "delta") if len(adapters) > 1 else ():
        found[f"half way, {space}"] = made.evaluate(interpolate(*adapters, at=0.5, space=space), "validation").value
    for keep in ("every-other", "low", "middle", "high"):
        found[keep] = float(np.mean([made.evaluate(prune(a, keep=keep), "validation").value for a in adapters]))
    return found


if __name__ == "__main__":
    main()
