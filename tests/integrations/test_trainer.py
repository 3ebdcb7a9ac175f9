"""The callback in HF Trainer: who sees which adapters when, what is logged, and that it leaves nothing behind."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import tiny_runs as tiny
from loraloom.integrations.gates import Gates
from loraloom.integrations.trainer import CoToCallback, RichProgress
from loraloom.strategies.dropout import ProgressiveDropout
from loraloom.strategies.progressive import CoTo

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ALL_ON = (True,) * tiny.LAYERS


class Spy(TrainerCallback):
    """Notes (event, step, gates); placed after the callback under test."""

    def __init__(self, model: nn.Module) -> None:
        self.gates, self.seen = Gates(model), []

    def note(self, event: str, step: int) -> None:
        self.seen.append((event, step, self.gates.state()))

    def of(self, event: str) -> list[tuple[int, tuple[bool, ...]]]:
        return [(step, state) for name, step, state in self.seen if name == event]


for _event in ("step_begin", "substep_end", "pre_optimizer_step", "step_end", "log", "evaluate", "save", "train_end"):

    def _note(self: Spy, args: Any, state: Any, control: Any, _event: str = _event, **kwargs: Any) -> None:
        self.note(_event, state.global_step)

    setattr(Spy, f"on_{_event}", _note)


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **options | given)


def trainer_of(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **given: Any) -> Trainer:
    held_out = given.pop("eval_dataset", None)
    trainer = Trainer(
        model,
        arguments(folder, **given),
        data_collator=tiny.collate,
        train_dataset=tiny.sentences(),
        eval_dataset=held_out,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def watch_forwards(model: nn.Module, spy: Spy, trainer: Callable[[], Trainer]) -> None:
    """Note the gates inside every forward, in the last layer: it is computed again where there is checkpointing."""

    def note(module: nn.Module, inputs: Any) -> None:
        trains = module.training and torch.is_grad_enabled()
        spy.note("training forward" if trains else "other forward", trainer().state.global_step)

    model.get_base_model().model.layers[-1].self_attn.register_forward_pre_hook(note)


def plan(total: int | None = 6, **given: Any) -> CoTo:
    return CoTo(total, **{"seed": 3} | given)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_training_forward_of_a_step_sees_its_draw(tmp_path: Path, accumulate: int, checkpointing: bool) -> None:
    model = tiny.model()
    spy = Spy(model)
    trainer = trainer_of(
        tmp_path,
        model,
        CoToCallback(plan()),
        spy,
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=2,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    watch_forwards(model, spy, lambda: trainer)
    trainer.train()
    drawn = [(step, plan().active(step, tiny.UNITS)) for step in range(6)]
    assert len({state for _, state in drawn}) > 2  # draws differ, or the test shows nothing
    passes = accumulate * (2 if checkpointing else 1)  # computed again in backward, under the same draw
    assert spy.of("training forward") == [entry for entry in drawn for _ in range(passes)]
    for event in ("step_begin", "substep_end", "pre_optimizer_step", "step_end", "log", "train_end"):
        assert all(state == ALL_ON for _, state in spy.of(event)), event
    assert len(spy.of("substep_end")) == 6 * (accumulate - 1)


def test_inactive_units_get_no_gradient_and_active_ones_do(tmp_path: Path) -> None:
    class Grads(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            active = dict(zip(tiny.UNITS, plan().active(state.global_step, tiny.UNITS), strict=True))
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    assert (weight.grad is not None) == active[tiny.unit_of(name)], (state.global_step, name)

    trainer_of(tmp_path, tiny.model(), CoToCallback(plan()), Grads(), gradient_accumulation_steps=2).train()


def test_a_step_whose_active_units_take_no_part_in_the_loss_teaches_nothing(tmp_path: Path) -> None:
    """The pooler of a bare encoder, adapted but not read: where it is drawn alone there is no way back to it."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    torch.manual_seed(0)
    base = BertModel(BertConfig(num_hidden_layers=2, **size))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "pooler.dense"], init_lora_weights=False))
    units = tuple(Gates(model).modules)
    draws = [plan(20).active(step, units) for step in range(20)]
    assert (False, False, True) in draws and any(one[0] for one in draws)
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=20),
        data_collator=tiny.collate,
        train_dataset=tiny.sentences(),
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.last_hidden_state.square().mean(),
        callbacks=[CoToCallback(plan(20))],
    )
    trainer.remove_callback(PrinterCallback)
    before = tiny.weights(model)
    trainer.train()
    moved = {name for name, weight in tiny.weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "pooler" not in name}


