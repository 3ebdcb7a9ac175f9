"""What a recipe will need, from the configuration alone: parameters, memory by rank, operations, communication."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loraloom.masks import load_mask, support, union
from loraloom.recipe import CalibrateRecipe, LoRIRecipe, Recipe
from loraloom.registry import UnknownName, edge
from loraloom.store import load
from loraloom.strategies.dropout import ProgressiveDropout
from loraloom.strategies.progressive import CoTo

SHARDINGS: Mapping[str, tuple[bool, bool, bool]] = {
    "ddp": (False, False, False),
    "zero1": (True, False, False),
    "zero2": (True, True, False),
    "zero3": (True, True, True),
    "fsdp": (True, True, True),
}
"""Whether optimizer state, gradients and weights are split over the ranks (ZeRO, arXiv 1910.02054, section 5)."""

ADAMW = 2  # moments a trained weight, each of the weight's size
SIZES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256}  # bytes of a quantised weight, with nf4's scales of blocks
INDEX = 4  # bytes that say where a kept entry of LoRI's B is
NEVER = -1  # of Product.again
MOST_STEPS = 20_000  # of a schedule; a longer run is taken at so many of its steps, evenly spaced


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights.

    Attributes:
        base: of the frozen model (with what ``modules_to_save`` trains).
        trainable: trained ones.
        frozen: of the adapter, not trained (LoRI's A).
    """

    base: int
    trainable: int
    frozen: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: of the base model.
        adapter: weights of the adapter.
        gradients, optimizer: of what is trained.
        gathered: two of the largest blocks, whole, where weights are sharded: one at work, one on its way.
        activations: kept for backward with every unit switched on, without the logits.
        checkpoints: what is kept instead with gradient checkpointing: what goes into each block.
        block: kept while one block is computed again.
        logits: the logits, their logarithms and two gradients, at the start of backward.
        output: the logits alone, which stay to the end.
        working: gradients in the backward pass of a block: three of the size of its largest tensor.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    checkpoints: int
    block: int
    logits: int
    output: int
    working: int

    def total(self, checkpointing: bool) -> int:
        """Everything, with or without gradient checkpointing."""
        kept, again = (self.checkpoints, self.block) if checkpointing else (self.activations, 0)
        return self.static + self.gathered + kept + max(self.logits, self.output + again + self.working)

    @property
    def static(self) -> int:
        """What stays from step to step."""
        return self.weights + self.adapter + self.gradients + self.optimizer


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one optimizer step on one rank; a product of m x k by k x n is 2 m k n of them.

    Attributes:
        forward: all units switched on.
        backward: the same.
        recomputed: what gradient checkpointing adds, the same.
        mean, mean_recomputed: forward and backward, and what checkpointing adds, in the mean over the strategy's
            schedule: units that are off are free, and backward ends at the lowest that is on.
    """

    forward: int
    backward: int
    recomputed: int
    mean: float
    mean_recomputed: float


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in one optimizer step, with ring algorithms.

    Attributes:
        gradients: summed over the ranks, whatever is switched off.
        active_gradients: of units that are on, in the mean over the schedule: what is needed.
        weights: gathered where they are sharded, for forward and again for backward; trained ones, where each rank
            updates its part.
    """

    gradients: int
    active_gradients: float
    weights: float


@dataclass(frozen=True)
class Plan:
    """What one recipe needs on ``world`` ranks; see :func:`plan`."""

    model: str
    kind: str
    strategy: str
    world: int
    sharding: str
    units: int
    checkpointing: bool
    parameters: Parameters
    memory: Memory
    flops: Flops
    communication: Communication

    @property
    def peak(self) -> int:
        """Bytes on one rank at the worst moment, as the recipe has gradient checkpointing."""
        return self.memory.total(self.checkpointing)

    def to_json(self) -> dict[str, Any]:
        """All of it, with the totals."""
        totals = {"peak": self.memory.total(False), "peak_checkpointed": self.memory.total(True)}
        return {**asdict(self), "memory": {**asdict(self.memory), **totals}}


