"""Tiny random models that several test files share."""

from __future__ import annotations

import torch
from torch import nn


def tiny_llama(seed: int = 0, layers: int = 2, vocab: int = 32) -> nn.Module:
    """A random Llama of hidden size 16; weights depend on the seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_bias=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
