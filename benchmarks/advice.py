"""Would advice from interference figures beat the default merge? Trained adapters, every method, one task held out.

    python benchmarks/advice.py measure --work DIR   # four tasks, LoRA and CoTo, two seeds; merged by every method
    python benchmarks/advice.py learn                # rules, one task held out each time, against the default

The model is the upper two layers of the bundled ViT-S/14 on what the frozen lower ten give for images of 28 px, so
that the whole takes minutes; adapters of rank 8 on query, value and MLP, heads fixed from frozen features. Adapters and
scores are written as they come; what is there is not made again. ``learn`` reads benchmarks/results/advice.json alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loraloom as ll
from loraloom.integrations.scoring import Bench, Prototypes, bench, fit_prototypes
from loraloom.integrations.seat import Seat
from loraloom.tasks import Task, load_task

RESULTS = Path(__file__).parent / "results" / "advice.json"
LOWER, RANK, STEPS, BATCH, RATE, SEEDS = 10, 8, 80, 16, 3e-3, (0, 1)
COUNTS = {"train": 160, "test": 120}
# Tasks made of the bundled ones: classes put together, so that one image has several questions.
LOOPS = (("zero", "six", "eight", "nine"), ("one", "two", "three", "four", "five", "seven"))
KINDS = (("t-shirt", "pullover", "coat", "shirt"), ("trousers", "dress"), ("sandal", "sneaker", "ankle boot"), ("bag",))
TASKS = {
    "digits": ("digits", None),
    "fashion": ("fashion-mnist", None),
    "digits-loops": ("digits", LOOPS),
    "fashion-kinds": ("fashion-mnist", KINDS),
}
DEFAULT = "linear"
METHODS = (
    *("linear", "svd", "ties", "dare", "dare_ties", "della", "breadcrumbs", "magnitude", "consensus", "sce", "cart"),
    *("ctm", "iso_c", "iso_cts", "karcher", "lego", "model_stock", "pico", "tsv_m"),
)
SUMS = {"linear, weights 1.5/k": 1.5, "linear, weights 2/k": 2.0}  # the sum of the weights


class Upper(nn.Module):
    """The upper layers of the ViT: hidden states, n x tokens x width, to features, n x width."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm = vit.encoder.layer[LOWER:], vit.layernorm

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)[:, 0]


@dataclass(frozen=True)
class Part:
    """Hidden states (n x tokens x width) and labels (n) of a task's split."""

    hidden: Tensor
    labels: Tensor


class Suite:
    """The model, and every task with its head."""

    def __init__(self) -> None:
        first = bench("vit-s14", "digits", image_size=28)
        self.model = Upper(first.model).eval()
        self.seat = Seat(self.model)
        self.parts: dict[str, dict[str, Part]] = {}
        self.heads: dict[str, Prototypes] = {}
        hidden: dict[str, tuple[Task, dict[str, Tensor]]] = {}
        for name, (source, groups) in TASKS.items():
            if source not in hidden:
                task = load_task(source, limit=max(COUNTS.values()))
                hidden[source] = (task, {split: _lower(replace(first, task=task), split) for split in COUNTS})
            self.parts[name] = {split: _part(*hidden[source], groups, split) for split in COUNTS}
            train = self.parts[name]["train"]
            with torch.inference_mode():
                features = self.model(train.hidden)
            self.heads[name] = fit_prototypes(features, train.labels, int(train.labels.max()) + 1, "cls")

    def accuracy(self, adapter: ll.Adapter | None, tasks: Sequence[str]) -> list[float]:
        """On the test examples of each task."""
        found = []
        with self.seat.attached(adapter) as live, torch.inference_mode():
            for task in tasks:
                part = self.parts[task]["test"]
                choices = self.heads[task].logits(live(part.hidden)).argmax(-1)
                found.append(float((choices == part.labels).float().mean()))
        return found


def _lower(made: Bench, split: str) -> Tensor:
    """What the frozen layers give."""
    states = []
    with torch.inference_mode():
        for batch in made._batches(made.task.splits[split][: COUNTS[split]]):
            hidden = made.model.embeddings(batch["pixel_values"])
            for layer in made.model.encoder.layer[:LOWER]:
                hidden = layer(hidden)
            states.append(hidden)
    return torch.cat(states).clone()


