"""CoTo in an Accelerate loop with gradient accumulation: the draw changes once an optimizer step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import loraloom as ll

STEPS = 8


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    sentences = torch.randint(3, 64, (STEPS * 2 * 4, 12))

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(sentences, batch_size=4))
    coto = ll.CoTo(total_steps=STEPS, seed=0)
    step = 0  # of the optimizer
    for ids in loader:
        with accelerator.accumulate(model), coto.applied(model, step):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            accelerator.print(f"step {step}: p = {coto.probability(step):.2f}, loss {loss.item():.3f}")
            step += 1


if __name__ == "__main__":
    main()
