"""A fresh adapter on a live model, for as long as it is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loraloom.adapter import Adapter, UnsupportedKind
from loraloom.integrations.layers import saved_whole
from loraloom.integrations.modality import is_multimodal, targets_in_text
from loraloom.integrations.peft import Snapshot, put_on
from loraloom.modalities import MOKA
from loraloom.strategies.dropout import ProgressiveDropout
from loraloom.strategies.modality import MokA

_SAVED = "adapter.modules_to_save"


@contextmanager
def training(  # noqa: PLR0913 - what a recipe says of an adapter
    model: nn.Module,
    *,
    kind: str = "lora",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
    start: Adapter | None = None,
    moka: MokA | None = None,
    modules_to_save: Sequence[str] = (),
) -> Iterator[Any]:
    """Attach a new adapter and yield the PeftModel; on leaving, the base is bare again, its weights untouched.

    The start of the adapter is a function of ``seed`` alone; the global random stream is left as it was.

    Args:
        model: the frozen base.
        kind: ``lora``, ``rslora``, ``dora`` or ``hira`` (HiRA has no alpha).
        rank: r.
        alpha: the update is scaled by alpha / r, for rsLoRA by alpha / sqrt(r).
        dropout: of the adapters' input.
        target_modules: names, or ``all-linear`` (of a multimodal model those of its language model).
        seed: of the adapter's random start.
        start: an adapter to go on with; it decides kind, rank, alpha and targets.
        moka: the plan, for kind ``moka``.
        modules_to_save: names of modules that are trained whole beside the adapter; those of ``start`` are, too.

    Raises:
        ValueError: no module of the model has such a name, or ``start`` does not fit the model.
    """
    for name in modules_to_save:
        saved_whole(model, name, _SAVED)
    snapshot = Snapshot(model)
    was_training = model.training
    targets = target_modules
    if targets == "all-linear" and is_multimodal(model):  # of the language model, as for MokA
        targets = targets_in_text(model, targets)
    options = {"modules_to_save": list(modules_to_save)} if modules_to_save else {}
    if unread := _unread(model, targets):
        options["exclude_modules"] = unread
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks Transformers by an old name whether gradient checkpointing is on; not our user's concern.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(seed)
        if moka is not None and start is None:
            adapted = moka.wrap(model, targets, **options)
        elif start is None:
            adapted = _fresh(model, kind, rank, alpha, dropout, targets, options)
        else:
            start = saving(model, start, modules_to_save)
            start = replace(start, config=with_dropout(start.config, dropout))
            adapted = put_on(model, start, inference_mode=False)
            adapted.train(was_training)
    try:
        yield adapted
    finally:
        snapshot.restore()


def with_dropout(config: Mapping[str, Any], dropout: float) -> dict[str, Any]:
    """An adapter's configuration with another dropout of its input, wherever its kind tells one.

    Example:
        >>> with_dropout({"peft_type": "LORA", "r": 8}, 0.1)
        {'peft_type': 'LORA', 'r': 8, 'lora_dropout': 0.1}
    """
    kind = str(config.get("peft_type")).upper()
    moka = {"moka": {**config["moka"], "dropout": dropout}} if kind == MOKA else {}
    return {**config, "hira_dropout" if kind == "HIRA" else "lora_dropout": dropout, **moka}


def told_by(recipe: Any) -> dict[str, Any]:
    """What a recipe (``recipe.Recipe``) tells :func:`training`; the dropout is that which its strategy begins with."""
    adapter, strategy = recipe.adapter, recipe.plan()
    if isinstance(strategy, ProgressiveDropout):  # PEFT makes no dropout to set where the probability is 0
        adapter = adapter.model_copy(update={"dropout": strategy.probability(0)})
    return {**adapter.model_dump(), "moka": None if recipe.moka is None else recipe.moka.plan(adapter)}


def saving(model: nn.Module, adapter: Adapter, names: Sequence[str]) -> Adapter:
    """The adapter with further modules of a bare model beside it, as they are there, to be trained whole.

    Raises:
        ValueError: the model has no module of that name, or the adapter is on it.
    """
    saved = list(adapter.config.get("modules_to_save") or ())
    further = [name for name in dict.fromkeys(names) if name not in saved]
    extras: dict[str, torch.Tensor] = {}
    for name in further:
        for path, module in saved_whole(model, name, _SAVED).items():
            if any(one == path or one.startswith((f"{path}.", f"{path}[")) for one in adapter.modules):
                raise ValueError(f"{_SAVED}: the adapter that is continued is on {path}")
            extras |= {f"{path}.{key}": value for key, value in module.state_dict().items()}
    if not further:
        return adapter
    config = {**adapter.config, "modules_to_save": [*saved, *further]}
    return replace(adapter, config=config, extras={**extras, **adapter.extras})


@contextmanager
def whole(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """The model with the named modules' weights trainable and nothing else; afterwards they are what they were.

    Raises:
        ValueError: the model has no module of that name.
    """
    was_training = model.training
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    for name in names:
        found = [module for path, module in model.named_modules() if path == name or path.endswith("." + name)]
        if not found:
            raise ValueError(f"{_SAVED}: the model has no module {name!r}")
        for module in found:
            module.requires_grad_(True)
    before = {parameter: parameter.detach().clone() for parameter in flags if parameter.requires_grad}
    try:
        yield model
    finally:
        model.train(was_training)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)


def _unread(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The targets in a bare encoder's pooler: what it makes of the last hidden state is not scored, so that no
    gradient would come there."""
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    names = [name for name in layers if name.startswith("pooler.")]
    if isinstance(targets, str):
        return [name for name in names if targets == "all-linear" or re.fullmatch(targets, name)]
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


def _fresh(
    model: nn.Module,
    kind: str,
    rank: int,
    alpha: float,
    dropout: float,
    modules: str | Sequence[str],
    options: Mapping[str, Any],
) -> Any:
    """A new adapter on the model."""
    from peft import HiraConfig, LoraConfig, get_peft_model

    if kind == "hira" and getattr(model, "is_quantized", False) and not getattr(model, "is_loaded_in_4bit", False):
        raise UnsupportedKind(
            "adapter.kind hira multiplies the base weights entry by entry, which of the quantised ones those of "
            "bitsandbytes with 4 bits (nf4) allow; here allowed are lora, rslora, dora, moka"
        )
    targets = modules if isinstance(modules, str) else list(modules)
    if kind == "hira":
        config: Any = HiraConfig(r=rank, target_modules=targets, hira_dropout=dropout, **options)
    else:
        config = LoraConfig(
            r=rank,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=targets,
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
            **options,
        )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"adapter.target_modules: {' '.join(str(error).split())}") from None
