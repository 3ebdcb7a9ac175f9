"""Mean gradients over the processes of DistributedDataParallel, of the parameters that take part in a step alone.

DDP sends every parameter in every step; where some get no gradient it also walks the graph to find them
(``find_unused_parameters``). With CoTo all processes know beforehand which adapters are switched off: their gradients
are neither made, nor sent, nor zero. Measured in benchmarks/ddp.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def taking_part(
    model: nn.Module, by_unit: Mapping[str, Sequence[nn.Parameter]], active: Sequence[bool]
) -> list[nn.Parameter]:
    """The trainable parameters of a model less those that are in switched-off units only.

    Args:
        model: with gates.
        by_unit: parameters of each unit (``Gates.parameters``).
        active: of each unit, in the same order.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> len(taking_part(model, {"a": [model.weight], "b": [model.bias]}, [True, False]))
        1
    """
    on = {weight for weights, some in zip(by_unit.values(), active, strict=True) if some for weight in weights}
    off = {weight for weights in by_unit.values() for weight in weights} - on
    return [weight for weight in model.parameters() if weight.requires_grad and weight not in off]


def reduce_gradients(weights: Iterable[nn.Parameter], group: Any = None) -> None:
    """Replace gradients by their mean over the processes, with one all-reduce for each dtype and device.

    A parameter without a gradient counts as 0 here, as in DDP; one that has none in any process keeps none.

    Args:
        weights: the same parameters in the same order in every process.
        group: of processes; None for all.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> reduce_gradients([weight])  # one process: nothing to do
    """
    if not torch.distributed.is_initialized():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for weight in weights:
        kinds.setdefault((weight.dtype, weight.device), []).append(weight)
    world = torch.distributed.get_world_size(group)
    for some in kinds.values():
        flat = _flat(some)
        torch.distributed.all_reduce(flat, group=group)
        found, made = flat.split([flat.numel() - len(some), len(some)])
        found /= world
        for at, (weight, mean) in enumerate(zip(some, found.split([w.numel() for w in some]), strict=True)):
            if weight.grad is not None:
                weight.grad.copy_(mean.view_as(weight))
            elif made[at]:
                weight.grad = mean.view_as(weight).clone()


def _flat(weights: Sequence[nn.Parameter]) -> torch.Tensor:
    """All gradients in one vector, and behind them for each whether there is one."""
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    made = weights[0].new_tensor([weight.grad is not None for weight in weights])
    return torch.cat([*(grad.reshape(-1) for grad in grads), made])


def is_replicated(model: Any) -> bool:
    """Whether a model is wrapped in DistributedDataParallel."""
    return isinstance(model, DistributedDataParallel)