def plan(recipe: Recipe, *, world: int = 1, sharding: str = "ddp") -> Plan:
    """Estimate what a recipe needs without its weights and data: the model is laid out on the meta device.

    ``model`` may also be ``llama-8b``, ``llama-70b`` or ``llama-405b``. Every example has ``data.max_length`` tokens.
    Operations are those of matrix products, exactly as PyTorch does them; memory is what autograd keeps with fused
    attention where the model has it, without the allocator's gaps. docs/plan.md has the rules and the measurements.

    Args:
        recipe: of the run.
        world: number of ranks, which share the ``train.batch_size * train.accumulate`` examples of a step.
        sharding: ``ddp``, ``fsdp``, ``zero1``, ``zero2`` or ``zero3``.

    Raises:
        ValueError: ``world`` is below 1 or does not divide the examples of a step, the model's configuration is not
            found, or the recipe does not fit it.
        UnknownName: no such sharding.

    Example:
        >>> from loraloom.recipe import Recipe
        >>> recipe = Recipe(model="llama-8b", task="digits", output="runs/a", adapter={"target_modules": ("q_proj",)})
        >>> plan(recipe, world=8).parameters                                              # doctest: +SKIP
        Parameters(base=8030261248, trainable=2097152, frozen=0)
    """
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise ValueError(f"world must be a whole number from 1 on, got {world!r}")
    if sharding not in SHARDINGS:
        raise UnknownName("sharding", sharding, list(SHARDINGS))
    strategy = recipe.plan()
    told = recipe.train
    batch, micro = edge("fit").share(told.batch_size * told.accumulate, told.batch_size, world)
    trace = edge("trainees").traced(recipe, batch=batch, unit=getattr(strategy, "unit", "layer"))
    chances = _chances(strategy, trace.units)
    trained = _trained(recipe, trace)
    costs = [_cost(trace.flops, chances, len(trace.units), blocks) for blocks in (None, trace.blocks)]
    all_on = {tuple([1.0] * len(trace.units)): 1.0}
    most = [_cost(trace.flops, all_on, len(trace.units), blocks) for blocks in (None, trace.blocks)]
    forward = sum(trace.flops.values())
    return Plan(
        model=recipe.model,
        kind=_kind(recipe),
        strategy=recipe.strategy.name,
        world=world,
        sharding=sharding,
        units=len(trace.units),
        checkpointing=told.gradient_checkpointing,
        parameters=Parameters(trace.base, trained.weights, trace.frozen),
        memory=_memory(recipe, trace, trained, world, SHARDINGS[sharding]),
        flops=Flops(
            forward=forward * micro,
            backward=round(most[0] - forward) * micro,
            recomputed=round(most[1] - most[0]) * micro,
            mean=costs[0] * micro,
            mean_recomputed=(costs[1] - costs[0]) * micro,
        ),
        communication=_communication(recipe, trace, (trained, micro), chances, world, sharding),
    )


@dataclass(frozen=True)
class _Trained:
    """How many weights are trained, and what a mask of LoRI leaves of B.

    Attributes:
        weights: all that are trained.
        entries: of B where a mask thins it out; else 0.
        kept: of these, trained.
        share: of the adapter's trained weights that is left.
    """

    weights: int
    entries: int = 0
    kept: int = 0
    share: float = 1.0


def _kind(recipe: Recipe) -> str:
    if recipe.lori is not None:
        return "lori"
    return recipe.adapter.kind if recipe.continue_from is None else load(recipe.continue_from).kind


