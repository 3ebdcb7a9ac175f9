"""What attribution costs when beginnings are shared: Shapley values of the 12 layers of ViT-S/14 with a digits adapter.

    python benchmarks/attribution.py            # seven minutes of one core; results/attribution.{json,md}
    python benchmarks/attribution.py --limit 128 --samples 200
    python benchmarks/attribution.py --parts variants     # the other parts stay as they are in the results

An adapter (rank 8, all linear layers) is trained first. Then the coalitions of ``shapley(samples=...)`` are scored
with shared beginnings, and some of them, before and after, in two plainer ways: attached anew for each and whole passes
(what a plain callable does), and gates on one attached adapter and whole passes. Last, coalitions one by one and
several in a pass, turn by turn, with few examples and with a full batch; what could be gained at most is told by rows
in a second over sizes of the batch. CPU time of the process, which other work disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import loraloom as ll
from loraloom import recipe, run
from loraloom.adapter import Adapter
from loraloom.integrations.prefix import Scores
from loraloom.probes.game import Work

HERE = Path(__file__).parent
SIDE, ROWS = 42, (8, 16, 32, 64, 128)
PARTS = ("counts", "rows a second", "time", "variants")
ALONE, DEFAULT = 1, None  # rows of a pass
VARIANTS = (  # pixels a side, examples, evaluations, rows of a pass
    (SIDE, 8, 178, (ALONE, DEFAULT, 32, 128)),
    (SIDE, 16, 64, (ALONE, DEFAULT)),
    (SIDE, 64, 16, (ALONE, DEFAULT)),
    (98, 8, 32, (ALONE, DEFAULT, 64)),
)


def trained(folder: Path, steps: int) -> Adapter:
    """An adapter on digits."""
    content = {
        "model": "vit-s14",
        "task": "digits",
        "output": str(folder / "adapter"),
        "adapter": {"rank": 8, "alpha": 16},
        "train": {"steps": steps, "batch_size": 16, "learning_rate": 5e-4, "save_every": None},
        "data": {"image_size": SIDE},
    }
    run.train(recipe.parse(content))
    return ll.load(folder / "adapter").loaded()


class Asked:
    """A score that notes what a probe asks and answers at once; the plan is the bench's."""

    def __init__(self, score: Scores) -> None:
        self.score, self.seen, self.work = score, [], Work()

    def __call__(self, adapter: Adapter | None) -> float:
        return self.many([adapter])[0]

    def many(self, adapters: list[Adapter | None]) -> list[float]:
        self.seen += adapters
        self.work = self.score.plan(adapters).added_to(self.work, len(adapters))
        return [float(at % 7) for at in range(len(adapters))]


