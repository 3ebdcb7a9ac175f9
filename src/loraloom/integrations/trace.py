"""One forward pass on the meta device, watched: its matrix products, who needs their gradients, what is kept for them.

No number is computed. A gradient with respect to an operand costs what the product itself costs, and is asked for where
an adapter that takes part lies above the operand in the graph. So each product is noted with the units that its
operands depend on, and the cost of a step with any set of units switched on follows from one pass.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loraloom.integrations.gates import Gates

NEVER = -1
ADDS = ("addmm", "baddbmm", "addbmm", "addmv")  # their first operand is added, not multiplied


@dataclass(frozen=True)
class Product:
    """Matrix products of one kind.

    Attributes:
        owner: number of the unit that they belong to, or None: they happen whether or not it takes part.
        operands: for every operand the set of units that it depends on, as bits; bit ``len(units)`` stands for weights
            that are always trained. 0: no gradient is ever asked for.
        block: number of the checkpointed block that they are in, or None.
        again: whether they are computed again with their block, which stops after the last tensor that it keeps: always
            (None), never (NEVER), or only if this unit takes part.
    """

    owner: int | None
    operands: tuple[int, ...]
    block: int | None
    again: int | None = None


@dataclass(frozen=True)
class Block:
    """A part of the model that gradient checkpointing computes again; sizes in bytes, for all units switched on."""

    given: int
    saved: int
    weights: int
    units: int


@dataclass(frozen=True)
class Trace:
    """What one forward pass does, on one device.

    Attributes:
        units: names of what is switched, in order.
        flops: floating-point operations of the products, by kind.
        blocks: those that gradient checkpointing would compute again, in the order of execution.
        saved: bytes kept for backward outside of blocks, without those of the logits.
        largest: bytes of the largest tensor with a gradient in a block.
        logits: elements of the logits (0 for a model without a vocabulary head).
        logits_saved: bytes kept for backward that are as wide as the vocabulary.
        base: number of the base model's weights.
        linear: of these, in linear layers other than the vocabulary head: what quantisation makes small.
        trainable: number of trained weights.
        frozen: number of the adapter's weights that are not trained.
        bytes_of: bytes of the base's weights, of the trained ones and of the adapter's frozen ones.
        by_unit: trained weights of each unit.
    """

    units: tuple[str, ...]
    flops: Counter[Product]
    blocks: tuple[Block, ...]
    saved: int
    largest: int
    logits: int
    logits_saved: int
    base: int
    linear: int
    trainable: int
    frozen: int
    bytes_of: tuple[int, int, int]
    by_unit: tuple[int, ...]


def trace(model: nn.Module, inputs: dict[str, Any], *, unit: str = "layer", switched: bool = True) -> Trace:
    """Watch one forward pass of a model on the meta device, all adapters taking part.

    Args:
        model: of Transformers, with or without PEFT layers, in training mode.
        inputs: keyword arguments of its forward.
        unit: what is switched together.
        switched: whether the model has adapters that can be switched.

    Raises:
        ValueError: ``unit`` matches none of the adapters.
    """
    watch = _Watch(model, Gates(model, unit) if switched else None)
    with watch.hooks(), _Flops(watch), _Functions(watch), watch.saving():
        output = model(**inputs)
    return watch.told(output)


class _Watch:
    """What is noted while the model runs."""

    def __init__(self, model: nn.Module, gates: Gates | None) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model, self.gates = model, gates
        self.units = gates.units if gates else ()
        self.always = 1 << len(self.units)
        self.products: list[tuple[Product, int]] = []
        self.running = 0  # operations counted so far
        self.owners: list[int | None] = [None]
        self.inside: list[int] = []
        self.of_block: list[dict[str, int]] = []
        self.kept_since = False  # whether autograd has kept something since the last product
        self.largest = 0
        self.saved: Counter[int | str] = Counter()
        self.held: dict[int, Any] = {}
        self.leaves: dict[Tensor, int] = {weight: self.always for weight in model.parameters() if weight.requires_grad}
        self.by_unit = []
        for at, weights in enumerate(gates.parameters().values() if gates else ()):
            self.leaves |= dict.fromkeys(weights, 1 << at)
            self.by_unit.append(sum(weight.numel() for weight in weights))
        self.own = {weight.untyped_storage()._cdata for weight in (*model.parameters(), *model.buffers())}
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = getattr(text, "vocab_size", None)
        self.checkpointed = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Know at any time which adapter and which block is at work."""
        made: list[Any] = []

        def around(module: nn.Module, before: Any, after: Any) -> None:
            made.append(module.register_forward_pre_hook(before, with_kwargs=True))
            made.append(module.register_forward_hook(after))

        def owner(at: int | None) -> tuple[Any, Any]:
            def leave(*_: Any) -> None:
                self.owners.pop()

            return lambda *_: self.owners.append(at), leave

        for at, names in enumerate(self.gates.modules.values() if self.gates else ()):
            for layer in (layer for name in names for layer in self.gates._layers[name]):  # type: ignore[union-attr]
                around(layer, *owner(at))
                around(layer.base_layer, *owner(None))
        for block in self.checkpointed:
            around(block, self._enter, self._leave)
        try:
            yield
        finally:
            for hook in made:
                hook.remove()

    def _enter(self, block: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        hidden = next(x for x in (*given, *named.values()) if isinstance(x, Tensor) and x.is_floating_point())
        weights = _bytes([*block.parameters()])
        self.inside.append(len(self.of_block))
        size = hidden.numel() * hidden.element_size()
        self.of_block.append({"given": size, "weights": weights, "units": 0})

    def _leave(self, *_: Any) -> None:
        """Mark the products at the end of the block that nothing is kept after."""
        block, at = self.inside.pop(), len(self.products) - 1
        if self.kept_since or at < 0 or self.products[at][0].block != block:
            return
        last = self.products[at][0].owner
        self._mark(at, NEVER)
        while last is not None and at > 0 and self.products[at][0].owner == last:
            at -= 1
        if last is not None and self.products[at][0].block == block:
            self._mark(at, last)

    def _mark(self, at: int, again: int) -> None:
        product, flops = self.products[at]
        self.products[at] = replace(product, again=again), flops

    def note(self, flops: int, operands: tuple[int, ...], made: Any) -> None:
        """A product has happened. Its number is left at the node of the graph by which ``made`` came about."""
        block = self.inside[-1] if self.inside else None
        if getattr(made, "grad_fn", None) is not None:
            made.grad_fn.metadata.setdefault("products", []).append(len(self.products))
        self.products.append((Product(self.owners[-1], operands, block), flops))
        self.kept_since = False
        if block is not None:
            for one in operands:
                self.of_block[block]["units"] |= one

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what autograd keeps, each storage once."""

        def pack(kept: Tensor) -> Tensor:
            storage = kept.untyped_storage()
            key = storage._cdata
            self.kept_since = True
            if key not in self.own and key not in self.held:
                wide = kept.shape[-1:] == (self.vocabulary,)
                where = self.inside[-1] if self.inside else "logits" if wide else "outside"
                size = storage.nbytes()
                self.saved[where] += size

                def freed(_: Any) -> None:  # what came to no use is not kept
                    self.saved[where] -= size
                    del self.held[key]

                self.held[key] = weakref.ref(storage, freed)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            yield

    def told(self, output: Any) -> Trace:
        """Everything, summed up. A product from which no path leads to the result has no backward pass."""
        used = _reached(next(output[name] for name in ("loss", "last_hidden_state", "logits") if name in output))
        flops: Counter[Product] = Counter()
        for at, (product, size) in enumerate(self.products):
            flops[product if at in used else replace(product, operands=())] += size
        blocks = tuple(Block(saved=self.saved[at], **one) for at, one in enumerate(self.of_block))
        logits = getattr(output, "logits", None)
        named = self.model.named_parameters()
        trained: list[Tensor] = []
        frozen: list[Tensor] = []
        base: list[Tensor] = []
        for name, weight in named:
            belongs = trained if weight.requires_grad else frozen if _of_adapter(name) else base
            belongs.append(weight)
        return Trace(
            units=self.units,
            flops=flops,
            blocks=blocks,
            saved=self.saved["outside"],
            largest=self.largest,
            logits=0 if logits is None else logits.numel(),
            logits_saved=self.saved["logits"],
            base=sum(weight.numel() for weight in base),
            linear=_linear(self.model),
            trainable=sum(weight.numel() for weight in trained),
            frozen=sum(weight.numel() for weight in frozen),
            bytes_of=(_bytes(base), _bytes(trained), _bytes(frozen)),
            by_unit=tuple(self.by_unit),
        )


class _Flops(TorchDispatchMode):
    """Adds up operations, by the formulas of ``torch.utils.flop_counter``."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.watch.running += formula(*args, **(kwargs or {}), out_val=made)
        return made


class _Functions(TorchFunctionMode):
    """Hands on which units a tensor depends on, and notes each function that multiplies matrices."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        units = 0
        for one in given:
            units |= self._units(one)
        if func is Tensor.__bool__:  # models ask whether a batch is without padding and without packing: it is
            return True
        if func is F.scaled_dot_product_attention:
            made = self._attention(*args, **kwargs)
        else:
            before = self.watch.running
            made = func(*args, **kwargs)
            if self.watch.running > before:
                factors = given[1:] if getattr(func, "__name__", "") in ADDS else given
                matrices = [one for one in factors if one.ndim > 1] or factors
                self.watch.note(self.watch.running - before, tuple(self._units(one) for one in matrices), made)
        for one in tree_leaves(made) if units else ():
            if isinstance(one, Tensor) and one.requires_grad and not one.is_leaf:
                one._loraloom_units = units  # type: ignore[attr-defined]
                if self.watch.inside:
                    self.watch.largest = max(self.watch.largest, one.numel() * one.element_size())
        return made

    def _units(self, one: Tensor) -> int:
        """Bits of the units that a tensor depends on; all of them where it came about out of our sight."""
        if not one.requires_grad:
            return 0
        if one.is_leaf:
            return self.watch.leaves.get(one, 0)
        return int(getattr(one, "_loraloom_units", 2 * self.watch.always - 1))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Fused attention: two products, of which nothing as large as the scores is kept."""
        scores = query.numel() * key.shape[-2]
        q, k, v = map(self._units, (query, key, value))
        made = _Fused.apply(query, key, value)
        self.watch.note(2 * scores, (q, k), made)
        self.watch.note(2 * scores // query.shape[-1] * value.shape[-1], (q | k, v), made)
        return made


class _Fused(torch.autograd.Function):
    """Keeps what fused attention keeps: queries, keys, values, the result, and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, made, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # a trace never gets here
        raise NotImplementedError("a trace has no backward pass")


def _reached(result: Tensor) -> set[int]:
    """Numbers of the products on the way to a result."""
    found: set[int] = set()
    seen: set[Any] = set()
    left = [result.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.update(dict(node.metadata).get("products", ()))  # type: ignore[call-overload]
            left += [before for before, _ in node.next_functions]
    return found


def _linear(model: nn.Module) -> int:
    found: Any = getattr(model, "get_output_embeddings", None)
    head = found() if found else None
    layers = [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and not _of_adapter(name)]
    return sum(one.weight.numel() for one in layers if one is not head)


def _bytes(weights: list[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _of_adapter(name: str) -> bool:
    return any(part.startswith(("lora_", "hira_")) for part in name.split("."))
