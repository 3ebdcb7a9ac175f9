"""LoRI beside LoRA on bundled weights and data: single tasks, four merged, and three learned one after another.

    python benchmarks/lori.py                 # about 25 minutes on 2 cores; results/lori.{json,md}

ViT-S/14 at 28 pixels, rank 8, all linear layers, 120 steps of 16 examples, 160 examples a task. Learning rates are
chosen on validation splits from the grid in RATES with seed 0 of two tasks, merging weights on validation splits from
WEIGHTS; all other figures are of test splits. Intervals are Student's 95 % over three seeds. What is in
results/lori.json already is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import loraloom as ll
from loraloom.intervals import half_width
from loraloom.masks import support
from loraloom.probes.forgetting import forgetting
from loraloom.recipe import read
from loraloom.run import bench_of, train_on

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "lori.json"
RECIPES = {name: HERE.parent / "recipes" / "lori" / f"{name}.yaml" for name in ("lora", "lori-d", "lori-s")}
TASKS = ("digits-policy", "fashion-mnist", "easy-vqa-shape", "easy-vqa-colour")
CHAIN = TASKS[:3]  # the policy first, then what must not make it be forgotten
RATES = {
    "lora": (5e-4, 1e-3, 2e-3, 4e-3),
    "lori-d": (1.25e-3, 2.5e-3, 5e-3, 1e-2),
    "lori-s": (5e-3, 1e-2, 2e-2, 4e-2),
}
WEIGHTS = (0.25, 0.4, 0.6, 0.8, 1.0)
MERGES: dict[str, dict[str, Any]] = {
    "concat (exact sum)": {"method": "cat"},
    "linear on factors": {"method": "linear", "space": "factors"},
    "TIES on updates": {"method": "ties"},
}
SEEDS = (0, 1, 2)
STEPS = 120
VARIANTS = ("lora", "lori-d", "lori-s", "lori-s, protected")
_benches: dict[str, Any] = {}


def bench(task: str) -> Any:
    """The model set up for a task, once a process."""
    torch.set_num_threads(1)
    if task not in _benches:
        _benches[task] = bench_of(read(RECIPES["lora"]), task)
    return _benches[task]


def score(task: str, adapter: Any, split: str = "test") -> float:
    return float(bench(task).evaluate(adapter, split, 400).value)


def train(method: str, task: str, seed: int, rate: float, out: Path, more: list[str], bare: bool = False) -> Any:
    """Train one adapter into a folder, or take the one that is there."""
    if not out.exists():
        path = RECIPES[method]
        told = [f"task={task}", f"seed={seed}", f"output={out}", f"train.steps={STEPS}", f"train.learning_rate={rate}"]
        if bare:  # continued: the earlier adapter decides rank and targets
            path = out.with_name(out.name + ".yaml")
            path.write_text("".join(line for line in RECIPES[method].open() if not line.startswith("adapter:")))
        recipe = read(path, [*told, *more])
        with tempfile.TemporaryDirectory() as work:
            train_on(bench(task), recipe, work=Path(work), resume=False, progress=False, overwrite=False)
    return ll.load(out)


def tune(job: dict[str, Any], work: Path, rates: dict[str, float]) -> dict[str, Any]:
    method, task, rate = job["method"], job["task"], job["rate"]
    more = ["lori.calibrate.steps=40", "lori.calibrate.learning_rate=1e-2"] if method == "lori-s" else []
    adapter = train(method, task, 0, rate, work / f"tune-{method}-{task}-{rate}", more)
    return {"validation": score(task, adapter, "validation")}


def single(job: dict[str, Any], work: Path, rates: dict[str, float]) -> dict[str, Any]:
    method, task, seed = job["method"], job["task"], job["seed"]
    base = method.removesuffix(", shared A")
    adapter = train(
        base, task, seed, rates[base], work / name_of(method, task, seed), extra_of(method, task, seed, work, rates)
    )
    lori = adapter.provenance["record"].get("lori", {})
    return {"test": score(task, adapter), "base": score(task, None), "kept": lori.get("kept")}


def name_of(method: str, task: str, seed: int, coto: bool = False) -> str:
    return f"{method.replace(', ', '-').replace(' ', '-')}-{task}-{seed}{'-coto' if coto else ''}"


def extra_of(method: str, task: str, seed: int, work: Path, rates: dict[str, float]) -> list[str]:
    """What a recipe of a first phase needs besides: a shared A, or the mask of the LoRI-D run of the same seed."""
    if method.endswith("shared A"):
        return ["lori.shared=true"]
    if method != "lori-s":
        return []
    return [f"lori.calibrate={{density: 0.1, learning_rate: {rates['lori-d']}}}"]


def merged(job: dict[str, Any], work: Path, rates: dict[str, float]) -> dict[str, Any]:
    """Four adapters of one method and seed: cosines of their updates, and merges at the best weight."""
    method, seed = job["method"], job["seed"]
    adapters = [ll.load(work / name_of(method, task, seed)) for task in TASKS]
    cosines = ll.cosines(adapters)
    pairs = [abs(cosines[i][j]) for i in range(len(TASKS)) for j in range(i)]
    found: dict[str, Any] = {"cosine": statistics.fmean(pairs)}
    for name, how in MERGES.items():
        tried = {}
        for weight in WEIGHTS:
            adapter = ll.merge(adapters, weights=[weight] * len(TASKS), **how).loaded()
            tried[weight] = statistics.fmean(score(task, adapter, "validation") for task in TASKS)
        best = max(tried, key=lambda weight: tried[weight])
        adapter = ll.merge(adapters, weights=[best] * len(TASKS), **how).loaded()
        found[name] = {"weight": best, "test": [score(task, adapter) for task in TASKS]}
    return found


def continual(job: dict[str, Any], work: Path, rates: dict[str, float]) -> dict[str, Any]:
    """The tasks of the chain one after another; the matrix of scores, and how the masks overlap."""
    variant, coto, seed = job["variant"], job["coto"], job["seed"]
    method = variant.removesuffix(", protected")
    with_coto = ["strategy.name=coto"] if coto else []
    phases, overlaps, folders = [], [], [work]
    for at, task in enumerate(CHAIN):
        if at == 0:
            out = work / name_of(method, task, seed, coto)
            more = extra_of(method, task, seed, work, rates)
        else:
            out = work / (name_of(variant, task, seed, coto) + f"-phase{at}")
            more = [f"continue_from={folders[-1]}"]
            if method == "lori-s":
                more.append(f"lori.calibrate={{density: 0.1, steps: 40, learning_rate: {rates['lori-d']}}}")
            if variant.endswith("protected"):
                more.append(f"protect=[{folders[-1]}]")
        phases.append(train(method, task, seed, rates[method], out, [*more, *with_coto], bare=at > 0))
        told = phases[-1].provenance["record"].get("lori", {}).get("overlap", {})
        overlaps.append(max(told.values(), default=None))
        folders.append(out)
    result = forgetting(phases, {task: lambda adapter, task=task: score(task, adapter) for task in CHAIN})
    return {**result.to_json(), "overlap": overlaps, "density": [support(phase).density for phase in phases]}


KINDS = {"tune": tune, "single": single, "merged": merged, "continual": continual}


def run(job: dict[str, Any], work: Path, rates: dict[str, float]) -> dict[str, Any]:
    return {**job, **KINDS[job["kind"]](job, work, rates)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=Path("runs/lori"), help="folder of the adapters")
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--jobs", type=int, default=2)
    chosen = options.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = json.loads(chosen.results.read_text()) if chosen.results.exists() else []
    rates: dict[str, float] = {}

    def go(jobs: list[dict[str, Any]]) -> None:
        left = [job for job in jobs if not any(job.items() <= {k: old.get(k) for k in job}.items() for old in done)]
        for made in [pool.submit(run, job, chosen.work, rates) for job in left]:
            done.append(made.result())
            print(json.dumps(done[-1]), flush=True)
            chosen.results.write_text(json.dumps(done, indent=1) + "\n")

    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        grid = [(method, rate, task) for method, grid_of in RATES.items() for rate in grid_of for task in TASKS[:2]]
        go([{"kind": "tune", "method": method, "rate": rate, "task": task} for method, rate, task in grid])
        for method, grid_of in RATES.items():
            found = {
                rate: statistics.fmean(
                    old["validation"]
                    for old in done
                    if (old["kind"], old.get("method"), old.get("rate")) == ("tune", method, rate)
                )
                for rate in grid_of
            }
            rates[method] = max(found, key=lambda rate: found[rate])
        methods = ("lora", "lori-d", "lori-s", "lori-d, shared A")
        each = [{"method": method, "seed": seed} for seed in SEEDS for method in methods]
        go([{"kind": "single", **one, "task": task} for one in each for task in TASKS])
        go([{"kind": "merged", **one} for one in each])
        chains = [(variant, coto, seed) for seed in SEEDS for coto in (False, True) for variant in VARIANTS]
        first = [chain for chain in chains if not chain[0].endswith("protected")]
        rest = [chain for chain in chains if chain[0].endswith("protected")]  # they share the first phase of those
        for part in (first, rest):
            go([{"kind": "continual", "variant": variant, "coto": coto, "seed": seed} for variant, coto, seed in part])
    chosen.results.with_suffix(".md").write_text(page(done, rates))


def spread(values: list[float]) -> str:
    """Mean over seeds with its interval."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} +- {half_width(error, len(values)):.3f}"


