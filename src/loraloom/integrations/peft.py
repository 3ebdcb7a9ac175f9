"""Adapters on live models, through PEFT itself: attach one for a while, or take a snapshot of one in training."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapter import Adapter, AdapterMismatch, UnsupportedKind
from loraloom.experts import as_stored
from loraloom.integrations.layers import HIDDEN, own_path
from loraloom.integrations.processes import gathered, whole
from loraloom.layout import PREFIX, check_config, from_state_dict, settled, to_state_dict
from loraloom.modalities import MOKA, plan_of
from loraloom.store import as_configured, knows_targets, load

# Containers that torch.nn.Module keeps as attributes and changes in place; everything else is replaced as a whole.
_CONTAINERS = (dict, set)


class Snapshot:
    """All that attaching may change on a base model, by reference, and the way back.

    Weights are not copied: PEFT puts its layers around those of the model and, loaded by assignment, replaces whole
    parameters, so what was there is still there, untouched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, self._attributes(module)) for module in model.modules()]
        config = getattr(model, "config", None)
        self._config = (config, dict(vars(config))) if hasattr(config, "__dict__") else None
        self._grads = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]

    @staticmethod
    def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
        return {
            key: (value, value.copy() if isinstance(value, _CONTAINERS) else None)
            for key, value in vars(module).items()
        }

    def same(self, other: Snapshot) -> bool:
        """Whether both are of the same model in the same state: the same objects, flags and memory throughout."""
        pairs = zip(self._modules, other._modules, strict=False)
        return (
            len(self._modules) == len(other._modules)
            and all(one is two and _alike(mine, theirs) for (one, mine), (two, theirs) in pairs)
            and [_place(data) for *_, data in self._grads] == [_place(data) for *_, data in other._grads]
            and _unchanged(self._config, other._config)
        )

    def restore(self) -> None:
        """Put every module, parameter, flag and hook back."""
        for module, attributes in self._modules:
            vars(module).clear()
            for key, (value, content) in attributes.items():
                if content is not None:
                    value.clear()
                    value.update(content)
                vars(module)[key] = value
        for parameter, requires_grad, data in self._grads:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        if self._config is not None:
            config, content = self._config
            vars(config).clear()
            vars(config).update(content)


