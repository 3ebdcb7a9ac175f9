"""The blocks of a model with an adapter on: passes that begin at one of them and carry several variants.

Variants of one pass run as one as long as they are alike. Where one leaves the one before it, the rows of a batch are
there once more from that block on, and each adapted layer takes its adapter for the rows of those that have it. All
else of the model (embeddings, masks, positions) runs as ever, once for all.

What ran before a block is not known here but for this: a block gets the hidden states and hands them on. Whether that
is all is tried out (``integrations/trial.py``).
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapter import Adapter
from loraloom.integrations.gates import Gates
from loraloom.strategies.units import layer

MEMORY = 1 << 30  # bytes of states that are kept at most, on the model's device
NOWHERE = sys.maxsize


@dataclass(frozen=True)
class Pass:
    """One forward pass over every batch, of one variant or of several.

    Attributes:
        switches: of each variant, as :meth:`Shape.switches` tells them.
        starts: for each the block at which it leaves the one before it, in this pass or before.
        keep: the blocks whose input later passes begin with.
    """

    switches: tuple[Sequence[bool], ...]
    starts: tuple[int, ...]
    keep: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Shape:
    """What was found of a model with an adapter on.

    Attributes:
        parts: names of the adapter's modules by path, in the order in which they run.
        depths: index of the block in which each path runs, the highest below it where it is in none; -1 is none.
        order: the blocks, as indices of those that :func:`blocks_of` lists, in the order in which they run.
        forms: for each block the length of the tuple that it returns, 0 where it is the hidden states alone.
        why: what keeps every pass from beginning above the bottom; empty where nothing does.
        refused: the blocks at which a pass must not begin, as what is below them is also used elsewhere.
        rows: of the last block's input, in the pass that was tried.
        states: that it had, tokens of all rows.
        fixed: arguments of blocks that do not go by rows.
        floor: the lowest block at which variants of one pass may part.
        apart: why they may not part at any, where that was tried.
    """

    parts: Mapping[str, tuple[str, ...]]
    depths: tuple[int, ...]
    order: tuple[int, ...]
    forms: tuple[int, ...]
    why: str
    refused: frozenset[int] = frozenset()
    rows: int = 1
    states: int = 1
    fixed: frozenset[str] = frozenset()
    floor: int = NOWHERE
    apart: str = ""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.order)

    def switches(self, adapter: Adapter | None) -> tuple[bool, ...]:
        """For each path whether the adapter has it."""
        return tuple(adapter is not None and names[0] in adapter.modules for names in self.parts.values())

    def gates(self, switches: Sequence[bool], units: Sequence[str]) -> list[bool]:
        """The same in the order of the gates."""
        by = dict(zip(self.parts, switches, strict=True))
        return [by[unit] for unit in units]

    def starts(self, rows: Sequence[Sequence[bool]]) -> list[int]:
        """The block at which each variant may begin, after the one before it."""
        alike = itertools.starmap(self._alike, itertools.pairwise(rows))
        return [0, *(0 if self.why else at for at in alike)] if rows else []

    def _alike(self, one: Sequence[bool], other: Sequence[bool]) -> int:
        """How many blocks from the bottom compute the same."""
        changed = (depth for depth, a, b in zip(self.depths, one, other, strict=True) if a != b)
        at = min(max(next(changed, self.blocks), 0), max(self.blocks - 1, 0))
        while at in self.refused:
            at -= 1
        return at

    def passes(self, rows: Sequence[Sequence[bool]], most: int = 1) -> list[Pass]:
        """How variants are passed in the order given, at most so many in one pass; the first begins at the bottom.

        Example:
            >>> shape = Shape({"a": ("a",), "b": ("b",)}, (0, 1), (0, 1), (0, 0), "", floor=0)
            >>> for one in shape.passes([(False, False), (False, True), (True, False)], 2):
            ...     print(one.starts, sorted(one.keep))
            (0, 1) []
            (0,) []
        """
        below = sum(depth < 0 for depth in self.depths)
        starts = self.starts(rows)
        groups: list[list[int]] = []
        for at, start in enumerate(starts):
            alike = at > 0 and start >= self.floor and rows[at][:below] == rows[at - 1][:below]
            if alike and len(groups[-1]) < most:
                groups[-1].append(at)
            else:
                groups.append([at])
        begun = [tuple(starts[at] for at in group) for group in groups]
        return [
            Pass(tuple(rows[at] for at in group), own, keep)
            for group, own, keep in zip(groups, begun, self.keeps(begun), strict=True)
        ]

    def keeps(self, starts: Sequence[Sequence[int]]) -> list[frozenset[int]]:
        """For each pass, told by its starts, the blocks whose input a later one begins with before another changes it.

        Example:
            >>> shape = Shape({"a": ("a",), "b": ("b",)}, (0, 1), (0, 1), (0, 0), "")
            >>> shape.keeps([(0,), (1,), (0,)])
            [frozenset({1}), frozenset(), frozenset()]
        """
        found = []
        for at, own in enumerate(starts):
            lowest, kept = self.blocks, set()
            for later in itertools.chain.from_iterable(starts[at + 1 :]):
                if later < lowest:
                    lowest = later
                    kept.add(later)
                if later <= min(own):
                    break
            found.append(frozenset(one for one in kept if one > min(own)))
        return found


@dataclass
class Trunk:
    """The blocks of a live model; inside :meth:`running` a pass begins where it may.

    Attributes:
        live: a PeftModel.
        shape: of ``trial.tried``.
        gates: of its modules; a pass sets them.
        memory: bytes that may be kept.
        ran: blocks that have run since :meth:`begin`, over all batches; once for each variant that was in them.
        batch: number of the last batch since then, from 0.
        held: bytes that are kept.
    """

    live: Any
    shape: Shape
    gates: Gates
    memory: int = MEMORY
    ran: int = 0
    batch: int = -1
    held: int = 0
    _pass: Pass = Pass((), ())
    _starts: list[int] = field(default_factory=list)
    _inside: list[int] = field(default_factory=list)  # variants that have rows of their own in the block that runs
    _states: list[dict[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._paths = list(self.shape.parts)

    def begin(self, given: Pass) -> None:
        """Before each evaluation: what its passes carry.

        A model then answers every batch with as many times its rows as there are variants, one after the other.
        """
        self._pass, self.batch, self.ran = given, -1, 0
        self.gates.set(self.shape.gates(given.switches[0], self.gates.units))
        begun_with = set(itertools.accumulate(given.starts, min))
        for states in self._states:
            for at in [at for at in states if at > min(given.starts) and at not in begun_with]:
                self.held -= states.pop(at).nbytes

    @contextlib.contextmanager
    def running(self, several: bool = False) -> Iterator[None]:
        """The model's blocks run under control inside; afterwards the model is as before, and nothing is kept.

        Args:
            several: whether a pass carries several variants.
        """
        found, base = blocks_of(self.live, self.shape.parts), self.live.get_base_model()
        runs: list[tuple[Any, Callable[..., Any]]] = [
            (found[index], partial(self._run, at)) for at, index in enumerate(self.shape.order)
        ]
        if several:
            runs += [(base.get_submodule(path), partial(self._adapt, at)) for at, path in enumerate(self.shape.parts)]
        before = [vars(module).get("forward") for module, _ in runs]
        hook = self.live.register_forward_pre_hook(self._next_batch)
        for module, run in runs:
            module.forward = partial(run, module.forward)
        try:
            yield
        finally:
            hook.remove()
            for (module, _), own in zip(runs, before, strict=True):
                del module.forward
                if own is not None:
                    module.forward = own
            self.gates.open()
            self._states, self.held = [], 0

    def _next_batch(self, module: nn.Module, arguments: tuple) -> None:
        self.batch += 1
        self._inside, self._starts = [], []
        if self.batch == len(self._states):
            self._states.append({})
        for start in self._pass.starts:
            kept = [at for at in self._states[self.batch] if at <= start]
            begins_with_kept = all(start <= earlier for earlier in self._starts)
            self._starts.append(max(kept, default=0) if begins_with_kept else start)

    def _run(self, at: int, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        hidden = hidden_of(arguments, named)
        before = self._inside
        self._inside = [one for one, start in enumerate(self._starts) if start <= at]
        if not self._inside:
            length = self.shape.forms[at]
            return (hidden, *[None] * (length - 1)) if length else hidden
        self.ran += len(self._inside)
        hidden = self._joined(at, hidden, before)
        rest = {str(place): one for place, one in enumerate(arguments[1:], 1)}
        named = {name: one for name, one in named.items() if arguments or name != "hidden_states"}
        times = len(self._inside)
        if times > 1:
            repeat = partial(_repeated, rows=len(hidden) // times, times=times, fixed=self.shape.fixed)
            rest, named = ({name: repeat(name, one) for name, one in some.items()} for some in (rest, named))
        return forward(hidden, *rest.values(), **named) if arguments else forward(hidden_states=hidden, **named)

    def _joined(self, at: int, hidden: Tensor, before: Sequence[int]) -> Tensor:
        """The input of a block for all variants in it, of that for those that were in the block below."""
        states = self._states[self.batch]
        parts = hidden.chunk(max(1, len(before)))
        own = dict(zip(before, parts, strict=False))
        last = states.get(at, hidden)  # what a variant begins with where no other of this pass goes before it
        inputs = [last := own.get(one, last) for one in self._inside]
        if before and at in states:
            self.held -= states.pop(at).nbytes
        if before and at in self._pass.keep and self.held + parts[-1].nbytes <= self.memory:
            states[at] = parts[-1].clone()
            self.held += parts[-1].nbytes
        return hidden if self._inside == before else torch.cat(inputs)  # new memory: a block may write into its input

    def _adapt(self, at: int, forward: Callable[..., Any], hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        """An adapted layer: with its adapter for the rows of the variants that have it, without for the others."""
        path = self._paths[at]
        on = [bool(self._pass.switches[one][at]) for one in self._inside]
        if len(set(on)) < 2:
            if on:
                self.gates.set_one(path, on[0])
            return forward(hidden, *arguments, **named)
        if len(hidden) % len(on):
            raise ValueError(f"{path} sees {len(hidden)} rows, of which it is not told whose they are")
        parts, made = hidden.chunk(len(on)), {}
        for open_ in (False, True):
            self.gates.set_one(path, open_)
            rows = torch.cat([part for part, its in zip(parts, on, strict=True) if its is open_])
            made[open_] = iter(forward(rows, *arguments, **named).chunk(on.count(open_)))
        return torch.cat([next(made[its]) for its in on])


def blocks_of(live: Any, paths: Iterable[str]) -> list[nn.Module]:
    """The transformer blocks of a PeftModel: all entries of the lists that the layers with adapters stand in."""
    base = live.get_base_model()
    homes = dict.fromkeys(layer(path).rpartition(".")[0] for path in paths if layer(path) != path)
    lists = [base.get_submodule(home) for home in homes if home]
    return [block for held in lists if isinstance(held, nn.ModuleList | nn.Sequential) for block in held]


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an argument by name; of those in a tuple or list also the place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for at, one in enumerate(value):
            yield from tensors_in(f"{name}.{at}", one)


def _repeated(name: str, value: Any, rows: int, times: int, fixed: frozenset[str]) -> Any:
    """An argument of a block, those of its tensors that go by rows repeated."""
    if isinstance(value, tuple | list):
        return tuple(_repeated(f"{name}.{at}", one, rows, times, fixed) for at, one in enumerate(value))
    goes = isinstance(value, Tensor) and value.ndim and len(value) == rows and name not in fixed
    return torch.cat([value] * times) if goes else value


def hidden_of(arguments: tuple, named: Mapping[str, Any]) -> Any:
    """The hidden states among the arguments of a block."""
    return arguments[0] if arguments else named.get("hidden_states")
