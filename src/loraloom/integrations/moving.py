"""Checkpoints that move between kinds of run: one process or DDP on one side, FSDP2 on the other.

Both kinds write the adapter as PEFT does, so that its weights are read from there before anything is divided. The
optimizer's state goes by the names of the parameters: FSDP2 writes it so, gathered; elsewhere it is numbered in the
order in which HF Trainer lists the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import Trainer

from loraloom.integrations.sparse import sparse_parameters

_PLAIN, _FSDP, _DEEPSPEED = "DDP or one process", "FSDP", "DeepSpeed"
_OPTIMIZER, _NAMED, _SCHEDULER = "optimizer.pt", "optimizer.bin", "scheduler.pt"


def check_kinds(trainer: Trainer, start: Path | None) -> None:
    """Refuse what cannot be done with a model in parts; let a Trainer go on from a checkpoint of another kind of run.

    Raises:
        ValueError: a model is trained in place, or the checkpoint is of a kind of run that does not move.
    """
    now = _FSDP if trainer.is_fsdp_enabled else _DEEPSPEED if trainer.is_deepspeed_enabled else _PLAIN
    if now != _PLAIN and not isinstance(trainer.model, PeftModel):
        raise ValueError(f"weights of a model without adapters are not trained under {now}; allowed: DDP, one process")
    model: Any = trainer.model
    if (
        now == _DEEPSPEED
        and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
        and any(sparse_parameters(model))
    ):
        raise ValueError("LoRI with a mask is not trained under ZeRO 3; allowed: ZeRO 2, FSDP2, DDP, one process")
    if start is None:
        return
    parts = len(list(start.glob("global_step*/*_optim_states.pt")))
    then = _DEEPSPEED if parts else _FSDP if any(start.glob("pytorch_model_fsdp*")) else _PLAIN
    if then != now and _DEEPSPEED in (then, now):
        raise ValueError(f"{start} was written under {then}, this run is of {now}: resume it as it was begun")
    if parts not in (0, trainer.args.world_size):
        raise ValueError(
            f"{start} holds the parts of {parts} DeepSpeed processes, these are {trainer.args.world_size}: "
            f"resume it with {parts}"
        )
    if then != now:
        _move(trainer, start, then)


def _move(trainer: Trainer, start: Path, then: str) -> None:
    """Put the adapter's weights in, and read the optimizer's state of another kind of run when it is asked for."""
    if then == _FSDP and not (start / _NAMED).is_file():
        raise ValueError(f"{start} is in parts (SHARDED_STATE_DICT), which only FSDP reads; resume it as it was begun")
    model: Any = trainer.model
    held = load_peft_weights(str(start), device="cpu")
    set_peft_model_state_dict(model, held, adapter_name=model.active_adapters[0])
    groups = _names(trainer)  # before the model is divided

    def optimizer_and_scheduler(checkpoint: str) -> None:
        optimizer: Any = trainer.optimizer
        scheduler: Any = trainer.lr_scheduler
        if then == _FSDP:
            state = torch.load(start / _NAMED, map_location="cpu", weights_only=True)
            optimizer.load_state_dict(numbered(state, groups, start))
        else:
            state = torch.load(start / _OPTIMIZER, map_location="cpu", weights_only=True)
            _put_in_parts(trainer, named(state, groups, start))
        scheduler.load_state_dict(torch.load(start / _SCHEDULER, weights_only=True))

    instead: dict[str, Any] = {"_load_from_checkpoint": lambda *_, **__: None}
    vars(trainer).update(instead | {"_load_optimizer_and_scheduler": optimizer_and_scheduler})


def _names(trainer: Trainer) -> list[list[str]]:
    """The trained parameters in the groups and the order in which HF Trainer gives them to the optimizer."""
    model: Any = trainer.model
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return [[name for name in trained if name in decayed], [name for name in trained if name not in decayed]]


def _put_in_parts(trainer: Trainer, state: dict[str, Any]) -> None:
    """Give each process of FSDP2 its part of an optimizer's state by name, which all of them hold."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    several = trainer.accelerator.num_processes > 1
    options = StateDictOptions(full_state_dict=True, cpu_offload=several, broadcast_from_rank0=several)
    mine = state if trainer.accelerator.is_main_process else {}
    model: Any = trainer.model
    optimizer: Any = trainer.optimizer
    set_optimizer_state_dict(model, optimizer, mine, options=options)


def named(state: dict[str, Any], groups: Sequence[Sequence[str]], where: object = "the optimizer") -> dict[str, Any]:
    """An optimizer's state by numbers as one by names.

    Args:
        state: of ``Optimizer.state_dict``.
        groups: names of the parameters of each group, in order.
        where: what messages call it.

    Raises:
        ValueError: the groups have other sizes.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> state = torch.optim.SGD([weight], lr=0.5).state_dict()
        >>> by_name = named(state, [["a.weight"]])
        >>> by_name["param_groups"][0]["params"], numbered(by_name, [["a.weight"]]) == state
        (['a.weight'], True)
    """
    if [len(group["params"]) for group in state["param_groups"]] != [len(names) for names in groups]:
        raise ValueError(f"{where}: its optimizer is of other parameters than the model's")
    of: dict[int, str] = {}
    for group, names in zip(state["param_groups"], groups, strict=True):
        of |= dict(zip(group["params"], names, strict=True))
    told = [{**group, "params": list(names)} for group, names in zip(state["param_groups"], groups, strict=True)]
    return {"state": {of[at]: held for at, held in state["state"].items()}, "param_groups": told}


def numbered(state: dict[str, Any], groups: Sequence[Sequence[str]], where: object = "the optimizer") -> dict[str, Any]:
    """The other way round; see :func:`named`."""
    if [sorted(group["params"]) for group in state["param_groups"]] != [sorted(names) for names in groups]:
        raise ValueError(f"{where}: its optimizer is of other parameters than the model's")
    at = {name: number for number, name in enumerate(name for names in groups for name in names)}
    told = [
        {**group, "params": [at[name] for name in names]}
        for group, names in zip(state["param_groups"], groups, strict=True)
    ]
    return {"state": {at[name]: held for name, held in state["state"].items()}, "param_groups": told}
