"""Many variants of one adapter scored together: a forward pass begins at the first block in which a variant differs.

Variants that have some modules of an adapter and lack others are switched by gates on one attached model. In an order
that puts beginnings that are alike side by side, the blocks below the first changed module would compute again what
they did for the variant before; what went into that block is kept instead, and the pass begins there. Blocks below hand
their input on. All else of the model (embeddings, masks, positions) runs as ever, so no architecture is known here.

Whether a model can do that is tried out on two examples before it is used: at every block, the outputs must be those of
the whole pass. Where they are not, no pass begins there (LLaVA reads its picture tower before the last block); where
they are at none, every pass is whole, and :attr:`Plan.why` says why.

What is kept is bounded by ``memory``. A state that has no room is not kept: passes then begin lower, and stay exact.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loraloom.adapter import Adapter, Factors
from loraloom.contents import of_factors, of_settings
from loraloom.integrations.gates import Gates
from loraloom.integrations.trunk import MEMORY, Shape, Trunk, tried
from loraloom.probes.game import Work

_TRIED = 2  # examples
_PART = re.compile(r"\[[^\[\]]*\]$")  # of a module that holds several updates: a modality, an expert


@dataclass(frozen=True)
class Plan:
    """How several adapters are scored.

    Attributes:
        order: their indices, so that those with the same beginning follow each other.
        passes: blocks to run, each over all examples.
        naive: how many it would be if every pass began at the bottom; 0 where the blocks are not known.
        why: what keeps passes from beginning higher; empty where nothing does.
    """

    order: tuple[int, ...]
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

    Attributes:
        work: blocks to run for all that was asked for, as planned.
        why: what kept passes of the last :meth:`many` from beginning higher, as in :class:`Plan`.
        ran: blocks that did run for adapters that were asked for together, means over batches.
    """

    def __init__(self, bench: Any, split: str = "test", limit: int | None = None, *, memory: int = MEMORY) -> None:
        self.bench, self.split, self.limit, self.memory = bench, split, limit, memory
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
        found = dict(self.stream(adapters, plan.order))
        return [found[at] for at in range(len(adapters))]

    def plan(self, adapters: Sequence[Adapter | None]) -> Plan:
        """How they would best be scored; attaches and runs two examples the first time."""
        family = Family.of(adapters)
        shape = family if isinstance(family, str) else self._shape(family)
        if isinstance(shape, str):
            return Plan(tuple(range(len(adapters))), 0, 0, shape)
        switches = [shape.switches(one) for one in adapters]
        order = tuple(sorted(range(len(adapters)), key=switches.__getitem__))
        naive = len(order) * shape.blocks
        starts = shape.starts([switches[at] for at in order])
        return Plan(order, naive if shape.why else naive - sum(starts), naive, shape.why)

    def stream(self, adapters: Sequence[Adapter | None], order: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Index and score of each adapter as they come, in the order given; close it if it is not run to its end."""
        family = Family.of([adapters[at] for at in order])
        shape = family if isinstance(family, str) else self._shape(family)
        if isinstance(family, str) or isinstance(shape, str):
            yield from ((at, self._alone(adapters[at])) for at in order)
            return
        switches = [shape.switches(adapters[at]) for at in order]
        self.bench.ready(self.split, self.limit)
        with self.bench.seat.attached(family.union) as live:
            gates, trunk = Gates(live, "module"), Trunk(live, shape, self.memory)
            starts, keeps = shape.starts(switches), shape.keeps(switches)
            with trunk.running(), contextlib.ExitStack() as after:
                after.callback(gates.open)
                for at, start, keep, switch in zip(order, starts, keeps, switches, strict=True):
                    gates.set(shape.gates(switch, gates.units))
                    trunk.begin(start, keep)
                    value = float(self.bench.outcome(live, self.split, self.limit).value)
                    self.ran += trunk.ran / max(1, trunk.batch + 1)
                    yield at, value

    def _shape(self, family: Family) -> Shape | str:
        """What the model allows, or why it is not even switched."""
        key = (family.settings, *sorted(family.union.modules))
        if key not in self._shapes:
            if self.bench.task.judge:
                return "answers are written token by token"
            examples = self.bench.ready(self.split, self.limit)[:_TRIED]
            with self.bench.seat.attached(family.union) as live, torch.inference_mode():
                self._shapes[key] = tried(live, family.parts, partial(self.bench.choose, live, examples))
        return self._shapes[key]


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
