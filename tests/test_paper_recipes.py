"""The recipes of the LoRI paper: as make.py writes them, with the paper's values, and valid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loraloom.recipe import Recipe, read, read_task
from loraloom.tasks.hub import HubTask

FOLDER = Path(__file__).parents[1] / "recipes" / "lori" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))
EVALUATED = sorted(FOLDER.glob("tasks/*.yaml"))
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


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(FOLDER / "make.py"), "--folder", str(tmp_path)], check=True)
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.yaml")}
    assert written == {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.rglob("*.yaml")}
    assert sorted(path.stem for path in FILES) == sorted(f"{name}-{kind}" for name in RATES for kind in "ds")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_what_the_paper_says(path: Path) -> None:
    if "lori" not in Recipe.model_fields:
        pytest.skip("recipes have no key lori yet")
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

    from loraloom.tasks import load_task

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
