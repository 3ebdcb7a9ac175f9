"""The recipes of the LoRI and the CoTo paper: as make.py writes them, with the papers' values, and dry-run.

A dry run builds the model at its true widths without memory (meta device), puts the adapter on, and reads the data set
from a small sample in the hub's format.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from loraloom.recipe import read, read_task
from loraloom.tasks import Example, load_task
from loraloom.tasks.hub import HubTask
from loraloom.tasks.judges import judge_of

FOLDER = Path(__file__).parents[1] / "recipes" / "lori" / "paper"
COTO = Path(__file__).parents[1] / "recipes" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))
COTO_FILES = sorted(COTO.glob("*.yaml"))
EVALUATED = sorted([*FOLDER.glob("tasks/*.yaml"), *COTO.glob("tasks/*.yaml")])
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = {"nlu": 5313, "gsm8k": 702, "codealpaca": 1250, "saferpaca": 1680}
# learning rate of D, of S: as the official scripts have them
RATES = {
    "nlu-llama3-r32": (5e-5, 5e-4),
    "nlu-llama3-r64": (5e-5, 1e-4),
    "nlu-mistral-r32": (1e-5, 1e-4),
    "nlu-mistral-r64": (1e-5, 1e-4),
    "gsm8k-llama3-r32": (5e-5, 5e-4),
    "gsm8k-llama3-r64": (5e-5, 1e-3),
    "gsm8k-mistral-r32": (5e-5, 5e-4),
    "gsm8k-mistral-r64": (1e-4, 5e-4),
    **{f"{task}-{model}-r32": (5e-5, 5e-4) for task in ("codealpaca", "saferpaca") for model in ("llama3", "mistral")},
    **{f"{task}-{model}-r64": (1e-5, 1e-4) for task in ("codealpaca", "saferpaca") for model in ("llama3", "mistral")},
}


@pytest.mark.parametrize("folder", [FOLDER, COTO], ids=["lori", "coto"])
def test_the_files_are_what_the_script_writes(folder: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(folder / "make.py"), "--folder", str(tmp_path)], check=True)
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.yaml")}
    assert written == {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.yaml")}


def test_no_run_of_the_papers_is_missing() -> None:
    assert sorted(path.stem for path in FILES) == sorted(f"{name}-{kind}" for name in RATES for kind in "ds")
    families = [path.stem.split("-")[0] for path in COTO_FILES]
    assert {name: families.count(name) for name in families} == {"clip": 11, "commonsense": 4, "glue": 6, "metamath": 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_what_the_paper_says(path: Path) -> None:
    run = read(path)
    name, kind = path.stem.rsplit("-", 1)
    task, model, rank = name.split("-")
    width = int(rank[1:])
    assert run.model == {"llama3": "meta-llama/Meta-Llama-3-8B", "mistral": "mistralai/Mistral-7B-v0.1"}[model]
    alpha = {"gsm8k-mistral-r64-d": 32, "gsm8k-mistral-r64-s": 64}.get(path.stem, 2 * width)
    assert (run.adapter.kind, run.adapter.rank, run.adapter.alpha, run.adapter.dropout) == ("lora", width, alpha, 0)
    assert run.adapter.target_modules == MODULES
    train = run.train
    assert (train.learning_rate, train.steps) == (RATES[name][kind == "s"], STEPS[task])
    assert train.batch_size * train.accumulate == 32
    assert (train.schedule, train.warmup, train.weight_decay, train.max_grad_norm) == ("constant", 0, 0, 1)
    assert train.bf16 and train.gradient_checkpointing and run.data.max_length == 512
    lori = yaml.safe_load(path.read_text())["lori"]
    mask = f"runs/lori/{name}/mask.safetensors"
    assert lori == ({} if kind == "d" else {"mask": mask, "start": "fresh"})
    assert run.output == Path(mask).parent / kind
    assert isinstance(run.task, HubTask) and run.task.answer


@pytest.mark.parametrize("path", EVALUATED, ids=lambda path: path.stem)
def test_an_evaluated_task_has_a_judge(path: Path) -> None:
    assert read_task(str(path)).judge in ("number", "option", "refusal")


@pytest.mark.parametrize("given", ["", "The colours: red."])
def test_the_template_is_alpacas(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without an input, letter by letter; no line is indented."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    described = yaml.safe_load((FOLDER / "codealpaca-llama3-r32-d.yaml").read_text())["task"]
    rows = [{"instruction": f"Do {i}.", "input": given, "output": f"done {i}"} for i in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    task = load_task(HubTask(**{**described, "dataset": str(tmp_path / "data")}))
    example = task.splits["train"][0]
    number = example.choices[0].split()[1]
    paired = ", paired with an input that provides further context" if given else ""
    middle = f"### Input:\n{given}\n\n" if given else ""
    assert task.prompt.format(content=example.content) == (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\nDo {number}.\n\n{middle}### Response:"
    )


# --- CoTo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COTO_FILES, ids=lambda path: path.stem)
def test_a_recipe_of_coto_is_valid_and_says_what_the_paper_says(path: Path) -> None:
    run = read(path)
    plan = run.plan()
    assert (plan.ramp, plan.start, plan.curve, plan.unit) == (0.75, 0.0, "linear", "layer")
    ranks = {"clip": 2, "commonsense": 32, "metamath": 8, "glue": 8}
    family = path.stem.split("-")[0]
    assert run.adapter.rank == ranks[family] and run.output == Path("runs/paper") / path.stem
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[1].startswith("# The paper's: ") and head[2].startswith("# Not told: ")
    assert (f"rank {run.adapter.rank}" in head[1]) == (family in ("clip", "metamath") or "llama3" in path.stem)
    assert isinstance(run.task, HubTask)
    if family in ("commonsense", "metamath"):
        assert 5e-5 <= run.train.learning_rate <= 2e-4 and run.train.batch_size * run.train.accumulate == 32
        assert run.task.judge == {"commonsense": "option", "metamath": "number"}[family]
    if family == "glue":
        assert run.train.learning_rate == 1e-3 and not run.task.validation


def test_maths_is_asked_as_it_is_trained() -> None:
    trained, asked = read(COTO / "metamath-llama2-7b.yaml").task, read_task(str(COTO / "tasks" / "gsm8k.yaml"))
    assert (trained.prompt, trained.judge) == (asked.prompt, asked.judge)
    reply = Example("", ("5 + 5 = 10\n#### 10",), 0)
    assert judge_of(trained.judge)("5 and 5 make 10.\n#### 10\nThe answer is: 10", reply)
    assert not judge_of(trained.judge)("10 less 5 is 5.\n#### 5\nThe answer is: 5", reply)


# Configurations of the models that the recipes name, with two of their layers where there are many.
MODELS = {
    "meta-llama/Meta-Llama-3-8B": (
        "Llama",
        {"vocab_size": 128256, "num_key_value_heads": 8, "intermediate_size": 14336},
    ),
    "meta-llama/Llama-2-7b-hf": ("Llama", {"num_key_value_heads": 32, "intermediate_size": 11008}),
    "mistralai/Mistral-7B-v0.1": ("Mistral", {"num_key_value_heads": 8, "intermediate_size": 14336}),
    "Qwen/Qwen2.5-7B": (
        "Qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
        },
    ),
    "microsoft/deberta-v3-base": (
        "DebertaV2",
        {"vocab_size": 128100, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "data/clip-vit-b16-vision": ("CLIPVision", {"patch_size": 16}),
}
# Numbers of one layer that each adapted module has beside the rank: the sum of out + in of its modules.
WIDTHS = {
    "meta-llama/Meta-Llama-3-8B": 8192 + 2 * (4096 + 1024) + 2 * (4096 + 14336),
    "meta-llama/Llama-2-7b-hf": 3 * 8192 + 2 * (4096 + 11008),
    "mistralai/Mistral-7B-v0.1": 8192 + 2 * (4096 + 1024) + 2 * (4096 + 14336),
    "Qwen/Qwen2.5-7B": 7168 + 2 * (3584 + 512) + 2 * (3584 + 18944),
    "microsoft/deberta-v3-base": 3 * 1536,
    "data/clip-vit-b16-vision": 3 * 1536,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_fits_the_model(name: str) -> None:
    """Of one recipe a model: every module that it names is there, at the paper's rank, and nothing else is trained."""
    import torch
    import transformers

    from loraloom.integrations.adapting import training
    from loraloom.strategies.units import group

    family, told = MODELS[name]
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=2, **told)
    kind = "CausalLM" if family in ("Llama", "Mistral", "Qwen2") else "Model"
    with torch.device("meta"):
        model = getattr(transformers, family + ("For" if kind == "CausalLM" else "") + kind)(config)
    run = next(found for found in map(read, COTO_FILES) if found.model == name)
    with training(model, **run.adapter.model_dump()) as adapted:
        trained = {path: weight for path, weight in adapted.named_parameters() if weight.requires_grad}
    assert sum(weight.numel() for weight in trained.values()) == 2 * run.adapter.rank * WIDTHS[name]
    assert {weight.device.type for weight in trained.values()} == {"meta"}
    assert len(group([path.split(".lora_")[0] for path in trained], run.strategy.unit)) == 2


