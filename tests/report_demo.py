"""A made-up report of the demo's shape, with every kind of panel; the numbers are smooth and mean nothing."""

from __future__ import annotations

import math

from loraloom.report import Bars, Curve, Heatmap, Report, Series, Table

EVIL = '<script>alert("x")</script> & `|*_'
T = tuple(i / 10 for i in range(11))


def with_interval(name, x, y, half=0.018):
    return Series(name, x, tuple(y), tuple(v - half for v in y), tuple(min(1.0, v + half) for v in y))


def interpolation():
    dips = {"LoRA, factors": 0.17, "LoRA, delta": 0.11, "CoTo, factors": 0.035, "CoTo, delta": 0.02}
    series = tuple(
        with_interval(name, T, [0.90 - (0.004 if "CoTo" in name else 0) - dip * math.sin(math.pi * t) ** 2 for t in T])
        for name, dip in dips.items()
    )
    return Curve(
        "Interpolation between two seeds",
        "position between seed 0 and seed 1",
        "accuracy",
        series,
        "Test accuracy of the adapter at each point of the straight line between two training runs that differ in seed "
        "only. Bands are 95 % bootstrap intervals over 1,000 test images.",
        "loraloom probe connectivity runs/lora-0 runs/lora-1 --task fashion-mnist -o path.json",
    )


