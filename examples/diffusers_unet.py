"""CoTo on a UNet of diffusers, then operators on what it made, and back: the network is tiny and random."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model

import loraloom as ll

STEPS = 6


def fresh() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def main(output: str) -> None:
    out = Path(output)
    model = get_peft_model(fresh(), LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    noisy, noise, text = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.randn(4, 5, 8)
    times = torch.arange(4)
    coto = ll.CoTo(total_steps=STEPS, seed=0)
    for step in range(STEPS):
        with coto.applied(model, step) as gates:  # a unit is one transformer block of the UNet
            loss = (model(noisy, times, text).sample - noise).pow(2).mean()
            loss.backward()
            active = sum(gates.state())
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {active} of {len(gates.units)} blocks active, loss {loss.item():.3f}")
    model.save_pretrained(out / "trained")

    smaller = ll.compress(ll.load(out / "trained"), rank=2)
    ll.export(smaller, out / "served", target="peft")  # alpha = rank, which is what diffusers assumes
    unet = fresh()
    unet.load_lora_adapter(out / "served", prefix="base_model.model", weight_name="adapter_model.safetensors")
    with torch.no_grad():
        theirs = unet(noisy, times, text).sample
        ours = ll.attach(fresh(), smaller)(noisy, times, text).sample
    print(f"step {STEPS}: compressed to rank 2, and the same in diffusers: {torch.allclose(theirs, ours, atol=1e-5)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