def _part(task: Task, hidden: dict[str, Tensor], groups, split: str) -> Part:
    place = {old: at for at, group in enumerate(groups or ()) for old in group}
    examples = task.splits[split][: COUNTS[split]]
    return Part(hidden[split], torch.tensor([place[task.labels[e.label]] if groups else e.label for e in examples]))


def train(suite: Suite, work: Path) -> None:
    """The adapters that are not there yet."""
    for task in TASKS:
        for strategy in ("lora", "coto"):
            for seed in SEEDS:
                folder = work / f"{task}-{strategy}-{seed}"
                if not folder.exists():
                    ll.save(_trained(suite, task, strategy, seed), folder)
                    print(
                        folder.name, suite.accuracy(None, [task]), suite.accuracy(ll.load(folder), [task]), flush=True
                    )


def _trained(suite: Suite, task: str, strategy: str, seed: int) -> ll.Adapter:
    from peft import LoraConfig, get_peft_model

    from loraloom.integrations.peft import Snapshot, from_model

    snapshot = Snapshot(suite.model)
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj", "fc1", "fc2"])
    live = get_peft_model(suite.model, config)
    plan = ll.CoTo(total_steps=STEPS, seed=seed) if strategy == "coto" else None
    weights = [parameter for parameter in live.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    part, head = suite.parts[task]["train"], suite.heads[task]
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(part.labels), generator=draw) for _ in range(STEPS)])
    live.train()
    for step in range(STEPS):
        rows = order[step * BATCH : (step + 1) * BATCH]

        def loss(rows: Tensor = rows) -> Tensor:
            return F.cross_entropy(head.logits(live(part.hidden[rows])), part.labels[rows])

        if plan is None:
            loss().backward()
        else:
            with plan.applied(live, step):
                loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    adapter = from_model(live)
    snapshot.restore()
    return adapter


def groups() -> list[tuple[str, ...]]:
    """What is merged, in a random order: seeds of one task, pairs and triples of tasks; one strategy each."""
    found = [tuple(f"{task}-{how}-{seed}" for seed in SEEDS) for task in TASKS for how in ("lora", "coto")]
    for size in (2, 3):
        for tasks in combinations(TASKS, size):
            found += [tuple(f"{task}-{how}-0" for task in tasks) for how in ("lora", "coto")]
    random.Random(0).shuffle(found)
    return found


def task_of(adapter: str) -> str:
    return adapter.rsplit("-", 2)[0]


def score(suite: Suite, work: Path) -> None:
    """Every group by every method: accuracy on each of its tasks, and the interference figures of the group."""
    told = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"alone": {}, "groups": {}}
    for group in groups():
        key, tasks = " + ".join(group), list(dict.fromkeys(map(task_of, group)))
        adapters = [ll.load(work / name).loaded() for name in group]
        for name, adapter in zip(group, adapters, strict=True):
            if name not in told["alone"]:
                told["alone"][name] = suite.accuracy(adapter, [task_of(name)])[0]
        if key in told["groups"]:
            continue
        scores = {}
        for method in METHODS:
            scores[method] = suite.accuracy(ll.merge(adapters, method), tasks)
        for method, total in SUMS.items():
            merged = ll.merge(adapters, weights=[total / len(group)] * len(group))
            scores[method] = suite.accuracy(merged, tasks)
        told["groups"][key] = {"tasks": tasks, "figures": figures(adapters), "scores": scores}
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")
        print(key, f"{np.mean(scores[DEFAULT]):.3f}", flush=True)


