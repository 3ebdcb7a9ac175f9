"""HF Trainer and TRL: CoTo as an ordinary callback, a progress bar, and one function that trains and resumes exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from loraloom.integrations.gates import Gates
from loraloom.strategies.dropout import ProgressiveDropout
from loraloom.strategies.progressive import CoTo


class CoToCallback(TrainerCallback):
    """Apply a plan in HF Trainer, TRL's trainers and whatever else calls Trainer callbacks (Zhuang et al. 2025, section 3).

    The draw of an optimizer step holds for its forward and backward passes in training; micro-batches share it. A
    forward in evaluation mode or without gradients (evaluation, generation, prediction, another callback's sampling)
    sees all adapters even in the middle of a step, and so it does after an exception or a keyboard interrupt. A loop of
    your own that goes on training the model after such an end calls :meth:`open` first; ``trainer.train()`` does it.

    Logged with the training loss, to ``report_to`` and ``state.log_history``: ``coto/probability``, ``coto/active``
    (how many units), ``coto/share``, and by active unit ``coto/grad_norm/<unit>``, the norm of its gradient after
    clipping, all of the step that the log closes.

    Args:
        plan: a :class:`CoTo` or :class:`ProgressiveDropout`; where its ``total_steps`` is None, the Trainer's is taken.

    Raises:
        ValueError: when training starts, ``total_steps`` is not the Trainer's number of steps.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[CoToCallback(CoTo(seed=0))])
    """

    def __init__(self, plan: CoTo | ProgressiveDropout) -> None:
        self.plan = plan
        self._running: _Running | None = None
