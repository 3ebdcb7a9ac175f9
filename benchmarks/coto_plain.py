"""Our CoTo beside the plainest one: a callback that draws each layer's adapter by itself, as the authors' README tells.

    python benchmarks/coto_plain.py recipes/small/sweep-first.yaml runs/regime-first --rate 3e-3

Trains the seeds of a finished sweep's arm once more with the plain callback: from 0.1 to 1 over 75 % of the steps,
draws from torch's global generator, all modules of a layer on or off together, at least one layer on. A switched-off
adapter takes no gradient and is skipped. Alone and half way between seeds are then compared with the sweep's own CoTo,
on the same seeds and examples. The two draw differently, so they agree within the spread of seeds at best.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

from loraloom.integrations import adapting, fit
from loraloom.integrations import peft as edge
from loraloom.ops.interpolate import interpolate
from loraloom.run import _fit_options, bench_of
from loraloom.strategies.units import group
from loraloom.sweep import read
from loraloom.sweep.found import spread
from loraloom.sweep.plan import cells, phases, run_of
from loraloom.sweep.work import Journal

RESULTS = Path(__file__).parent / "results" / "coto_plain.json"


class Plain(TrainerCallback):
    """Draws before every step; opens all at the end."""

    def __init__(self, model: torch.nn.Module, steps: int, ramp: float = 0.75, start: float = 0.1) -> None:
        found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        self.layers = [[found[name] for name in names] for names in group(list(found), "layer").values()]
        self.ramp, self.start = math.ceil(ramp * steps), start

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        chance = min(1.0, self.start + (1 - self.start) * state.global_step / self.ramp)
        on = torch.rand(len(self.layers)) < chance
        while not on.any():
            on = torch.rand(len(self.layers)) < chance
        self.switch(on.tolist())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch([True] * len(self.layers))

    def switch(self, on: list[bool]) -> None:
        for modules, active in zip(self.layers, on, strict=True):
            for module in modules:
                module.enable_adapters(active)


def trained(bench: Any, recipe: Any) -> Any:
    """One adapter with the plain callback."""
    work = Path(tempfile.mkdtemp())
    with adapting.training(bench.model, **recipe.adapter.model_dump(), seed=recipe.seed) as model:
        options = _fit_options(recipe.train, recipe.seed, work, resume=False, progress=False)
        plain = Plain(model, recipe.train.steps)
        fit.fit(model, bench.training, collate=bench.collate, options=options, loss=bench.loss, callbacks=[plain])
        adapter = edge.from_model(model).loaded()
    shutil.rmtree(work)
    return adapter


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("sweep", type=Path)
    options.add_argument("folder", type=Path)
    options.add_argument("--rate", type=float, required=True)
    options.add_argument("--arm", default="CoTo")
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args()
    sweep, journal = read(chosen.sweep), Journal(chosen.folder / "journal")
    torch.set_num_threads(sweep.threads or 1)
    cell = next(cell for cell in cells(sweep) if (cell.arm, cell.rate) == (chosen.arm, chosen.rate))
    bench = bench_of(run_of(sweep, cell, sweep.seeds[0]))
    adapters = {seed: trained(bench, run_of(sweep, cell, seed)) for seed in sweep.seeds}
    after = dict(zip(sweep.seeds, [*sweep.seeds[1:], sweep.seeds[0]], strict=True))
    points = {
        "alone": dict(adapters),
        **{
            f"half way, {space}": {
                seed: interpolate(adapters[seed], adapters[after[seed]], space=space) for seed in adapters
            }
            for space in ("factors", "delta")
        },
    }
    ours = {
        (job.operation.name, job.seed): float(journal.correct(job, "test").mean())
        for jobs in phases(sweep, lambda cell: chosen.rate)
        for job in jobs
        if job.cell == cell and job.operation.name in points
    }
    rows = []
    for name, held in points.items():
        plain = {seed: bench.evaluate(adapter, "test", sweep.limit).value for seed, adapter in held.items()}
        own = {seed: ours[name, seed] for seed in held}
        gap = spread({(seed,) if name == "alone" else (seed, after[seed]): own[seed] - plain[seed] for seed in held})
        rows.append({"measurement": name, "loraloom": own, "plain": plain, "difference, low, high": gap})
        print(f"{name}: loraloom {np.mean(list(own.values())):.3f}, plain {np.mean(list(plain.values())):.3f}, {gap}")
    told = {"sweep": chosen.sweep.name, "arm": cell.arm, "axes": cell.axes, "task": cell.task, "rate": cell.rate}
    chosen.results.parent.mkdir(exist_ok=True)
    chosen.results.write_text(json.dumps({**told, "limit": sweep.limit, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