SAMPLES = {
    "commonsense-llama3-8b": {
        "instruction": "Is {i} a number? Answer format: true/false",
        "output": "the correct answer is true",
    },
    "metamath-llama2-7b": {"query": "What is {i} + {i}?", "response": "It is 0.\n#### 0\nThe answer is: 0"},
    "glue-sst2": {"sentence": "a fine film {i}"},
    "glue-mnli": {"premise": "It rains {i}.", "hypothesis": "It is wet."},
    "clip-dtd": {},
}


@pytest.mark.parametrize("stem", SAMPLES)
def test_a_sample_in_the_hub_s_format_becomes_examples(stem: str, tmp_path: Path) -> None:
    import datasets

    run = read(COTO / f"{stem}.yaml")
    columns: dict[str, list] = {name: [text.format(i=i) for i in range(60)] for name, text in SAMPLES[stem].items()}
    features: dict[str, object] = dict.fromkeys(columns, datasets.Value("string"))
    names = {"glue-sst2": ["negative", "positive"], "glue-mnli": ["entailment", "neutral", "contradiction"]}
    if not run.task.answer:
        labels = names.get(stem, ["banded", "dotted"])
        columns |= {"label": [i % len(labels) for i in range(60)]}
        features |= {"label": datasets.ClassLabel(names=labels)}
    if stem == "clip-dtd":
        columns |= {"image": [np.full((8, 8, 3), i, np.uint8) for i in range(60)]}
        features |= {"image": datasets.Image()}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    parts = {"train": made.select(range(40)), run.task.test or "test": made.select(range(40, 60))}
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "data"))
    task = load_task(replace(run.task, dataset=str(tmp_path / "data")))
    assert len(task.splits["test"]) == 20 and len(task.splits["train"]) + len(task.splits["validation"]) == 40
    example = task.splits["train"][0]
    if stem == "clip-dtd":
        assert task.modality == "image" and task.labels == ("banded", "dotted") and example.content.shape == (8, 8, 3)
    elif run.task.answer:
        assert task.prompt.format(content=example.content).startswith("Below is an instruction")
        assert judge_of(run.task.judge)(example.choices[0], example)
    else:
        assert task.labels == tuple(names[stem]) and "{" not in example.content
