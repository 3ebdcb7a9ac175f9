"""MokA on live Transformers models: PEFT's LoRA layers with one A a modality, stacked."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from loraloom.adapter import UnsupportedKind
from loraloom.integrations.routing import Router, current, generate, is_seq2seq
from loraloom.strategies.modality import MokA
from loraloom.strategies.rankspace import Routing, hidden

KIND = "MOKA"


@dataclass
class MokAConfig(LoraConfig):
    """PEFT's configuration of a MokA adapter; written with a type of its own, so that plain PEFT refuses the folder."""

    moka: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``."""
        return {**super().to_dict(), "peft_type": KIND}


class MokALinear(LoraLinear):
    """A LoRA layer of PEFT whose A holds one A a modality, one below the other."""

    _moka: dict[str, MokA]  # by adapter name
    _stream: Routing | None  # the tokens of an encoder: all of one modality

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus ``scale * B h``; without routing, or with that of other tokens, an error."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("MokA layers do not mix adapters in a batch (adapter_names)")
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        names = [name for name in self.active_adapters if name in self.lora_A]
        routing = self._routing_of(x) if names else None
        for name in names:
            a: Tensor = self.lora_A[name].weight  # type: ignore[assignment]
            b: Any = self.lora_B[name]
            entered = self.lora_dropout[name](self._cast_input_dtype(x, a.dtype))
            h = hidden(self._moka[name], a, entered, routing)  # type: ignore[arg-type]
            result = (
                result + self.scaling[name] * b(h.to(b.weight.dtype))
                if b.bias is not None
                else _added(result, h, b.weight, self.scaling[name])
            )
        return result

    def _routing_of(self, x: Tensor) -> Routing:
        if self._stream is not None:
            types = self._stream.types.to(x.device).expand(x.shape[:2])
            return Routing(types, plain=False)
        return current(x.shape[:-1])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the update of a token depends on its modality and on the text."""
        raise UnsupportedKind(
            "a MokA adapter cannot be merged into the base weights: its update depends on each token's modality; "
            "`loraloom fold --text-only` folds what it does to text"
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Refused, as :meth:`merge`."""
        self.merge()
        raise AssertionError


def _added(result: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """result + scale * h B^T, as one product that adds up in place of three passes over the output."""
    if torch.is_autocast_enabled(result.device.type) or result.dtype != b.dtype:
        return result + (scale * (h.to(b.dtype) @ b.T)).to(result.dtype)
    flat = torch.addmm(result.reshape(-1, result.shape[-1]), h.to(b.dtype).flatten(0, -2), b.T, alpha=scale)
    return flat.view(result.shape)


# --- wrapping ---------------------------------------------------------------------------------------------------------
def wrap(plan: MokA, model: nn.Module, target_modules: str | Sequence[str] = "all-linear", **options: Any) -> Any:
    """Put fresh MokA adapters on a model; see :meth:`MokA.wrap`."""
    paths = _targets(model, target_modules)
    config = MokAConfig(
        r=plan.width,
        lora_alpha=plan.alpha,  # type: ignore[arg-type]
        lora_dropout=plan.dropout,
        target_modules=paths,
        moka=plan.to_json(),
        **{"task_type": None if is_seq2seq(model) else "CAUSAL_LM", **options},
    )
    return routed(get_peft_model(model, config), plan)


def routed(peft_model: Any, plan: MokA, adapter_name: str = "default") -> Any:
    """Make the LoRA layers of a PEFT model MokA layers, at their start, and put the hooks on; returns the model."""
    base = peft_model.get_base_model()
    layers: dict[str, Any] = {
        path: m for path, m in base.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r
    }
    for path, layer in layers.items():
        if type(layer) is not LoraLinear:
            raise UnsupportedKind(f"{path} is a {type(layer).__name__} layer; MokA adapts linear layers")
        _widen(layer, plan, adapter_name)
        layer.__class__ = MokALinear
        layer.__dict__.update(_moka={adapter_name: plan}, _stream=_stream_of(base, path, plan))
    router = Router(plan, base, list(layers.values()))
    for module in dict.fromkeys([peft_model, base]):
        module.register_forward_pre_hook(router.before, with_kwargs=True)
        module.register_forward_hook(router.after, with_kwargs=True, always_call=True)
    if hasattr(base, "generate"):
        base.generate = functools.partial(generate, router, base.generate)
    peft_model.moka_router = router
    return peft_model


def _widen(layer: Any, plan: MokA, name: str) -> None:
    """One A a modality below the other, each started as PEFT starts one; several B's side by side at 0."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    meta = {"device": a.weight.device, "dtype": a.weight.dtype}
    if plan.rows != a.out_features:
        layer.lora_A[name] = nn.Linear(a.in_features, plan.rows, bias=False, **meta)
        layer.lora_A[name].weight.requires_grad_(a.weight.requires_grad)
    if plan.columns != b.in_features:
        layer.lora_B[name] = nn.Linear(plan.columns, b.out_features, bias=b.bias is not None, **meta)
        for parameter in layer.lora_B[name].parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(b.weight.requires_grad)


def _stream_of(model: nn.Module, path: str, plan: MokA) -> Routing | None:
    """For layers of an encoder-decoder that see the encoder's tokens: all of the one modality that it encodes."""
    if not is_seq2seq(model):
        return None
    of_encoder = "encoder" in path.split(".") or path.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    if not of_encoder:
        return None
    if len(plan.groups) != 2:
        raise UnsupportedKind(f"the encoder of {type(model).__name__} has one modality, the plan {plan.groups[1:]}")
    return Routing(torch.ones(1, 1, dtype=torch.long), plain=False)


def _language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of what sees the text: the language model, or the whole of an encoder-decoder."""
    if is_seq2seq(model):
        return "", model
    for name in ("language_model", "thinker.model", "text_model"):
        for path, module in model.named_modules():
            if path == name or path.endswith("." + name):
                return path, module
    return "", model


def _targets(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """Full paths of the linear layers to adapt, all of them in the language model."""
    prefix, _ = _language_model(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    inside = [path for path in linear if not prefix or path.startswith(prefix + ".")]
    if wanted == "all-linear":
        return inside
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found: dict[str, None] = {}
    for name in names:
        hits = [path for path in inside if path == name or path.endswith("." + name)]
        if not hits:
            where = f" of the language model ({prefix})" if prefix else ""
            outside = [path for path in linear if path == name or path.endswith("." + name)]
            raise ValueError(
                f"target_modules: {name!r} is no linear layer{where}"
                + (f"; {outside[0]} sees no text, so MokA has nothing to do there" if outside else "")
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def layers_of(peft_model: nn.Module) -> Iterator[tuple[str, MokALinear]]:
    """The MokA layers of a model by path."""
    for path, module in peft_model.named_modules():
        if isinstance(module, MokALinear):
            yield path, module


__all__ = ["MokALinear", "Router", "layers_of", "routed", "wrap"]
