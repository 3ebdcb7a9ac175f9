"""Tiny models set up for a task, an adapter on each, and all that is left of it with units left out."""

from __future__ import annotations

import itertools
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

import tiny_llava
from loraloom.adapter import Adapter, Factors
from loraloom.integrations.scoring import bench
from loraloom.probes.game import game_of_units
from loraloom.tasks import Example, Task
from tiny import tiny_llama
from tiny_text import VOCAB, Letters, text_task

LAYERS = 3


def adapter_on(model: nn.Module, ends: tuple[str, ...], scale: float = 1.0, **config) -> Adapter:
    """A random adapter on all linear layers of such names."""
    draw = torch.Generator().manual_seed(3)
    modules = {
        name: Factors(
            B=torch.randn(part.out_features, 2, generator=draw),
            A=torch.randn(2, part.in_features, generator=draw),
            scale=scale,
        )
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.endswith(ends)
    }
    assert modules
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 * scale, "target_modules": list(modules), **config}
    return Adapter(settings, modules)


def causal():
    made = bench(
        tiny_llama(vocab=VOCAB, layers=LAYERS), text_task(()), family="causal", processor=Letters(), max_length=30
    )
    return made, adapter_on(made.model, ("q_proj", "down_proj"))


def encoder():
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=VOCAB, **size)).eval()
    made = bench(model, text_task(n=150), family="encoder", processor=Letters())
    return made, adapter_on(model, ("query", "output.dense"))


def image_task() -> Task:
    draw = np.random.default_rng(0)
    rows = [Example(draw.integers(0, 256, (8, 8, 3), np.uint8), ("a", "b"), at % 2) for at in range(70)]
    splits = MappingProxyType({"train": rows, "validation": rows, "test": rows})
    return Task("noise", "image", ("a", "b"), "", splits, "here", "none")


def vision():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    stats = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    made = bench(model, image_task(), family="vision", processor=stats, image_size=28)
    return made, adapter_on(model, ("q_proj", "fc1"))


def multimodal():
    made = bench(tiny_llava.tiny_llava(), tiny_llava.task(), processor=tiny_llava.processor(), max_length=40)
    return made, adapter_on(made.model, ("q_proj", "fc1", "down_proj"))


def variants(adapter: Adapter, unit: str = "layer") -> list[Adapter | None]:
    """The adapter with every set of its units left out; that of all is the base."""
    found: list[Adapter | None] = []
    game = game_of_units(adapter, lambda one: float(found.append(one) or 0), unit)
    for on in itertools.chain(*(itertools.combinations(range(len(game.players)), n) for n in range(LAYERS + 1))):
        game.value(on)
    return found
