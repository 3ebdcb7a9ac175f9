"""What some merges ask to know of an adapter on its task: Gram matrices of inputs (RegMean), Fisher information."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.adapter import Adapter, Factors, UnsupportedKind
from loraloom.integrations.generation import is_free
from loraloom.integrations.peft import attached
from loraloom.integrations.scoring import Bench, bench, trained_with
from loraloom.layout import PREFIX
from loraloom.measured import KINDS, Statistics
from loraloom.ops.checks import check_gauge
from loraloom.registry import UnknownName
from loraloom.tasks import Example, Task
from loraloom.tasks.hub import HubTask

_BATCH = 16


def measure(
    adapter: Adapter,
    task: str | HubTask | Task | Bench,
    *,
    kind: str = "gram",
    model: str | nn.Module = "",
    limit: int | None = 256,
    labels: str = "model",
    space: str = "factors",
    modules: Sequence[str] | None = None,
    **options: Any,
) -> Statistics:
    """Statistics of an adapter on the training examples of its task, with the adapter on the model.

    ``gram``: for each module ``X^T X / rows``, in x in, of the inputs X of the module on batches as in training, one
    row a token or position without padding; so the size of a task does not matter (Jin et al. 2023, arXiv 2212.09849).
    A convolution's rows are its patches. An embedding's inputs are one-hot: only the diagonal is given, the shares of
    the tokens.

    ``fisher``: the diagonal Fisher information ``mean over examples of E_y (d log p(y | x) / d theta)^2`` (Matena and
    Raffel 2022, arXiv 2111.09832), where p is the model's distribution over the choices of an example, as the bench
    scores them. All are divided by their root mean square over the adapter, since Fishers of two tasks have no common
    size (the authors' code divides by the norm). In ``factors`` theta are B and A with sqrt(scale) in each, as that
    space merges them: one vector per module, B's entries and then A's. In ``delta`` it is the weight matrix, out x in.

    Args:
        adapter: what is on the model.
        task: its task; or a bench, with its own model and options.
        kind: ``gram`` or ``fisher``.
        model: a name or a live model; by default the one that the adapter names.
        limit: so many training examples, the first ones.
        labels: of ``fisher``: ``model``, all labels as probable as the model has them (the Fisher information, as in
            the paper; one backward pass a label), or ``given``, the example's own (the "empirical Fisher").
        space: of ``fisher``: ``factors`` or ``delta``.
        modules: module paths; by default the adapter's. More of them for merges with adapters that have others.
        options: those of ``ll.bench``.

    Returns:
        By module path, in main memory: in x in (an embedding: in), a vector of (out + in) r entries, or out x in.

    Raises:
        UnknownName: no such kind, space, choice of labels, or module.
        UnsupportedKind: MokA, or a module whose inputs are no rows (``delta``: convolutions and embeddings).
        ValueError: no model is named, no examples, free answers (``fisher``), or a module outside sees none.

    Example:
        >>> grams = ll.measure(ll.load("runs/digits"), "digits", limit=64)             # doctest: +SKIP
        >>> grams["encoder.layer.0.attention.attention.query"].shape                   # doctest: +SKIP
        torch.Size([384, 384])
    """
    for what, value, known in (("kind", kind, KINDS), ("labels", labels, ("model", "given"))):
        if value not in known:
            raise UnknownName(what, value, list(known))
    if space not in ("factors", "delta"):
        raise UnknownName("space", space, ["factors", "delta"])
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    check_gauge(adapter, "measure")
    made = bench_for(adapter, task, model, **options)
    examples = made.training[:limit]
    if not examples:
        raise ValueError(f"task {made.task.name}: no training examples to measure on")
    if kind == "fisher" and is_free(made.task, examples[0]):
        raise ValueError(f"task {made.task.name}: Fisher information needs choices; its answers are free texts")
    names = list(adapter.modules) if modules is None else list(modules)
    if not made.continues:
        _ = made.head  # made while the base is bare: it is of frozen features
    about = {"task": made.task.name, "model": made.name, "examples": str(len(examples))}
    if kind == "gram":
        return Statistics(kind, _grams(made, adapter, names, examples), about)
    found = _fishers(made, adapter, names, examples, labels, space)
    return Statistics(kind, found, {**about, "labels": labels, "space": space})


def bench_for(
    adapter: Adapter, task: str | HubTask | Task | Bench, model: str | nn.Module = "", **options: Any
) -> Bench:
    """A bench for an adapter: its own model, image size and text length, where the caller gives no other.

    Raises:
        ValueError: nobody names a model, or a bench is given together with a model or options.

    Example:
        >>> bench_for(ll.load("runs/digits"), "digits").image_size    # doctest: +SKIP
        98
    """
    if isinstance(task, Bench):
        if options or not isinstance(model, str) or model:
            raise ValueError("a bench has its own model and options; give none with it")
        return task
    name = adapter.base if isinstance(model, str) and not model else model
    if isinstance(name, str) and not name:
        raise ValueError("no base model is named; say which with --model")
    kept = {key: value for key, value in trained_with(adapter).items() if key in ("image_size", "max_length")}
    return bench(name, task, **{**kept, **options})


# --- Gram matrices ----------------------------------------------------------------------------------------------------
class _Sums:
    """Sums of x^T x by module, over all rows that the modules have seen."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.mask: Tensor | None = None  # of the batch that is on its way: 1 where there is no padding

    def see(self, name: str, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        """A forward pre-hook: adds the rows of one call."""
        x = arguments[0] if arguments else next(iter(named.values()))
        layer = getattr(module, "base_layer", module)
        places = x.shape if isinstance(layer, nn.Embedding) else x.shape[:-1]
        if self.mask is not None and places in (self.mask.shape, (self.mask.numel(),)):  # a shared expert's are flat
            x = x[self.mask.bool().reshape(places)]
        if isinstance(layer, nn.Embedding):
            added, count = torch.bincount(x.flatten(), minlength=layer.num_embeddings).float(), x.numel()
        else:
            rows = _rows(x, layer)
            rows = _wide(rows)
            added, count = rows.T @ rows, len(rows)
        self.sums[name] = self.sums[name].add_(added) if name in self.sums else added
        self.rows[name] = self.rows.get(name, 0) + count


def _rows(x: Tensor, layer: nn.Module) -> Tensor:
    """The inputs of a linear layer, or the patches that a convolution multiplies, one a row."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.flatten(0, -2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(sizes, start=2):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    spatial = len(layer.kernel_size)  # n x channels x positions x kernel
    return x.movedim(1, 1 + spatial).flatten(1 + spatial).flatten(0, spatial)


def _grams(made: Bench, adapter: Adapter, names: Sequence[str], examples: Sequence[Example]) -> dict[str, Tensor]:
    seen = _Sums()
    with attached(made.model, adapter) as model, torch.no_grad():  # it takes the hooks away too
        for name, module in _found(model, names).items():
            module.register_forward_pre_hook(partial(seen.see, name), with_kwargs=True)
        for start in range(0, len(examples), _BATCH):
            batch = _batch(made, examples[start : start + _BATCH], model)
            seen.mask = batch.get("attention_mask")
            model(**batch)
    found = {}
    for name in names:
        width = adapter.shape(name).in_ if name in adapter.modules else None
        if name in seen.sums:
            found[name] = (seen.sums[name] / seen.rows[name]).cpu()
        elif width is None:
            raise ValueError(f"{name}: task {made.task.name} does not reach this module, which the adapter has not")
        else:  # not reached by this task, which then says nothing of it
            found[name] = torch.zeros(width) if adapter.modules[name].embedding else torch.zeros(width, width)
    return found


# --- Fisher information -----------------------------------------------------------------------------------------------
def _fishers(
    made: Bench, adapter: Adapter, names: Sequence[str], examples: Sequence[Example], labels: str, space: str
) -> dict[str, Tensor]:
    balanced = replace(adapter, modules={name: _balanced(adapter.modules[name]) for name in adapter.modules})
    sums: dict[str, Tensor] = {}
    with attached(made.model, balanced) as model, torch.enable_grad():
        model.requires_grad_(False)
        gradients = (_of_factors if space == "factors" else _of_weights)(model, adapter, names)
        for example in examples:
            log_p = _log_likelihoods(made, model, example)
            chosen = range(len(log_p)) if labels == "model" else [example.label]
            for at, choice in enumerate(chosen):
                share = float(log_p[choice].detach().exp()) if labels == "model" else 1.0
                for name, gradient in gradients(log_p[choice], at + 1 < len(chosen)):
                    squared = gradient.square().mul_(share)
                    sums[name] = sums[name].add_(squared) if name in sums else squared
    sums = {name: tensor.cpu() for name, tensor in sums.items()}  # Apple's have no float64
    entries = sum(tensor.numel() for tensor in sums.values())
    size = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in sums.values()) / entries)
    return {name: sums[name] / size if size > 0 else sums[name] for name in names}


def _balanced(factors: Factors) -> Factors:
    """The same update with sqrt(scale) in B and A each: what the space ``factors`` stacks."""
    root = math.sqrt(abs(factors.scale))
    working = torch.promote_types(factors.dtype, torch.float32)
    b, a = factors.B.to(working) * math.copysign(root, factors.scale), factors.A.to(working) * root
    bias = None if factors.bias is None else factors.bias * factors.scale
    return replace(factors, B=b, A=a, bias=bias, scale=1.0)


def _log_likelihoods(made: Bench, model: nn.Module, example: Example) -> Tensor:
    """log p of every choice of one example: by what the bench chooses, (choices,)."""
    if not made.continues:
        batch = _batch(made, [example], model)
        features = made.head.features(model(**batch).last_hidden_state, batch.get("attention_mask"))
        return made.head.logits(features)[0].log_softmax(-1)
    rows = made.collate([replace(example, label=choice) for choice in range(len(example.choices))])
    batch = {key: value.to(_device(model)) for key, value in rows.items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    token = -F.cross_entropy(_wide(logits).mT, labels, reduction="none")
    return (token.sum(1) / (labels >= 0).sum(1)).log_softmax(-1)


Gradients = Callable[[Tensor, bool], Iterator[tuple[str, Tensor]]]


def _of_factors(model: nn.Module, adapter: Adapter, names: Sequence[str]) -> Gradients:
    """Gradients with respect to B and A, one vector per module."""
    for name in names:
        if name not in adapter.modules:
            raise UnknownName("module", name, list(adapter.modules))
    live = dict(model.named_parameters())
    kinds = [("lora_", ".weight"), ("lora_embedding_", ""), ("hira_", ""), ("hira_embedding_", "")]
    pairs = {}
    for name in names:
        keys = [[f"{PREFIX}{name}.{kind}{part}.default{end}" for part in "BA"] for kind, end in kinds]
        pairs[name] = next([live[b].requires_grad_(), live[a].requires_grad_()] for b, a in keys if b in live)

    def of(log_p: Tensor, again: bool) -> Iterator[tuple[str, Tensor]]:
        flat = [parameter for pair in pairs.values() for parameter in pair]
        found = iter(torch.autograd.grad(log_p, flat, retain_graph=again, materialize_grads=True))
        for name in pairs:
            yield name, torch.cat([next(found).flatten(), next(found).flatten()])

    return of


def _of_weights(model: nn.Module, adapter: Adapter, names: Sequence[str]) -> Gradients:
    """Gradients with respect to the whole weight matrices, from the inputs and outputs of the modules."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def keep(name: str, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        if arguments[0].shape[:-1] != output.shape[:-1]:
            layer = type(getattr(module, "base_layer", module)).__name__
            raise UnsupportedKind(f"{name}: no Fisher information of a whole {layer} weight here; use space='factors'")
        if not output.requires_grad:
            output.requires_grad_()
        calls[name].append((arguments[0].detach().flatten(0, -2), output))
        return output

    def of(log_p: Tensor, again: bool) -> Iterator[tuple[str, Tensor]]:
        outputs = [output for made in calls.values() for _, output in made]
        found = iter(torch.autograd.grad(log_p, outputs, retain_graph=again, materialize_grads=True))
        for name, made in calls.items():
            if not made:
                raise ValueError(f"{name}: the task does not reach this module")
            yield name, torch.stack([_wide(next(found)).flatten(0, -2).T @ _wide(x) for x, _ in made]).sum(dim=0)
            if not again:
                made.clear()

    for name, module in _found(model, names).items():
        module.register_forward_hook(partial(keep, name))
    return of


# --- the model --------------------------------------------------------------------------------------------------------
def _found(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    live = dict(base.named_modules())
    for name in names:
        if name not in live:
            raise UnknownName("module", name, [path for path in live if path])
    return {name: live[name] for name in names}


def _wide(tensor: Tensor) -> Tensor:
    """In at least 32 bits: squares of small gradients vanish in 16, and sums of many stand still."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batch(made: Bench, examples: Sequence[Example], model: nn.Module) -> dict[str, Tensor]:
    batch = made.collate(examples)
    return {key: value.to(_device(model)) for key, value in batch.items() if key != "labels"}
