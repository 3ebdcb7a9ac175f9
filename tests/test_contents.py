"""Fingerprints tell what differs, and only that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import loraloom as ll
from loraloom.adapter import Adapter, Factors
from loraloom.contents import of_adapter, of_data, of_factors, of_model, of_settings
from loraloom.tasks import Example

ONE = Factors(torch.arange(6.0).reshape(3, 2), torch.arange(8.0).reshape(2, 4), bias=torch.zeros(3))
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q", "v"], "inference_mode": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"B": ONE.B + 1e-6},
        {"A": ONE.A.double(), "B": ONE.B.double()},
        {"scale": 2.0},
        {"bias": None},
        {"bias": torch.ones(3)},
        {"magnitude": torch.ones(3)},
        {"embedding": True},
    ],
)
def test_any_number_of_an_update_counts(changes):
    assert of_factors(replace(ONE)) == of_factors(ONE) != of_factors(replace(ONE, **changes))


def test_an_adapter_is_known_wherever_it_lies(tmp_path):
    a = Adapter(CONFIG, {"layers.0.q": replace(ONE, bias=None), "layers.1.v": replace(ONE, bias=None)})
    ll.save(a, tmp_path / "a")
    ll.save(ll.load(tmp_path / "a"), tmp_path / "b")
    read, again = ll.load(tmp_path / "a"), ll.load(tmp_path / "b")
    assert of_adapter(read) == of_adapter(again) == of_adapter(read.loaded())
    turned = replace(read.loaded(), modules=dict(reversed(read.loaded().modules.items())))
    assert of_adapter(turned) == of_adapter(read)
    half = replace(read.loaded(), modules={"layers.0.q": read.modules["layers.0.q"]})
    assert len({of_adapter(one) for one in (read, half, None)}) == 3


def test_settings_are_all_but_the_modules_and_whether_they_are_trained():
    a = Adapter(CONFIG, {"q": ONE})
    assert of_settings(a) == of_settings(replace(a, config={**CONFIG, "inference_mode": False}, modules={}))
    others = [replace(a, config={**CONFIG, "use_dora": True}), replace(a, extras={"head": torch.ones(2)})]
    assert len({of_settings(one) for one in (a, *others)}) == 3


def test_examples_and_weights_count():
    picture = np.zeros((2, 2, 3), np.uint8)
    rows = [Example(picture, ("a", "b"), 0, media={"image": [picture]})]
    assert of_data(rows) == of_data([Example(picture.copy(), ("a", "b"), 0, media={"image": [picture.copy()]})])
    others = [replace(rows[0], label=1), replace(rows[0], content=picture + 1), replace(rows[0], media={})]
    assert len({of_data([one]) for one in (*rows, *others)}) == 4
    assert of_data(picture) != of_data(picture.reshape(-1)) and of_data({1, 2}) == of_data({2, 1})
    model, tuned = torch.nn.Linear(50, 50), torch.nn.Linear(50, 50)
    tuned.load_state_dict(model.state_dict())
    assert of_model(model.named_parameters()) == of_model(tuned.named_parameters())
    with torch.no_grad():
        tuned.weight.add_(1e-4)
    assert of_model(model.named_parameters()) != of_model(tuned.named_parameters())
