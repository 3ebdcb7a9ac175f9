"""How the demo's recipes were tuned: the learning rate of LoRA and of CoTo, from one grid, on validation splits.

    python benchmarks/tune_demo.py --rates 2.5e-4,5e-4,1e-3,2e-3,4e-3

The demo uses one rate a method on all its tasks. It is the one with the best validation accuracy of the finished
adapters alone, first averaged over seeds, then over tasks; how they merge or prune plays no part. Every run is written
to benchmarks/results/tune_demo.json as it comes; a run that is there already is not made again.
tune_demo.md has the map of all rates, and what CoTo gains over LoRA at each of them, over the tasks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from loraloom.demo import METHODS, Settings
from loraloom.intervals import interval
from loraloom.ops.interpolate import interpolate
from loraloom.ops.prune import prune
from loraloom.recipe import bundled_recipe, parse
from loraloom.run import bench_of, train_on

STEPS = 400  # what the rates were chosen at; the demo takes 300 to save time
KEPT = ("every-other", "low", "middle", "high")
RESULTS = Path(__file__).parent / "results" / "tune_demo.json"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rates", default="2.5e-4,5e-4,1e-3,2e-3,4e-3")
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args()
    rates = [float(rate) for rate in chosen.rates.split(",")]
    runs = json.loads(chosen.results.read_text()) if chosen.results.exists() else []
    recipes = {method: bundled_recipe(name, [f"train.steps={STEPS}"]) for method, name in METHODS.items()}
    plain, settings = recipes["LoRA"], Settings()
    seeds = {plain.task: settings.seeds} | dict.fromkeys(settings.others, settings.seeds[:1])
    for task in seeds:
        made = None
        for rate in rates:
            for method, recipe in recipes.items():
                key = {"task": task, "method": method, "rate": rate}
                if any(all(run[name] == value for name, value in key.items()) for run in runs):
                    continue
                made = made or bench_of(plain, task)
                runs.append(key | measure(made, recipe, rate, seeds[task]))
                print(runs[-1], flush=True)
                chosen.results.parent.mkdir(exist_ok=True)
                chosen.results.write_text(json.dumps(runs, indent=1) + "\n")
    chosen.results.with_suffix(".md").write_text(table(runs, tuple(seeds)) + gains(runs, tuple(seeds)))
    for method in METHODS:
        means = {rate: mean(runs, method, rate) for rate in rates}
        print(f"{method}: learning rate {max(means, key=lambda rate: means[rate]):g}; validation by rate {means}")


def mean(runs: list[dict], method: str, rate: float) -> float:
    """Validation accuracy over the tasks, each the mean over its seeds."""
    return float(np.mean([run["validation"] for run in runs if (run["method"], run["rate"]) == (method, rate)]))


def table(runs: list[dict], tasks: tuple[str, ...]) -> str:
    """The map of learning rates: all tasks alone, and the first task taken apart and put together."""
    kept = ("half way, factors", "half way, delta", *KEPT)
    columns = ("rate", "method", *tasks, "mean", *(f"{tasks[0]}: {name}" for name in kept))
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for rate in sorted({run["rate"] for run in runs}):
        for method in METHODS:
            found = {run["task"]: run for run in runs if (run["method"], run["rate"]) == (method, rate)}
            numbers = [found[task]["validation"] for task in tasks]
            numbers += [float(np.mean(numbers)), *(found[tasks[0]][name] for name in kept)]
            lines.append(f"| {rate:g} | {method} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
    head = "<!-- Made by benchmarks/tune_demo.py: accuracy on validation splits; seeds as in the demo. -->\n\n"
    return head + "\n".join(lines) + "\n"


def gains(runs: list[dict], tasks: tuple[str, ...]) -> str:
    """CoTo minus LoRA at the same rate: mean over the tasks with Student's 95 % interval, and the ratio of times."""
    names = ("validation", *KEPT)
    lines = [
        "",
        f"CoTo minus LoRA at the same rate, over {len(tasks)} tasks: mean and Student's 95 % interval over tasks.",
        "",
    ]
    columns = ("rate", "alone", *KEPT, "time, CoTo / LoRA")
    lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    rates = sorted({run["rate"] for run in runs})
    found = {(run["task"], run["rate"], run["method"]): run for run in runs}
    for chosen in [*([rate] for rate in rates), [rate for rate in rates if rate < max(rates)]]:
        cells = []
        for name in (*names, "seconds"):
            values = []
            for task in tasks:
                each = [[np.sum(found[task, rate, method][name]) for method in METHODS] for rate in chosen]
                values.append(np.mean([b / a if name == "seconds" else b - a for a, b in each]))
            middle, (low, high) = np.mean(values), interval(values)
            cells.append(
                f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"
                if name != "seconds"
                else f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            )
        told = f"{chosen[0]:g}" if len(chosen) == 1 else f"mean of {len(chosen)} up to {chosen[-1]:g}"
        lines.append(f"| {told} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    for keep in KEPT:
        found[keep] = float(np.mean([made.evaluate(prune(a, keep=keep), "validation").value for a in adapters]))
    return found


if __name__ == "__main__":
    main()
