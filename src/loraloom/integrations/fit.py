"""Training that a kill cannot spoil: HF Trainer with a plan, sealed checkpoints and an exact resume."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loraloom.integrations.balance import FILE as BALANCE
from loraloom.integrations.balance import BalanceCallback, BalanceMeter
from loraloom.integrations.checkpoints import (
    SafeCheckpoints,
    StopOnInterrupt,
    disk_faults_told,
    last_complete,
    remove_torn,
)
from loraloom.integrations.fast import fast
from loraloom.integrations.moving import check_kinds
from loraloom.integrations.processes import join
from loraloom.integrations.trainer import CoToCallback, RichProgress
from loraloom.probes.balance import Balance
from loraloom.strategies import Strategy

_CLOCK, _TRAINED = "seconds.json", "trained.safetensors"


@dataclass(frozen=True)
class FitOptions:
    """How :func:`fit` trains.

    Attributes:
        output: folder of the checkpoints (``checkpoint-N``).
        steps: optimizer steps of the whole run.
        batch_size: most examples of one forward pass on one device; ``batch_size * accumulate`` make an optimizer
            step, over all processes together: the same examples whatever their number.
        lr: peak learning rate of AdamW.
        seed: of the data order, which depends on nothing else, and of the model's dropout.
        accumulate: forward passes an optimizer step, of one process; several share them.
        warmup: steps of linear warm-up; ``constant`` has none.
        scheduler: what follows it, by the name that Transformers gives it: linear, cosine, constant_with_warmup, ...
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        save_every: steps between checkpoints (and one at the end); None writes none but after Ctrl-C. The two newest
            are kept.
        log_every: steps between logs.
        bf16: autocast to bfloat16.
        gradient_checkpointing: compute activations again in backward.
        fast: adapted layers take their fast paths (`loraloom.fast`).
        resume: go on from the newest whole checkpoint in ``output``, if there is one.
        progress: draw a progress bar on a terminal.
        report_to: reporters of Transformers: "none", "tensorboard", "wandb", ...
        balance_every: steps between measurements of the balance (:class:`BalanceCallback`); None takes none.
    """

    output: str | Path
    steps: int
    batch_size: int
    lr: float
    seed: int
    accumulate: int = 1
    warmup: int = 0
    scheduler: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_every: int | None = None
    log_every: int = 10
    bf16: bool = False
    gradient_checkpointing: bool = False
    fast: bool = False
    resume: bool = False
    progress: bool = False
    report_to: str | Sequence[str] = "none"
    balance_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "balance_every"):
            value = getattr(self, name)
            if not (name in ("save_every", "balance_every") and value is None) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be in [0, steps = {self.steps}], got {self.warmup}")
        if self.warmup and self.scheduler == "constant":  # Transformers would leave it out
            raise ValueError(f"scheduler constant has no warmup, got {self.warmup}; constant_with_warmup has")
        for name in ("lr", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number from 0 on, got {getattr(self, name)}")


@dataclass(frozen=True)
class Fit:
    """What came of :func:`fit`.

    Attributes:
        steps: optimizer steps of the whole run.
        resumed_from: the step of the checkpoint that this call went on from, 0 without one.
        seconds: wall time of training with its checkpoints and logs; of a resumed run, up to the checkpoint and from
            there on.
        log_history: the Trainer's logs of the whole run, one mapping a log, with its ``step``. The first ``loss`` after
            a resume is the mean from the checkpoint on.
        balance: what ``balance_every`` noted.
    """

    steps: int
    resumed_from: int
    seconds: float
    log_history: tuple[Mapping[str, float], ...]
    balance: Balance | None = None


def fit(
    model: PeftModel,
    dataset: Any,
    *,
    collate: Callable[[list[Any]], dict[str, Any]],
    options: FitOptions,
    plan: Strategy | None = None,
    loss: Callable[..., Tensor] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Fit:
    """Train the adapters of ``model`` in place with HF Trainer; a killed run that is resumed ends in the same bits.

    Args:
        model: a PEFT model, or one of Transformers of which the trainable weights are trained in place. With ``loss``
            it may be a mere backbone (AutoModel).
        dataset: examples by index, with a length. What an index gives must not depend on chance: an example that is
            drawn ahead of its step would be drawn again after a resume.
        collate: a list of examples to the keyword arguments of forward; ``labels`` go to ``loss`` where it is given.
        options: see there.
        plan: a strategy, carried out by :class:`CoToCallback`.
        loss: ``loss(outputs, labels, num_items_in_batch)`` with the number of labels (other than -100) of the whole
            optimizer step: divide a sum by it. None takes the model's own loss.
        callbacks: further callbacks of the Trainer.

    Returns:
        The logs and the time; the weights are in ``model``, all gates open.

    Raises:
        ValueError: ``output`` has checkpoints and ``resume`` is off, or they are of a run of other length; or the
            examples of a step cannot be split evenly over the processes.
        KeyboardInterrupt: after Ctrl-C, once the step that was under way is done and a checkpoint is written.
        OSError: the disk is full.
    """
    join()
    if options.fast and isinstance(model, PeftModel):
        fast(model)
    start = _starting_point(options)
    done = 0 if start is None else int(_state(start)["global_step"])
    if start is not None and done == options.steps:
        return _finished(model, start, done, balance=options.balance_every is not None)
    switch = CoToCallback(plan) if plan is not None else None
    balance = BalanceCallback(options.balance_every) if options.balance_every else None
    bar = RichProgress() if options.progress else None
    safe, stop = SafeCheckpoints(), StopOnInterrupt()
    clock = _Clock(start)
    trained = None if isinstance(model, PeftModel) else _Weights(model, start)
    extra = [
        stop,
        clock,
        trained,
        switch,
        balance,
        bar,
        *callbacks,
        safe,
    ]  # the seal comes last: it covers what other callbacks save
    trainer = _Trainer(
        model,
        _arguments(options),
        data_collator=collate,
        train_dataset=dataset,
        compute_loss_func=loss,
        callbacks=[callback for callback in extra if callback is not None],
    )
    check_kinds(trainer, start)
    if trainer.is_fsdp_enabled:
        _name_blocks(trainer)
    trainer.remove_callback(PrinterCallback)
    if loss is not None:
        trainer.model_accepts_loss_kwargs = False  # the count of labels is for the loss, not for a backbone's forward
    try:
        with stop.listening(), disk_faults_told(options.output), warnings.catch_warnings():
            # torch asks for another option, which sends them once all the same
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
    finally:
        if switch is not None:
            switch.open()
        if bar is not None:
            bar.close()
    noted = None if balance is None else balance.result
    return Fit(options.steps, done, clock.seconds(), tuple(trainer.state.log_history), noted)


class _Trainer(Trainer):
    """HF Trainer, but for counting the model's weights anew at every step: a walk over all modules."""

    _of_entry = 0  # operations for each entry of the main input, once they are known

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a step, forward and backward, by Trainer's own estimate."""
        given = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if given is None or not given.numel():
            return super().floating_point_ops(inputs)
        self._of_entry = self._of_entry or super().floating_point_ops(inputs) // given.numel()
        return self._of_entry * given.numel()


