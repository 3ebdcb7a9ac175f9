"""CoTo in HF Trainer: one more callback. The model is tiny and random, so that this runs anywhere in seconds."""

from __future__ import annotations

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import loraloom as ll


def main(output: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    sentences = torch.randint(3, 64, (32, 12))
    examples = [{"input_ids": ids, "labels": ids} for ids in sentences]

    coto = ll.CoTo(total_steps=None, ramp=0.75, seed=0)  # the Trainer knows how many steps there are
    arguments = TrainingArguments(output, max_steps=12, learning_rate=1e-2, logging_steps=4, use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[ll.CoToCallback(coto)])
    trainer.train()
    for log in trainer.state.log_history:
        if "loss" in log:
            print(f"step {log['step']:2d}: p = {log['coto/probability']:.2f}, {log['coto/active']:.0f} layers active")
    model.save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
