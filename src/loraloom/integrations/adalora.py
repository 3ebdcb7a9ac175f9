"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) under a plan that switches adapters off.

The CoTo paper leaves the pair open. Two things in PEFT's AdaLoRA break when an adapter sits out a step: its penalty on
A and B gives gradients to switched-off adapters too, and its importance averages need a gradient of every parameter.
Here a switched-off adapter gets no gradient from anywhere, and its averages stand still: they are over the steps in
which it took part. With every adapter on, all is as PEFT has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

# Hooks on the parameters of layers that are off.
_muted: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def heed_absence(parts: Iterable[nn.Module]) -> None:
    """Let the rank allocators among the modules of a model pass over parameters that have no gradient.

    Called when gates are made; nothing happens in a model without AdaLoRA.

    Raises:
        ValueError: later, in ``update_and_allocate``: ranks are to be taken away, and an adapter has never taken part.
    """
    for module in parts:
        allocator = vars(module).get("rankallocator")
        if allocator is not None and "update_ipt" not in vars(allocator):
            allocator.update_ipt, allocator.mask_to_budget = _Averages(allocator), _Masking(allocator)


class _Averages:
    """PEFT's update of the importance averages, over the parameters that have a gradient."""

    def __init__(self, allocator: Any) -> None:
        self._update = allocator.update_ipt

    def __call__(self, model: nn.Module) -> None:
        present = [(name, weight) for name, weight in model.named_parameters() if weight.grad is not None]
        self._update(SimpleNamespace(named_parameters=lambda: iter(present)))


class _Masking:
    """PEFT's choice of the ranks that stay, once there is an average for every adapter."""

    def __init__(self, allocator: Any) -> None:
        self._allocator, self._choose = allocator, allocator.mask_to_budget

    def __call__(self, model: nn.Module, budget: int) -> Any:
        end = f".{self._allocator.adapter_name}"
        for name, _ in model.named_parameters():
            if ".lora_E." in name and name.endswith(end) and name not in self._allocator.exp_avg_ipt:
                raise ValueError(
                    f"{name.split('.lora_E.')[0]} has not taken part in any step before AdaLoRA first takes ranks "
                    "away, so their importance is not known; take a larger tinit, or a plan that starts higher (start=)"
                )
        return self._choose(model, budget)


def mute(layer: nn.Module) -> None:
    """Drop what gradients the parameters of an AdaLoRA layer get from now on; other layers get none when off."""
    if hasattr(layer, "ranknum") and layer not in _muted:
        weights = [weight for name, weight in layer.named_parameters() if name.startswith("lora_")]
        hooks = [w.register_post_accumulate_grad_hook(_drop) for w in weights if w.requires_grad]
        _muted[layer] = hooks


def unmute(layer: nn.Module) -> None:
    """Let gradients be again."""
    for hook in _muted.pop(layer, []):
        hook.remove()


def _drop(weight: nn.Parameter) -> None:
    weight.grad = None
