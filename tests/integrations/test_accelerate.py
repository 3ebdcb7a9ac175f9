"""A plain Accelerate loop with ``coto.applied``: the same as HF Trainer with the callback, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

import tiny_runs as tiny
from loraloom.integrations.fit import FitOptions, fit
from loraloom.integrations.gates import Gates
from loraloom.strategies.progressive import CoTo

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

STEPS, ACCUMULATE = 6, 2


def test_an_accelerate_loop_is_the_trainer(tmp_path: Path) -> None:
    batches: list[list[Tensor]] = []

    def collate(examples: list[Tensor]) -> dict[str, Tensor]:
        batches.append(examples)
        return tiny.collate(examples)

    trained = tiny.model()
    options = FitOptions(
        output=tmp_path,
        steps=STEPS,
        batch_size=2,
        lr=1e-2,
        seed=0,
        accumulate=ACCUMULATE,
        scheduler="constant",
        weight_decay=0.1,
    )
    fit(trained, tiny.sentences(), collate=collate, options=options, plan=CoTo(None, seed=3))

    coto = CoTo(STEPS, seed=3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    by_hand = tiny.model()
    optimizer = torch.optim.AdamW([w for w in by_hand.parameters() if w.requires_grad], lr=1e-2, weight_decay=0.1)
    examples = [example for batch in batches[: STEPS * ACCUMULATE] for example in batch]
    loader = DataLoader(examples, batch_size=2, collate_fn=tiny.collate)
    model, optimizer, loader = accelerator.prepare(by_hand, optimizer, loader)
    gates, seen = Gates(by_hand), []
    model.train()
    step = 0
    for batch in loader:
        with accelerator.accumulate(model), coto.applied(model, step):
            accelerator.backward(model(**batch).loss)
            seen.append(gates.state())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                step += 1
            optimizer.step()
            optimizer.zero_grad()
        assert all(gates.state())
    assert step == STEPS
    assert seen == [coto.active(at // ACCUMULATE, tiny.UNITS) for at in range(STEPS * ACCUMULATE)]
    expected, found = tiny.weights(trained), tiny.weights(by_hand)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
