"""LoRI in a plain loop: all of B, then a tenth of it on the same A, then another task that leaves it untouched."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import loraloom as ll

STEPS = 8


def fresh() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def train(model: PeftModel, seed: int, out: Path) -> ll.Adapter:
    ids = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)  # an ordinary PEFT LoRA, dense
    return ll.load(out)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    model = fresh()
    ll.LoRI(seed=0, task="one").attach(model)
    dense = train(model, seed=1, out=out / "dense")

    model = fresh()
    lori = ll.LoRI(mask=ll.calibrate(dense, density=0.1), start=dense)
    lori.attach(model)
    model.print_trainable_parameters()
    first = train(model, seed=1, out=out / "first")
    lori.detach(model)

    held = ll.support(first)
    ll.LoRI(mask=ll.calibrate(dense, density=0.1, exclude=held), start="keep").attach(model)
    second = train(model, seed=2, out=out / "second")
    same = all(torch.equal(f.B[held[n]], second.modules[n].B[held[n]]) for n, f in first.modules.items())
    print(f"step {STEPS - 1}: {ll.support(second).density:.2f} of B in use, the first task's part untouched: {same}")


if __name__ == "__main__":
    main()
