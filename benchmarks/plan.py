"""What `loraloom plan` says of Llama-3 shapes, and what operators on their adapters cost, by formula.

python benchmarks/plan.py          # writes benchmarks/results/plan.json and plan.md; no weights, minutes on one core
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import loraloom as ll
from loraloom.integrations.shapes import LLAMA
from loraloom.recipe import parse

OUT = Path(__file__).parent / "results"
KINDS = {
    "LoRA": {},
    "DoRA": {"adapter": {"kind": "dora", "rank": 16}},
    "HiRA": {"adapter": {"kind": "hira", "rank": 16}},
    "LoRI, 10 %": {"lori": {"calibrate": {"density": 0.1}}},
    "MokA, 2 modalities": {
        "adapter": {"kind": "moka", "rank": 16},
        "moka": {"modalities": {"image": 1, "audio": 2}},
    },
    "LoRA, CoTo": {"strategy": {"name": "coto"}},
}
RUNS = [
    *(("llama-8b", kind, 8, "ddp") for kind in KINDS),
    ("llama-8b", "LoRA, CoTo", 8, "fsdp"),
    ("llama-70b", "LoRA, CoTo", 64, "fsdp"),
    ("llama-405b", "LoRA, CoTo", 512, "fsdp"),
]
ADAPTERS, RANK, BYTES = 8, 16, 2
ROUNDS = 6  # of the iteration that finds the factors of a dense result: 5 to 7 are needed
Cost = tuple[float, float, float, float]  # operations, bytes read, bytes written, bytes of memory for one module


def planned(model: str, kind: str, world: int, sharding: str) -> dict[str, object]:
    recipe = parse(
        {
            "model": model,
            "task": "digits",
            "output": "runs/plan",
            "dtype": "bfloat16",
            "adapter": {"rank": 16},
            "data": {"max_length": 2048},
            "train": {"steps": 1000, "batch_size": 1, "accumulate": world, "gradient_checkpointing": True},
            **KINDS[kind],
        }
    )
    print(model, kind, world, sharding, flush=True)
    return {"label": kind, **ll.plan(recipe, world=world, sharding=sharding).to_json()}


def modules(model: str) -> list[tuple[int, int]]:
    """(out, in) of every linear layer that carries an adapter."""
    width, inner, layers, heads = LLAMA[model]
    keys = width // heads * 8
    layer = [(width, width), (keys, width), (keys, width), (width, width), (inner, width), (inner, width)]
    return [*layer, (width, inner)] * layers


def gram(m: int, n: int, s: int, rank: int) -> float:
    """Singular values and vectors of a product of factors with s columns, cut to a rank."""
    return 2 * (m + n) * s**2 + 25 * s**3 + 2 * (m + n) * s * rank


def back(m: int, n: int, rank: int) -> float:
    """From a dense matrix to factors, by block iteration."""
    return 2 * m * n * (rank + 16) * ROUNDS


def operators(k: int = ADAPTERS, r: int = RANK, b: int = BYTES) -> dict[str, tuple[str, Callable[[int, int], Cost]]]:
    """Cost on one module of m x n, by operator, with the formula of its operations."""
    s = k * r

    def factors(m: int, n: int, columns: int) -> float:
        return columns * (m + n) * b

    return {
        "linear, factors": (
            "2 s (m + n)",
            lambda m, n: (2 * s * (m + n), factors(m, n, s), factors(m, n, r), 4 * (s + r) * (m + n)),
        ),
        "cat": ("s m", lambda m, n: (s * m, factors(m, n, s), factors(m, n, s), 2 * factors(m, n, s))),
        "svd; spectral methods in core, to rank r": (
            "2 (m + n) s^2 + 25 s^3 + 2 (m + n) s r",
            lambda m, n: (gram(m, n, s, r), factors(m, n, s), factors(m, n, r), 8 * (s + r) * (m + n)),
        ),
        "TIES, dense, to rank s": (
            "4 m n s + 12 m n (s + 16)",
            lambda m, n: (4 * m * n * s + back(m, n, s), factors(m, n, s), factors(m, n, s), 4 * m * n),
        ),
        "DARE, dense, to rank s": (
            "2 m n s + 12 m n (s + 16)",
            lambda m, n: (2 * m * n * s + back(m, n, s), factors(m, n, s), factors(m, n, s), 4 * m * n),
        ),
        "prune by units": ("0", lambda m, n: (0, factors(m, n, r) / 2, factors(m, n, r) / 2, factors(m, n, r))),
        "prune one by density, dense": (
            "2 m n r + 12 m n (r + 16)",
            lambda m, n: (2 * m * n * r + back(m, n, r), factors(m, n, r), factors(m, n, r), 4 * m * n),
        ),
        "compress one to rank r / 4": (
            "2 (m + n) r^2 + 25 r^3 + (m + n) r^2 / 2",
            lambda m, n: (gram(m, n, r, r // 4), factors(m, n, r), factors(m, n, r // 4), 8 * 2 * r * (m + n)),
        ),
        "fold all into the base": (
            "2 m n s",
            lambda m, n: (2 * m * n * s, factors(m, n, s) + m * n * b, m * n * b, 8 * m * n),
        ),
    }


def costs() -> list[dict[str, object]]:
    rows = []
    for name, (formula, of) in operators().items():
        row: dict[str, object] = {"operator": name, "operations": formula}
        for model in LLAMA:
            each = [of(m, n) for m, n in modules(model)]
            flops, read, written = (sum(cost[at] for cost in each) for at in range(3))
            row[model] = {"flops": flops, "read": read, "written": written, "memory": max(cost[3] for cost in each)}
        rows.append(row)
    return rows


def page(plans: list[dict], rows: list[dict]) -> str:
    gib, tera = 2**30, 1e12
    lines = [
        "# Plans of Llama-3 shapes",
        "",
        "Made by `python benchmarks/plan.py`: rank 16 on all linear layers, bfloat16 weights, one example of 2048",
        "tokens a rank and pass, gradient checkpointing, 1000 steps. GiB and TFLOP: of one rank and optimizer step.",
        "",
        "| model | adapter | ranks | trained | static GiB | peak GiB | without checkpointing | TFLOP | mean of the run"
        " | checkpointing adds | gradients sent, GiB | of active units | weights sent, GiB |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in plans:
        held, flops, sent = one["memory"], one["flops"], one["communication"]
        static = sum(held[key] for key in ("weights", "adapter", "gradients", "optimizer")) / gib
        numbers = [static, held["peak_checkpointed"] / gib, held["peak"] / gib]
        numbers += [
            (flops["forward"] + flops["backward"]) / tera,
            flops["mean"] / tera,
            flops["mean_recomputed"] / tera,
        ]
        numbers += [sent["gradients"] / gib, sent["active_gradients"] / gib, sent["weights"] / gib]
        trained = f"{one['parameters']['trainable'] / 1e6:.1f} M"
        where = f"{one['world']} {one['sharding']}"
        lines.append(
            f"| {one['model']} | {one['label']} | {where} | {trained} | "
            + " | ".join(f"{x:.4g}" for x in numbers)
            + " |"
        )
    lines += [
        "",
        "# Operators on their adapters",
        "",
        f"{ADAPTERS} adapters of rank {RANK} in bfloat16 on the seven projections, m x n each; s = {ADAPTERS * RANK} is"
        " the sum of the ranks. Each cell: TFLOP; GiB read; GiB written; MiB held for the largest module.",
        "",
        "| operator | operations a module | " + " | ".join(LLAMA) + " |",
        "|---|---|" + "--:|" * len(LLAMA),
    ]
    for row in rows:
        cells = [
            f"{row[m]['flops'] / tera:.3g}; {row[m]['read'] / gib:.3g}; {row[m]['written'] / gib:.3g}; "
            f"{row[m]['memory'] / 2**20:.0f}"
            for m in LLAMA
        ]
        lines.append(f"| {row['operator']} | {row['operations']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows, plans = costs(), [planned(*run) for run in RUNS]
    (OUT / "plan.json").write_text(json.dumps({"plans": plans, "operators": rows}, indent=1) + "\n")
    (OUT / "plan.md").write_text(page(plans, rows))


if __name__ == "__main__":
    main()
