"""The model of a recipe as it is trained, on the meta device, and what one pass through it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from loraloom.adapter import Adapter
from loraloom.integrations import shapes
from loraloom.integrations.adapting import saving, told_by, training, whole, with_dropout
from loraloom.integrations.backbones import QUANTISED
from loraloom.integrations.modality import routed
from loraloom.integrations.peft import _peft_config  # how a stored configuration becomes PEFT's
from loraloom.integrations.trace import Trace, trace
from loraloom.modalities import plan_of
from loraloom.store import load


def traced(recipe: Any, *, batch: int, unit: str = "layer") -> Trace:
    """One forward pass of ``batch`` examples of a recipe (``recipe.Recipe``), with all adapters taking part.

    Raises:
        ValueError: the model's configuration is not found, or the adapter or the data do not fit it.
    """
    kind = "float32" if recipe.dtype in QUANTISED else recipe.dtype  # quantised layers compute in it
    kind = "bfloat16" if recipe.train.bf16 else kind
    bare, family = shapes.bare(recipe.model, kind)
    data = recipe.data
    given = shapes.inputs(bare, family, batch=batch, length=data.max_length, image_size=data.image_size)
    if modalities := _modalities(recipe):
        given |= _tokens(batch, data.max_length, modalities)
    with trainee(bare, recipe) as model:
        return trace(model.train(), given, unit=unit, switched=recipe.adapter.kind != "none")


@contextmanager
def trainee(model: nn.Module, recipe: Any) -> Iterator[nn.Module]:
    """The model with what the recipe trains, as for a run of it, but for the values of the weights."""
    earlier = None if recipe.continue_from is None else load(recipe.continue_from)
    with ExitStack() as held:
        with torch.device(next(model.parameters()).device):  # for what is added to the model, not for what it does
            if recipe.adapter.kind == "none":
                made: Any = held.enter_context(whole(model, recipe.adapter.modules_to_save))
            elif earlier is not None:
                made = _continued(model, earlier, told_by(recipe))
            else:
                made = held.enter_context(training(model, **told_by(recipe), seed=recipe.seed))
        for name, weight in made.named_parameters():
            if recipe.lori is not None and {"lora_A", "lora_embedding_A"} & {*name.split(".")}:
                weight.requires_grad_(False)
        yield made


def _continued(model: nn.Module, earlier: Adapter, told: Mapping[str, Any]) -> Any:
    """An adapter that is gone on with, as :func:`adapting.training` attaches it; nothing of it is read."""
    config = saving(model, replace(earlier, extras={}), told["modules_to_save"]).config
    config = {**with_dropout(config, told["dropout"]), "inference_mode": False}
    made = get_peft_model(model, _peft_config(model, config))
    plan = plan_of(config)
    return made if plan is None else routed(made, plan)


def _modalities(recipe: Any) -> int:
    """How many modalities besides the text the recipe's MokA adapter tells apart; 0 without one."""
    told = recipe.moka
    if recipe.continue_from is not None:
        told = plan_of(load(recipe.continue_from).config)
    return 0 if told is None else max(told.modalities.values())


def _tokens(batch: int, length: int, modalities: int) -> dict[str, Tensor]:
    """Half of every example the modalities, one after the other; then text, of which the second half is the answer.

    They are real numbers: which token is what is decided by looking at them.
    """
    half = length // 2
    of = torch.arange(half) * modalities // max(half, 1) + 1
    ids = torch.cat([of, torch.zeros(length - half, dtype=torch.long)]).expand(batch, length).clone()
    labels = torch.zeros_like(ids)
    labels[:, : length - length // 4] = -100
    return {"modality_ids": ids, "labels": labels, "input_ids": torch.zeros_like(ids)}
