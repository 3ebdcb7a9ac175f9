"""The same callback under TRL's SFTTrainer, on a tiny model and tokenizer made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from torch import nn
from transformers import TrainerCallback

import tiny_runs as tiny
from loraloom.integrations.gates import Gates
from loraloom.integrations.trainer import CoToCallback
from loraloom.strategies.progressive import CoTo

# TRL and PEFT use names that Transformers has just deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


TEXT = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat", "by", "the", "door"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(TEXT)]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_sft_with_the_callback(tmp_path: Path) -> None:
    from datasets import Dataset

    coto = CoTo(None, seed=3)
    model = tiny.model()
    gates, seen = Gates(model), {True: [], False: []}
    reported: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append({**logs, "step": state.global_step})

    def note(module: nn.Module, inputs: Any) -> None:
        seen[module.training and torch.is_grad_enabled()].append(gates.state())

    model.get_base_model().model.register_forward_pre_hook(note)
    texts = Dataset.from_dict({"text": [" ".join(TEXT[at : at + 5]) for at in range(8)]})
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=4,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=texts,
        eval_dataset=texts.select(range(2)),
        processing_class=tokenizer(),
        callbacks=[CoToCallback(coto)],
    )
    trainer.callback_handler.callbacks.insert(0, Reporter())
    trainer.train()
    plan = CoTo(4, seed=3)
    assert seen[True] == [plan.active(at // 2, tiny.UNITS) for at in range(8)]
    assert len({*seen[True]}) > 1
    assert len(seen[False]) == 2 and all(all(state) for state in seen[False])  # both evaluations
    logged = [entry for entry in reported if "loss" in entry]
    assert [entry["coto/probability"] for entry in logged] == [plan.probability(step) for step in range(4)]
    assert [entry["coto/active"] for entry in logged] == [sum(plan.active(step, tiny.UNITS)) for step in range(4)]
    assert all(gates.state()) and (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()


# PEFT, on leaving the adapter out for the reference: switched-off units come on. They do not: the draw is kept.
@pytest.mark.filterwarnings("ignore:The model contains some adapter layers that are enabled and others:UserWarning")
@pytest.mark.parametrize("fresh", [True, False])
def test_dpo_with_the_callback(tmp_path: Path, fresh: bool) -> None:
    """The policy sees the drawn units, in the backward pass too; the reference sees the base, or the first adapter."""
    from datasets import Dataset
    from peft import LoraConfig

    pairs = {"prompt": ["the cat"] * 8, "chosen": [" sat on the mat"] * 8, "rejected": [" sat by the door"] * 8}
    given = tiny.model()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = trl.DPOTrainer(
        given.unload() if fresh else given,
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=1e-2,
            max_length=12,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
        peft_config=lora if fresh else None,
        callbacks=[CoToCallback(CoTo(None, seed=3))],
    )
    seen: dict[str, list[tuple[bool, ...]]] = {"policy": [], "reference": [], "backward": []}
    layers = trainer.model.get_base_model().model.layers
    watched = Gates(trainer.model)
    before = tiny.weights(trainer.model)

    def note(module: nn.Module, inputs: Any) -> None:
        seen["policy" if torch.is_grad_enabled() else "reference"].append(watched.state())

    def note_again(module: nn.Module, inputs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # within a backward pass: computed again
            seen["backward"].append(watched.state())

    trainer.model.get_base_model().model.register_forward_pre_hook(note)
    layers[-1].self_attn.q_proj.register_forward_pre_hook(note_again)
    trainer.train()
    plan = CoTo(4, seed=3)
    drawn = [plan.active(at // 2, tiny.UNITS) for at in range(8)]
    assert len({*drawn}) > 1
    assert seen["policy"] == drawn
    assert seen["backward"] == drawn
    assert seen["reference"] == [(not fresh,) * 4] * 8
    assert all(watched.state())
    assert all(weight.requires_grad for name, weight in trainer.model.named_parameters() if ".default." in name)
    after = tiny.weights(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
