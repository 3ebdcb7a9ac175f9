"""Names of parameters in checkpoints of Transformers, where they are not those of the model's modules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def live_names(folder: Path, architecture: str, keys: Iterable[str]) -> dict[str, str]:
    """Keys of a checkpoint by the names that Transformers gives them when it loads it.

    The model is made on the meta device, without weights. Parameters that are made of several (experts, fused
    projections) are left out: no one key holds them. Empty where Transformers has no such class or cannot make it.

    Args:
        folder: with ``config.json``.
        architecture: the class that the configuration names, such as ViTModel.
        keys: of the checkpoint.
    """
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    kind: Any = getattr(transformers, architecture, None)
    if kind is None:
        return {}
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = kind(config)
    mapping: Any = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    found = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters)
        if converted is None:
            found[name] = key
    return found
