"""A CoTo run beside the plainest way to make one: PEFT's own switch on every layer before every step, same draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import tiny_runs
from loraloom.integrations.fit import FitOptions, fit
from loraloom.strategies.progressive import CoTo

STEPS = 12


class Plain(transformers.TrainerCallback):
    """Layer by layer: a layer that is off is skipped and takes no gradient; all are on at the end."""

    def __init__(self, model: PeftModel, plan: CoTo) -> None:
        self.plan = plan
        self.drawn: list[tuple[bool, ...]] = []
        layers = [module for _, module in model.named_modules() if isinstance(module, LoraLayer)]
        per = len(layers) // tiny_runs.LAYERS
        self.layers = [layers[at : at + per] for at in range(0, len(layers), per)]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.drawn.append(self.plan.active(state.global_step, tiny_runs.UNITS))
        self.switch(self.drawn[-1])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.switch((True,) * tiny_runs.LAYERS)

    def switch(self, on: tuple[bool, ...]) -> None:
        for modules, active in zip(self.layers, on, strict=True):
            for module in modules:
                module.enable_adapters(active)


def trained(folder: Path, dropout: float, plain: bool) -> tuple[dict[str, torch.Tensor], list[tuple[bool, ...]]]:
    model, plan = tiny_runs.model(dropout), CoTo(STEPS, seed=3)
    options = FitOptions(output=folder, steps=STEPS, batch_size=4, lr=1e-2, seed=0, weight_decay=0.1)
    callback = Plain(model, plan)
    more = {"callbacks": [callback]} if plain else {"plan": plan}
    fit(model, tiny_runs.sentences(), collate=tiny_runs.collate, options=options, **more)
    return tiny_runs.weights(model), callback.drawn


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_plainest_coto_ends_in_the_same_weights(tmp_path: Path, dropout: float) -> None:
    ours, _ = trained(tmp_path / "ours", dropout, plain=False)
    plain, drawn = trained(tmp_path / "plain", dropout, plain=True)
    assert len(drawn) == STEPS and any(not all(on) for on in drawn) and all(any(on) for on in drawn)
    assert ours.keys() == plain.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, plain[name]), name
    fresh = tiny_runs.weights(tiny_runs.model(dropout))
    assert all(not torch.equal(weight, fresh[name]) for name, weight in ours.items())
