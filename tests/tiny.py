"""Tiny random models that several test files share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


class Convs(nn.Module):
    """Every layer kind that is stored with a shape of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 6)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), padding=1)
        self.point = nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(3, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2))
        return self.head(self.point(self.conv2(x[:, None]).relu()).mean((2, 3)))