def _alike(mine: Mapping[str, tuple[Any, Any]], theirs: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether two modules' attributes are the same objects and their containers hold the same objects."""
    return mine.keys() == theirs.keys() and all(
        value is theirs[key][0] and _holding(content) == _holding(theirs[key][1])
        for key, (value, content) in mine.items()
    )


def _holding(content: Any) -> Any:
    """What a container holds, by identity."""
    if isinstance(content, dict):
        return [(key, id(value)) for key, value in content.items()]
    return content


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how it is read; that of a tensor without memory is its own."""
    return tensor.data_ptr() or id(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _unchanged(mine: tuple[Any, dict[str, Any]] | None, theirs: tuple[Any, dict[str, Any]] | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return mine[0] is theirs[0] and _holding(mine[1]) == _holding(theirs[1])


def _peft_config(model: nn.Module, content: Mapping[str, Any]) -> Any:
    """PEFT's configuration object. Its start is switched off: it costs time, and PiSSA and the like change the base."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any
    if str(content["peft_type"]).upper() == MOKA:
        from loraloom.integrations.modality import MokAConfig as kind
    else:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(str(content["peft_type"]).upper())]
    known = {field.name for field in dataclasses.fields(kind)}
    chosen = {key: value for key, value in content.items() if key in known and key != "peft_type"}
    for start in ("init_lora_weights", "init_weights"):
        if start in known:
            chosen[start] = False
    for start in ("eva_config", "corda_config", "lora_ga_config", "loftq_config"):
        chosen.pop(start, None)
    # PEFT warns when the adapter was trained on a base of another name: a moved model is no mistake.
    chosen["base_model_name_or_path"] = vars(model).get("name_or_path") or None
    return kind(**chosen)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An adapter as PEFT takes it.

    Attributes:
        adapter: its modules as PEFT stores them.
        config: a configuration that gives each module its rank and scale.
        tensors: by their names in a file.
    """

    adapter: Adapter
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def prepared(adapter: Adapter) -> Prepared:
    """An adapter made ready to be attached, its factors read.

    Raises:
        ValueError: its configuration is no adapter's.
    """
    check_config(adapter.config, "configuration")
    held = as_stored(adapter).loaded()
    bake = not all(as_configured(held.config, name, factors) for name, factors in held.modules.items())
    ranks = {name: factors.rank // factors.experts for name, factors in held.modules.items()}
    config = settled(held.config, ranks, bake=bake, retarget=not knows_targets(held))
    return Prepared(held, config, dict(to_state_dict(held, bake=bake)))


def put_on(model: nn.Module, adapter: Adapter | Prepared, **changes: Any) -> nn.Module:
    """Attach an adapter to a base model for good; ``changes`` replace entries of its configuration.

    Raises:
        AdapterMismatch: a module is missing in the model or has another size; names the first one.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    ready = adapter if isinstance(adapter, Prepared) else prepared(adapter)
    held, config = ready.adapter, ready.config
    tensors = {name: tensor.clone() for name, tensor in ready.tensors.items()}  # PEFT takes them as parameters
    try:
        # PEFT draws even where the drawn values are thrown away (HiRA); nobody's random stream may notice.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT 0.21 asks the model for a name that Transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            peft_model = get_peft_model(model, _peft_config(model, {**config, **changes}), low_cpu_mem_usage=True)
            if plan := plan_of(config):
                from loraloom.integrations.modality import routed

                routed(peft_model, plan)
        result: Any = set_peft_model_state_dict(peft_model, tensors, low_cpu_mem_usage=True)
    except UnsupportedKind:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        raise AdapterMismatch(f"the adapter does not fit this model: {_reason(model, held, error)}") from error
    stray = [*result.unexpected_keys, *(name for name, value in peft_model.named_parameters() if value.is_meta)]
    if stray:  # a tensor without a place, or a place of PEFT's without a tensor
        side = "the adapter" if result.unexpected_keys else "the model"
        lost = LookupError(f"{stray[0].removeprefix(PREFIX)} is only in {side}")
        raise AdapterMismatch(f"the adapter does not fit this model: {_reason(model, held, lost)}")
    peft_model.base_model._cast_adapter_dtype(adapter_name="default", autocast_adapter_dtype=True)
    if any(parameter.element_size() < 4 for parameter in model.parameters()):
        # PEFT has rounded the factors to the type of such a base on the way; now they are of 32 bits
        set_peft_model_state_dict(peft_model, tensors)
    return peft_model.eval()


def _reason(model: nn.Module, adapter: Adapter, error: Exception) -> str:
    """The first module of the adapter that the model does not have, or the line in which PEFT names a tensor."""
    there = {name for name, _ in model.named_modules()}
    for name in adapter.modules:
        if name not in there and f"{name}.base_layer" not in there:
            return f"module {name} is not in the model"
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "size mismatch" in line), lines[0].strip())


@contextmanager
def attached(model: nn.Module, adapter: Adapter | None) -> Iterator[nn.Module]:
    """The model with the adapter on it, in evaluation mode; on exit the base model is what it was, bit for bit.

    Built by PEFT (the yielded model is a ``PeftModel``), so it computes what ``PeftModel.from_pretrained`` would on the
    saved folder: factors of 16 bits are held in 32. No global random stream is touched. Whatever is done to the base
    model inside is undone too, except writing into its weights (do not call ``merge_adapter`` here).

    Args:
        model: the base model, without adapters.
        adapter: what to attach; None yields the model itself, unchanged.

    Raises:
        AdapterMismatch: a module is missing in the model or has another size; names the first one.
        ValueError: the model already has adapters.

    Example:
        >>> from loraloom.adapter import Factors
        >>> base = nn.Sequential(nn.Linear(2, 3))
        >>> a = Adapter({"peft_type": "LORA"}, {"0": Factors(B=torch.ones(3, 1), A=torch.ones(1, 2), scale=2.0)})
        >>> x = torch.ones(1, 2)
        >>> with attached(base, a) as peft_model:
        ...     change = peft_model(x) - base[0].base_layer(x)
        >>> change.detach().round()
        tensor([[4., 4., 4.]])
    """
    if adapter is None:
        yield model
        return
    snapshot = bare(model)
    try:
        yield put_on(model, adapter)
    finally:
        snapshot.restore()


