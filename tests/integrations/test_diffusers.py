"""CoTo on the adapters of diffusers: the units of a UNet and of a DiT, a training step, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import loraloom as ll
from loraloom.integrations.gates import Gates

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SAVED = "pytorch_lora_weights.safetensors"
UNET_UNITS = (
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
)


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5])}
    return model, {**given, "encoder_hidden_states": torch.randn(2, 5, 8)}


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 5.0])}
    return model, {**given, "encoder_hidden_states": torch.randn(2, 5, 8), "pooled_projections": torch.randn(2, 8)}


@pytest.mark.parametrize(
    ("make", "units"),
    [(unet, UNET_UNITS), (dit, tuple(f"transformer_blocks.{at}" for at in range(3)))],
)
def test_coto_on_an_adapter_of_diffusers(make: Any, units: tuple[str, ...], tmp_path: Path) -> None:
    model, given = make()
    model.requires_grad_(False)
    with torch.no_grad():
        bare = model(**given).sample
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(lora, adapter_name="style")
    assert set(Gates(model).units) == set(units)

    coto = ll.CoTo(total_steps=4, seed=0)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for step in range(4):
        with coto.applied(model, step) as gates:
            off = [unit for unit, on in zip(gates.units, gates.state(), strict=True) if not on]
            model(**given).sample.pow(2).mean().backward()
        silent = {unit for unit, weights in gates.parameters().items() if all(w.grad is None for w in weights)}
        assert set(off) <= silent and len(silent) < len(units)
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        trained = model(**given).sample
    assert not torch.allclose(trained, bare, atol=1e-4)
    model.save_lora_adapter(tmp_path / "style", adapter_name="style")
    again, _ = make()
    again.load_lora_adapter(tmp_path / "style", prefix=None, weight_name=SAVED, adapter_name="style")
    with torch.no_grad():
        torch.testing.assert_close(again(**given).sample, trained)


def test_a_folder_of_ours_goes_to_diffusers(tmp_path: Path) -> None:
    """Operators work on PEFT folders; exported for PEFT, with alpha = rank, diffusers reads one as it is."""
    model, given = unet()
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "trained")
    pruned = ll.prune(ll.load(tmp_path / "trained"), keep="every-other")
    assert 0 < len(pruned.modules) < len(ll.load(tmp_path / "trained").modules)
    ll.export(pruned, tmp_path / "given", target="peft")

    ours = ll.attach(unet()[0], pruned)
    theirs = unet()[0]
    theirs.load_lora_adapter(tmp_path / "given", prefix="base_model.model", weight_name="adapter_model.safetensors")
    with torch.no_grad():
        bare = unet()[0](**given).sample
        expected = ours(**given).sample
        torch.testing.assert_close(theirs(**given).sample, expected)
    assert not torch.allclose(bare, expected, atol=1e-4)
