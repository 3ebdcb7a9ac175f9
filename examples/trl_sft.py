"""CoTo in TRL's SFTTrainer: the callback of HF Trainer. Model and tokenizer are tiny and made here."""

from __future__ import annotations

import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import loraloom as ll

TEXTS = ["the cat sat on the mat", "the dog sat by the door", "a cat and a dog sat by the mat"] * 8


def main(output: str) -> None:
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(" ".join(TEXTS).split())]
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
    coto = ll.CoTo(total_steps=None, seed=0)
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        SFTConfig(output, max_steps=12, learning_rate=1e-2, logging_steps=4, use_cpu=True, bf16=False),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        callbacks=[ll.CoToCallback(coto)],
    )
    trainer.train()
    for log in trainer.state.log_history:
        if "loss" in log:
            print(f"step {log['step']:2d}: p = {log['coto/probability']:.2f}, {log['coto/active']:.0f} layers active")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
