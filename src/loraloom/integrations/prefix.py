"""Many variants of one adapter scored together: a pass begins where a variant differs, and may carry several.

Variants that have some modules of an adapter and lack others are switched by gates on one attached model. In an order
that puts beginnings that are alike side by side, the blocks below the first changed module would compute again what
they did for the variant before; what went into that block is kept instead, and the pass begins there. Blocks below hand
their input on. All else of the model (embeddings, masks, positions) runs as ever, so no architecture is known here.

Where a batch has few rows, several variants go through one pass, each block with the rows of as many as differ up to it
(``rows``). The blocks to run are as many as one by one, in fewer and larger steps; rounding may differ in last bits.

Whether a model can do that is tried out on two examples before it is used: at every block, the outputs must be those of
the whole pass. Where they are not, no pass begins there (LLaVA reads its picture tower before the last block); where
they are at none, every pass is whole, and :attr:`Plan.why` says why. Likewise for several variants in one pass.

What is kept is bounded by ``memory``. A state that has no room is not kept: passes then begin lower, and stay exact.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loraloom.adapter import Adapter, Factors
from loraloom.contents import of_factors, of_settings
from loraloom.integrations.gates import Gates
from loraloom.integrations.trial import shared, tried
from loraloom.integrations.trunk import MEMORY, Shape, Trunk
from loraloom.probes.game import Work, check_whole

_FEWEST = 4  # variants in a pass; fewer gain next to nothing
_STATES = 640  # of a pass: tokens of all its rows; more is no faster on a processor (benchmarks/attribution.py)
_RUN = 64  # variants, or fewer, so that there are several runs to share among processes
_RUNS = 4
_TRIED = 2  # examples
_PART = re.compile(r"\[[^\[\]]*\]$")  # of a module that holds several updates: a modality, an expert


@dataclass(frozen=True)
class Plan:
    """How several adapters are scored.

    Attributes:
        runs: their indices, so that those with the same beginning follow each other. A score depends, to its last bit,
            on nothing but what is in its run and the order there.
        passes: blocks to run, each over all examples.
        naive: how many it would be if every pass began at the bottom; 0 where the blocks are not known.
        why: what keeps passes from beginning higher, or from carrying several variants where batches are small; empty
            where nothing does.
    """

    runs: tuple[tuple[int, ...], ...]
    passes: int
    naive: int
    why: str

    def added_to(self, work: Work, adapters: int) -> Work:
        """What is done once this is done too."""
        return Work(work.passes + self.passes, work.whole + self.naive, work.unknown + adapters * (not self.naive))


class Scores:
    """A score for probes, better at many adapters than at one (see the module).

    Args:
        bench: the model set up for a task (``ll.bench``).
        split: train, validation or test.
        limit: only the first so many examples.
        memory: bytes of states that may be kept.
        rows: as many variants share a pass as have this many rows together, at least four; 1 is off. By default as long
            as that is faster on a processor, and never more than those of a full batch.

    Attributes:
        work: blocks to run for all that was asked for, as planned.
        why: of the last :meth:`many`, as in :class:`Plan`.
        ran: blocks that did run for adapters that were asked for together, means over batches; a block that ran for
            several variants counts for each.

    Raises:
        ValueError: ``rows`` is no whole number of at least 1.
    """

    def __init__(
        self,
        bench: Any,
        split: str = "test",
        limit: int | None = None,
        *,
        memory: int = MEMORY,
        rows: int | None = None,
    ) -> None:
        if rows is not None:
            check_whole("rows", rows, 1)
        self.bench, self.split, self.limit, self.memory, self.rows = bench, split, limit, memory, rows
        self.work = Work()
        self.why = ""
        self.ran = 0.0
        self._shapes: dict[Any, Shape | str] = {}

    def __call__(self, adapter: Adapter | None) -> float:
        """The score of one adapter, or of the base."""
        self.work = self.work._replace(unknown=self.work.unknown + 1)
        return self._alone(adapter)

    def _alone(self, adapter: Adapter | None) -> float:
        return float(self.bench.evaluate(adapter, self.split, self.limit).value)

    def many(self, adapters: Sequence[Adapter | None]) -> list[float]:
        """The scores of several, in the order given."""
        plan = self.plan(adapters)
        self.work, self.why = plan.added_to(self.work, len(adapters)), plan.why
        found = dict(self.stream(adapters, plan.runs))
        return [found[at] for at in range(len(adapters))]

    def plan(self, adapters: Sequence[Adapter | None]) -> Plan:
        """How they would best be scored; attaches and runs two examples the first time."""
        singles = tuple((at,) for at in range(len(adapters)))
        family = Family.of(adapters)
        shape = family if isinstance(family, str) else self._shape(family)
        if isinstance(shape, str):
            return Plan(singles, 0, 0, shape)
        switches = [shape.switches(one) for one in adapters]
        order = sorted(range(len(adapters)), key=switches.__getitem__)
        copies = self._copies(shape)
        length = copies * -(-min(_RUN, -(-len(order) // _RUNS)) // copies) if copies > 1 else 1
        runs = tuple(tuple(order[at : at + length]) for at in range(0, len(order), length))
        naive = len(order) * shape.blocks
        saved = sum(sum(shape.starts([switches[at] for at in some])) for some in _stretches(runs))
        return Plan(runs, naive - saved, naive, shape.why or shape.apart)

    def stream(self, adapters: Sequence[Adapter | None], runs: Sequence[Sequence[int]]) -> Iterator[tuple[int, float]]:
        """Index and score of each adapter in some runs of a plan, as they come; close it if it is not run to its end.

        Args:
            adapters: those that the plan is of.
            runs: of the plan; those of one adapter follow each other as one.
        """
        if not runs:
            return
        family = Family.of(adapters)
        shape = family if isinstance(family, str) else self._shape(family)
        if isinstance(family, str) or isinstance(shape, str):
            yield from ((at, self._alone(adapters[at])) for run in runs for at in run)
            return
        copies = self._copies(shape)
        self.bench.ready(self.split, self.limit)
        with self.bench.seat.attached(family.union) as live:
            trunk = Trunk(live, shape, Gates(live, "module"), self.memory)
            with trunk.running(several=copies > 1):
                for some in _stretches(runs):
                    left = iter(some)
                    for given in shape.passes([shape.switches(adapters[at]) for at in some], copies):
                        trunk.begin(given)
                        found = self.bench.outcomes(live, self.split, self.limit, len(given.starts))
                        self.ran += trunk.ran / max(1, trunk.batch + 1)
                        yield from ((next(left), float(one.value)) for one in found)

    def _shape(self, family: Family) -> Shape | str:
        """What the model allows, or why it is not even switched."""
        key = (family.settings, *sorted(family.union.modules))
        if key not in self._shapes:
            if self.bench.task.judge:
                return "answers are written token by token"
            examples = self.bench.ready(self.split, self.limit)[:_TRIED]
            with self.bench.seat.attached(family.union) as live, torch.inference_mode():
                run = partial(self.bench.choices, live, examples)
                shape = tried(live, family.parts, run)
                if isinstance(shape, Shape) and not shape.why and self._fit(shape) > 1:
                    shape = shared(live, shape, run)
            self._shapes[key] = shape
        return self._shapes[key]

    def _copies(self, shape: Shape) -> int:
        """How many variants may share a pass."""
        return self._fit(shape) if shape.floor < shape.blocks else 1

    def _fit(self, shape: Shape) -> int:
        """How many have room in one, with as many rows and tokens an example as the tried ones had."""
        count, batch = max(1, len(self.bench.ready(self.split, self.limit))), self.bench.batch
        rows, states = (one * min(count, batch) / min(count, _TRIED) for one in (shape.rows, shape.states))
        copies = min(batch // min(count, batch), _STATES // states) if self.rows is None else self.rows // rows
        return int(copies) if copies >= _FEWEST else 1


def _stretches(runs: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """What is passed without a break: each run, but those of one alone together, which are the same bits anyway."""
    alone = all(len(run) == 1 for run in runs)
    return [list(itertools.chain.from_iterable(runs))] if alone else runs


@dataclass(frozen=True)
class Family:
    """Adapters that are one adapter with modules left out.

    Attributes:
        union: the adapter with all modules that any of them has.
        settings: fingerprint of the rest.
        parts: names of the adapter's modules by path in the model.
    """

    union: Adapter
    settings: str
    parts: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, adapters: Sequence[Adapter | None]) -> Family | str:
        """The family, or why there is none."""
        given = [one for one in adapters if one is not None]
        if len(adapters) < 2 or not given:
            return "one adapter alone has nothing to share"
        settings = of_settings(given[0])
        if any(of_settings(one) != settings for one in given[1:]):
            return "the adapters differ in more than the modules that they have"
        if given[0].extras and len(given) < len(adapters):
            return "the base lacks the adapter's whole tensors"
        modules: dict[str, Factors] = {}
        prints: dict[str, str] = {}
        parts: dict[str, dict[str, None]] = {}
        for one in given:
            for name in one.modules:
                factors = one.modules[name]
                if prints.setdefault(name, of_factors(factors)) != of_factors(factors):
                    return f"the adapters differ in what they hold of {name}"
                modules.setdefault(name, factors)
                parts.setdefault(_PART.sub("", name), {})[name] = None
        if any(0 < len(held & set(one.modules)) < len(held) for held in map(set, parts.values()) for one in given):
            return "some of a module's updates are on while others are off"
        union = Adapter(given[0].config, modules, given[0].extras, given[0].provenance)
        return cls(union, settings, {path: tuple(names) for path, names in parts.items()})
