"""Where a model has PEFT layers, which of their weights learn, and what stands in the way of switching them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loraloom.adapter import UnsupportedKind
from loraloom.starts import moves_base
from loraloom.strategies.units import base_path

# Wrappers put themselves into the path of a module; these are none of the model's own names.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
HIDDEN = WRAPPERS[1:]  # those that take themselves out of the names of a state dict

_NOT_BY_LAYER = {
    "XLoraModel": "X-LoRA's forward re-enables all layers each time",
    "ShadowLayer": "one shadow state passes through all of them",
}


def own_path(path: str, wrappers: Sequence[str] = WRAPPERS) -> str:
    """A module's path without the wrappers in it.

    Example:
        >>> own_path("model.layers.0._orig_mod.self_attn.q_proj")
        'model.layers.0.self_attn.q_proj'
    """
    return ".".join(part for part in path.split(".") if part not in wrappers)


def saved_whole(model: nn.Module, name: str, where: str = "modules_to_save") -> dict[str, nn.Module]:
    """The modules that PEFT takes for a name of ``modules_to_save``, by path; PEFT is silent where there are none.

    Raises:
        ValueError: there are none; it begins with ``where``.
    """
    found = {path: one for path, one in model.named_modules(remove_duplicate=False) if path.endswith(name)}
    if not found:
        raise ValueError(f"{where}: the model has no module {name!r}")
    return found


def parts_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()`` in its order, several times faster: that one nests a generator for every level."""
    found: dict[nn.Module, None] = {}
    left = [model]
    while left:
        part = left.pop()
        if part not in found:
            found[part] = None
            left += [child for child in reversed(part._modules.values()) if child is not None]
    return list(found)


def inner_model(model: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    """The base model of the one PEFT model in it, if there is one."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    adapted = [part for part in parts if isinstance(part, PeftModel)]
    if len(adapted) == 1:
        return adapted[0].get_base_model()
    return extract_model_from_parallel(model, keep_torch_compile=False)


def tuner_layers(model: nn.Module) -> dict[str, list[Any]]:
    """PEFT layers by module path in the base model; those inside another one stand under the outermost."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, list[Any]] = {}
    seen: dict[nn.Module, None] = {}

    def walk(module: nn.Module, parts: tuple[str, ...], owner: str | None) -> None:
        if module in seen or isinstance(module, AuxiliaryTrainingWrapper):
            return
        seen[module] = None
        why = _NOT_BY_LAYER.get(type(module).__name__)
        if why is not None:
            raise UnsupportedKind(f"adapters of {type(module).__name__} cannot be switched by layer: {why}")
        if isinstance(module, BaseTunerLayer):
            owner = owner if owner is not None else base_path(".".join(parts))
            found.setdefault(owner, []).append(module)
        for name, child in module.named_children():
            walk(child, parts if name in WRAPPERS else (*parts, name), owner)

    root = model
    while [name for name, _ in root.named_children()] == ["module"]:  # DDP and its like
        root = root.get_submodule("module")
    walk(root, (), None)
    return found


def learning_weights(layer: Any) -> list[nn.Parameter]:
    """The adapter parameters of a layer that are trained."""
    parts = [getattr(layer, part) for part in layer.adapter_layer_names]
    return [
        weight for part in parts if isinstance(part, nn.Module) for weight in part.parameters() if weight.requires_grad
    ]


def frozen_beside(learning: Mapping[str, Sequence[Any]]) -> str:
    """Where a frozen adapter is active beside one that learns; empty if nowhere."""
    for name, layers in learning.items():
        for layer in layers:
            parts = [getattr(layer, part) for part in layer.adapter_layer_names]
            for adapter in layer.active_adapters:
                held = [part[adapter] for part in parts if isinstance(part, nn.ModuleDict) and adapter in part]
                weights = [weight for one in held for weight in one.parameters()]
                if weights and not any(weight.requires_grad for weight in weights):
                    return f"adapter {adapter!r} is active and frozen in {name}"
    return ""


def start_that_changes_base(parts: Sequence[nn.Module]) -> str:
    """The option by which an adapter started so; empty if none did."""
    for part in parts:
        configs = vars(part).get("peft_config")
        for config in configs.values() if isinstance(configs, dict) else ():
            start = getattr(config, "init_lora_weights", None)
            if moves_base(start):  # without the adapter the layer is not the base layer
                return f"init_lora_weights={start!r}"
            if getattr(config, "kasa_config", None) is not None:
                return "kasa_config"
    return ""
