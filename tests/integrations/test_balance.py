"""The balance of training: what is noted is what dense matrices and the optimizer's gradients say, gates or not."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, VeraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import tiny_runs as tiny
from loraloom.integrations.balance import FILE, BalanceCallback, BalanceMeter
from loraloom.integrations.fit import FitOptions, fit
from loraloom.integrations.peft import from_model
from loraloom.integrations.trainer import CoToCallback
from loraloom.strategies.modality import MokA
from loraloom.strategies.progressive import CoTo
from loraloom.strategies.sparse import LoRI, calibrate
from tiny import tiny_llama
from tiny_multimodal import tiny_llava

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Dense(TrainerCallback):
    """The slow obvious version: every gradient and every dense update of every step."""

    def __init__(self, start: dict[str, torch.Tensor]) -> None:
        self.start, self.gradient, self.update, self.distance = start, {}, {}, {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradient[state.global_step + 1] = norms(
            {name: weight.grad for name, weight in kwargs["model"].named_parameters() if weight.grad is not None}
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held = from_model(kwargs["model"])
        self.update[state.global_step] = {name: float(f.delta().norm()) for name, f in held.modules.items()}
        now = tiny.weights(kwargs["model"])
        self.distance[state.global_step] = norms({name: now[name] - self.start[name] for name in now})


def norms(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, tensor in tensors.items():
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        found[module] = found.get(module, 0.0) + float(tensor.double().square().sum())
    return {name: value**0.5 for name, value in found.items()}


def run(folder: Path, *callbacks: TrainerCallback, model: Any = None, resume: bool = False, **given: Any) -> Trainer:
    options: dict[str, Any] = {"max_steps": 7, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    options |= {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **options | given),
        data_collator=tiny.collate,
        train_dataset=tiny.sentences(),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.mark.parametrize(("gated", "accumulate"), [(False, 1), (True, 2)], ids=["plain", "coto"])
def test_it_is_what_dense_matrices_and_the_optimizer_say(tmp_path: Path, gated: bool, accumulate: int) -> None:
    model = tiny.model()
    dense, noted = Dense(tiny.weights(model)), BalanceCallback(every=3)
    plan = [CoToCallback(CoTo(7, seed=3))] if gated else []
    trainer = run(
        tmp_path, *plan, noted, dense, model=model, gradient_accumulation_steps=accumulate, max_grad_norm=0.02
    )
    found = noted.result
    assert found.steps == (0, 3, 6, 7)  # the start, every third, the end
    assert len(found.modules) == 2 * tiny.LAYERS
    closed = 0
    for at, step in enumerate(found.steps[1:], start=1):
        for what in ("gradient", "update", "distance"):
            for name, value in zip(found.modules, getattr(found, what)[at], strict=True):
                expected = getattr(dense, what)[step].get(name)
                closed += expected is None
                assert value == (None if expected is None else pytest.approx(expected, rel=1e-5)), (what, step, name)
    assert (closed > 0) is gated  # or the test shows nothing of gates
    assert found.gradient[0] == (None,) * 8
    assert found.distance[0] == (0.0,) * 8
    whole = sum(value**2 for value in found.gradient[1] if value is not None) ** 0.5
    assert whole == pytest.approx(0.02, rel=1e-3)  # after clipping
    logged = [entry for entry in trainer.state.log_history if "balance/top_third" in entry]
    assert [entry["step"] for entry in logged] == [1, 3, 6, 7]  # the start goes with the first log
    assert logged[1][f"balance/update/{tiny.UNITS[2]}"] == pytest.approx(found.by("update")[1][1][2])
    assert "log" not in vars(trainer)  # the Trainer is as it was


def test_training_is_the_same_bits_with_it(tmp_path: Path) -> None:
    one, other = tiny.model(dropout=0.1), tiny.model(dropout=0.1)
    run(tmp_path, model=one)
    run(tmp_path, BalanceCallback(every=1), model=other)
    before, after = tiny.weights(one), tiny.weights(other)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_has_the_balance_of_an_unbroken_one(tmp_path: Path) -> None:
    def options(folder: str, **given: Any) -> FitOptions:
        told: dict[str, Any] = {"steps": 8, "batch_size": 2, "lr": 1e-2, "seed": 0, "balance_every": 3, "save_every": 5}
        return FitOptions(output=tmp_path / folder, **told | given)

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise KeyboardInterrupt

    whole = fit(tiny.model(), tiny.sentences(), collate=tiny.collate, options=options("whole")).balance
    with pytest.raises(KeyboardInterrupt):
        fit(tiny.model(), tiny.sentences(), collate=tiny.collate, options=options("cut"), callbacks=[Stop()])
    again = fit(tiny.model(), tiny.sentences(), collate=tiny.collate, options=options("cut", resume=True))
    assert again.resumed_from == 5
    assert again.balance == whole
    assert whole is not None
    assert whole.steps == (0, 3, 6, 8)
    finished = fit(tiny.model(), tiny.sentences(), collate=tiny.collate, options=options("cut", resume=True))
    assert finished.balance == whole


def test_without_a_start_the_distance_says_from_where_it_counts(tmp_path: Path) -> None:
    run(tmp_path, model=tiny.model(), save_strategy="steps", save_steps=4)
    noted = BalanceCallback(every=2)
    (tmp_path / "checkpoint-7").rename(tmp_path / "last")
    run(tmp_path, noted, model=tiny.model(), resume=True)
    assert noted.result.since == 4
    assert noted.result.steps == (4, 6, 7)
    assert noted.result.distance[0] == (0.0,) * 8


def test_a_plain_loop_needs_one_call_a_measurement() -> None:
    model = tiny.model()
    meter = BalanceMeter(model)
    meter.note(0)
    batch = tiny.collate(tiny.sentences(count=2))
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    meter.note(1)
    assert [0.5 * value for value in meter.result.gradient[1]] == pytest.approx(
        list(meter.result.distance[1]), rel=1e-4
    )


def test_weights_of_64_bits_are_measured_as_they_are() -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)).double(), LoraConfig(target_modules=["0"], r=1))
    meter = BalanceMeter(model)
    with torch.no_grad():
        model.get_submodule("base_model.model.0.lora_B.default").weight.fill_(2.0)
    meter.note(1)
    assert meter.result.distance == ((pytest.approx(8**0.5),),)


def factors_of(kind: str) -> Any:
    options: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "r": 3}
    if kind == "hira":
        return HiraConfig(target_modules=["q_proj"], r=3, init_weights=False)
    extra = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}[kind]
    return LoraConfig(**options, lora_alpha=7, init_lora_weights=False, **extra)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "hira"])
def test_updates_of_other_kinds(kind: str) -> None:
    model = get_peft_model(tiny_llama(), factors_of(kind))
    meter = BalanceMeter(model)
    meter.note(0)
    held = from_model(model)
    expected = {name: float(factors.delta().norm()) for name, factors in held.modules.items()}
    assert dict(zip(meter.result.modules, meter.result.update[0], strict=True)) == pytest.approx(expected, rel=1e-5)


def test_of_lori_what_is_kept_is_what_is_trained() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    LoRI(mask=calibrate(from_model(model), density=1 / 32, scope="module"), start="fresh").attach(model)
    meter = BalanceMeter(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                assert weight.shape == (1,)
                weight.fill_(2.0)
    meter.note(1)
    expected = [float(factors.delta().norm()) for factors in from_model(model).modules.values()]
    assert meter.result.update[0] == pytest.approx(expected)
    assert meter.result.distance[0] == (2.0, 2.0)


def test_what_has_no_factors_has_no_update_but_a_distance() -> None:
    model = get_peft_model(tiny_llama(), VeraConfig(target_modules=["q_proj"], r=2))
    meter = BalanceMeter(model)
    meter.note(0)
    assert meter.result.update[0] == (None, None)
    assert meter.result.distance[0] == (0.0, 0.0)


def test_a_start_taken_out_of_the_base_has_no_update() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa"))
    meter = BalanceMeter(model)
    meter.note(0)
    assert meter.result.update[0] == (None, None)


@pytest.mark.parametrize("own", ["A", "B", "both"])
def test_of_moka_the_update_is_that_of_all_modalities(own: str) -> None:
    plan = MokA(modalities={"image": 1}, rank=2, own=own, attention="none")
    model = plan.wrap(tiny_llava(), target_modules=["q_proj"])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()
    meter = BalanceMeter(model)
    meter.note(0)
    expected: dict[str, float] = {}
    for name, factors in from_model(model).modules.items():
        module = name.partition("[")[0]
        expected[module] = (expected.get(module, 0.0) ** 2 + factors.norm() ** 2) ** 0.5
    assert dict(zip(meter.result.modules, meter.result.update[0], strict=True)) == pytest.approx(expected, rel=1e-5)


def test_weights_in_parts_and_scaled_gradients_are_refused(tmp_path: Path) -> None:
    model = tiny.model()
    next(weight for weight in model.parameters() if weight.requires_grad).ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match=r"q_proj is sharded over devices \(FSDP, ZeRO-3\)"):
        BalanceMeter(model)
    args = SimpleNamespace(fp16=True, max_grad_norm=0.0, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="fp16 without max_grad_norm"):
        BalanceCallback().on_train_begin(args, SimpleNamespace(global_step=0), None, model=tiny.model())


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be a whole number of optimizer steps, at least 1, got 0"):
        BalanceCallback(every=0)
    with pytest.raises(ValueError, match="no training has begun"):
        _ = BalanceCallback().result
    with pytest.raises(ValueError, match="no PEFT layers"):
        BalanceMeter(tiny_llama())
    frozen = tiny.model()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="all of its parameters are frozen"):
        BalanceMeter(frozen)
    meter = BalanceMeter(tiny.model())
    meter.save(tmp_path / FILE)
    other = get_peft_model(copy.deepcopy(tiny_llama()), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="of other modules than this model trains"):
        BalanceMeter(other).load(tmp_path / FILE)
