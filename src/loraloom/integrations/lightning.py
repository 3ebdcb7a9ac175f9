"""Lightning: a plan as an ordinary callback of its Trainer. Needs the extra ``loraloom[lightning]``."""

from __future__ import annotations

import sys
from typing import Any

from peft import PeftModel

from loraloom.integrations.trainer import _completed, _Run
from loraloom.strategies import Strategy

try:  # whichever of its two packages the user works with; their callbacks are called by the same names
    if "lightning.pytorch" in sys.modules:
        from lightning.pytorch import Callback
    else:
        from pytorch_lightning import Callback
except ImportError as error:
    raise ModuleNotFoundError(
        f"ll.lightning needs Lightning, which is not installed ({error}): pip install 'loraloom[lightning]'"
    ) from None


class CoToCallback(Callback):
    """Carry out a plan in Lightning: ``Trainer(..., callbacks=[ll.lightning.CoToCallback(coto)])``.

    CoTo, ICML 2025 (arXiv 2506.05713, section 3). The draw of an optimizer step holds for all its micro-batches
    (``accumulate_grad_batches``), forward and backward. At all other times every gate is open: validation, prediction
    and checkpoints see all adapters, and after an exception they are open as well. Logged at every step:
    ``coto/probability``, ``coto/active`` and ``coto/share``. A plan that skips nothing has ``dropout/`` for ``coto/``.

    Args:
        plan: CoTo or another strategy. Where its ``total_steps`` is None, the Trainer's number of steps is taken.

    Raises:
        ValueError: when training begins: ``total_steps`` is not the Trainer's, the Trainer does not know its number of
            steps, the LightningModule optimizes by hand, or has no PEFT layers.
    """

    def __init__(self, plan: Strategy) -> None:
        super().__init__()
        self.plan = plan
        self._run: _Run | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Complete the plan, find the units, open everything."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "CoToCallback needs automatic optimization, where Lightning tells when a step begins; in your own loop "
                "use `with coto.applied(model, step):`"
            )
        total = trainer.estimated_stepping_batches
        if total != int(total) or total < 1:
            raise ValueError(f"the Trainer runs {total} steps: give it max_steps, or max_epochs and data with a length")
        adapted = [module for module in pl_module.modules() if isinstance(module, PeftModel)]
        self._run = _Run(_completed(self.plan, int(total)), adapted[0] if len(adapted) == 1 else pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Gates as drawn for this optimizer step, the same for all its micro-batches."""
        if self._run is not None:
            self._run.draw(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Everything open for what comes between batches, and the numbers of the step are logged."""
        if self._run is not None:
            self._run.open()
            report = {name: float(value) for name, value in self._run.report(grads=False).items()}
            pl_module.log_dict(report)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Everything open."""
        self._open()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Everything open after a failure or a keyboard interrupt too."""
        self._open()

    def _open(self) -> None:
        if self._run is not None:
            self._run.open()
            self._run = None
