"""loraloom: train LoRA-family adapters that come apart and go together well, and take them apart and put them together.

    import loraloom as ll
    a, b = ll.load("runs/a"), ll.load("runs/b")
    ll.save(ll.merge([a, b], weights=[0.5, 0.5]), "runs/merged")

Names are loaded when they are first used: importing the package imports neither Transformers nor PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind, concat, truncate
    from loraloom.checkpoint import base_weights
    from loraloom.extraction import extract
    from loraloom.folding import fold
    from loraloom.integrations.balance import BalanceCallback, BalanceMeter
    from loraloom.integrations.peft import attach
    from loraloom.integrations.scoring import Evaluation, bench, evaluate, score
    from loraloom.integrations.soup import learn_weights
    from loraloom.integrations.sparse import gradient_scores
    from loraloom.integrations.statistics import measure
    from loraloom.integrations.trainer import CoToCallback
    from loraloom.listing import catalogue
    from loraloom.masks import Mask, load_mask, save_mask, support
    from loraloom.measured import load_statistics, save_statistics
    from loraloom.ops.align import align
    from loraloom.ops.arithmetic import scale, subtract
    from loraloom.ops.compress import compress
    from loraloom.ops.interpolate import interpolate
    from loraloom.ops.merge import merge
    from loraloom.ops.prune import prune
    from loraloom.ops.search import search
    from loraloom.overview import cosines, summary
    from loraloom.planning import plan
    from loraloom.probes.balance import balance
    from loraloom.probes.connectivity import connectivity
    from loraloom.probes.forgetting import forgetting
    from loraloom.probes.geometry import geometry
    from loraloom.probes.interference import interference
    from loraloom.probes.partial_modality import partial_modality
    from loraloom.probes.plane import plane
    from loraloom.probes.shapley import shapley
    from loraloom.probes.stability import stability
    from loraloom.recipe import Recipe
    from loraloom.recipe import read as read_recipe
    from loraloom.run import train
    from loraloom.serving import export
    from loraloom.store import load, save
    from loraloom.strategies.dropout import ProgressiveDropout
    from loraloom.strategies.modality import MokA
    from loraloom.strategies.progressive import CoTo
    from loraloom.strategies.sparse import LoRI, calibrate
    from loraloom.tasks import load_task

_HOME = {
    **dict.fromkeys(["Adapter", "AdapterMismatch", "Factors", "UnsupportedKind", "concat", "truncate"], "adapter"),
    "base_weights": "checkpoint",
    "extract": "extraction",
    "fold": "folding",
    "export": "serving",
    "catalogue": "listing",
    **dict.fromkeys(["Evaluation", "bench", "evaluate", "score"], "integrations.scoring"),
    "attach": "integrations.peft",
    "learn_weights": "integrations.soup",
    "measure": "integrations.statistics",
    **dict.fromkeys(["load_statistics", "save_statistics"], "measured"),
    "CoToCallback": "integrations.trainer",
    **dict.fromkeys(["BalanceCallback", "BalanceMeter"], "integrations.balance"),
    "align": "ops.align",
    **dict.fromkeys(["scale", "subtract"], "ops.arithmetic"),
    "compress": "ops.compress",
    "interpolate": "ops.interpolate",
    "merge": "ops.merge",
    "prune": "ops.prune",
    "search": "ops.search",
    "balance": "probes.balance",
    "connectivity": "probes.connectivity",
    "forgetting": "probes.forgetting",
    "geometry": "probes.geometry",
    "interference": "probes.interference",
    "partial_modality": "probes.partial_modality",
    "plane": "probes.plane",
    "shapley": "probes.shapley",
    "stability": "probes.stability",
    "Recipe": "recipe",
    "plan": "planning",
    "train": "run",
    "read_recipe": "recipe:read",
    **dict.fromkeys(["load", "save"], "store"),
    "ProgressiveDropout": "strategies.dropout",
    "MokA": "strategies.modality",
    "CoTo": "strategies.progressive",
    **dict.fromkeys(["LoRI", "calibrate"], "strategies.sparse"),
    **dict.fromkeys(["Mask", "load_mask", "save_mask", "support"], "masks"),
    "gradient_scores": "integrations.sparse",
    "fast": "integrations.fast",
    **dict.fromkeys(["cosines", "summary"], "overview"),
    "load_task": "tasks",
}

__all__ = [  # noqa: RUF022 - by subject, as the documentation has it
    "Adapter",
    "Factors",
    "AdapterMismatch",
    "UnsupportedKind",
    "load",
    "save",
    "attach",
    "concat",
    "truncate",
    "merge",
    "interpolate",
    "prune",
    "compress",
    "align",
    "scale",
    "subtract",
    "fold",
    "base_weights",
    "extract",
    "export",
    "measure",
    "save_statistics",
    "load_statistics",
    "search",
    "learn_weights",
    "CoTo",
    "ProgressiveDropout",
    "CoToCallback",
    "BalanceCallback",
    "BalanceMeter",
    "MokA",
    "LoRI",
    "calibrate",
    "Mask",
    "load_mask",
    "save_mask",
    "support",
    "gradient_scores",
    "fast",
    "Recipe",
    "read_recipe",
    "train",
    "plan",
    "load_task",
    "bench",
    "score",
    "evaluate",
    "Evaluation",
    "balance",
    "connectivity",
    "forgetting",
    "partial_modality",
    "plane",
    "stability",
    "shapley",
    "interference",
    "geometry",
    "summary",
    "cosines",
    "catalogue",
]


def __getattr__(name: str) -> Any:
    if name == "lightning":  # a module, since it needs a package that is optional
        return importlib.import_module("loraloom.integrations.lightning")
    if name not in _HOME:
        raise AttributeError(f"module 'loraloom' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(f"loraloom.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
