"""Why adapters of nn.MultiheadAttention are refused: what their files mean is up to the version of PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from loraloom.adapter import UnsupportedKind
from loraloom.store import load


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def test_the_output_projection_is_adapted_twice_by_peft_and_the_adapter_refused(tmp_path):
    """Once PEFT adds the update once (its pull request 3774), this fails, and both projections are plain updates."""
    torch.manual_seed(0)
    live = get_peft_model(Layer(), LoraConfig(r=2, lora_alpha=2, target_modules=["attn"], init_lora_weights=False))
    attention = live.base_model.model.attn
    plain, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    plain.load_state_dict(
        {
            "in_proj_weight": attention.in_proj_weight + attention.get_delta_weight("default"),
            "in_proj_bias": attention.in_proj_bias,
            "out_proj.weight": attention.out_proj.weight
            + 2 * attention.base_layer.out_proj.get_delta_weight("default"),
            "out_proj.bias": attention.out_proj.bias,
        }
    )
    assert torch.allclose(live.eval()(x), plain.eval()(x, x, x)[0], atol=1e-5)
    live.save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedKind, match="adds this update twice"):
        load(tmp_path / "a")
