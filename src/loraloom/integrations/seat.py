"""A seat: where adapters take turns on a base model; those of one shape swap weights and nothing is built again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraloom.adapter import Adapter
from loraloom.integrations.peft import Snapshot, bare, prepared, put_on

_KEPT = 4  # shapes of adapters that stay built: those of a path's ends, of its inside, and two to spare


@dataclass(frozen=True, eq=False)
class _Built:
    """An adapter's layers around a model, to be put back on.

    Attributes:
        model: the ``PeftModel``.
        before: the bare model that the layers were built around.
        state: the model with the layers on.
        weights: the adapter's own tensors by their names in a file; they share memory with the parameters.
    """

    model: nn.Module
    before: Snapshot
    state: Snapshot
    weights: Mapping[str, Tensor]


class Seat:
    """Adapters in turn on one base model, each for a while: :func:`loraloom.integrations.peft.attached`, but faster.

    The layers of an adapter stay built when it is taken off. An adapter of the same configuration with tensors of the
    same names, sizes and types is put on by copying its weights into them: the same layers with the same numbers, so
    the outputs are the same bits. All else is attached afresh: other ranks, targets or kinds, adapters with whole
    saved modules or biases, MokA, and any adapter after the base model was changed. In between the base model is bare.

    Attributes:
        injections: how often layers were built.
        swaps: how often weights were copied instead.

    Example:
        >>> from loraloom.adapter import Factors
        >>> base = nn.Sequential(nn.Linear(2, 3, bias=False))
        >>> seat, x = Seat(base), torch.ones(1, 2)
        >>> for size in (1.0, 2.0):
        ...     one = Factors(B=torch.full((3, 1), size), A=torch.ones(1, 2))
        ...     with seat.attached(Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, {"0": one})) as live:
        ...         (live(x) - base[0].base_layer(x)).detach().round()
        tensor([[2., 2., 2.]])
        tensor([[4., 4., 4.]])
        >>> seat.injections, seat.swaps
        (1, 1)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.injections = self.swaps = 0
        self._built: dict[str, _Built] = {}

    @contextmanager
    def attached(self, adapter: Adapter | None) -> Iterator[nn.Module]:
        """The model with the adapter on it, in evaluation mode; on exit the base model is what it was, bit for bit.

        Args:
            adapter: what to attach; None yields the model itself, unchanged.

        Raises:
            AdapterMismatch: a module is missing in the model or has another size; names the first one.
            ValueError: the model has adapters already.
        """
        if adapter is None:
            yield self.model
            return
        before = bare(self.model)
        try:
            yield self._on(adapter, before)
        finally:
            before.restore()

    def _on(self, adapter: Adapter, before: Snapshot) -> nn.Module:
        ready = prepared(adapter)
        shapes = {name: (str(tensor.dtype), *tensor.shape) for name, tensor in ready.tensors.items()}
        orders = [
            [*(ready.config.get(name) or ())] for name in ("rank_pattern", "alpha_pattern")
        ]  # the first match wins
        key = json.dumps([ready.config, orders, shapes], sort_keys=True, default=str)
        built = self._built.pop(key, None)
        if built is not None and before.same(built.before):
            built.state.restore()
            for name, tensor in ready.tensors.items():
                built.weights[name].copy_(tensor)
            self.swaps += 1
            self._built[key] = built  # now the last used
            return built.model
        live = put_on(self.model, ready)
        self.injections += 1
        weights = _weights(live)
        if _swappable(ready.tensors, weights) and not adapter.extras and adapter.kind != "moka":
            self._built[key] = _Built(live, before, Snapshot(live), weights)
            while len(self._built) > _KEPT:
                self._built.pop(next(iter(self._built)))
        return live


def _weights(live: nn.Module) -> Mapping[str, Tensor]:
    """The adapter's tensors by their names in a file, in the memory of the live parameters."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT announces that it saves targeted embeddings, and that it is offline
        held: dict[str, Tensor] = get_peft_model_state_dict(live)
    own = {parameter.data_ptr() for parameter in live.parameters()}
    return {name: tensor.detach() for name, tensor in held.items() if tensor.data_ptr() in own}


def _swappable(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether every tensor has its place and every place its tensor."""
    return set(tensors) == set(weights) and all(tensors[name].shape == weights[name].shape for name in tensors)
