"""Merge weights by module, learned by gradient on a few examples (CAT, LoRA Soups)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapter import Adapter, UnsupportedKind
from loraloom.integrations.peft import attached
from loraloom.integrations.scoring import Bench
from loraloom.integrations.statistics import bench_for
from loraloom.layout import PREFIX
from loraloom.ops.checks import check_linear
from loraloom.ops.merge import merge
from loraloom.registry import UnknownName
from loraloom.strategies.units import KINDS, group
from loraloom.tasks import Task
from loraloom.tasks.hub import HubTask

_BATCH = 8


def learn_weights(
    adapters: Sequence[Adapter],
    task: str | HubTask | Task | Bench,
    *,
    model: str | nn.Module = "",
    per: str = "module",
    convex: bool = False,
    steps: int = 100,
    lr: float = 0.02,
    limit: int | None = 64,
    seed: int = 0,
    **options: Any,
) -> dict[str, list[float]]:
    """Weights for ``merge``, learned on a few examples with base and adapters frozen (Prabhakar et al. 2024).

    Each module gets ``sum_t c_t scale_t B_t A_t``, the exact sum of all updates (CAT, the concatenation), with
    coefficients c of its own, from 1/k on; they alone are trained, by Adam on the loss of training. The weights go to
    ``merge(adapters, weights=...)``. LoRA Soups learns one coefficient per module and adapter on a mixture of the
    skills' data; its authors' code has them add up to 1 (``convex``).

    Args:
        adapters: at least one, as ``merge(method="linear")`` takes them.
        task: whose training examples to learn on; or a bench, with its own model and options.
        model: a name or a live model; by default the one that the first adapter names.
        per: ``module``, or ``layer`` or ``projection`` for coefficients that all modules of such a unit share.
        convex: weights from 0 on that add up to 1 (a softmax of what is trained), rather than any numbers.
        steps: of Adam, 8 examples each.
        lr: its learning rate; about what a coefficient moves in a step.
        limit: so many training examples, the first ones.
        seed: of the order of the examples.
        options: those of ``ll.bench``.

    Returns:
        Module path -> one weight per adapter, also for modules that only some adapters have.

    Raises:
        AdapterMismatch, UnsupportedKind: the adapters do not add up exactly (DoRA), or do not fit the model.
        UnknownName: no such unit.
        ValueError: an argument out of range, no model or no examples, or a loss that is not finite.

    Example:
        >>> a, b = ll.load("runs/digits"), ll.load("runs/fashion")                         # doctest: +SKIP
        >>> weights = ll.learn_weights([a, b], "digits", steps=50)                         # doctest: +SKIP
        >>> ll.save(ll.merge([a, b], weights=weights), "runs/soup")                        # doctest: +SKIP
    """
    for what, value in (("steps", steps), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be a finite number above 0, got {lr}")
    if per not in KINDS:
        raise UnknownName("unit", per, list(KINDS))
    if not adapters:
        raise ValueError("there is nothing to merge: at least one adapter is needed")
    for adapter in adapters:
        check_linear(adapter, "learn weights of")
    made = bench_for(adapters[0], task, model, **options)
    examples = made.training[:limit]
    if not examples:
        raise ValueError(f"task {made.task.name}: no training examples to learn on")
    loss = made.loss  # for an encoder it makes the head, of frozen features: before any adapter is on
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    units = group(names, per)
    of_unit = {name: unit for unit, members in units.items() for name in members}
    start = 0.0 if convex else 1 / len(adapters)
    free = {unit: torch.full((len(adapters),), start, requires_grad=True) for unit in units}

    def weights() -> dict[str, Tensor]:
        by_unit = {unit: value.softmax(0) if convex else value for unit, value in free.items()}
        return {name: by_unit[of_unit[name]] for name in names}

    generator, device = torch.Generator().manual_seed(seed), next(made.model.parameters()).device
    with mixed(made.model, adapters) as forward, torch.enable_grad():
        optimizer = torch.optim.Adam(free.values(), lr=lr)
        for step, rows in zip(range(steps), _draws(len(examples), generator), strict=False):
            batch = {key: value.to(device) for key, value in made.collate([examples[row] for row in rows]).items()}
            height = loss_of(forward, weights(), batch, loss)
            if not torch.isfinite(height):
                raise ValueError(
                    f"the loss at step {step} is {float(height.detach())}; weights cannot be learned from it"
                )
            optimizer.zero_grad()
            height.backward()
            optimizer.step()
    return {name: value.detach().tolist() for name, value in weights().items()}


def _draws(count: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of row numbers without end; every row comes up once in each pass."""
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[start : start + _BATCH] for start in range(0, count, _BATCH))