def counts(score: Scores, adapter: Adapter, ways: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations and block passes of several ways to ask, planned; nothing is scored."""
    rows = []
    for name, options in ways.items():
        found = ll.shapley(adapter, Asked(score), **options)
        whole = (found.evaluations + found.saved) * 12
        rows.append(
            {
                "way": name,
                "evaluations": found.evaluations,
                "known already": found.saved,
                "block passes": found.passes,
                "whole passes": found.passes + found.passes_saved,
                "times fewer": (found.passes + found.passes_saved) / found.passes,
                "times fewer, with what was known already": whole / found.passes,
            }
        )
    return rows


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and the value."""
    began = time.process_time()
    value = work()
    return time.process_time() - began, value


def compared(made: Any, asked: list[Adapter | None], some: int, limit: int) -> dict[str, Any]:
    """CPU seconds an evaluation: shared for all, whole passes for some, before and after; and whether all agree."""
    shared, whole = Scores(made, limit=limit), Scores(made, limit=limit, memory=0)
    few = [asked[at * len(asked) // some] for at in range(some)]
    halves = few[::2], few[1::2]
    plain: list[float] = []
    values: list[float] = []
    gates: list[float] = []

    def whole_passes(half: list[Adapter | None]) -> None:
        for one in half:
            spent, value = timed(lambda one=one: whole(one))
            plain.append(spent)
            values.append(value)
        spent, found = timed(lambda: whole.many(half))
        gates.append(spent / len(half))
        assert found == values[-len(half) :]

    whole_passes(halves[0])
    spent, found = timed(lambda: shared.many(asked))
    whole_passes(halves[1])
    by = dict(zip(map(id, asked), found, strict=True))
    same = [by[id(one)] for half in halves for one in half] == values
    per = {"plain": statistics.median(plain), "gates": statistics.mean(gates), "shared": spent / len(asked)}
    return {
        "evaluations": len(asked),
        "of them also plain": len(values),
        "same scores": same,
        "CPU seconds an evaluation": per,
        "times faster than plain": per["plain"] / per["shared"],
        "times faster than gates": per["gates"] / per["shared"],
        "block passes": shared.work.passes,
        "whole passes": shared.work.whole,
        "ran": shared.ran,
    }


def throughput(made: Any, repeats: int = 5) -> dict[int, float]:
    """Rows in a CPU second by how many are in a batch: what several coalitions in one pass could gain at most."""
    examples = made.training[: max(ROWS)]
    batch = made.collate(examples)["pixel_values"]
    found = {}
    with torch.inference_mode():
        for rows in ROWS:
            made.model(pixel_values=batch[:rows])
            times = [timed(lambda rows=rows: made.model(pixel_values=batch[:rows]))[0] for _ in range(repeats)]
            found[rows] = rows / statistics.median(times)
    return found


def variants(asked: list[Adapter | None], repeats: int) -> list[dict[str, Any]]:
    """CPU seconds for the same evaluations, one by one and several in a pass; ways take turns."""
    found = []
    for side, examples, evaluations, ways in VARIANTS:
        made, some = ll.bench("vit-s14", "digits", image_size=side), asked[:evaluations]
        scores = {rows: Scores(made, limit=examples, rows=rows) for rows in ways}
        plans = {rows: score.plan(some) for rows, score in scores.items()}
        spent: dict[int | None, list[float]] = {rows: [] for rows in ways}
        values: dict[int | None, dict[int, float]] = {}
        for _ in range(repeats):
            for rows, score in scores.items():
                scored = partial(score.stream, some, plans[rows].runs)
                seconds, values[rows] = timed(lambda scored=scored: dict(scored()))
                spent[rows].append(seconds)
        for rows, plan in plans.items():
            row = {"pixels": side, "examples": examples, "evaluations": len(some), "rows": rows}
            times = {"CPU seconds": statistics.median(spent[rows]), "all": spent[rows]}
            gain = statistics.median(spent[ALONE]) / times["CPU seconds"]
            row |= {"shares": any(len(run) > 1 for run in plan.runs), "block rows": plan.passes * examples}
            row |= {**times, "times faster": gain}
            found.append({**row, "same scores": values[rows] == values[ALONE]})
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    time_, rows = report["time"], report["rows a second"]
    per = time_["CPU seconds an evaluation"]
    counted = "\n".join(
        f"| {one['way']} | {one['evaluations']} ({one['known already']}) | {one['block passes']} |"
        f" {one['whole passes']} | {one['times fewer']:.1f} | {one['times fewer, with what was known already']:.1f} |"
        for one in report["counts"]
    )
    several = ", ".join(f"{count}: {value:.0f}" for count, value in rows.items())
    gain = max(rows.values()) / rows[min(rows, key=int)]
    where = f"{report['made']['cores']} shared cores, {report['made']['threads']} thread, {report['asked']['limit']}"
    agree = "the same" if time_["same scores"] else "NOT the same"
    joined = "\n".join(
        f"| {one['pixels']} | {one['examples']} | {one['evaluations']} | {one['rows'] or 'default'}"
        f"{'' if one['shares'] else ' (one by one)'} |"
        f" {one['block rows']} | {one['CPU seconds']:.1f} | {one['times faster']:.2f} |"
        f" {'yes' if one['same scores'] else 'NO'} |"
        for one in report["variants"]
    )
    return f"""# Attribution with shared beginnings

{report["asked"]["model"]} (12 layers, {SIDE} pixels), units are the layers; adapter of rank 8 on all linear layers,
digits. Counts are plans (`--limit` does not change them). *times fewer*: whole passes by block passes; the last column
also counts coalitions that came up again.

| way | evaluations (known already) | block passes | whole passes | times fewer | with those known already |
|---|--:|--:|--:|--:|--:|
{counted}

Time, on {where} examples: {time_["evaluations"]} evaluations with shared
beginnings, {time_["of them also plain"]} of them also with whole passes, half before and half after.

| CPU seconds an evaluation | | times the shared |
|---|--:|--:|
| shared beginnings | {per["shared"]:.3f} | 1 |
| gates on one attached adapter, whole passes | {per["gates"]:.3f} | {time_["times faster than gates"]:.1f} |
| attached anew for each, whole passes | {per["plain"]:.3f} | {time_["times faster than plain"]:.1f} |

The scores are {agree}.

## Several coalitions in a pass

Coalitions share passes of at most so many rows where there is room for four, else they go one by one; a row is a
picture: 10 tokens at 42 pixels, 50 at 98. Medians of {report["asked"]["repeats"]} rounds in which the ways take turns;
how far two ways that are both one by one differ is chance. Block rows: rows times the blocks they go through.

| pixels | examples | evaluations | rows of a pass | block rows | CPU seconds | times faster | same scores |
|--:|--:|--:|---|--:|--:|--:|---|
{joined}

Rows in a CPU second of whole passes, by rows in a batch: {several}.
The best is {gain:.2f} times the smallest.
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--some", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        adapter = trained(Path(folder), asked.steps)
    made = ll.bench("vit-s14", "digits", image_size=SIDE)
    score = Scores(made, limit=asked.limit)
    ways: dict[str, dict[str, Any]] = {
        "multilinear, 200 samples (the default)": {},
        f"multilinear, {asked.samples} samples": {"samples": asked.samples},
        "permutations, 40": {"by": "permutations", "samples": 40},
        "exact": {"by": "exact"},
        "leave-one-out": {"by": "leave-one-out"},
    }
    noted = Asked(score)
    ll.shapley(adapter, noted, samples=asked.samples)
    made_with = {"cores": os.cpu_count(), "threads": asked.threads, "torch": torch.__version__}
    options = {key: value for key, value in vars(asked).items() if key not in ("out", "parts")}
    held = asked.out / "attribution.json"
    report: dict[str, Any] = json.loads(held.read_text()) if held.exists() else {}
    report |= {"made": made_with, "asked": {"model": "vit-s14", **options}}
    work: dict[str, Callable[[], Any]] = {
        "counts": lambda: counts(score, adapter, ways),
        "rows a second": lambda: throughput(made),
        "time": lambda: compared(made, noted.seen, asked.some, asked.limit),
        "variants": lambda: variants(noted.seen, asked.repeats),
    }
    for part in asked.parts:
        report[part] = work[part]()
    asked.out.mkdir(parents=True, exist_ok=True)
    held.write_text(json.dumps(report, indent=1) + "\n")
    (asked.out / "attribution.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
