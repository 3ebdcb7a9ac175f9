"""MokA beside LoRA and what lies between them, on two small real models: pictures with questions, and speech.

    python benchmarks/moka.py                 # results/moka.{json,md}; resumes where it was stopped

Stage one trains the projector alone (recipes/moka/*-projector.yaml), once. On top of that model each method trains
adapters on all linear layers of the language model, with the projector beside them: same examples, steps, rank (so that
several A's or B's have more parameters) and learning rate. The rate is the one of RATES by which LoRA with seed 0 gives
the right answers of the validation split the highest likelihood; the other methods may have better ones. Figures are of
test splits. Differences to LoRA are paired over examples, each example's outcome averaged over the seeds first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import loraloom as ll
from loraloom.experts import as_stored
from loraloom.integrations.peft import attached
from loraloom.intervals import half_width
from loraloom.recipe import read
from loraloom.run import bench_of, train_on
from loraloom.tasks.metrics import difference

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "moka.json"
RECIPES = HERE.parent / "recipes" / "moka"
SETS = ("vqa", "speech")
LIMITS = {"vqa": (100, 200), "speech": (None, None)}  # examples of validation and test
METHODS: Mapping[str, tuple[str, ...]] = {
    "LoRA": ("adapter.kind=lora", "moka=null"),
    "one A, several B's": ("moka.own=B", "moka.attention=none"),
    "uni-modal LoRA": ("moka.own=both", "moka.attention=none"),
    "MokA without attention": ("moka.attention=none",),
    "MokA": (),
}
RATES = {"vqa": (3e-4, 1e-3, 3e-3), "speech": (1e-3,)}
SEEDS = (0, 1, 2)
_benches: dict[str, Any] = {}


def bench(of: str, work: Path) -> Any:
    """The model of a set with its task, once a process."""
    torch.set_num_threads(1)
    if of not in _benches:
        _benches[of] = bench_of(read(RECIPES / f"{of}-moka.yaml", [f"model={work / f'{of}-base'}"]))
    return _benches[of]


def stage_one(of: str, work: Path) -> None:
    """The model with its trained projector, unless it is there; a later call on another machine makes it again."""
    out = work / f"{of}-base"
    if not out.exists():
        ll.train(read(RECIPES / f"{of}-projector.yaml", [f"output={out}"]), overwrite=True)


def measured(of: str, adapter: Any, split: str, work: Path) -> dict[str, Any]:
    """Outcomes, and the mean log-likelihood per token of the right answers."""
    made = bench(of, work)
    examples = made.task.splits[split][: LIMITS[of][split == "test"]]
    with attached(made.model, adapter) as model:
        model.eval()
        scores = list(made.rows.likelihoods(model, examples))
    right = [int(max(range(len(s)), key=s.__getitem__) == e.label) for s, e in zip(scores, examples, strict=True)]
    told = statistics.fmean(s[e.label] for s, e in zip(scores, examples, strict=True))
    return {"accuracy": statistics.fmean(right), "log_likelihood": told, "right": right}


def run(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """One job of the list, with its result."""
    if job["kind"] == "projector":
        return {**job, "test": measured(job["set"], None, "test", work)}
    of, rate = job["set"], job["rate"]
    out = work / "-".join(str(part) for part in job.values()).replace(" ", "_").replace(",", "")
    more = [f"seed={job['seed']}", f"train.learning_rate={rate}", f"output={out}", f"model={work / f'{of}-base'}"]
    recipe = read(RECIPES / f"{of}-moka.yaml", [*METHODS[job["method"]], *more])
    made = bench(of, work)
    with tempfile.TemporaryDirectory() as folder:
        trained = train_on(made, recipe, work=Path(folder), resume=False, progress=False, overwrite=True)
    adapter = ll.load(out)
    factors = sum(m.B.numel() + m.A.numel() for m in as_stored(adapter).modules.values())
    splits = ("validation", "test") if job["method"] == "LoRA" and job["seed"] == 0 else ("test",)
    told = {split: measured(of, adapter, split, work) for split in splits}
    return {**job, **told["test"], **told, "seconds": trained.seconds, "parameters": factors}


def main() -> None:
    """Run what is not done yet, then write the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=Path("runs/moka"), help="folder of models and adapters")
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    options.add_argument("--jobs", type=int, default=2)
    chosen = options.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = json.loads(chosen.results.read_text()) if chosen.results.exists() else []

    def go(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        def found(job: dict[str, Any]) -> dict[str, Any] | None:
            return next((old for old in done if job.items() <= {k: old.get(k) for k in job}.items()), None)

        for made in [pool.submit(run, job, chosen.work) for job in jobs if found(job) is None]:
            done.append(made.result())
            print(
                {key: value for key, value in done[-1].items() if key not in ("right", "validation", "test")},
                flush=True,
            )
            chosen.results.write_text(json.dumps(done) + "\n")
        return [held for job in jobs if (held := found(job)) is not None]

    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        for of in chosen.sets:
            pool.submit(stage_one, of, chosen.work).result()
            go([{"kind": "projector", "set": of}])
            plain = {"kind": "run", "set": of, "method": "LoRA", "seed": 0}
            tried = go([{**plain, "rate": rate} for rate in RATES[of]])
            rate = max(tried, key=lambda one: one["validation"]["log_likelihood"])["rate"]
            each = [(seed, method) for seed in SEEDS for method in METHODS]
            go([{"kind": "run", "set": of, "method": m, "seed": seed, "rate": rate} for seed, m in each])
            chosen.results.with_suffix(".md").write_text(page(done))


def spread(values: list[float]) -> str:
    """Mean over seeds with its 95 % interval (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} +- {half_width(error, len(values)):.3f}"


def page(done: list[dict[str, Any]]) -> str:
    """The tables."""
    told = [" ".join(part.split()) for part in (__doc__ or "").strip().split("\n\n")]
    lines = [f"# {told[0].rstrip('.')}", "", told[2], ""]
    for of in dict.fromkeys(one["set"] for one in done):
        base = next(one for one in done if (one["kind"], one["set"]) == ("projector", of))
        runs = [one for one in done if (one["kind"], one["set"]) == ("run", of)]
        if not runs:
            continue
        tried = {one["rate"] for one in runs}
        rate = statistics.mode(one["rate"] for one in runs)
        runs = [one for one in runs if one["rate"] == rate]
        ran = {(one["seed"], one["method"]) for one in runs}
        seeds = [seed for seed in SEEDS if all((seed, method) in ran for method in METHODS)]
        runs = [one for one in runs if one["seed"] in seeds]  # whole ones only
        if not runs:
            continue
        rates = ", ".join(f"{one:g}" for one in sorted(tried))
        recipe = read(RECIPES / f"{of}-moka.yaml")
        lines += [
            f"## {recipe.task}: {read(RECIPES / f'{of}-projector.yaml').model}",
            "",
            f"{recipe.train.steps} steps of {recipe.train.batch_size}, rate {rate:g} of {rates}, rank "
            f"{recipe.adapter.rank}, {len(seeds)} seeds, {len(base['test']['right'])} test examples; after stage one "
            f"alone {base['test']['accuracy']:.3f} (log-likelihood {base['test']['log_likelihood']:.3f}).",
            "",
            "| method | adapter entries | accuracy | minus LoRA | log-likelihood of the right answer | seconds |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        lora = [one for one in runs if one["method"] == "LoRA"]
        for method in METHODS:
            rows = [one for one in runs if one["method"] == method]
            if not rows:
                continue
            cells = [f"{rows[0]['parameters']:,}", spread([one["accuracy"] for one in rows])]
            cells += ["" if method == "LoRA" else paired(rows, lora)]
            cells += [spread([one["log_likelihood"] for one in rows])]
            cells += [f"{statistics.median(one['seconds'] for one in rows):.0f}"]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def paired(rows: list[dict[str, Any]], lora: list[dict[str, Any]]) -> str:
    """Difference of the shares of right answers with its interval over examples."""
    means = [
        [statistics.fmean(each) for each in zip(*(one["right"] for one in kind), strict=True)] for kind in (rows, lora)
    ]
    found = difference(*means)
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


if __name__ == "__main__":
    main()