def demo_report():
    pruned = ("all", "every-other", "low", "middle", "high")
    kept = tuple(i / 20 for i in range(1, 21))
    steps = tuple(range(0, 241, 4))
    return Report(
        "Adapters that come apart and go together",
        "CoTo's two seeds stay connected: half-way between them accuracy falls by 2 points, with LoRA by 11 to 17. "
        "After removing every other layer's adapter CoTo keeps 86 % accuracy and LoRA 71 %.\n\n"
        "On the task itself the two are equal within their intervals (90.0 and 89.6 %), and CoTo trained 8 % faster.",
        (
            interpolation(),
            Table(
                "Three tasks merged into one adapter",
                ("method", "space", "fashion-mnist", "digits", "shapes", "mean"),
                (
                    ("LoRA, separate", None, 0.9, 0.981, 0.944, 0.942),
                    ("CoTo, separate", None, 0.896, 0.979, 0.941, 0.939),
                    ("LoRA, merged", "factors", 0.61, 0.82, 0.55, 0.66),
                    ("LoRA, merged", "delta", 0.702, 0.874, 0.628, 0.735),
                    ("CoTo, merged", "factors", 0.79, 0.911, 0.731, 0.811),
                    ("CoTo, merged", "delta", 0.823, 0.93, 0.782, 0.845),
                ),
                "Equal weights. The first two rows are the single-task adapters, each on its own task.",
                "loraloom merge runs/coto-fmnist runs/coto-digits runs/coto-shapes -o runs/merged --space delta",
            ),
            Bars(
                "Structured pruning",
                "accuracy",
                pruned,
                (
                    with_interval("LoRA", pruned, [0.9, 0.71, 0.64, 0.77, 0.35]),
                    with_interval("CoTo", pruned, [0.896, 0.862, 0.80, 0.85, 0.66]),
                ),
                "Accuracy with the adapters of the named layers only.",
                "loraloom prune runs/coto-0 -o runs/pruned --keep every-other",
            ),
            Curve(
                "Unstructured pruning",
                "density (share of entries kept)",
                "accuracy",
                (
                    with_interval("LoRA", kept, [0.9 * (1 - math.exp(-9 * d)) for d in kept]),
                    with_interval("CoTo", kept, [0.896 * (1 - math.exp(-16 * d)) for d in kept]),
                ),
                "Entries of the factors kept by magnitude.",
            ),
            Table(
                "Training time",
                ("run", "steps", "seconds", "share of LoRA"),
                (
                    ("LoRA, seed 0", 240, 118.4, 1.0),
                    ("LoRA, seed 1", 240, 119.0, 1.005),
                    ("CoTo, seed 0", 240, 108.9, 0.92),
                ),
            ),
            Curve(
                "Activation probability",
                "step",
                "p(t)",
                (
                    Series("CoTo", steps, tuple(min(1.0, s / 180) for s in steps)),
                    Series("LoRA", steps, (1.0,) * len(steps)),
                ),
                "Each unit takes part in a step with probability p(t).",
                "loraloom train recipes/demo.yaml",
            ),
            Heatmap(
                "Norm of the update",
                "projection",
                "layer",
                ("query", "key", "value", "dense", "fc1", "fc2"),
                tuple(range(12)),
                tuple(
                    tuple(round(0.1 * (layer + 2) * (1 + 0.3 * (j % 3)), 3) for j in range(6)) for layer in range(12)
                ),
                "Frobenius norm of delta by module, CoTo, seed 0.",
            ),
        ),
        {
            "recipe": {
                "model": "vit-small",
                "rank": 8,
                "alpha": 16,
                "learning_rate": 0.0025,
                "steps": 240,
                "batch": 16,
            },
            "seeds": [0, 1],
            "versions": {"loraloom": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
            "machine": {"cores": 2, "gpu": None},
            "seconds": 521.3,
            "finished": True,
        },
        tuple({"run": f"{m}-{s}", "t": t, "correct": 880 + s} for m in ("lora", "coto") for s in (0, 1) for t in T),
    )


def hard_report():
    """What is hard to lay out: long names, many layers, many series, values on both sides of 0."""
    paths = [f"model.language_model.decoder.layers.{at}" for at in range(32)]
    roles = [f"self_attention.{name}_projection_of_the_rank_space" for name in "qkvo"] + [
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    ]
    runs = [f"adapter-of-a-long-name-on-task-{at}-with-method-{'lora' if at % 2 else 'coto'}" for at in range(9)]
    units = tuple(f"{path}.self_attn.q_proj" for path in paths)
    worth = tuple(0.04 * math.sin(at) + 0.01 for at in range(len(units)))
    wave = tuple(tuple(math.sin(0.3 * i + j) for j in range(len(roles))) for i in range(len(paths)))
    alike = tuple(tuple(math.cos(0.4 * (i - j)) for j in range(9)) for i in range(9))
    return Report(
        "What is hard to lay out",
        "Long names, many layers, many series.",
        (
            Heatmap("Shapley values by module", "projection", "layer", roles, paths, wave, z_label="share of the gain"),
            Heatmap("Cosine of the updates", "adapter", "adapter", runs, runs, alike, z_label="cosine"),
            Bars("Shapley values", "value", units, (Series("adapter", units, worth, worth, worth),)),
            Curve(
                "Scores",
                "share off",
                "accuracy",
                tuple(Series(run, T, tuple(0.1 * at + 0.05 * t for t in T)) for at, run in enumerate(runs)),
            ),
            Heatmap("Empty", "x", "y", ("a", "b"), ("c",), ((None, None),)),
            Heatmap("One value", "x", "y", ("a",), ("c",), ((0.5,),)),
            Curve("Flat and small", "step", "loss", (Series("run", (0, 1, 2), (1e-7, 1e-7, 1e-7)),)),
            Curve("Odd range", "step", "share", (Series("run", (0, 1, 2), (0.722, 0.37, 0.346)),)),
            Curve("Points", "axis 1", "axis 2", tuple(Series(run, (at,), (at % 3,)) for at, run in enumerate(runs))),
        ),
    )


def evil_report():
    """Text that would do harm if it were not escaped, in every place that takes text."""
    one = Series(EVIL, (EVIL,), (1.0,), (0.5,), (1.5,))
    return Report(
        EVIL,
        EVIL,
        (
            Curve(EVIL, EVIL, EVIL, (one,), EVIL, EVIL),
            Bars(EVIL, EVIL, (EVIL,), (one,), EVIL, EVIL),
            Heatmap(EVIL, EVIL, EVIL, (EVIL,), (EVIL,), ((1.0,),), EVIL, EVIL),
            Table(EVIL, (EVIL,), ((EVIL,),), EVIL, EVIL),
        ),
        {EVIL: EVIL, "nested": {EVIL: [EVIL]}},
        ({EVIL: EVIL},),
    )
