"""How evenly the layers of a sweep's adapters share their gain: Shapley values of LoRA's and CoTo's layers.

    loraloom sweep recipes/small/sweep-images.yaml -o runs/images --arms LoRA,CoTo
    python benchmarks/shapley.py              # about a minute an adapter; results/shapley.json, runs/shapley

Every arm at the rate that the sweep chose for each task; test examples, 200 draws. What is in results/shapley.json
already is not computed again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import loraloom as ll
from loraloom import report
from loraloom.probing.asking import asked
from loraloom.report import Heatmap, Report, Table
from loraloom.sweep.found import Found, rounded, spread
from loraloom.sweep.plan import Cell, read, run_key, run_of
from loraloom.sweep.work import Journal

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "shapley.json"
COMMAND = "python benchmarks/shapley.py"
EVERY = "mean of the tasks"


def valued(arm: str, seed: int, recipe: Any, folder: Path, limit: int) -> dict[str, Any]:
    """The values of the layers of one adapter."""
    torch.set_num_threads(1)
    adapter = ll.load(folder / "adapters" / run_key(recipe)).loaded()
    found = ll.shapley(adapter, asked(adapter, recipe.task, limit=limit))
    told = {"arm": arm, "task": recipe.task, "seed": seed, "rate": recipe.train.learning_rate, "limit": limit}
    return {**told, "top third": found.top_third, **found.to_json()}


def page(done: list[dict[str, Any]], tasks: list[str], arms: list[str]) -> Report:
    """A heat map of layers and tasks an arm, and how concentrated the values are."""
    panels: list[Any] = []
    layers = list(dict.fromkeys(unit for one in done for unit in one["units"]))
    for arm in arms:
        z = []
        for layer in range(len(layers)):
            shares = [
                [one["values"][layer] / sum(one["values"]) for one in done if (one["arm"], one["task"]) == (arm, task)]
                for task in tasks
            ]
            z.append(tuple(round(float(np.mean(each)), 4) for each in shares))
        note = "Share of the gain (Shapley value by the sum of all), mean over seeds."
        panels.append(Heatmap(f"Layers of {arm}", "task", "layer", tuple(tasks), tuple(layers), tuple(z), note))
    rows = []
    for task in [*tasks, EVERY]:
        by = {
            arm: {
                (seed,): float(
                    np.mean(
                        [
                            one["top third"]
                            for one in done
                            if one["arm"] == arm and one["seed"] == seed and task in (one["task"], EVERY)
                        ]
                    )
                )
                for seed in sorted({one["seed"] for one in done})
            }
            for arm in arms
        }
        first, *others = (by[arm] for arm in arms)
        for arm, values in zip(arms[1:], others, strict=True):
            gap = spread({seed: values[seed] - first[seed] for seed in values})
            rows.append((task, arm, *rounded(spread(first)[0], spread(values)[0], *gap)))
    panels.append(
        Table(
            "What the highest third of the layers has",
            ("task", "arm", arms[0], "arm's", "difference", "low", "high"),
            tuple(rows),
            "Share of the sum of the values above 0 that the four highest of twelve layers have; a third would be "
            "even. 95 % intervals over seeds (Student's).",
        )
    )
    of_all = next(row for row in rows if row[0] == EVERY)
    even = f"{of_all[1]} {of_all[3]:.3f}, {arms[0]} {of_all[2]:.3f}"
    summary = f"Share of the highest third of the layers, mean of {len(tasks)} tasks: {even} (even: .333)."
    return report.ran(Report("What each layer is worth", summary, tuple(panels), records=tuple(done)), COMMAND)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sweep", type=Path, default=HERE.parent / "recipes" / "small" / "sweep-images.yaml")
    options.add_argument("--folder", type=Path, default=Path("runs/images"))
    options.add_argument("--arms", nargs="+", default=["LoRA", "CoTo"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--limit", type=int, default=200)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path("runs/shapley"))
    given = options.parse_args()
    sweep = read(given.sweep, given.arms)
    found = Found(sweep, Journal(given.folder / "journal"))
    done: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = {(one["arm"], one["task"], one["seed"], one["rate"], one["limit"]) for one in done}

    def left(cell: Cell, seed: int) -> bool:
        return (cell.arm, cell.task, seed, cell.rate, given.limit) not in known

    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        wanted = [(cell, seed) for seed in given.seeds for cell in found.chosen if left(cell, seed)]
        runs = [
            pool.submit(valued, cell.arm, seed, run_of(sweep, cell, seed), given.folder, given.limit)
            for cell, seed in wanted
        ]
        for run in runs:
            done.append(run.result())
            print(*(done[-1][key] for key in ("arm", "task", "seed", "top third")), flush=True)
            RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    report.write(page(done, list(sweep.tasks), list(sweep.arms)), given.out)


if __name__ == "__main__":
    main()