def figures(adapters: Sequence[ll.Adapter]) -> dict[str, float]:
    """What interference tells of a group: means over its pairs, and the number of adapters."""
    found = ll.interference(adapters)
    pairs = list(combinations(range(len(adapters)), 2))

    def mean(matrix) -> float:
        return float(np.mean([matrix[i][j] for i, j in pairs]))

    norms = found.norms
    return {
        "adapters": len(adapters),
        "cosine": mean(found.cosine),
        "tsv": mean(found.tsv),
        "core": float(np.mean([found.core[i][j] for i in range(len(norms)) for j in range(len(norms)) if i != j])),
        "sign_conflict": mean(found.sign_conflict),
        "sign_conflict_weighted": mean(found.sign_conflict_weighted),
        "grassmann_columns": mean(found.grassmann.columns),
        "grassmann_rows": mean(found.grassmann.rows),
        "norm_ratio": math.log(max(norms) / min(norms)),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("stage", choices=("measure", "learn"))
    options.add_argument("--work", type=Path, help="folder of the adapters")
    chosen = options.parse_args()
    if chosen.stage == "learn":
        learn()
        return
    if chosen.work is None:
        options.error("--work: the folder of the adapters is needed")
    suite = Suite()
    train(suite, chosen.work)
    score(suite, chosen.work)


def learn() -> None:
    """What rules gain over the default on groups with a task that they never saw; written beside the results."""
    told = json.loads(RESULTS.read_text())
    held, wanted = told["groups"], len(groups())
    if len(held) < wanted:
        raise SystemExit(f"{len(held)} of {wanted} groups are scored; `measure` goes on where it stopped")
    rows = [Group(frozenset(one["tasks"]), one["figures"], _gains(one["scores"])) for one in held.values()]
    lines = [
        f"<!-- Made by benchmarks/advice.py learn, on {len(rows)} groups. -->",
        "",
        "Accuracy gained over the default (linear, weights 1/k) on groups with a task that the rule was not made on:",
        "the mean over groups with a 95 % bootstrap interval. Advice ships if a rule of figures has both ends above 0.",
        "",
        "| rule | gain | rules found, one a task held out |",
        "| --- | --- | --- |",
    ]
    for name, find in {"one method for all": fixed, "by one figure": stump}.items():
        gains, found = held_out(rows, find)
        low, high = interval(gains)
        lines.append(f"| {name} | {np.mean(gains):+.4f} [{low:+.4f}, {high:+.4f}] | {'; '.join(found)} |")
    best = [max(row.gains.values()) for row in rows]
    lines.append(f"| the best of each group, known afterwards | {np.mean(best):+.4f} | |")
    lines += ["", "| method, on all groups | gain |", "| --- | --- |"]
    means = {method: [row.gains[method] for row in rows] for method in rows[0].gains}
    for method, gains in sorted(means.items(), key=lambda item: -np.mean(item[1])):
        low, high = interval(gains)
        lines.append(f"| {method} | {np.mean(gains):+.4f} [{low:+.4f}, {high:+.4f}] |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


@dataclass(frozen=True)
class Group:
    """Adapters that were merged: their tasks, their figures, and what each method gains over the default."""

    tasks: frozenset[str]
    figures: dict[str, float]
    gains: dict[str, float]


def _gains(scores: dict[str, list[float]]) -> dict[str, float]:
    return {method: float(np.mean(each) - np.mean(scores[DEFAULT])) for method, each in scores.items()}


Rule = tuple[str, Callable[[Group], str]]  # in words, and the method for a group


def fixed(rows: Sequence[Group]) -> Rule:
    """The method of the highest mean gain."""
    method = max(rows[0].gains, key=lambda name: np.mean([row.gains[name] for row in rows]))
    return method, lambda row: method


def stump(rows: Sequence[Group], least: int = 3) -> Rule:
    """One method below a threshold of one figure and one above it, of the highest mean gain; at least 3 groups each."""
    best, rule = -math.inf, fixed(rows)
    for figure in rows[0].figures:
        values = sorted({row.figures[figure] for row in rows})
        for low, high in pairwise(values):
            cut = (low + high) / 2
            sides = [[row for row in rows if (row.figures[figure] > cut) is above] for above in (False, True)]
            if min(map(len, sides)) < least:
                continue
            below, above = (fixed(side)[0] for side in sides)
            gain = sum(row.gains[below] for row in sides[0]) + sum(row.gains[above] for row in sides[1])
            if gain > best:
                words = f"{figure} > {cut:.3g}: {above}, else {below}"
                best, rule = gain, (words, partial(_chosen, figure, cut, below, above))
    return rule


def _chosen(figure: str, cut: float, below: str, above: str, row: Group) -> str:
    return above if row.figures[figure] > cut else below


def held_out(rows: Sequence[Group], find: Callable[[Sequence[Group]], Rule]) -> tuple[list[float], list[str]]:
    """The gain of each group by rules that were made without one of its tasks, and the rules in words."""
    gains: dict[int, list[float]] = {}
    found = []
    for task in TASKS:
        words, rule = find([row for row in rows if task not in row.tasks])
        found.append(words)
        for at, row in enumerate(rows):
            if task in row.tasks:
                gains.setdefault(at, []).append(row.gains[rule(row)])
    return [float(np.mean(each)) for each in gains.values()], found


def interval(gains: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % percentile bootstrap interval of the mean."""
    draw = np.random.default_rng(0)
    means = draw.choice(np.asarray(gains), (10_000, len(gains))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    main()