def _trained(recipe: Recipe, trace: Any) -> _Trained:
    chosen = recipe.lori
    if chosen is None or (chosen.mask is None and chosen.calibrate is None and not recipe.protect):
        return _Trained(trace.trainable)
    model, _ = edge("shapes").bare(recipe.model)
    with edge("trainees").trainee(model, recipe) as made:
        own = {name: one.numel() for name, one in made.named_parameters() if one.requires_grad and "lora_" in name}
    entries = sum(size for name, size in own.items() if {"lora_B", "lora_embedding_B"} & {*name.split(".")})
    kept = _kept(chosen, recipe.protect, entries)
    gone = entries - kept
    return _Trained(trace.trainable - gone, entries, kept, 1 - gone / sum(own.values()))


def _kept(chosen: LoRIRecipe, protect: Sequence[Path], entries: int) -> int:
    """Entries of B that are trained; a mask that is still to be made is taken to meet protected ones by chance."""
    how = chosen.calibrate or CalibrateRecipe(density=1.0)
    spared, taken = (  # as a run reads them (calibration.protected)
        union([support(load(path)) if path.is_dir() else load_mask(path) for path in paths])
        for paths in (protect, how.exclude)
    )
    if chosen.mask is not None:
        mask = load_mask(chosen.mask)
        return (mask if spared is None else mask - spared).kept
    free = entries - (0 if taken is None else taken.kept)
    met = 0 if spared is None else (spared if taken is None else spared - taken).kept
    return round(round(how.density * entries) * (1 - met / max(free, 1)))


# --- the schedule ----------------------------------------------------------------------------------------------------


