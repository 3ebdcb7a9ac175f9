"""The plan under Lightning's Trainer: the draws of its optimizer steps, everything open in between."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import loraloom as ll
import tiny_runs as tiny
from loraloom.integrations.gates import Gates
from loraloom.strategies.progressive import CoTo

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning uses torch's old name
]


class Learner(pl.LightningModule):
    def __init__(self, fails_at: int | None = None, by_hand: bool = False) -> None:
        super().__init__()
        self.net = tiny.model()
        self.fails_at, self.automatic_optimization = fails_at, not by_hand

    def training_step(self, batch: dict[str, Tensor], at: int) -> Tensor:
        loss = self.net(**batch).loss
        if at == self.fails_at:
            raise RuntimeError("broken batch")
        return loss

    def validation_step(self, batch: dict[str, Tensor], at: int) -> None:
        self.net(**batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=1e-2)


def fit(learner: Learner, folder: Path, coto: CoTo, **options: Any) -> pl.Trainer:
    loader = DataLoader(tiny.sentences(16), batch_size=2, collate_fn=tiny.collate)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    told = {"max_steps": 4, "accumulate_grad_batches": 2, "enable_checkpointing": False, **quiet, **options}
    callbacks = [ll.lightning.CoToCallback(coto)]
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=str(folder), callbacks=callbacks, **told)
    trainer.fit(learner, loader, DataLoader(tiny.sentences(2), batch_size=2, collate_fn=tiny.collate))
    return trainer


def test_the_draws_of_each_step(tmp_path: Path) -> None:
    learner = Learner()
    gates, seen = Gates(learner.net), {True: [], False: []}

    def note(module: nn.Module, inputs: Any) -> None:
        seen[module.training].append(gates.state())

    learner.net.get_base_model().model.register_forward_pre_hook(note)
    before = tiny.weights(learner.net)
    trainer = fit(learner, tmp_path, CoTo(None, seed=3), num_sanity_val_steps=1)
    plan = CoTo(4, seed=3)
    assert seen[True] == [plan.active(at // 2, tiny.UNITS) for at in range(8)]
    assert len({*seen[True]}) > 1
    assert len(seen[False]) == 2 and all(map(all, seen[False]))  # the sanity check and the end of the epoch
    assert all(gates.state())
    after = tiny.weights(learner.net)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert trainer.callback_metrics["coto/probability"] == plan.probability(3)
    assert trainer.callback_metrics["coto/active"] == sum(plan.active(3, tiny.UNITS))


def test_an_inactive_adapter_is_not_moved(tmp_path: Path) -> None:
    learner = Learner()
    before = tiny.weights(learner.net)
    fit(learner, tmp_path, CoTo(None, seed=3), max_steps=1)
    active = CoTo(1, seed=3).active(0, tiny.UNITS)
    assert sum(active) == 1
    for name, weight in tiny.weights(learner.net).items():
        assert torch.equal(before[name], weight) is not active[tiny.UNITS.index(tiny.unit_of(name))]


def test_after_a_failure_all_gates_are_open(tmp_path: Path) -> None:
    learner = Learner(fails_at=1)
    with pytest.raises(RuntimeError, match="broken batch"):
        fit(learner, tmp_path, CoTo(None, seed=3))
    assert all(Gates(learner.net).state())


@pytest.mark.parametrize(
    ("learner", "plan", "said"),
    [
        ({"by_hand": True}, CoTo(None), "needs automatic optimization"),
        ({}, CoTo(7), "total_steps=7 but the Trainer runs 4 steps"),
    ],
)
def test_refused_when_training_begins(tmp_path: Path, learner: dict, plan: CoTo, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(Learner(**learner), tmp_path, plan, accumulate_grad_batches=1 if learner else 2)


def test_without_lightning_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "loraloom.integrations.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'loraloom\[lightning\]'"):
        _ = ll.lightning
