"""MokA in a plain loop: a tiny LLaVA learns on random pictures, is saved, and loaded again bit for bit."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import loraloom as ll

IMAGE, STEPS = 63, 6


def fresh() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=8, patch_size=4)
    text = LlamaConfig(**size, vocab_size=64)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE, (4, 10), generator=draw)
    ids[:, 1:5] = IMAGE  # a picture of 2 x 2 patches
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]  # the answer; pictures look at the text before it
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(4, 3, 8, 8, generator=draw)}


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "moka"
    model = ll.MokA(modalities={"image": 1}, rank=2, dropout=0.0).wrap(fresh())
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    data, losses = batch(), []
    for _ in range(STEPS):
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)
    again = ll.attach(fresh(), out)
    model.eval(), again.eval()
    same = torch.equal(model(**data).logits, again(**data).logits)
    print(f"step {STEPS - 1}: the loss fell: {losses[-1] < losses[0]}, loaded bit for bit: {same}")


if __name__ == "__main__":
    main()
