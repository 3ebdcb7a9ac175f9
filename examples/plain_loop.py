"""CoTo in a loop of your own: gates as drawn inside ``with``, all open outside."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import loraloom as ll

STEPS = 12


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    sentences = torch.randint(3, 64, (STEPS, 8, 12))

    coto = ll.CoTo(total_steps=STEPS, seed=0)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for step, ids in enumerate(sentences):
        with coto.applied(model, step):  # forward and backward belong inside
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # to None: AdamW then leaves inactive adapters alone
        print(f"step {step:2d}: p = {coto.probability(step):.2f}, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
