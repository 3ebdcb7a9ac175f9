"""CoTo in TRL's DPOTrainer: the policy trains the drawn layers, the reference is the bare model."""

from __future__ import annotations

import sys
import tempfile
import warnings

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import loraloom as ll

PAIRS = {
    "prompt": ["the cat", "the dog"] * 8,
    "chosen": [" sat on the mat"] * 16,
    "rejected": [" sat by the door"] * 16,
}


def main(output: str) -> None:
    torch.manual_seed(0)
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *dict.fromkeys(" ".join(text for texts in PAIRS.values() for text in texts).split()),
    ]
    vocabulary = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    # PEFT warns that layers are off when TRL takes the adapter out for the reference; the callback sees to them.
    warnings.filterwarnings("ignore", message="The model contains some adapter layers that are enabled and others")
    trainer = DPOTrainer(
        LlamaForCausalLM(config),
        args=DPOConfig(output, max_steps=12, learning_rate=1e-2, logging_steps=4, use_cpu=True, bf16=False),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        callbacks=[ll.CoToCallback(ll.CoTo(total_steps=None, seed=0))],
    )
    trainer.train()
    for log in trainer.state.log_history:
        if "loss" in log:
            print(f"step {log['step']:2d}: p = {log['coto/probability']:.2f}, {log['coto/active']:.0f} layers active")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
