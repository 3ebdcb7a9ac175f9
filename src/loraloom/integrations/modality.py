"""MokA on live Transformers models: PEFT's LoRA layers with one A a modality, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loraloom.adapter import UnsupportedKind
from loraloom.integrations.layers import saved_whole
from loraloom.integrations.routing import Router, current, hook, is_seq2seq
from loraloom.registry import UnknownName
from loraloom.strategies.modality import MokA
from loraloom.strategies.rankspace import Routing, hidden, route

KIND = "MOKA"
_OF_THE_PLAN = ("r", "lora_alpha", "lora_dropout", "target_modules", "moka")
_FREE = ("modules_to_save", "bias", "init_lora_weights", "trainable_token_indices", "exclude_modules", "inference_mode")
_RECORDS = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
_BY_LAYER = ("rank_pattern", "alpha_pattern", "runtime_config")
_STARTS = (True, False, "gaussian")


@dataclass
class MokAConfig(LoraConfig):
    """PEFT's configuration of a MokA adapter; written with a type of its own, so that plain PEFT refuses the folder.

    Raises:
        UnsupportedKind: an option of PEFT's that would change what the layers compute.
    """

    moka: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module({nn.Linear: MokALinear})
        usual = LoraConfig()
        for one in fields(LoraConfig):
            value = getattr(self, one.name)
            known = one.name in (*_OF_THE_PLAN, *_FREE, *_RECORDS, *_BY_LAYER)
            if not known and value != getattr(usual, one.name):
                raise UnsupportedKind(f"{one.name}={value!r} is not for MokA; allowed are {', '.join(_FREE)}")
        if self.init_lora_weights not in _STARTS:
            raise UnsupportedKind(
                f"init_lora_weights={self.init_lora_weights!r} is not for MokA; allowed are {_STARTS}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``."""
        return {**super().to_dict(), "peft_type": KIND}


class _Refusal:
    """What PEFT's own loaders find for such a folder: they would put the layers in, but not the hooks that route."""

    def __init__(self, **content: Any) -> None:
        self.from_pretrained()

    @staticmethod
    def from_pretrained(*args: Any, **options: Any) -> NoReturn:
        raise UnsupportedKind("this is a MokA adapter, which loraloom loads: ll.attach(model, folder)")


PEFT_TYPE_TO_CONFIG_MAPPING[KIND] = _Refusal  # type: ignore[index, assignment]


