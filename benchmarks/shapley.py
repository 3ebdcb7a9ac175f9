"""How evenly the layers of a sweep's adapters share their gain: Shapley values of LoRA's and CoTo's layers.

    loraloom sweep recipes/small/sweep-images.yaml -o runs/images --arms LoRA,CoTo
    python benchmarks/shapley.py              # some minutes an adapter; results/shapley.json, runs/shapley

Every arm at the rate that the sweep chose for each task, the first 100 test examples. What is in results/shapley.json
already is not computed again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import loraloom as ll
from loraloom import report
from loraloom.integrations.processes import end_with_parent
from loraloom.probing.asking import asked
from loraloom.report import Heatmap, Report, Table
from loraloom.sweep.found import Found, rounded, spread
from loraloom.sweep.plan import Cell, read, run_key, run_of
from loraloom.sweep.work import Journal

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "shapley.json"
COMMAND = "python benchmarks/shapley.py"
EVERY = "mean of the tasks"
VALUED, UPPER = "four most valued", "upper four"  # layers of twelve: the paper's share, and that of the depth


def valued(arm: str, seed: int, recipe: Any, folder: Path, limit: int, samples: int) -> dict[str, Any]:
    """The values of the layers of one adapter."""
    torch.set_num_threads(1)
    adapter = ll.load(folder / "adapters" / run_key(recipe)).loaded()
    found = ll.shapley(adapter, asked(adapter, recipe.task, limit=limit), samples=samples)
    told = {"arm": arm, "task": recipe.task, "seed": seed, "rate": recipe.train.learning_rate}
    told |= {"limit": limit, "asked": samples}
    return {**told, "top third": found.top_third, **found.to_json()}


def page(done: list[dict[str, Any]], tasks: list[str], arms: list[str]) -> Report:
    """A heat map of layers and tasks an arm, and how concentrated the values are."""
    panels: list[Any] = []
    layers = list(dict.fromkeys(unit for one in done for unit in one["units"]))
    for arm in arms:
        sums = [
            np.sum([one["values"] for one in done if (one["arm"], one["task"]) == (arm, task)], axis=0)
            for task in tasks
        ]
        z = tuple(tuple(round(float(one[layer] / one.sum()), 4) for one in sums) for layer in range(len(layers)))
        note = "Share of the gain: a layer's Shapley values summed over seeds, by the sum of all."
        panels.append(Heatmap(f"Layers of {arm}", "task", "layer", tuple(tasks), tuple(layers), z, note))
    rows = []
    for task, what in product([*tasks, EVERY], (VALUED, UPPER)):
        by = {arm: _by_seed(done, arm, task, what) for arm in arms}
        first = by[arms[0]]
        for arm in arms[1:]:
            gap = spread({seed: by[arm][seed] - first[seed] for seed in first})
            rows.append((task, what, arm, *rounded(spread(first)[0], spread(by[arm])[0], *gap)))
    panels.append(
        Table(
            "What a third of the layers has",
            ("task", "layers", "arm", arms[0], "arm's", "difference", "low", "high"),
            tuple(rows),
            "Shares of the sum of the values above 0: of the four layers with the highest values, and of the four next "
            "to the head. Even would be a third; chance in the values raises the first. 95 % intervals over seeds "
            "(Student's).",
        )
    )
    told = {row[1]: f"{row[2]} {row[4]:.3f}, {arms[0]} {row[3]:.3f}" for row in rows if row[0] == EVERY}
    parts = "; ".join(f"{what}: {share}" for what, share in told.items())
    summary = f"Shares of four of twelve layers, mean of {len(tasks)} tasks (even: .333). {parts}."
    return report.ran(Report("What each layer is worth", summary, tuple(panels), records=tuple(done)), COMMAND)


def _by_seed(done: list[dict[str, Any]], arm: str, task: str, what: str) -> dict[tuple[int, ...], float]:
    """The share of a third of the layers by seed, of one task or averaged over all."""
    shares: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for one in done:
        if one["arm"] == arm and task in (one["task"], EVERY):
            values = np.maximum(one["values"], 0)
            upper = values[-4:].sum() / values.sum()
            shares[one["seed"],].append(one["top third"] if what == VALUED else upper)
    return {seed: float(np.mean(values)) for seed, values in sorted(shares.items())}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sweep", type=Path, default=HERE.parent / "recipes" / "small" / "sweep-images.yaml")
    options.add_argument("--folder", type=Path, default=Path("runs/images"))
    options.add_argument("--arms", nargs="+", default=["LoRA", "CoTo"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--limit", type=int, default=100)
    options.add_argument("--samples", type=int, default=100)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path("runs/shapley"))
    given = options.parse_args()
    sweep = read(given.sweep, given.arms)
    found = Found(sweep, Journal(given.folder / "journal"))
    done: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = {tuple(one[key] for key in ("arm", "task", "seed", "rate", "limit", "asked")) for one in done}

    def left(cell: Cell, seed: int) -> bool:
        return (cell.arm, cell.task, seed, cell.rate, given.limit, given.samples) not in known

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, context, initializer=end_with_parent) as pool:
        wanted = [(cell, seed) for seed in given.seeds for cell in found.chosen if left(cell, seed)]
        runs = [
            pool.submit(valued, cell.arm, seed, run_of(sweep, cell, seed), given.folder, given.limit, given.samples)
            for cell, seed in wanted
        ]
        for run in runs:
            done.append(run.result())
            print(*(done[-1][key] for key in ("arm", "task", "seed", "top third")), flush=True)
            RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    report.write(page(done, list(sweep.tasks), list(sweep.arms)), given.out)


if __name__ == "__main__":
    main()
