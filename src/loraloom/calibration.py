"""LoRI in a run that a recipe describes: the mask it trains with, the plan, and what its record says of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraloom.adapter import Adapter
from loraloom.masks import MASK, Mask, load_mask, save_mask, support
from loraloom.recipe import CalibrateRecipe, Recipe
from loraloom.registry import edge
from loraloom.store import load
from loraloom.strategies.sparse import LoRI, calibrate

Attached = Callable[[], AbstractContextManager[Any]]


def protected(path: Path) -> Mask:
    """What a path protects: the entries of a mask file, or all that are not 0 in an adapter's B.

    Raises:
        FileNotFoundError, ValueError: it is neither.
    """
    return support(load(path)) if path.is_dir() else load_mask(path)


def plan_of(
    recipe: Recipe, earlier: Adapter | None, bench: Any, attached: Attached, fit: Callable[..., Any], work: Path
) -> LoRI | None:
    """The LoRI plan of a run; its mask is calibrated first where the recipe says so.

    Args:
        recipe: of the run.
        earlier: the adapter that it goes on with.
        bench: model and task.
        attached: attaches the run's adapter to the model, fresh or as it is continued.
        fit: trains an attached model; called with the model, a folder for checkpoints, and the ``train`` options that
            differ from the recipe's.
        work: the folder of the run while it is unfinished; the mask of a calibration is kept there for a resume.

    Raises:
        ValueError: a mask does not fit, or nothing is left to train.
    """
    chosen = recipe.lori
    if chosen is None:
        return None
    start: str | Adapter = chosen.start if chosen.start in ("reuse", "fresh") else load(chosen.start)
    task = bench.task.name
    lent = earlier or (start if isinstance(start, Adapter) else None)
    first = LoRI(seed=recipe.seed, task=task, shared=chosen.shared, start=lent or "reuse")
    mask = None if chosen.mask is None else load_mask(chosen.mask)
    if chosen.calibrate is not None:
        mask = _calibrated(chosen.calibrate, first, bench, attached, fit, work)
    held = tuple(map(protected, recipe.protect))
    if earlier is not None:
        start = "keep"
    return LoRI(mask=mask, seed=recipe.seed, task=task, shared=chosen.shared, start=start, protect=held)


def _calibrated(
    how: CalibrateRecipe, first: LoRI, bench: Any, attached: Attached, fit: Callable[..., Any], work: Path
) -> Mask:
    """The mask of a run's own calibration, made once: a resumed run finds it again."""
    kept, first_process = work / MASK, edge("processes").first
    if first_process(kept.is_file):
        return load_mask(kept)
    if how.by == "training" and edge("processes").in_parts():
        raise ValueError(
            "lori.calibrate by training needs the whole base again afterwards, which FSDP and DeepSpeed leave in parts;"
            " calibrate before (`loraloom calibrate`) and give lori.mask, or use lori.calibrate.by=gradients"
        )
    exclude = tuple(map(protected, how.exclude))
    checkpoints = work / "calibration"
    with attached() as model:
        first.attach(model)
        examples = bench.training[: how.examples]
        if how.by == "gradients":
            batches = [bench.collate(examples[at : at + 16]) for at in range(0, len(examples), 16)]
            # without dropout, which nothing seeds here; sums, so that a last batch of few examples weighs no more
            summed = None if bench.loss is None else lambda outputs, labels: bench.loss(outputs, labels, 1)
            source: Any = edge("sparse").gradient_scores(model.eval(), batches, loss=summed)
        else:
            told = {"steps": how.steps, "learning_rate": how.learning_rate}
            fit(model, checkpoints, examples, {key: value for key, value in told.items() if value is not None})
            source = edge("peft").from_model(model)
    mask = calibrate(source, density=how.density, scope=how.scope, exclude=exclude)
    mask = replace(mask, provenance={**mask.provenance, "source": how.by, "a": first.origin})
    first_process(lambda: save_mask(mask, kept))
    first_process(lambda: shutil.rmtree(checkpoints, ignore_errors=True))
    return mask


def told_of(plan: LoRI, recipe: Recipe, earlier: Adapter | None, trained: Mask | None) -> dict[str, Any]:
    """What the record of a run says of its plan: where A is from, what was trained, how masks overlap.

    Args:
        plan: as carried out.
        recipe: of the run.
        earlier: the adapter that it goes on with.
        trained: the entries that were trained; None for all.
    """
    told: dict[str, Any] = {"a": plan.origin}
    if earlier is not None:  # A is still what that run drew
        told["a"] = earlier.provenance.get("record", {}).get("lori", {}).get("a")
    if trained is not None:
        told |= {"kept": trained.kept, "entries": trained.entries, "density": trained.density}
    if plan.mask is not None:
        others = {str(path): mask for path, mask in zip(recipe.protect, plan.protect, strict=True)}
        if earlier is not None:
            others.setdefault(str(recipe.continue_from), support(earlier))
        told["overlap"] = {name: plan.mask.overlap(other) for name, other in others.items()}
    return told


def trained_entries(plan: LoRI, shapes: Mapping[str, tuple[int, int]]) -> Mask | None:
    """The entries of B that a plan trains; None for all.

    Raises:
        ValueError: there is none.
    """
    allowed = {name: plan.allowed(name, shape) for name, shape in shapes.items()}
    found = {name: mask for name, mask in allowed.items() if mask is not None}
    if not found:
        return None
    about = {} if plan.mask is None else plan.mask.provenance
    mask = Mask.of(found, about)
    if mask.kept == 0:
        raise ValueError("protect leaves no entry to train")
    return mask