class MokALinear(LoraLinear):
    """A LoRA layer of PEFT whose A holds one A a modality, one below the other.

    Several adapters in one layer must have one plan: they share the routing.
    """

    plan: MokA
    stream: Routing | None = None  # the tokens of an encoder, all of one modality, need no other routing

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter: every A starts as PEFT starts one, B (several side by side) at 0."""
        if not isinstance(config, MokAConfig):
            raise UnsupportedKind(f"{adapter_name} is a {type(config).__name__}; a MokA layer takes MokA adapters only")
        plan = MokA.from_json(config.moka)
        if self.lora_A and plan != self.plan:
            raise UnsupportedKind(f"{adapter_name} has another plan than the layer's first adapter: {self.plan}")
        if r != plan.width:
            raise UnsupportedKind(f"rank {r} for {kwargs.get('target_name')}: MokA has {plan.width} in every layer")
        self.plan = plan
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        a: Any = self.lora_A[adapter_name]
        b: Any = self.lora_B[adapter_name]
        like: dict[str, Any] = {"bias": False, "device": a.weight.device, "dtype": a.weight.dtype}
        self.lora_A[adapter_name] = nn.Linear(a.weight.shape[1], plan.rows, **like)
        self.lora_B[adapter_name] = nn.Linear(plan.columns, b.weight.shape[0], **like)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus ``scale * B h``; without routing, or with that of other tokens, an error."""
        if kwargs.pop("adapter_names", None) is not None:
            raise UnsupportedKind("MokA layers do not mix adapters in a batch (adapter_names)")
        base = result = self.base_layer(x, *args, **kwargs)
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return result
        routing = self.routing(x)
        for name in names:
            a: Any = self.lora_A[name]
            stacked = a(self.lora_dropout[name](self._cast_input_dtype(x, a.weight.dtype)))
            h = self.scaling[name] * hidden(self.plan, stacked, routing)  # scaled where it is small
            result = result + self.lora_B[name](h)
        return result.to(base.dtype)

    def routing(self, x: Tensor) -> Routing:
        """The routing of these tokens."""
        return (self.stream or current(x.shape[:-1])).on(x.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused: the update of a token depends on its modality and on the text."""
        raise UnsupportedKind(
            "a MokA adapter cannot be merged into the base weights: its update depends on each token's modality; "
            "`loraloom fold --text-only` folds what it does to text"
        )

    def unmerge(self) -> NoReturn:
        """Refused, as :meth:`merge`."""
        self.merge()

    def get_delta_weight(self, adapter: str) -> NoReturn:
        """Refused, as :meth:`merge`."""
        self.merge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn it into a LoRA."""
        return False

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """The base layer; called by PEFT's ``unload``, after which the model needs no routing."""
        if merge:
            self.merge()
        self._disable_adapters = True
        return self.get_base_layer()


# --- wrapping ---------------------------------------------------------------------------------------------------------
def wrap(plan: MokA, model: nn.Module, target_modules: str | Sequence[str] = "all-linear", **options: Any) -> Any:
    """Put fresh MokA adapters on a model; see :meth:`MokA.wrap`."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model already has adapters; wrap the base model (peft_model.unload() gives it)")
    for name in options:
        if name in _OF_THE_PLAN:
            raise ValueError(f"{name} is told by the plan (MokA(rank=, alpha=, dropout=)), not by an option")
        if name not in {one.name for one in fields(LoraConfig)}:
            raise UnknownName("option", name, [*_FREE])
    for name in options.get("modules_to_save") or ():
        saved_whole(model, name)
    config = MokAConfig(
        r=plan.width,
        lora_alpha=plan.alpha,  # type: ignore[arg-type]
        lora_dropout=plan.dropout,
        target_modules=targets_in_text(model, target_modules),
        moka=plan.to_json(),
        **{"task_type": None if is_seq2seq(model) else "CAUSAL_LM", **options},
    )
    return routed(get_peft_model(model, config), plan)


def routed(peft_model: Any, plan: MokA) -> Any:
    """Put the hooks that route on a PEFT model with MokA layers; returns the model."""
    base = peft_model.get_base_model()
    prefix, _ = _language_model(base)
    tuned: dict[str, Any] = {path: m for path, m in base.named_modules() if isinstance(m, LoraLayer)}
    for path, layer in tuned.items():
        if not isinstance(layer, MokALinear):
            raise UnsupportedKind(f"{path} is a {type(layer).__name__} layer; MokA adapts linear layers")
        if prefix and not path.startswith(prefix + "."):
            raise UnsupportedKind(f"{path} is outside of the language model ({prefix}), where no token is text")
        layer.stream = _stream_of(base, path, plan)
    hook(Router(plan, base, list(tuned.values())), base)
    return peft_model


def _stream_of(model: nn.Module, path: str, plan: MokA) -> Routing | None:
    """For layers of an encoder-decoder that see the encoder's tokens: all of the one modality that it encodes."""
    of_encoder = "encoder" in path.split(".") or path.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    if not is_seq2seq(model) or not of_encoder:
        return None
    if len(plan.groups) != 2:
        raise UnsupportedKind(f"the encoder of {type(model).__name__} has one modality, the plan {plan.groups[1:]}")
    return route(replace(plan, attention="none"), torch.ones(1, 1, dtype=torch.long))


def is_multimodal(model: nn.Module) -> bool:
    """Whether the model is a language model that writes, with other parts beside it, such as an encoder of images."""
    return bool(_language_model(model)[0]) and hasattr(model, "generate")


def _language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of what sees the text: the language model, or the whole of an encoder-decoder."""
    if is_seq2seq(model):
        return "", model
    for name in ("language_model", "thinker.model", "text_model"):
        for path, module in model.named_modules():
            if path == name or path.endswith("." + name):
                return path, module
    return "", model


def targets_in_text(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
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


__all__ = ["MokAConfig", "MokALinear", "is_multimodal", "routed", "targets_in_text", "wrap"]