def _chances(strategy: CoTo | ProgressiveDropout | None, units: Sequence[str]) -> dict[tuple[float, ...], float]:
    """Probabilities of the units, before the condition that one is on, and the share of the run that has them."""
    if not isinstance(strategy, CoTo):
        return {(1.0,) * len(units): 1.0}
    total = strategy.total_steps or 1
    points = min(total, MOST_STEPS)
    found: Counter[tuple[float, ...]] = Counter()
    for at in range(points):
        here = strategy.probabilities(at * total // points, units)
        if not any(here):  # the limit: relative to each other as for a p that is nearly 0
            here = replace(strategy, curve="constant", start=1e-150).probabilities(0, units)
        found[here] += 1
    return {here: count / points for here, count in found.items()}


def _any(sets: np.ndarray, chances: Mapping[tuple[float, ...], float]) -> np.ndarray:
    """For each state of the schedule (rows) and set of units (columns), the chance that one of the set is on."""
    p = np.minimum(np.array(list(chances)), 1 - 1e-16)
    return -np.expm1(np.log1p(-p) @ sets.T)


def _bits(sets: Sequence[int], count: int) -> np.ndarray:
    return np.array([[float(one >> at & 1) for at in range(count)] for one in sets]).reshape(len(sets), count)


class _Odds:
    """Mean over the schedule of the chance that a unit is on together with at least one of a set."""

    def __init__(self, sets: Sequence[int], chances: Mapping[tuple[float, ...], float], count: int) -> None:
        self.count = count
        if not count:
            return
        self.share = np.array(list(chances.values()))
        states = np.array(list(chances))
        some = _any(np.ones((1, count)), chances)
        self.on = states / some
        self.column = {one: at for at, one in enumerate(sets)}
        self.hit = _any(_bits(sets, count), chances) / some
        self.plain = states

    def __call__(self, owner: int | None, units: int) -> float:
        """``units``: a set as bits; ``owner`` None stands for what always happens."""
        sure = bool(units >> self.count & 1)
        if owner is None:
            return 1.0 if sure else float(self.share @ self.hit[:, self.column[units]]) if units else 0.0
        if not units:
            return 0.0
        if sure or units >> owner & 1:
            return float(self.share @ self.on[:, owner])
        return float(self.share @ (self.plain[:, owner] * self.hit[:, self.column[units]]))


def _cost(
    flops: Mapping[Any, int], chances: Mapping[tuple[float, ...], float], count: int, blocks: Sequence[Any] | None
) -> float:
    """Mean operations of one forward and backward pass; with ``blocks``, those are computed again in backward."""
    everything = (1 << count + 1) - 1
    sets = {units for product in flops for units in product.operands} | {block.units for block in blocks or ()}
    odds = _Odds(sorted(sets), chances, count)
    total = 0.0
    for product, size in flops.items():
        happens = odds(product.owner, everything)
        total += size * happens
        total += size * sum(odds(product.owner, units) for units in product.operands)
        if blocks is not None and product.block is not None and product.again != NEVER:
            total += size * odds(product.owner if product.again is None else product.again, blocks[product.block].units)
    return total


# --- memory and communication ----------------------------------------------------------------------------------------


def _memory(recipe: Recipe, trace: Any, trained: _Trained, world: int, split: tuple[bool, bool, bool]) -> Memory:
    base, wider = _base(recipe, trace)
    each = trace.bytes_of[1] / max(trace.trainable, 1)
    size, frozen = each * trained.weights, trace.bytes_of[2]
    dense = round(each * trained.entries)  # LoRI's B is laid out whole for every pass
    copies = (
        base // 2 if recipe.train.bf16 and recipe.dtype == "float32" else 0
    )  # autocast keeps each weight in bfloat16 too, from forward to backward
    optimizer, gradients, weights = (world if one else 1 for one in split)
    saved = [block.saved for block in trace.blocks]
    outside = trace.saved + dense + copies
    output = trace.logits * (2 if recipe.train.bf16 or recipe.dtype in ("bfloat16", "float16") else 4)
    return Memory(
        weights=-(-base // weights),
        adapter=-(-round(size + frozen + INDEX * trained.kept) // weights),
        gradients=-(-round(size) // gradients),
        optimizer=-(-round(size * ADAMW) // optimizer),
        gathered=round(2 * wider * max((b.weights for b in trace.blocks), default=base)) if weights > 1 else 0,
        activations=outside + sum(saved),
        checkpoints=outside + sum(block.given for block in trace.blocks),
        block=max(saved, default=0),
        logits=output + trace.logits_saved + 2 * 4 * trace.logits,
        output=output,
        working=3 * trace.largest,
    )


def _base(recipe: Recipe, trace: Any) -> tuple[int, float]:
    """Bytes of the base's weights, and how much wider they are than those of the pass that was watched."""
    plain = 2 if recipe.dtype in ("bfloat16", "float16") else 4
    size = round(plain * (trace.base - trace.linear) + SIZES.get(recipe.dtype, plain) * trace.linear)
    return size, size / max(trace.bytes_of[0], 1)


def _communication(
    recipe: Recipe,
    trace: Any,
    trained_and_passes: tuple[_Trained, int],
    chances: Mapping[tuple[float, ...], float],
    world: int,
    sharding: str,
) -> Communication:
    """Ring algorithms: reduce-scatter and all-gather of V bytes send V (N - 1) / N a rank, an all-reduce both."""
    trained, passes = trained_and_passes
    base, wider = _base(recipe, trace)
    size, frozen = trace.bytes_of[1] / max(trace.trainable, 1) * trained.weights, trace.bytes_of[2]
    way = (world - 1) / world
    count = len(trace.units)
    sets = sorted({1 << at for at in range(count)} | {block.units for block in trace.blocks})
    odds = _Odds(sets, chances, count)
    off = 0.0  # share of the trained weights that is switched off
    if trained.weights:
        off = sum(n * (1 - odds(None, 1 << at)) for at, n in enumerate(trace.by_unit)) * trained.share / trained.weights
    times = 2 if sharding == "ddp" else 1 if sharding == "zero1" else passes
    weights = 0.0
    if SHARDINGS[sharding][2]:
        again = wider * sum(block.weights * odds(None, block.units) for block in trace.blocks)
        weights = way * passes * (base + size + frozen + again)  # what lies outside of blocks stays after forward
    elif sharding != "ddp":
        weights = way * size
    return Communication(round(way * times * size), way * times * size * (1 - off), weights)
