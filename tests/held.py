"""What the graph of a forward pass holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def held(model: Any, *inputs: Any, **named: Any) -> int:
    """Bytes that a forward pass keeps for backward beside the weights."""
    seen: dict[int, int] = {}
    weights = {weight.data_ptr() for weight in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        keep = model(*inputs, **named)  # noqa: F841 - the storages stay, so that their addresses tell them apart
    return sum(seen.values())
