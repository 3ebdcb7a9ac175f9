"""Write the recipes of the CoTo paper (arXiv:2506.05713): language, GLUE and pictures, each with CoTo.

python recipes/paper/make.py                 # into its own folder
python recipes/paper/make.py --folder out    # elsewhere

Each recipe says in its first lines which values are the paper's and which it does not tell, so that they are ours. To
change a recipe, change the tables and run this again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHORT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{content}\n\n### Response:"
)
STEP_BY_STEP = SHORT + " Let's think step by step."
COMMONSENSE = {
    "dataset": "zwhe99/commonsense_170k",
    "content": "instruction",
    "answer": "output",
    "prompt": SHORT,
    "judge": "option",
    "max_new_tokens": 32,
}
METAMATH = {
    "dataset": "meta-math/MetaMathQA",
    "content": "query",
    "answer": "response",
    "prompt": STEP_BY_STEP,
    "judge": "number",
    "max_new_tokens": 512,
}
# Task files for `loraloom evaluate --task`, with what their first lines say.
EVALUATED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "commonsense": (
        "One of the eight commonsense sets of LLM-Adapters: a local folder with its train.json and test.json.",
        {**COMMONSENSE, "dataset": "data/boolq"},
    ),
    "gsm8k": (
        "GSM8K, its own test part, asked as MetaMath asks; the last number of the completion is the answer.",
        {**METAMATH, "dataset": "openai/gsm8k", "config": "main", "content": "question", "answer": "answer"},
    ),
}

LLAMA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# name: model, whether the paper reports it with this task, rank, whether the paper tells the rank.
LANGUAGE: Mapping[tuple[str, str], tuple[str, bool, int, bool]] = {
    ("commonsense", "llama3-8b"): ("meta-llama/Meta-Llama-3-8B", True, 32, True),
    ("commonsense", "llama2-7b"): ("meta-llama/Llama-2-7b-hf", True, 32, False),
    ("commonsense", "mistral-7b"): ("mistralai/Mistral-7B-v0.1", False, 32, False),
    ("commonsense", "qwen25-7b"): ("Qwen/Qwen2.5-7B", False, 32, False),
    ("metamath", "llama2-7b"): ("meta-llama/Llama-2-7b-hf", True, 8, True),
}
# GLUE: columns, and the parts that have labels.
GLUE: Mapping[str, Mapping[str, str]] = {
    "cola": {"content": "sentence"},
    "mnli": {"content": "{premise} {hypothesis}", "test": "validation_matched"},
    "mrpc": {"content": "{sentence1} {sentence2}"},
    "qnli": {"content": "{question} {sentence}"},
    "qqp": {"content": "{question1} {question2}"},
    "sst2": {"content": "sentence"},
}
GLUE_SIZES = {"cola": 8_551, "mnli": 392_702, "mrpc": 3_668, "qnli": 104_743, "qqp": 363_846, "sst2": 67_349}
# The eleven sets of few-shot work on CLIP and their numbers of classes.
PICTURES = {
    "caltech101": 100,
    "dtd": 47,
    "eurosat": 10,
    "fgvc-aircraft": 100,
    "flowers102": 102,
    "food101": 101,
    "imagenet": 1000,
    "oxford-pets": 37,
    "stanford-cars": 196,
    "sun397": 397,
    "ucf101": 101,
}
SHOTS = 16


def written(head: list[str], **keys: Any) -> str:
    """A recipe with its first lines; the task's keys have a line each."""
    lines = [f"# {line}" for line in head]
    for key, value in keys.items():
        inner = [f"\n  {name}: {json.dumps(held)}" for name, held in value.items()] if key == "task" else []
        lines.append(f"{key}: {json.dumps(value)}" if not inner else f"{key}:{''.join(inner)}")
    return "\n".join(lines) + "\n"


