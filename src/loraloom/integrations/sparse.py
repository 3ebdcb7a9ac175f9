"""LoRI on live PEFT models: A is frozen, B is a short vector of kept entries that is scattered when it is needed.

A sparse B is the layer's own B (a linear layer, a convolution, or an entry of an embedding's ParameterDict) under a
subclass: its parameter is ``kept``, 1-D; ``weight`` is computed; its state dict has the dense ``weight`` that PEFT
expects, both ways. So saving, merging, resuming and loading are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loraloom.adapter import Adapter, UnsupportedKind
from loraloom.experts import as_stored
from loraloom.integrations.layers import inner_model, own_path, parts_of  # the same reading of paths as for gates
from loraloom.integrations.processes import fill, whole
from loraloom.layout import PREFIX
from loraloom.masks import renamed

if TYPE_CHECKING:
    from loraloom.strategies.sparse import LoRI

_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of PEFT's, those that leave the base as it was and train B


class _Scatter(torch.autograd.Function):
    """Kept entries into a dense matrix; backward takes them out of its gradient, which nothing holds on to."""

    @staticmethod
    def forward(kept: Tensor, index: Tensor, rest: Tensor | None, shape: torch.Size) -> Tensor:
        dense = kept.new_zeros(shape) if rest is None else rest.to(kept.dtype, copy=True)
        dense.view(-1)[index] = kept
        return dense

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (index,) = ctx.saved_tensors
        return grad.reshape(-1)[index], None, None, None


class _Sparse:
    """Kept entries of one weight, held by a module under the parameter ``kept`` (or another name)."""

    _form: dict[str, torch.Size]  # by parameter: the dense shape

    def _thin(self: Any, name: str, dense: Tensor, index: Tensor, kept: str) -> None:
        """Replace the dense parameter ``name`` by the entries at ``index``."""
        learns = self._parameters.pop(name).requires_grad
        if "_form" not in vars(self):
            self._form = {}
        self._form[kept] = dense.shape
        held = dense.reshape(-1)[index]
        rest = dense.clone()
        rest.view(-1)[index] = 0
        self.register_parameter(kept, nn.Parameter(held, learns))
        self.register_buffer(f"{kept}_index", index, persistent=False)
        self.register_buffer(f"{kept}_rest", rest if rest.any() else None, persistent=False)

    def _dense(self: Any, kept: str) -> Tensor:
        """The dense weight, differentiable in the kept entries (all of them: those of other processes are fetched)."""
        index, rest = self._buffers[f"{kept}_index"], self._buffers[f"{kept}_rest"]
        return _Scatter.apply(whole(self._parameters[kept]), index, rest, self._form[kept])

    def _thicken(self: Any, name: str, kept: str) -> None:
        """The dense parameter again; the class is that of PEFT when nothing sparse is left."""
        dense = self._dense(kept).detach()
        del self._parameters[kept]
        self._forget(kept)
        self.register_parameter(name, nn.Parameter(dense))

    def _forget(self: Any, kept: str) -> None:
        """What is held beside a parameter that is no longer sparse."""
        del self._buffers[f"{kept}_index"], self._buffers[f"{kept}_rest"], self._form[kept]
        self._non_persistent_buffers_set -= {f"{kept}_index", f"{kept}_rest"}
        if not self._form:
            del self._form
            self.__class__ = type(self).__bases__[1]

    def _put(self: Any, destination: dict[str, Any], key: str, kept: str, keep_vars: bool) -> None:
        """The dense weight in a state dict."""
        dense = self._dense(kept)
        destination[key] = dense if keep_vars else dense.detach()

    def _take(self: Any, dense: Tensor, key: str, kept: str, errors: list[str]) -> None:
        """Kept entries out of a dense weight, which must be ours outside of them."""
        index, rest = self._buffers[f"{kept}_index"], self._buffers[f"{kept}_rest"]
        if dense.shape != self._form[kept]:
            errors.append(f"size mismatch for {key}: {tuple(dense.shape)}, the model has {tuple(self._form[kept])}")
            return
        with torch.no_grad():
            parameter = self._parameters[kept]
            values = whole(dense).to(parameter.device, parameter.dtype)
            outside = values.reshape(-1).clone()
            outside[index] = 0
            if not torch.equal(outside, torch.zeros_like(outside) if rest is None else rest.reshape(-1).to(outside)):
                errors.append(f"{key} has other values than this model where its LoRI mask does not train")
                return
            fill(parameter, values.reshape(-1)[index])


class _SparseWeight(_Sparse):
    """A module whose ``weight`` is sparse."""

    @property
    def weight(self) -> Tensor:
        """Dense, made anew each time."""
        return self._dense("kept")

    def _save_to_state_dict(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        del destination[prefix + "kept"]
        self._put(destination, prefix + "weight", "kept", keep_vars)

    def _load_from_state_dict(
        self: Any, state: dict, prefix: str, local: Any, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        key = prefix + "weight"
        dense = state.pop(key, None)
        super()._load_from_state_dict(state, prefix, local, strict, missing, unexpected, errors)  # type: ignore[misc]
        _settle(missing, prefix + "kept", key, dense is None)
        if dense is not None:
            state[key] = dense
            self._take(dense, key, "kept", errors)
            if key in unexpected:
                unexpected.remove(key)


class SparseLinear(_SparseWeight, nn.Linear):  # type: ignore[override]
    """A linear layer with a sparse weight."""


class SparseConv1d(_SparseWeight, nn.Conv1d):  # type: ignore[override]
    """A convolution with a sparse weight."""


class SparseConv2d(_SparseWeight, nn.Conv2d):  # type: ignore[override]
    """A convolution with a sparse weight."""


class SparseConv3d(_SparseWeight, nn.Conv3d):  # type: ignore[override]
    """A convolution with a sparse weight."""


class SparseDict(_Sparse, nn.ParameterDict):
    """The B factors of an embedding's adapters; reading a sparse one, a 1-D parameter, gives the matrix."""

    def __getitem__(self, key: str) -> Any:
        """The parameter, or the dense matrix of a sparse one."""
        return self._dense(key) if key in vars(self).get("_form", {}) else super().__getitem__(key)

    def __setitem__(self, key: str, parameter: Any) -> None:
        """Put a whole parameter in."""
        super().__setitem__(key, parameter)
        if key in self._form:
            self._forget(key)

    def __delitem__(self, key: str) -> None:
        """Take a parameter out, and what makes it sparse."""
        super().__delitem__(key)
        if key in self._form:
            self._forget(key)

    def items(self) -> Iterable[tuple[str, Any]]:
        """The parameters as they are."""
        return [(key, self._parameters[key]) for key in self.keys()]

    def values(self) -> Iterable[Any]:
        """The parameters as they are."""
        return [self._parameters[key] for key in self.keys()]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for kept in self._form:
            self._put(destination, prefix + kept, kept, keep_vars)

    def _load_from_state_dict(
        self, state: dict, prefix: str, local: Any, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        there = {kept: state.pop(prefix + kept, None) for kept in self._form}
        super()._load_from_state_dict(state, prefix, local, strict, missing, unexpected, errors)
        for kept, dense in there.items():
            _settle(missing, prefix + kept, prefix + kept, dense is None)
            if dense is not None:
                state[prefix + kept] = dense
                self._take(dense, prefix + kept, kept, errors)


_SPARSE = {kind.__bases__[1]: kind for kind in (SparseLinear, SparseConv1d, SparseConv2d, SparseConv3d, SparseDict)}
_SPARSE[SparseDict] = SparseDict  # of several adapters


def _settle(missing: list[str], ours: str, theirs: str, lacking: bool) -> None:
    """Report a missing weight under the name that it has in a state dict, and only if it is missing."""
    if ours in missing:
        missing.remove(ours)
    if lacking and theirs not in missing:
        missing.append(theirs)


def attach(lori: LoRI, peft_model: nn.Module, adapter_name: str = "default") -> None:
    """Carry out a plan on a live model (see :class:`loraloom.LoRI`).

    Raises:
        ValueError: there is no such adapter, it is no LoRA, it is attached already, or a mask or an A does not fit.
        UnsupportedKind: its start has changed the base weights, or freezes B.
    """
    layers = _layers(peft_model, adapter_name)
    configs = [vars(part).get("peft_config") for part in parts_of(peft_model)]  # whatever is around them
    config = next((held[adapter_name] for held in configs if isinstance(held, dict) and adapter_name in held), None)
    start = getattr(config, "init_lora_weights", True)
    if start not in _STARTS:
        raise UnsupportedKind(
            f"init_lora_weights={start!r} changes the base weights or freezes B; LoRI draws A itself: use True"
        )
    if getattr(config, "kasa_config", None) is not None:
        raise UnsupportedKind("kasa_config changes the base weights; leave it out")
    mask = lori.mask and renamed(lori.mask, own_path)
    lori = replace(lori, mask=mask, protect=tuple(renamed(held, own_path) for held in lori.protect))
    allowed = {}
    for name, layer in layers.items():
        _, b = _factors(layer, adapter_name)
        if isinstance(b, _Sparse) and (not isinstance(b, SparseDict) or adapter_name in b._form):
            raise ValueError(f"{name}: LoRI is attached already; detach it first")
        allowed[name] = lori.allowed(name, (_weight(b, adapter_name).shape[0], _weight(b, adapter_name).shape[1]))
        if allowed[name] is not None and type(b) not in _SPARSE:
            raise UnsupportedKind(f"{name}: LoRI does not know how to make a {type(b).__name__} sparse")
    unknown = sorted(set(mask or ()) - set(layers))
    if unknown:
        raise ValueError(f"the mask has a module {unknown[0]} that the model does not adapt")
    stored = _stored(lori, layers, adapter_name)  # the last that may be refused: from here on the model changes
    for name, layer in layers.items():
        _start(lori, name, layer, adapter_name, stored)
        _freeze(layer, adapter_name)
        kept = allowed[name]
        if kept is not None:
            _make_sparse(layer, adapter_name, kept.flatten().nonzero()[:, 0].to(torch.int32))


def detach(peft_model: nn.Module, adapter_name: str = "default") -> None:
    """The adapter as an ordinary LoRA again; A and B both require gradients."""
    for layer in _layers(peft_model, adapter_name).values():
        a, b = _factors(layer, adapter_name)
        if isinstance(b, SparseDict) and adapter_name in b._form:
            b._thicken(adapter_name, adapter_name)
        elif isinstance(b, _SparseWeight):
            b._thicken("weight", "kept")
        _declare(layer, adapter_name, {*layer.frozen_peft_weight_names[adapter_name]} - {_a_of(layer, adapter_name)})
        for held in (a, _factors(layer, adapter_name)[1]):
            _weight(held, adapter_name).requires_grad_(True)


def gradient_scores(
    peft_model: nn.Module, batches: Iterable[Mapping[str, Any]], *, loss: Any = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Gradient of the loss in each B, added up over batches: a score for ``calibrate`` that needs no training.

    At the start, where B is 0, one step of gradient descent makes B proportional to it. The model is left as it was.

    Args:
        peft_model: a LoRA, with LoRI-D attached or not.
        batches: keyword arguments of forward, with ``labels``.
        loss: ``loss(outputs, labels)``; None takes the model's own.
        adapter_name: whose B.

    Raises:
        ValueError: no batch, or B does not require gradients.

    Example:
        >>> mask = calibrate(gradient_scores(peft_model, batches), density=0.1)   # doctest: +SKIP
    """
    weights = {
        name: _weight(_factors(layer, adapter_name)[1], adapter_name)
        for name, layer in _layers(peft_model, adapter_name).items()
    }
    for name, weight in weights.items():
        if not weight.is_leaf or not weight.requires_grad:
            raise ValueError(f"{name}: B is sparse or frozen; gradient scores need all of it (LoRI without a mask)")
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    seen, device = 0, next(peft_model.parameters()).device
    for batch in batches:
        given = send_to_device(dict(batch), device)
        labels = given.pop("labels") if loss is not None else None
        outputs = peft_model(**given)
        value = outputs.loss if loss is None else loss(outputs, labels)
        for name, grad in zip(
            total, torch.autograd.grad(value, list(weights.values()), materialize_grads=True), strict=True
        ):
            total[name] += grad
        seen += 1
    if seen == 0:
        raise ValueError("no batch to take gradients of")
    return {name: held.reshape(len(held), -1) for name, held in total.items()}


def _layers(peft_model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers of an adapter by module path in the base model, whatever is around that."""
    found: dict[str, LoraLayer] = {}
    for path, module in inner_model(peft_model, parts_of(peft_model)).named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer):
            raise ValueError(
                f"{path}: LoRI is for LoRA layers, this is one of {type(module).__module__.split('.')[-2]}"
            )
        if adapter_name in (*module.lora_A.keys(), *module.lora_embedding_A.keys()):
            found[own_path(path.removeprefix(PREFIX))] = module
    if not found:
        raise ValueError(f"the model has no LoRA adapter named {adapter_name!r}")
    return found


def _a_of(layer: Any, adapter_name: str) -> str:
    return "lora_A" if adapter_name in layer.lora_A else "lora_embedding_A"


def _factors(layer: Any, adapter_name: str) -> tuple[Any, Any]:
    """The modules that hold A and B: layers of their own, or the ParameterDicts of an embedding."""
    if adapter_name in layer.lora_A:
        return layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    return layer.lora_embedding_A, layer.lora_embedding_B


def _weight(held: Any, adapter_name: str) -> Tensor:
    return held[adapter_name] if isinstance(held, nn.ParameterDict) else held.weight


def _stored(lori: LoRI, layers: Mapping[str, Any], adapter_name: str) -> dict[str, Tensor]:
    """The A factors of the adapter that is the plan's start, by module; they have the sizes of the model's."""
    if not isinstance(lori.start, Adapter):
        return {}
    held = as_stored(lori.start).modules
    names = {own_path(name): name for name in held}
    for name, layer in layers.items():
        if name not in names:
            raise ValueError(f"the adapter that A is taken from has no module {name}")
        theirs, a = held[names[name]].A, _weight(_factors(layer, adapter_name)[0], adapter_name)
        if theirs.numel() != a.numel() or len(theirs) != len(a):
            told = " x ".join(map(str, theirs.shape))
            raise ValueError(f"{name}: the A to start from is {told}, this model's is {' x '.join(map(str, a.shape))}")
    return {name: held[names[name]].A for name in layers}


@torch.no_grad()
def _start(lori: LoRI, name: str, layer: Any, adapter_name: str, stored: Mapping[str, Tensor]) -> None:
    """A as the plan says, B 0; with ``keep`` both as they are."""
    if lori.start == "keep":
        return
    a, b = (_weight(held, adapter_name) for held in _factors(layer, adapter_name))
    if name in stored:
        drawn = stored[name]
    else:
        drawn = lori.a(name, len(a), a[0].numel())
        if isinstance(_factors(layer, adapter_name)[0], nn.ParameterDict):
            drawn = drawn * a[0].numel() ** 0.5  # an embedding's input is one-hot: its fan-in is 1
    a.copy_(drawn.reshape(a.shape))
    b.zero_()


def _freeze(layer: Any, adapter_name: str) -> None:
    """A requires no gradient, also after PEFT's ``set_adapter``."""
    _weight(_factors(layer, adapter_name)[0], adapter_name).requires_grad_(False)
    _declare(layer, adapter_name, {*layer.frozen_peft_weight_names.get(adapter_name, ()), _a_of(layer, adapter_name)})


def _declare(layer: Any, adapter_name: str, frozen: set[str]) -> None:
    """Tell PEFT which weights of a layer it must not switch on; a mapping of its own, as PEFT's is the class's."""
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: tuple(sorted(frozen))}


def _make_sparse(layer: Any, adapter_name: str, index: Tensor) -> None:
    """Only the entries at ``index`` of B stay parameters."""
    b = _factors(layer, adapter_name)[1]
    dense = _weight(b, adapter_name).detach()
    index = index.to(dense.device)
    name, kept = (adapter_name, adapter_name) if isinstance(b, nn.ParameterDict) else ("weight", "kept")
    b.__class__ = _SPARSE[type(b)]
    b._thin(name, dense, index, kept)


def sparse_parameters(peft_model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The kept entries of all sparse modules, by parameter name."""
    for path, module in peft_model.named_modules():
        if isinstance(module, _Sparse):
            for kept in vars(module)["_form"]:
                yield f"{path}.{kept}", module._parameters[kept]  # type: ignore[attr-defined]


__all__ = ["attach", "detach", "gradient_scores", "sparse_parameters"]
