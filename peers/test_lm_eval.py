"""lm-evaluation-harness itself on a task defined here, offline; run by `make peers`: too large for `make test`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import loraloom as ll
from loraloom.cli import app
from loraloom.registry import UnknownName

WORDS = ["<pad>", "</s>", "<unk>", "the", "cat", "sat", "dog", "on", "mat", "yes", "no"]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: label
doc_to_choice: ["yes", "no"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokens.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def task(tmp_path: Path) -> str:
    rows = [{"text": f"the {who} sat on the mat", "label": at % 2} for at, who in enumerate(["cat", "dog"] * 4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.replace("FILE", str(file)))
    return f"lm_eval:{tmp_path / 'tasks' / 'tiny.yaml'}"


def adapter(model: Path, folder: Path, lean: float) -> Path:
    """LoRA on the head that leans towards "yes" (or, below 0, towards "no") whatever is asked."""
    made = get_peft_model(
        LlamaForCausalLM.from_pretrained(model), LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"])
    )
    layer = made.get_base_model().lm_head
    with torch.no_grad():
        ids = torch.tensor([[WORDS.index(word) for word in ["the", "cat", "sat", "on", "the", "mat"]]])
        last = made.get_base_model().model(ids).last_hidden_state[0, -1]
        layer.lora_A["default"].weight.copy_(last[None])
        layer.lora_B["default"].weight.zero_()[WORDS.index("yes")] = lean
    made.save_pretrained(folder)
    return folder


def test_a_local_task_through_the_command(model: Path, task: str, tmp_path: Path) -> None:
    yes, no = adapter(model, tmp_path / "yes", 100.0), adapter(model, tmp_path / "no", -100.0)
    for folder in (yes, no):
        done = CliRunner().invoke(app, ["evaluate", str(folder), "--task", task, "--model", str(model), "--json"])
        assert done.exit_code == 0, done.output
        (row,) = json.loads(done.stdout[done.stdout.index("[") :])
        assert row["task"] == "lm_eval:tiny_choice:acc" and row["n"] == 8
        assert row["value"] == 0.5  # one answer for all: half of them are right
        assert row["low"] < 0.5 < row["high"]
    short = ll.evaluate(ll.load(yes), task + ":acc_norm", model=str(model), limit=1)
    assert short.estimate.n == 1 and short.value == 1.0 and set(short.metrics) == {"acc", "acc_norm"}
    assert ll.evaluate(ll.load(no), task, model=str(model), limit=1).value == 0.0


def test_names_that_are_not_there(model: Path, task: str) -> None:
    with pytest.raises(UnknownName, match=r"metric of tiny_choice 'f1' is not known.*acc, acc_norm"):
        ll.evaluate(None, task + ":f1", model=str(model))
    with pytest.raises(UnknownName, match="task of lm-evaluation-harness 'hellaswagg' is not known"):
        ll.evaluate(None, "lm_eval:hellaswagg", model=str(model))