def attach(model: nn.Module, adapter: Adapter | str | Path, *, trainable: bool = False) -> Any:
    """Put an adapter on a base model to stay, for inference or to go on training it: what loads MokA adapters.

    What PEFT loads it loads by itself too (``PeftModel.from_pretrained``); a MokA adapter needs this.

    Args:
        model: the base model, without adapters; it is changed.
        adapter: a folder, or an adapter in memory.
        trainable: its parameters and whole saved modules may be trained.

    Returns:
        A ``PeftModel`` in evaluation mode, in training mode if it is trainable. It saves, resumes in a Trainer and
        takes callbacks as any other.

    Raises:
        AdapterMismatch: it does not fit the model, which then is as it was.
        ValueError: the model has adapters already.

    Example:
        >>> from loraloom.adapter import Factors
        >>> one = Adapter({"peft_type": "LORA"}, {"0": Factors(B=torch.ones(3, 1), A=torch.ones(1, 2))})
        >>> live = attach(nn.Sequential(nn.Linear(2, 3)), one, trainable=True)
        >>> [tuple(parameter.shape) for parameter in live.parameters() if parameter.requires_grad]
        [(1, 2), (3, 1)]
    """
    held = adapter if isinstance(adapter, Adapter) else load(adapter)
    snapshot = bare(model)
    try:
        return put_on(model, held, inference_mode=not trainable).train(trainable)
    except BaseException:
        snapshot.restore()
        raise


def bare(model: nn.Module) -> Snapshot:
    """The way back to a model that has no adapters.

    Raises:
        ValueError: it has some.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model already has adapters; attach to the base model (peft_model.unload() gives it)")
    return Snapshot(model)


def from_model(peft_model: nn.Module, adapter_name: str = "default") -> Adapter:
    """A snapshot of an adapter of a live PeftModel, in main memory: what ``save_pretrained`` and ``load`` would give.

    Of a model in parts (FSDP2, ZeRO 3) too: then every process calls this.

    Raises:
        UnsupportedKind: the adapter is more than factors can say (also PiSSA and the like, whose base has changed).
        ValueError: no adapter of that name.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> live = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> from_model(live).shape("0")
        Shape(out=3, in_=4, rank=2)
    """
    from peft import get_peft_model_state_dict

    configs: Mapping[str, Any] = getattr(peft_model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"no adapter {adapter_name!r} in the model; it has: {', '.join(configs) or 'none'}")
    config = _plain(configs[adapter_name].to_dict())
    base: Any = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model  # type: ignore[operator]
    config.update(inference_mode=True)
    if config.get("base_model_name_or_path") is None:
        config["base_model_name_or_path"] = vars(base).get("name_or_path") or None
    if config.get("task_type") is None:
        config["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    check_config(config, "the live adapter")
    with warnings.catch_warnings(), gathered(peft_model):
        warnings.simplefilter("ignore")  # PEFT announces that it saves targeted embeddings, and that it is offline
        live: dict[str, Tensor] = get_peft_model_state_dict(peft_model, _state(peft_model), adapter_name)
        held = {own_path(key, HIDDEN): whole(tensor.detach()).to("cpu", copy=True) for key, tensor in live.items()}
    return from_state_dict(config, held, "the live adapter")


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with names as modules have them: by these PEFT looks, and is silent where it finds nothing."""
    paths = {own_path(path, HIDDEN): path for path, _ in model.named_modules()}
    found = {}
    for name, tensor in model.state_dict().items():
        owner, dot, leaf = name.rpartition(".")
        found[f"{paths.get(owner, owner)}{dot}{leaf}"] = tensor
    return found


def _plain(value: Any) -> Any:
    """Configuration values as JSON would give them back: enums are their text, sets are sorted lists."""
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return value.value if hasattr(value, "value") else value