def page(done: list[dict[str, Any]], rates: dict[str, float]) -> str:
    """The tables."""
    of = {kind: [one for one in done if one["kind"] == kind] for kind in KINDS}
    methods = list(dict.fromkeys(one["method"] for one in of["single"]))
    lines = [
        "# LoRI beside LoRA, on bundled weights and data",
        "",
        *(__doc__ or "").strip().split("\n\n")[2].splitlines(),
        "",
    ]
    lines += ["Learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in rates.items()) + ".", ""]
    lines += ["## Single tasks, test accuracy", "", "| method | trained entries | " + " | ".join(TASKS) + " | mean |"]
    lines += ["|---|--:|" + "--:|" * (len(TASKS) + 1)]
    for method in methods:
        rows = [one for one in of["single"] if one["method"] == method]
        cells = [spread([one["test"] for one in rows if one["task"] == task]) for task in TASKS]
        means = [statistics.fmean(one["test"] for one in rows if one["seed"] == seed) for seed in SEEDS]
        lines.append(f"| {method} | {rows[0]['kept'] or 'all'} | " + " | ".join(cells) + f" | {spread(means)} |")
    bases = {one["task"]: one["base"] for one in of["single"]}
    lines.append("| the base alone | | " + " | ".join(f"{bases[task]:.3f}" for task in TASKS) + " | |")
    lines += ["", "## Four adapters merged, mean test accuracy over the tasks", ""]
    lines += [
        "| method | mean abs. cosine of the updates | " + " | ".join(MERGES) + " |",
        "|---|--:|" + "--:|" * len(MERGES),
    ]
    for method in methods:
        rows = [one for one in of["merged"] if one["method"] == method]
        cells = [spread([statistics.fmean(one[name]["test"]) for one in rows]) for name in MERGES]
        lines.append(f"| {method} | {spread([one['cosine'] for one in rows])} | " + " | ".join(cells) + " |")
    lines += ["", f"## One after another: {', '.join(CHAIN)}", ""]
    lines += [
        "| method | CoTo | policy at first | policy at last | kept of it | ACC | BWT | FWT | mask overlap | B not 0 |"
    ]
    lines += ["|---|---|" + "--:|" * 8]
    for variant in VARIANTS:
        for coto in (False, True):
            rows = [one for one in of["continual"] if (one["variant"], one["coto"]) == (variant, coto)]
            first, last = [one["scores"][0][0] for one in rows], [one["scores"][-1][0] for one in rows]
            kept = [b / a for a, b in zip(first, last, strict=True)]
            overlap = [value for one in rows for value in one["overlap"] if value is not None]
            cells = [first, last, kept, *([one[key] for one in rows] for key in ("accuracy", "backward", "forward"))]
            tail = [
                f"{statistics.fmean(overlap):.3f}" if overlap else "",
                f"{statistics.fmean(one['density'][-1] for one in rows):.3f}",
            ]
            lines.append(
                f"| {variant} | {'yes' if coto else 'no'} | " + " | ".join([*map(spread, cells), *tail]) + " |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
