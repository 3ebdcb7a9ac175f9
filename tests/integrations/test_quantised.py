"""Adapters on quantised bases: every strategy on int8 (torchao) and nf4 (bitsandbytes), on this CPU.

The packages are an optional extra (``loraloom[quantised]``) that `make test` does not install; `make quantised` does.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from loraloom.adapter import UnsupportedKind
from loraloom.integrations import backbones
from loraloom.integrations.adapting import training
from loraloom.integrations.fit import FitOptions, fit
from loraloom.integrations.gates import Gates
from loraloom.integrations.peft import attached, from_model
from loraloom.strategies.modality import MokA
from loraloom.strategies.progressive import CoTo
from loraloom.strategies.sparse import LoRI, calibrate

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name}: run `make quantised`")
    for name in ("torchao", "bitsandbytes")
}
HELD = [
    pytest.param("int8", marks=needs["torchao"]),
    pytest.param("nf4", marks=needs["bitsandbytes"]),
]
# bitsandbytes 0.50 loses the scales of its 8 bits when a model that has run once is moved, as a Trainer does (seen on a
# CPU): no type of a recipe, and not trained here.
LIVE = [*HELD, pytest.param("llm.int8", marks=needs["bitsandbytes"])]
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(made)
    return made


def base(folder: Path, held: str) -> Any:
    if held in backbones.QUANTISED:
        return backbones._load(str(folder), "causal", held)
    options: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def collate(examples: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(examples)
    return {"input_ids": ids, "labels": ids.clone()}


def trained(live: Any, folder: Path) -> None:
    data = list(torch.randint(3, 60, (16, 8), generator=torch.Generator().manual_seed(1)))
    options = FitOptions(folder, steps=4, batch_size=4, lr=1e-2, seed=0, save_every=2)
    fit(live, data, collate=collate, options=options, plan=CoTo(None, seed=1))


@pytest.mark.parametrize("held", HELD)
def test_coto_and_lori_and_what_is_saved(tmp_path: Path, folder: Path, held: str) -> None:
    model = base(folder, held)
    bare = model(IDS).logits.detach()
    full = LlamaForCausalLM.from_pretrained(folder)(IDS).logits
    assert not torch.equal(bare, full) and torch.allclose(bare, full, atol=0.2)  # quantised, and the same model
    for kind in ("lora", "dora", *(["hira"] if held == "nf4" else [])):
        with training(model, kind=kind, rank=4, alpha=8, seed=0) as live:
            trained(live, tmp_path / kind)
            made, ours = from_model(live), live.eval()(IDS).logits.detach()
            gates = Gates(live)
            for layer in [layer for some in gates.modules.values() for name in some for layer in gates.layers(name)]:
                layer._disable_adapters = True  # all of them, which no plan does
            assert torch.equal(live(IDS).logits, bare)  # an adapter that is off leaves the quantised layer alone
        assert torch.equal(model(IDS).logits, bare) and not torch.equal(ours, bare)
        with attached(model, made) as again:
            assert torch.allclose(again(IDS).logits, ours, atol=1e-5)
    with training(model, rank=4, alpha=8, seed=0) as live:
        shapes = {name: made.shape(name) for name in made.modules}
        chance = torch.Generator().manual_seed(0)
        scores = {name: torch.rand(one.out, one.rank, generator=chance) for name, one in shapes.items()}
        mask = calibrate(scores, density=0.25)
        LoRI(mask=mask, start="fresh").attach(live)
        trained(live, tmp_path / "lori")
        thin = from_model(live)
    for name, factors in thin.modules.items():
        assert factors.B.any() and not factors.B[~mask[name]].any()


@pytest.mark.parametrize("held", LIVE)
def test_moka(folder: Path, held: str) -> None:
    model = base(folder, held)
    bare = model(IDS).logits.detach()
    kinds = torch.zeros_like(IDS)
    kinds[:, 1:4] = 1
    with training(model, kind="moka", moka=MokA({"image": 1}, rank=2, alpha=4), seed=0) as live:
        assert torch.equal(live(input_ids=IDS, modality_ids=kinds).logits, bare)  # B starts at 0
        live(input_ids=IDS, labels=IDS, modality_ids=kinds).loss.backward()
        grads = {name: p.grad for name, p in live.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in grads.values())
        assert all(grad.any() for name, grad in grads.items() if "lora_B" in name)


def test_hira_is_refused(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.is_quantized = True
    with (
        pytest.raises(
            UnsupportedKind, match=r"hira multiplies the base weights .*nf4.* allowed are lora, rslora, dora, moka"
        ),
        training(model, kind="hira"),
    ):
        pass


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"dtype nf4 needs the package bitsandbytes: pip install 'loraloom\[quant"):
        backbones._load(str(folder), "causal", "nf4")