def language(task: str, model: str) -> str:
    """One language recipe: three passes over commonsense_170k, one over 100,000 examples of MetaMath."""
    name, reported, rank, told = LANGUAGE[task, model]
    maths = task == "metamath"
    paper = ["data", "CoTo with a linear curve over 75 % of the steps"]
    ours = ["alpha", "batch", "steps", "warmup", "schedule", "prompt", "which projections (those of HiRA's recipe)"]
    (paper if reported else ours).insert(0, "this model")
    (paper if told else ours).append(f"rank {rank}")
    rate = "rate (the paper's ablation covers 5e-5 to 2e-4)"
    size, passes = (100_000, 1) if maths else (170_000, 3)
    train = {
        "steps": math.ceil(size / 32) * passes,
        "batch_size": 8,
        "accumulate": 4,
        "learning_rate": 1e-4,
        "schedule": "cosine" if maths else "linear",
        "warmup": 0.03 if maths else 0.01,
        "weight_decay": 0,
        "bf16": True,
        "gradient_checkpointing": True,
    }
    return written(
        [
            f"CoTo on {task}, {name}. By make.py.",
            f"The paper's: {', '.join(paper)}.",
            f"Not told: {', '.join(ours)},",
            f"{rate}.",
        ],
        model=name,
        task=METAMATH if maths else COMMONSENSE,
        output=f"runs/paper/{task}-{model}",
        seed=0,
        dtype="bfloat16",
        adapter={"kind": "lora", "rank": rank, "alpha": 2 * rank, "target_modules": LLAMA},
        strategy={"name": "coto"},
        train=train,
        data={"max_length": 512, **({"train_limit": size} if maths else {})},
    )


def glue(task: str) -> str:
    """One GLUE recipe: three passes, at most 20,000 steps."""
    steps = min(20_000, math.ceil(GLUE_SIZES[task] / 32) * 3)
    described = {"dataset": "nyu-mll/glue", "config": task, "validation": "", "test": "validation", **GLUE[task]}
    return written(
        [
            f"CoTo on GLUE's {task}, DeBERTa-v3-base, for merging. By make.py.",
            "The paper's: model, rate 1e-3 with CoTo, six tasks of GLUE.",
            "Not told: which six, rank, alpha, batch, steps, projections.",
            "Other than in the paper: the head is fixed (prototypes), so that adapters can be merged alone.",
        ],
        model="microsoft/deberta-v3-base",
        task=described,
        output=f"runs/paper/glue-{task}",
        seed=0,
        adapter={"kind": "lora", "rank": 8, "alpha": 16, "target_modules": ["query_proj", "key_proj", "value_proj"]},
        strategy={"name": "coto"},
        train={"steps": steps, "batch_size": 32, "learning_rate": 1e-3, "schedule": "linear"},
        data={"max_length": 256},
    )


def picture(name: str) -> str:
    """One recipe on pictures, 16 a class."""
    return written(
        [
            f"CoTo on {name}, {SHOTS} pictures a class, the vision tower of CLIP ViT-B/16. By make.py.",
            f"The paper's: model, rank 2, q, k and v, {SHOTS} a class.",
            "Not told: alpha, dropout, batch, steps (those of CLIP-LoRA, from memory), rate (on DTD LoRA collapses",
            "above 1e-3, CoTo trains at 5e-3).",
            "Other than in the paper: the text tower has no part, the head is fixed (prototypes). Folders: README.md.",
        ],
        model="data/clip-vit-b16-vision",
        task={
            "dataset": f"data/few-shot/{name}",
            "content": "image",
            "label": "label",
            "prompt": "What is in the image?",
        },
        output=f"runs/paper/clip-{name}",
        seed=0,
        adapter={
            "kind": "lora",
            "rank": 2,
            "alpha": 2,
            "dropout": 0.25,
            "target_modules": ["q_proj", "k_proj", "v_proj"],
        },
        strategy={"name": "coto"},
        train={"steps": 500 * SHOTS, "batch_size": 32, "learning_rate": 2e-4, "schedule": "cosine", "warmup": 0},
        data={"image_size": 224, "train_limit": SHOTS * PICTURES[name]},
    )


def documents() -> dict[str, str]:
    """Every file by its path in the folder."""
    made = {f"{task}-{model}.yaml": language(task, model) for task, model in LANGUAGE}
    made |= {f"glue-{task}.yaml": glue(task) for task in GLUE}
    made |= {f"clip-{name}.yaml": picture(name) for name in PICTURES}
    return made | {
        f"tasks/{name}.yaml": written([f"{what} By make.py."], **told) for name, (what, told) in EVALUATED.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description="Write the recipes of the CoTo paper.")
    parser.add_argument("--folder", type=Path, default=HERE)
    folder = parser.parse_args(arguments).folder
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    for name, text in documents().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