class _Clock(TrainerCallback):
    """Adds up training time over kills: each checkpoint holds the seconds until then."""

    def __init__(self, start: Path | None) -> None:
        self._before = 0.0 if start is None else _seconds(start)
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _CLOCK).write_text(json.dumps({"seconds": self.seconds()}), encoding="utf-8")


class _Weights(TrainerCallback):
    """Keeps the trained weights of a model of Transformers in its checkpoints, under the names that they have live.

    The checkpoint's own names may be others (those of the hub), which a Trainer that resumes does not find, silently.
    """

    def __init__(self, model: torch.nn.Module, start: Path | None) -> None:
        self._start = start
        self._held = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def load(self) -> None:
        """Put the weights of the checkpoint in."""
        with torch.no_grad():
            for name, value in load_file(self._start / _TRAINED).items() if self._start else ():
                self._held[name].copy_(value)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.load()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_file({name: weight.detach().contiguous() for name, weight in self._held.items()}, folder / _TRAINED)


def share(examples: int, most: int, processes: int) -> tuple[int, int]:
    """How a process takes its part of a step: examples a forward pass, and passes.

    Args:
        examples: of one optimizer step, over all processes.
        most: examples of one forward pass.
        processes: their number.

    Raises:
        ValueError: there is no even split.

    Example:
        >>> share(16, 8, 1), share(16, 8, 2), share(12, 8, 2)
        ((8, 2), (8, 1), (6, 1))
    """
    each, left = divmod(examples, processes)
    if left or not each:
        raise ValueError(
            f"batch_size * accumulate = {examples} examples a step cannot be split over {processes} processes; "
            f"allowed are multiples of {processes}"
        )
    passes = next(count for count in range(1, each + 1) if each % count == 0 and each // count <= most)
    return each // passes, passes


def _name_blocks(trainer: Trainer) -> None:
    """The blocks that FSDP gathers one by one, where its configuration names none.

    Of those that the model's class names Accelerate would insist on all, and families share their names; and it takes
    the input embeddings as a block of their own, which must not lie in another one.
    """
    model: Any = trainer.model
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        inputs = getattr(model, "get_input_embeddings", lambda: None)()
        there = {type(module).__name__ for module in model.modules()}
        around = {type(module).__name__ for module in model.modules() if inputs in (*module.modules(),)[1:]}
        named = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = sorted((there - around).intersection(named))


def _arguments(options: FitOptions) -> TrainingArguments:
    has_device = torch.accelerator.is_available()
    names = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    batch, passes = share(options.batch_size * options.accumulate, options.batch_size, join().num_processes)
    checkpointing: dict[str, Any] = {name: options.gradient_checkpointing, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=passes,
        learning_rate=options.lr,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=options.log_every,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or options.steps,
        save_total_limit=2,
        bf16=options.bf16,
        report_to=[options.report_to] if isinstance(options.report_to, str) else list(options.report_to),
        use_cpu=not has_device,
        ddp_broadcast_buffers=False,  # of a frozen base and of masks: the same everywhere
        dataloader_pin_memory=has_device,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        disable_tqdm=True,
        **checkpointing,
    )


def _starting_point(options: FitOptions) -> Path | None:
    """The checkpoint to go on from, after clearing away torn ones."""
    if not options.resume:
        found = sorted(Path(options.output).glob("checkpoint-*"))
        if found:
            raise ValueError(
                f"{options.output} has checkpoints already ({found[0].name}); resume, or choose another folder"
            )
        return None
    with join().main_process_first():
        remove_torn(options.output)
    start = last_complete(options.output)
    if start is not None:
        steps = _state(start)["max_steps"]
        if steps != options.steps:
            raise ValueError(f"{start} is of a run of {steps} steps, not {options.steps}: it cannot be resumed exactly")
    return start


def _finished(model: PeftModel, checkpoint: Path, step: int, *, balance: bool) -> Fit:
    """The end of a run that needs no further step: the Trainer would make one all the same."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    if isinstance(model, PeftModel):
        weights = load_peft_weights(str(checkpoint), device="cpu")
        set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters[0])
    else:
        _Weights(model, checkpoint).load()
    meter = BalanceMeter(model) if balance else None
    if meter is not None:
        meter.load(checkpoint / BALANCE)
    noted = None if meter is None else meter.result
    return Fit(step, step, _seconds(checkpoint), tuple(_state(checkpoint)["log_history"]), noted)


def _seconds(checkpoint: Path) -> float:
    return float(json.loads((checkpoint / _CLOCK).read_text(encoding="utf-8"))["seconds"])


def _state(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