def test_adamw_neither_moves_nor_decays_an_inactive_adapter(tmp_path: Path) -> None:
    class Frozen(TrainerCallback):
        compared = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.before = self.snapshot(kwargs["model"], kwargs["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after = self.snapshot(kwargs["model"], kwargs["optimizer"])
            active = dict(zip(tiny.UNITS, plan().active(state.global_step - 1, tiny.UNITS), strict=True))
            for name, tensors in after.items():
                before = self.before[name]
                same = len(tensors) == len(before) and all(map(torch.equal, tensors, before))
                assert same != active[tiny.unit_of(name)], (state.global_step, name)
                self.compared += same

        @staticmethod
        def snapshot(model: nn.Module, optimizer: Any) -> dict[str, list[torch.Tensor]]:
            moments = optimizer.state
            return {
                name: [weight.detach().clone(), *(value.clone() for value in moments.get(weight, {}).values())]
                for name, weight in model.named_parameters()
                if weight.requires_grad
            }

    frozen = Frozen()
    trainer_of(tmp_path, tiny.model(), CoToCallback(plan()), frozen, weight_decay=0.1).train()
    assert frozen.compared > 10


def test_evaluation_saving_best_model_and_prediction_see_all_adapters(tmp_path: Path) -> None:
    model = tiny.model()
    spy = Spy(model)
    held_out = tiny.sentences(5, seed=9)
    trainer = trainer_of(
        tmp_path,
        model,
        CoToCallback(plan(curve="constant", start=0.3)),
        spy,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    watch_forwards(model, spy, lambda: trainer)
    save, load = model.save_pretrained, model.load_adapter

    def saving(*args: Any, **kwargs: Any) -> Any:
        spy.note("saving", trainer.state.global_step)
        return save(*args, **kwargs)

    def loading(*args: Any, **kwargs: Any) -> Any:
        spy.note("loading", trainer.state.global_step)
        return load(*args, **kwargs)

    model.save_pretrained, model.load_adapter = saving, loading
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.predict(held_out).metrics["test_loss"] == min(logged)  # the best model, with every adapter
    for event, times in (("other forward", 5), ("saving", 3), ("loading", 1), ("evaluate", 4), ("save", 3)):
        assert len(spy.of(event)) == times and all(state == ALL_ON for _, state in spy.of(event)), event
    assert any(state != ALL_ON for _, state in spy.of("training forward"))


def test_generation_in_the_middle_of_a_step_sees_all_adapters_and_training_goes_on_as_drawn(tmp_path: Path) -> None:
    model = tiny.model()
    spy = Spy(model)
    ids = torch.tensor([[3, 4, 5]])

    class Samples(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.eval()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
            model.train()
            with torch.no_grad():
                model(ids)

    trainer = trainer_of(tmp_path, model, CoToCallback(plan(curve="constant", start=0.3)), Samples(), spy)
    watch_forwards(model, spy, lambda: trainer)
    trainer.train()
    others = spy.of("other forward")
    assert len(others) == 6 * 3 and all(state == ALL_ON for _, state in others)
    constant = plan(curve="constant", start=0.3)
    assert spy.of("training forward") == [(step, constant.active(step, tiny.UNITS)) for step in range(6)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["step begin", "collate", "forward", "backward", "optimizer", "callback"])
def test_an_exception_leaves_the_gates_open_and_no_hook(tmp_path: Path, place: str, error: type) -> None:
    model = tiny.model()
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    callback = CoToCallback(plan(curve="constant", start=0.3))
    broken = SimpleNamespace(now=False, armed=True)

    def fail(*args: Any, **kwargs: Any) -> None:
        if broken.now:
            raise error("stop")

    class Later(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            broken.now = broken.armed and state.global_step == 2
            if place == "step begin":
                fail()

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if place == "callback":
                fail()

    trainer = trainer_of(tmp_path, model, callback, Later(), gradient_accumulation_steps=2, dataloader_num_workers=0)
    lm_head = model.get_base_model().lm_head
    handles = []
    if place == "collate":
        trainer.data_collator = lambda examples: fail() or tiny.collate(examples)
    if place == "forward":
        handles.append(lm_head.register_forward_hook(fail))
    if place == "backward":
        handles.append(lm_head.register_forward_hook(lambda m, i, out: out.register_hook(fail) and None))
    if place == "optimizer":
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(error):
        trainer.train()
    for handle in handles:
        handle.remove()
    assert Gates(model).state() == ALL_ON
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    broken.armed = broken.now = False
    trainer.train()  # and the same Trainer can go again
    assert Gates(model).state() == ALL_ON and "log" not in vars(trainer)


def test_a_callback_that_is_taken_away_after_an_exception_is_at_work_no_more(tmp_path: Path) -> None:
    model, seen = tiny.model(), []
    callback = CoToCallback(plan(curve="constant", start=0.3))
    trainer = trainer_of(tmp_path, model, callback)
    head = model.get_base_model().lm_head

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = head.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    trainer.remove_callback(callback)
    head.register_forward_hook(lambda *args: seen.append(Gates(model).state()))
    trainer.train()
    assert seen and set(seen) == {ALL_ON}


def test_a_full_plan_is_plain_training(tmp_path: Path) -> None:
    trained = []
    for callbacks in ([], [CoToCallback(plan(ramp=0.0))]):
        model = tiny.model(dropout=0.2)
        trainer_of(tmp_path, model, *callbacks).train()
        trained.append(tiny.weights(model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_total_steps_come_from_the_trainer_or_must_agree(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny.model(), CoToCallback(plan(None)))
    trainer.train()
    seen = [entry["coto/probability"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == [plan(6).probability(step) for step in range(6)]
    with pytest.raises(ValueError, match=r"total_steps=50 but the Trainer runs 6 steps.*total_steps=None"):
        trainer_of(tmp_path, tiny.model(), CoToCallback(plan(50))).train()


def test_reporters_and_the_history_get_the_numbers(tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append({**logs, "step": state.global_step})

    model = tiny.model()
    held_out = tiny.sentences(4)
    trainer = trainer_of(
        tmp_path,
        model,
        CoToCallback(plan()),
        logging_steps=2,
        max_grad_norm=0.0,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.callback_handler.callbacks.insert(0, Reporter())  # where TensorBoard and its like stand
    trainer.train()
    assert trainer.state.log_history == reported
    training = [entry for entry in reported if "loss" in entry]
    assert [entry["step"] for entry in training] == [2, 4, 6]
    for entry in training:
        step = int(entry["step"]) - 1  # the step that closes the log
        active = plan().active(step, tiny.UNITS)
        assert entry["coto/probability"] == plan().probability(step)
        assert entry["coto/active"] == sum(active) and entry["coto/share"] == sum(active) / 4
        norms = {key: value for key, value in entry.items() if key.startswith("coto/grad_norm/")}
        on = [unit for unit, is_on in zip(tiny.UNITS, active, strict=True) if is_on]
        assert list(norms) == [f"coto/grad_norm/{unit}" for unit in on]
        assert math.isclose(math.hypot(*norms.values()), entry["grad_norm"], rel_tol=1e-5)
    assert not any("coto" in key for entry in reported if "loss" not in entry for key in entry)


@pytest.mark.parametrize(("strategy", "steps"), [("epoch", [6]), ("no", [])])
def test_logs_by_epoch_and_none(tmp_path: Path, strategy: str, steps: list[int]) -> None:
    trainer = trainer_of(tmp_path, tiny.model(), CoToCallback(plan()), logging_strategy=strategy)
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in found] == steps
    assert all(any(key.startswith("coto/grad_norm/") for key in entry) for entry in found)


def test_the_trainer_is_as_before_afterwards_and_two_plans_go_together(tmp_path: Path) -> None:
    model = tiny.model(dropout=0.1)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    seen: list[float] = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda *_: seen.append(dropouts[0].p))
    falling = ProgressiveDropout(6, start=0.8)
    trainer = trainer_of(tmp_path, model, CoToCallback(falling), CoToCallback(plan()))
    trainer.train()
    assert seen == [falling.probability(step) for step in range(6)]
    assert {module.p for module in dropouts} == {0.1}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["dropout/probability"] for entry in logged] == seen
    assert [entry["coto/active"] for entry in logged] == [sum(plan().active(step, tiny.UNITS)) for step in range(6)]
    assert Gates(model).state() == ALL_ON
    trainer.train()  # what is left of the wrappers does not stand in the way
    assert seen[6:] == seen[:6]


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(0, 40), st.floats(0, 1))
def test_the_events_alone_serve_a_loop_that_is_no_trainer(seed: int, step: int, ramp: float) -> None:
    model = tiny.model()
    some = CoTo(41, seed=seed, ramp=ramp)
    callback = CoToCallback(some)
    state = SimpleNamespace(max_steps=41, global_step=step, logging_steps=1)
    args = arguments(Path("unused"))
    callback.on_train_begin(args, state, None, model=model)
    assert Gates(model).state() == ALL_ON
    callback.on_step_begin(args, state, None)
    assert Gates(model).state() == some.active(step, tiny.UNITS)
    callback.on_pre_optimizer_step(args, state, None)
    assert Gates(model).state() == ALL_ON


def test_events_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="no training has begun"):
        CoToCallback(plan()).on_step_begin(None, SimpleNamespace(global_step=0), None)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_shows_the_numbers_on_a_terminal_only(tmp_path: Path, terminal: bool) -> None:
    out = io.StringIO()
    bar = RichProgress(Console(file=out, force_terminal=terminal, width=100))
    trainer_of(tmp_path, tiny.model(), CoToCallback(plan()), bar).train()
    if terminal:
        assert all(text in out.getvalue() for text in ("6/6", "loss 3.", "p 1.00", "active 4"))
    else:
        assert out.getvalue() == ""
