"""One call that trains: against plain loops, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel, TrainerCallback

import tiny_runs as tiny
from loraloom.integrations.fit import FitOptions, fit
from loraloom.integrations.gates import Gates
from loraloom.strategies.progressive import CoTo

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def options(folder: Path, **given: Any) -> FitOptions:
    return FitOptions(**{"output": folder, "steps": 5, "batch_size": 4, "lr": 1e-2, "seed": 0} | given)


def run(folder: Path, model: PeftModel, plan: CoTo | None = None, **given: Any) -> list[list[Tensor]]:
    """Train, and return the batches in the order in which they were made."""
    batches: list[list[Tensor]] = []

    def collate(examples: list[Tensor]) -> dict[str, Tensor]:
        batches.append(examples)
        return tiny.collate(examples)

    fit(model, tiny.sentences(), collate=collate, options=options(folder, **given), plan=plan)
    return batches


@pytest.mark.parametrize("plan", [None, CoTo(5, seed=3)], ids=["plain", "coto"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_adamw_on_the_same_batches(tmp_path: Path, accumulate: int, plan: CoTo | None) -> None:
    trained, by_hand = tiny.model(), tiny.model()
    settings: dict[str, Any] = {"scheduler": "constant", "weight_decay": 0.1, "accumulate": accumulate}
    batches = run(tmp_path, trained, plan, max_grad_norm=0.0, **settings)
    optimizer = torch.optim.AdamW([w for w in by_hand.parameters() if w.requires_grad], lr=1e-2, weight_decay=0.1)
    gates = Gates(by_hand)
    by_hand.train()
    for step in range(5):
        if plan is not None:
            gates.set(plan.active(step, gates.units))
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            (by_hand(**tiny.collate(batch)).loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected, found = tiny.weights(by_hand), tiny.weights(trained)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    start = tiny.weights(tiny.model())
    assert all(not torch.allclose(found[name], start[name], atol=1e-3) for name in expected)


def test_the_order_of_the_data_depends_on_the_seed_alone(tmp_path: Path) -> None:
    def order(name: str, model: PeftModel, plan: CoTo | None = None, **given: Any) -> list[Tensor]:
        batches = run(tmp_path / name, model, plan, steps=9, **given)  # into the second epoch
        return [example for batch in batches for example in batch][:36]

    def same(left: list[Tensor], right: list[Tensor]) -> bool:
        return len(left) == len(right) and all(map(torch.equal, left, right))

    plain = order("plain", tiny.model())
    torch.rand(7)  # the state of the global stream does not matter
    assert same(plain, order("coto", tiny.model(dropout=0.3, seed=8), CoTo(None)))
    assert not same(plain, order("other", tiny.model(), seed=1))
    assert not same(plain[:24], plain[24:] + plain[12:24])


def test_a_backbone_learns_from_a_loss_on_its_outputs(tmp_path: Path) -> None:
    def backbone() -> PeftModel:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        bert = BertModel(BertConfig(vocab_size=32, attention_probs_dropout_prob=0, hidden_dropout_prob=0, **sizes))
        return get_peft_model(bert, LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False))

    seen: list[Any] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append((tuple(labels.shape), int(num_items_in_batch)))
        scores = outputs.last_hidden_state[:, 0, :2]
        return torch.nn.functional.cross_entropy(scores, labels, reduction="sum") / num_items_in_batch

    def collate(examples: list[Tensor]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack(examples), "labels": torch.stack([example[0] % 2 for example in examples])}

    trained = []
    for batch_size, accumulate in ((4, 2), (8, 1)):
        model = backbone()
        run_of = options(
            tmp_path / str(accumulate), batch_size=batch_size, accumulate=accumulate, log_every=1, steps=12
        )
        done = fit(model, tiny.sentences(), collate=collate, options=run_of, plan=CoTo(None), loss=loss)
        losses = [entry["loss"] for entry in done.log_history if "loss" in entry]
        trained.append((losses, tiny.weights(model)))
    assert seen == [((4,), 8)] * 24 + [((8,), 8)] * 12
    (losses, accumulated), (_, whole) = trained
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(torch.allclose(accumulated[name], whole[name], atol=1e-5) for name in whole)


def test_bfloat16_and_checkpointing(tmp_path: Path) -> None:
    trained = []
    for given in ({}, {"gradient_checkpointing": True}, {"bf16": True}):
        model = tiny.model()
        run(tmp_path, model, CoTo(None), **given)
        trained.append(tiny.weights(model))
    plain, checkpointed, rounded = trained
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert any(not torch.equal(plain[name], rounded[name]) for name in plain)


def test_operations_are_those_that_trainer_counts(tmp_path: Path, monkeypatch) -> None:
    model = tiny.model()
    weights, counted = model.num_parameters(exclude_embeddings=True), []
    monkeypatch.setattr(
        type(model.get_base_model()), "num_parameters", lambda _, **told: counted.append(told) or weights
    )
    done = fit(model, tiny.sentences(), collate=tiny.collate, options=options(tmp_path))
    tokens = 5 * 4 * tiny.collate(tiny.sentences()[:1])["input_ids"].numel()
    assert done.log_history[-1]["total_flos"] == 6 * weights * tokens
    assert counted == [{"exclude_embeddings": True}]


def test_gates_are_open_after_an_interrupt(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = tiny.model()
    with pytest.raises(KeyboardInterrupt):
        fit(
            model,
            tiny.sentences(),
            collate=tiny.collate,
            options=options(tmp_path),
            plan=CoTo(None),
            callbacks=[Interrupt()],
        )
    assert all(Gates(model).state())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"warmup": 6}, r"warmup must be in \[0, steps = 5\], got 6"),
        ({"warmup": 2, "scheduler": "constant"}, "scheduler constant has no warmup, got 2; constant_with_warmup has"),
        ({"lr": float("nan")}, "lr must be a finite number from 0 on, got nan"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **given)


def test_a_folder_with_checkpoints_is_resumed_or_refused(tmp_path: Path) -> None:
    model = tiny.model()
    first = options(tmp_path, save_every=5, log_every=2)
    done = fit(model, tiny.sentences(), collate=tiny.collate, options=first)
    assert done.resumed_from == 0 and done.seconds > 0 and (tmp_path / "checkpoint-5").is_dir()
    with pytest.raises(ValueError, match=r"has checkpoints already \(checkpoint-5\)"):
        fit(model, tiny.sentences(), collate=tiny.collate, options=first)
    with pytest.raises(ValueError, match="of a run of 5 steps, not 9"):
        fit(model, tiny.sentences(), collate=tiny.collate, options=replace(first, resume=True, steps=9))
    again = tiny.model(seed=5)
    finished = fit(again, tiny.sentences(), collate=tiny.collate, options=replace(first, resume=True))
    assert finished.resumed_from == finished.steps == 5 and 0 < finished.seconds <= done.seconds
    assert finished.log_history and finished.log_history == done.log_history[: len(finished.log_history)]
    trained, loaded = tiny.weights(model), tiny.weights(again)
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
