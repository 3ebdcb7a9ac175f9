"""What the tests of training share: a tiny random model with adapters, and sentences of random tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 4
UNITS = tuple(f"model.layers.{at}" for at in range(LAYERS))


def model(dropout: float = 0.0, seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    lora = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    return get_peft_model(LlamaForCausalLM(config), lora)


def sentences(count: int = 24, length: int = 6, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, 32, (count, length), generator=generator))


def collate(examples: Sequence[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(list(examples))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def weights(trained: PeftModel) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trained.named_parameters() if weight.requires_grad}


def unit_of(name: str) -> str:
    return next(unit for unit in UNITS if f".{unit}." in name)
