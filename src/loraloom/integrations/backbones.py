"""Pretrained models through ``from_pretrained``: which class, which processor, which layers to adapt."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraloom.integrations.processes import in_parts, join
from loraloom.models import models, resolve
from loraloom.untrusted import read_json

QUANTISED = {"int8": "torchao", "nf4": "bitsandbytes"}  # types of weights beside torch's, and who makes them
FAMILIES = ("causal", "multimodal", "encoder", "vision")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen pretrained model and what turns its inputs into tensors.

    Attributes:
        model: in eval mode, without gradients; one that was loaded here is on the accelerator, if there is one.
        name: as the user gave it.
        family: one of FAMILIES.
        processor: a tokenizer; for multimodal models their own processor; for vision models a mapping with
            ``image_mean`` and ``image_std``.
    """

    model: nn.Module
    name: str
    family: str
    processor: Any


def load_backbone(
    model: str | nn.Module, *, family: str | None = None, processor: Any = None, dtype: str = "float32"
) -> Backbone:
    """Load a model by bundled name, local folder or hub id, or take a live one as it is.

    Args:
        model: name, folder, id or the model itself.
        family: one of FAMILIES; by default told from the configuration.
        processor: what turns inputs into tensors; by default loaded.
        dtype: of weights that are loaded here: one of torch's, or of QUANTISED.

    Raises:
        ValueError: the family is not known and cannot be told from the configuration, or the folder is no model; or a
            package that quantises is not installed.
        FileNotFoundError: a path without a folder.
    """
    if isinstance(model, nn.Module):
        name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        config, source = getattr(model, "config", None), name
    else:
        name, source = model, resolve(model)
        config = _configuration(name, source)
    family = family or _family(name, config, type(model).__name__)
    if family not in FAMILIES:
        raise ValueError(f"model {name}: family {family!r} has no score here; allowed: {', '.join(FAMILIES)}")
    if processor is None:
        processor = _processor(source, family)
    live = model if isinstance(model, nn.Module) else _load(source, family, dtype)
    return Backbone(live, name, family, processor)


def _configuration(name: str, source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        known = ", ".join(models)
        raise ValueError(f"model {name}: no model folder, hub id or one of {known} ({_first(error)})") from None


def _load(source: str, family: str, dtype: str) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    loader = AutoModelForCausalLM if family == "causal" else AutoModel
    if family == "multimodal":
        loader = _multimodal_class(source)
    with without_bars():
        model = loader.from_pretrained(source, **_held_as(dtype)).eval().requires_grad_(False)
    return model if dtype in QUANTISED else model.to(_device())


def _device() -> torch.device:
    """Where this process computes; a model that is to be taken apart (FSDP, DeepSpeed) is placed by who does that."""
    if in_parts() or not torch.accelerator.is_available():
        return torch.device("cpu")
    device: torch.device = join().device
    return device


def _held_as(dtype: str) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a type of the weights; linear layers of a quantised one compute in float32.

    Raises:
        ValueError: the package that quantises is not installed.
    """
    if dtype not in QUANTISED:
        return {"dtype": getattr(torch, dtype)}
    package = QUANTISED[dtype]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"dtype {dtype} needs the package {package}: pip install 'loraloom[quantised]'")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    config: Any
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    # each process has a base of its own
    return {"dtype": torch.float32, "quantization_config": config, "device_map": {"": join().device}}


def _processor(source: str, family: str) -> Any:
    if family == "vision":
        return _image_statistics(source)
    from transformers import AutoProcessor, AutoTokenizer

    return (AutoProcessor if family == "multimodal" else AutoTokenizer).from_pretrained(source)


def _multimodal_class(source: str) -> Any:
    """Transformers' class of a model; not all of them are known to its automatic classes."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    named = next(iter(config.architectures or ()), "")
    if hasattr(config, "thinker_config"):  # Qwen-Omni: the part that reads, without the one that speaks
        named = named.removesuffix("Model").removesuffix("ForConditionalGeneration") + "ThinkerForConditionalGeneration"
    if not named.endswith("ForConditionalGeneration") or not hasattr(transformers, named):
        raise ValueError(f"model {source}: architecture {named!r} is no multimodal model of Transformers")
    return getattr(transformers, named)


@contextmanager
def without_bars() -> Iterator[None]:
    """Loading a local model takes a second: no progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _family(name: str, config: Any, live: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name in models:
        return str(models[name].facts["family"])
    told = (live, *(getattr(config, "architectures", None) or ()))
    if hasattr(config, "thinker_config"):
        return "multimodal"
    if any("ForConditionalGeneration" in one for one in told) and hasattr(config, "text_config"):
        return "multimodal"
    if any("CausalLM" in one or one in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for one in told):
        return "causal"  # some are called otherwise, such as GPT2LMHeadModel
    return "vision" if hasattr(config, "num_channels") and not hasattr(config, "vocab_size") else "encoder"


def _image_statistics(source: str) -> Mapping[str, Any]:
    """Mean and deviation of pixels; read from the file, since the processor classes need torchvision."""
    file = Path(source) / "preprocessor_config.json"
    if not file.exists() and file.parent.is_dir():
        raise FileNotFoundError(f"model {source}: no {file.name} beside the weights; it tells image_mean and image_std")
    if not file.exists():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(source, file.name))
    told = read_json(file)
    for key in ("image_mean", "image_std"):
        if not isinstance(told, Mapping) or key not in told:
            raise ValueError(f"model {source}: {file.name} does not tell {key}")
    return dict(told)


def _first(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:160]
