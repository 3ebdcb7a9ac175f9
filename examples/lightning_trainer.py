"""CoTo in Lightning's Trainer: one more callback."""

from __future__ import annotations

import sys
import tempfile

import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import loraloom as ll

STEPS = 8


class Learner(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2
        )
        self.net = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    def training_step(self, ids: Tensor, at: int) -> Tensor:
        return self.net(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=1e-2)


class Say(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, learner: Learner, outputs: dict, batch: Tensor, at: int) -> None:
        told = trainer.callback_metrics
        print(f"step {at}: p = {told['coto/probability']:.2f}, {told['coto/active']:.0f} layers active")


def main(output: str) -> None:
    pl.seed_everything(0, verbose=False)
    learner = Learner()
    sentences = torch.randint(3, 64, (STEPS * 4, 12))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        default_root_dir=output,
        callbacks=[ll.lightning.CoToCallback(ll.CoTo(total_steps=None, seed=0)), Say()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(learner, DataLoader(sentences, batch_size=4))
    learner.net.save_pretrained(output)  # an ordinary PEFT folder


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