def loss_of(
    forward: Callable[..., Any],
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    loss: Callable[..., Tensor] | None,
) -> Tensor:
    """The loss of a batch under weights: the model's own, or ``loss(outputs, labels)`` where it is given.

    Args:
        forward: of :func:`mixed`.
        weights: module path -> one coefficient per adapter, (k,).
        batch: model inputs and ``labels``.
        loss: that of the bench.

    Source: as ``integrations/fit.py`` has HF Trainer do it.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels") if loss is not None else None
    outputs = forward(weights, **inputs)
    value: Tensor = outputs.loss if loss is None else loss(outputs, labels)
    return value


@contextmanager
def mixed(model: nn.Module, adapters: Sequence[Adapter]) -> Iterator[Callable[..., Any]]:
    """The model with all adapters on it as one, and a forward pass that takes their weights; the base as it was after.

    The sum of all updates is exact: their factors side by side. A weight multiplies the columns of its adapter's B (and
    its bias), so that gradients of the weights are exact too.

    Args:
        model: the base model, without adapters.
        adapters: as ``merge(method="linear")`` takes them.

    Yields:
        ``forward(weights, **inputs)`` with weights by module path, (k,) each; it gives the model's output.

    Raises:
        AdapterMismatch, UnsupportedKind: the adapters do not add up, or do not fit the model.

    Example:
        >>> from loraloom.adapter import Factors
        >>> a = Adapter({"peft_type": "LORA"}, {"0": Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))})
        >>> with mixed(nn.Sequential(nn.Linear(1, 1, bias=False)).requires_grad_(False), [a, a]) as forward:
        ...     on, off = (forward({"0": torch.tensor(w)}, input=torch.ones(1, 1)) for w in ([2.0, 3.0], [0.0, 0.0]))
        >>> (on - off).round()
        tensor([[5.]])
    """
    for adapter in adapters:
        check_linear(adapter, "merge")
    whole = merge(adapters, weights=[1.0] * len(adapters), extras="average")
    with attached(model, whole) as live:
        live.requires_grad_(False)
        parameters = dict(live.named_parameters())
        parts = {name: _columns(name, parameters, adapters, whole) for name in whole.modules}

        def forward(weights: Mapping[str, Tensor], **inputs: Tensor) -> Any:
            scaled = {}
            for name, columns in parts.items():
                for key, (stack, owners) in columns.items():
                    each = weights[name].to(stack)[owners]
                    scaled[key] = stack @ each if key.endswith(".bias") else stack * _beside(each, stack)
            return torch.func.functional_call(live, scaled, kwargs=inputs)

        yield forward


def _columns(
    name: str, parameters: Mapping[str, Tensor], adapters: Sequence[Adapter], whole: Adapter
) -> dict[str, tuple[Tensor, Tensor]]:
    """The live parameters that weights enter, by key, and whose each column is."""
    holders = [at for at, adapter in enumerate(adapters) if name in adapter.modules]
    ranks = [adapters[at].shape(name).rank for at in holders]
    owners = torch.tensor(holders).repeat_interleave(torch.tensor(ranks))
    stem = f"{PREFIX}{name}."
    kinds = ("lora_B.default.weight", "lora_embedding_B.default", "hira_B.default", "hira_embedding_B.default")
    key = next((stem + kind for kind in kinds if stem + kind in parameters), None)
    if key is None or (more := parameters[key].shape[1] - len(owners)) < 0:
        raise UnsupportedKind(f"{name}: its updates do not lie side by side on the model")
    owners = torch.cat([owners, owners.new_zeros(more)])  # HiRA has one rank; columns of nobody are 0
    found = {key: (parameters[key].detach(), owners)}
    bias = f"{stem}lora_B.default.bias"
    if bias in parameters:
        zero, scale = torch.zeros_like(parameters[bias]), whole.modules[name].scale
        each = [adapters[at].modules[name] for at in holders]
        biases = [zero if one.bias is None else (one.scale / scale) * one.bias.to(zero) for one in each]
        found[bias] = torch.stack(biases, dim=1), torch.tensor(holders)
    return found


def _beside(each: Tensor, stack: Tensor) -> Tensor:
    """Coefficients of columns, in the shape in which they multiply B (out x r, or out x r x 1 x 1)."""
    return each.reshape(1, -1, *[1] * (stack.ndim - 2))
