"""HF Trainer and TRL: a plan as an ordinary callback, and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from loraloom.integrations.gates import Gates, drawn
from loraloom.integrations.reduction import is_replicated, reduce_gradients, taking_part
from loraloom.strategies import Strategy

if TYPE_CHECKING:
    from rich.console import Console


class CoToCallback(TrainerCallback):
    """Carry out a plan in HF Trainer and its kin (TRL's trainers): ``Trainer(..., callbacks=[CoToCallback(coto)])``.

    CoTo, ICML 2025 (arXiv 2506.05713, section 3). The draw of an optimizer step holds for its forward and backward
    passes, the same for all micro-batches. At all other times every gate is open: evaluation, prediction, saving and
    ``load_best_model_at_end`` see all adapters. So does a forward in evaluation mode or without gradients inside a
    training step (generation in TRL's online trainers). An exception or a keyboard interrupt opens the gates as well.

    Logged with the training loss, to ``report_to`` and ``state.log_history``, for the step that closes the log:
    ``coto/probability``, ``coto/active`` (number of units), ``coto/share`` and by active unit ``coto/grad_norm/<unit>``
    (norm of its gradient after clipping). A plan that skips nothing has ``dropout/`` in place of ``coto/``.

    Args:
        plan: CoTo or another strategy. Where its ``total_steps`` is None, the Trainer's number of steps is taken.

    Raises:
        ValueError: when training begins: ``total_steps`` is not the Trainer's, the model has no PEFT layers, or
            DeepSpeed trains a plan that skips parameters.
    """

    def __init__(self, plan: Strategy) -> None:
        self.plan = plan
        self._run: _Run | None = None
        self._trainer = Extended(self)
        self._report: dict[str, float | Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the plan, find the units, open everything."""
        self.open()
        self._run = _Run(_completed(self.plan, state.max_steps), kwargs["model"])
        self._report = {}
        self._attach()
        if self.plan.skips_parameters and self._trainer.by_deepspeed:
            self._trainer.detach()
            raise ValueError(
                f"{type(self.plan).__name__} cannot be trained by DeepSpeed, which steps all parameters as one vector: "
                "switched-off adapters would move; allowed are DDP and FSDP2"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gates as drawn for this optimizer step in a loop that is no Trainer; a Trainer's ``training_step`` draws."""
        run = self._begun()
        if not self._trainer.found:
            run.draw(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All passes of the step are done: open everything, and note what is to be logged of it."""
        self.open()
        self._report = self._begun().report(grads=_will_log(args, state, state.global_step + 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything open for what comes between steps."""
        self.open()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything open; the Trainer is as it was."""
        self.open()
        self._trainer.detach()

    def open(self) -> None:
        """Open all gates, whatever state training was left in."""
        if self._run is not None:
            self._run.open()

    def _begun(self) -> _Run:
        if self._run is None:
            raise ValueError("no training has begun: on_train_begin comes before the other events")
        return self._run

    def _attach(self) -> None:
        """Extend the calling Trainer: no event comes when a step fails, which would leave gates closed.

        Here they are open again as soon as ``training_step`` is left in any way. A loop that is no Trainer but calls
        the events is served by these.
        """

        def step(before: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def training_step(model: Any, *args: Any, **kwargs: Any) -> Tensor:
                run = self._begun()
                try:
                    run.draw(self._trainer.state.global_step)
                    if not (run.plan.skips_parameters and is_replicated(model)):
                        return before(model, *args, **kwargs)
                    with model.no_sync():
                        loss = before(model, *args, **kwargs)
                    if self._trainer.last_of_step:
                        reduce_gradients(taking_part(model, run.weights, run.active), model.process_group)
                    return loss
                finally:
                    self.open()

            return training_step

        def compute_loss(before: Callable[..., Any]) -> Callable[..., Any]:
            def compute_loss(*args: Any, **kwargs: Any) -> Any:
                found = before(*args, **kwargs)
                if isinstance(found, tuple):
                    return (self._begun().attached(found[0]), *found[1:])
                return self._begun().attached(found)

            return compute_loss

        def log(before: Callable[..., None]) -> Callable[..., None]:
            def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
                if "loss" in logs:  # the training log; evaluation has eval_loss
                    logs.update({name: float(value) for name, value in self._report.items()})
                before(logs, *args, **kwargs)

            return log

        self._trainer.attach(training_step=step, compute_loss=compute_loss, log=log)


class Extended:
    """Methods of the calling Trainer that it offers for extension, extended for as long as a training lasts.

    Events alone cannot do it: reporters (TensorBoard and the like) get ``on_log`` before any callback of the user's, so
    that what a callback adds there comes too late. A callback is never told its Trainer; it is found once, among the
    callers.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self._callback = callback
        self._trainer: Trainer | None = None
        self._wrapped: dict[str, Callable] = {}

    @property
    def found(self) -> bool:
        """Whether a Trainer is extended."""
        return self._trainer is not None

    @property
    def state(self) -> Any:
        """The state of the Trainer that is extended."""
        return None if self._trainer is None else self._trainer.state

    @property
    def last_of_step(self) -> bool:
        """Whether the pass under way is the last one before the optimizer's step."""
        return self._trainer is None or bool(self._trainer.accelerator.sync_gradients)

    @property
    def by_deepspeed(self) -> bool:
        """Whether DeepSpeed trains."""
        return self._trainer is not None and bool(self._trainer.is_deepspeed_enabled)

    def attach(self, **wrappers: Callable[[Callable], Callable]) -> None:
        """Put ``wrappers[name](method)`` in the place of each method; nothing where no Trainer calls."""
        self.detach()
        self._trainer = _calling_trainer()
        if self._trainer is not None:
            self._wrapped = {name: self._extended(name, wrap) for name, wrap in wrappers.items()}
            vars(self._trainer).update(self._wrapped)

    def _extended(self, name: str, wrap: Callable[[Callable], Callable]) -> Callable:
        trainer = self._trainer
        before = getattr(trainer, name)
        after, listed = wrap(before), self._listed()

        def method(*args: Any, **kwargs: Any) -> Any:
            at_work = self._trainer is trainer and (self._listed() or not listed)
            return (after if at_work else before)(*args, **kwargs)

        return method

    def _listed(self) -> bool:
        """Whether the Trainer still has the callback: after an exception no event tells that it was taken away."""
        callbacks = self._trainer.callback_handler.callbacks if self._trainer is not None else []
        return any(one is self._callback for one in callbacks)

    def detach(self) -> None:
        """Give the Trainer its methods back."""
        if self._trainer is not None:
            for name, wrapped in self._wrapped.items():
                if vars(self._trainer).get(name) is wrapped:
                    delattr(self._trainer, name)
        self._trainer = None  # a wrapper that is itself wrapped stays, and passes on


class _Run:
    """A plan at work on a model: the draw of one step, and what there is to say of it."""

    def __init__(self, plan: Strategy, model: nn.Module) -> None:
        self.plan = plan
        self.gates = Gates(model, plan.unit, trained=True)
        self.gates.open()
        self.weights = self.gates.parameters()
        self.block = ExitStack()
        self.step = 0
        self.active: tuple[bool, ...] = ()

    def draw(self, step: int) -> None:
        self.block.close()
        self.step = step
        self.block.enter_context(drawn(self.plan, self.gates, step))
        self.active = self.gates.state()

    def open(self) -> None:
        self.block.close()
        self.gates.open()

    def attached(self, loss: Tensor) -> Tensor:
        """The loss, with a path back where no unit that is on takes part in it, as a pooler that nobody reads."""
        if loss.requires_grad or not torch.is_grad_enabled():
            return loss
        on = [weights[0] for weights, some in zip(self.weights.values(), self.active, strict=True) if some and weights]
        return loss + 0 * on[0].sum() if on else loss

    def report(self, grads: bool) -> dict[str, float | Tensor]:
        """The numbers of the step drawn last. Norms stay on the device: the wait for them comes with the log."""
        prefix = "coto" if self.plan.skips_parameters else "dropout"
        report: dict[str, float | Tensor] = {f"{prefix}/probability": self.plan.probability(self.step)}
        if self.plan.skips_parameters:
            report[f"{prefix}/active"] = sum(self.active)
            report[f"{prefix}/share"] = sum(self.active) / len(self.active)
        for unit, weights in self.weights.items() if grads else ():
            found = [weight.grad for weight in weights if weight.grad is not None]
            if found:
                report[f"{prefix}/grad_norm/{unit}"] = torch.stack(
                    [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in found]
                ).norm()
        return report


class RichProgress(TrainerCallback):
    """A progress bar with loss, p(t), active units and time left; nothing at all where there is no terminal.

    Takes the place of the Trainer's own: pass ``disable_tqdm=True`` and ``trainer.remove_callback(PrinterCallback)``.

    Args:
        console: where to draw; by default the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._progress: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the bar, on the main process of a terminal only."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.close()
        console = self._console or Console(stderr=True)
        if not (console.is_terminal and state.is_world_process_zero):
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("train", total=state.max_steps, completed=state.global_step, text="")
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the newest numbers."""
        if self._progress is None or not logs or "loss" not in logs:
            return
        shown = [("loss", "loss", ".4f"), ("coto/probability", "p", ".2f"), ("coto/active", "active", ".0f")]
        text = "  ".join(f"{label} {logs[key]:{form}}" for key, label, form in shown if key in logs)
        self._progress.update(self._task, text=text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; after an exception in training too."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _completed(plan: Any, max_steps: int) -> Any:
    if plan.total_steps is None:
        return replace(plan, total_steps=max_steps)
    if plan.total_steps != max_steps:
        raise ValueError(
            f"the plan has total_steps={plan.total_steps} but the Trainer runs {max_steps} steps; "
            "give total_steps=None to take the Trainer's number"
        )
    return plan


def _will_log(args: Any, state: Any, step: int) -> bool:
    """Whether the Trainer may write a training log when ``step`` optimizer steps are done."""
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
    return args.logging_strategy != IntervalStrategy.NO


def _calling_trainer() -> Trainer | None:
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
