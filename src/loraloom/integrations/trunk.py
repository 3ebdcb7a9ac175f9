"""The blocks of a model with an adapter on: in which order they run, and forward passes that begin at one of them.

What ran before is not known here but for this: a block gets the hidden states and hands them on. Whether that is all is
tried out at every block.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapter import Adapter, UnsupportedKind
from loraloom.integrations.gates import Gates
from loraloom.strategies.units import layer

MEMORY = 1 << 30  # bytes of states that are kept at most, on the model's device
_FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


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
    """

    parts: Mapping[str, tuple[str, ...]]
    depths: tuple[int, ...]
    order: tuple[int, ...]
    forms: tuple[int, ...]
    why: str
    refused: frozenset[int] = frozenset()

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
        """The block at which each pass may begin, after the one before it."""
        return [0, *(0 if self.why else self._alike(one, other) for one, other in pairwise(rows))] if rows else []

    def _alike(self, one: Sequence[bool], other: Sequence[bool]) -> int:
        """How many blocks from the bottom compute the same."""
        changed = (depth for depth, a, b in zip(self.depths, one, other, strict=True) if a != b)
        at = min(max(next(changed, self.blocks), 0), max(self.blocks - 1, 0))
        while at in self.refused:
            at -= 1
        return at

    def keeps(self, rows: Sequence[Sequence[bool]]) -> list[frozenset[int]]:
        """For each pass the blocks whose input a later one begins with, before another pass changes it.

        Example:
            >>> shape = Shape({"a": ("a",), "b": ("b",)}, (0, 1), (0, 1), (0, 0), "")
            >>> shape.keeps([(False, False), (False, True), (True, False)])
            [frozenset({1}), frozenset(), frozenset()]
        """
        starts, found = self.starts(rows), []
        for at, start in enumerate(starts):
            lowest, kept = self.blocks, set()
            for later in starts[at + 1 :]:
                if later < lowest:
                    lowest = later
                    kept.add(later)
                if later <= start:
                    break
            found.append(frozenset(one for one in kept if one > start))
        return found


@dataclass
class Trunk:
    """The blocks of a live model; inside :meth:`running` a pass begins where it may.

    Attributes:
        live: a PeftModel.
        shape: of :func:`tried`.
        memory: bytes that may be kept.
        ran: blocks that have run since :meth:`begin`, over all batches.
        batch: number of the last batch since then, from 0.
        held: bytes that are kept.
    """

    live: Any
    shape: Shape
    memory: int = MEMORY
    ran: int = 0
    batch: int = -1
    held: int = 0
    _limit: int = 0
    _start: int = 0
    _keep: frozenset[int] = frozenset()
    _states: list[dict[int, Tensor]] = field(default_factory=list)

    def begin(self, start: int, keep: frozenset[int]) -> None:
        """Before each evaluation: where its passes may begin, and what is wanted of them later."""
        self._limit, self._keep, self.batch, self.ran = start, keep, -1, 0
        for states in self._states:
            for at in [at for at in states if at > start]:
                self.held -= states.pop(at).nbytes

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model's blocks run under control inside; afterwards the model is as before, and nothing is kept."""
        found = blocks_of(self.live, self.shape.parts)
        blocks = [found[at] for at in self.shape.order]
        before = [vars(block).get("forward") for block in blocks]
        hook = self.live.register_forward_pre_hook(self._next_batch)
        for at, block in enumerate(blocks):
            block.forward = partial(self._run, at, block.forward)
        try:
            yield
        finally:
            hook.remove()
            for block, own in zip(blocks, before, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own
            self._states, self.held = [], 0

    def _next_batch(self, module: nn.Module, arguments: tuple) -> None:
        self.batch += 1
        if self.batch == len(self._states):
            self._states.append({})
        self._start = max((at for at in self._states[self.batch] if at <= self._limit), default=0)

    def _run(self, at: int, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        states, hidden = self._states[self.batch], _hidden(arguments, named)
        if at < self._start:
            length = self.shape.forms[at]
            return (hidden, *[None] * (length - 1)) if length else hidden
        self.ran += 1
        if at == self._start and at in states:
            hidden = states[at].clone()  # a block may write into its input
        elif at in self._keep and self.held + hidden.nbytes <= self.memory:
            states[at] = hidden.clone()
            self.held += hidden.nbytes
        if arguments:
            return forward(hidden, *arguments[1:], **named)
        return forward(**{**named, "hidden_states": hidden})


def blocks_of(live: Any, paths: Iterable[str]) -> list[nn.Module]:
    """The transformer blocks of a PeftModel: all entries of the lists that the layers with adapters stand in."""
    base = live.get_base_model()
    homes = dict.fromkeys(layer(path).rpartition(".")[0] for path in paths if layer(path) != path)
    lists = [base.get_submodule(home) for home in homes if home]
    return [block for held in lists if isinstance(held, nn.ModuleList | nn.Sequential) for block in held]


def tried(live: Any, parts: Mapping[str, tuple[str, ...]], run: Callable[[], Any]) -> Shape | str:
    """Find out in which order blocks and modules run, and whether a pass may begin at any of them.

    Args:
        live: a PeftModel with all modules on.
        parts: as in :class:`Family`.
        run: one forward pass of it.

    Returns:
        The shape, or why modules cannot be switched by themselves.
    """
    try:
        units = Gates(live, "module").units
    except UnsupportedKind as error:
        return str(error)
    if strange := set(units) ^ set(parts):
        return f"{min(strange)} is no layer that is switched by itself"
    seen = Seen(live, parts)
    with seen.watching():
        run()
    depths = {path: seen.depths.get(path, len(seen.order)) for path in parts}
    ordered = sorted(parts, key=depths.__getitem__)
    depth = tuple(depths[path] for path in ordered)
    forms = tuple(seen.forms.get(at, 0) for at in seen.order)
    shape = Shape({path: parts[path] for path in ordered}, depth, tuple(seen.order), forms, seen.why)
    if shape.why:
        return shape
    wrong = _wrong(live, shape, run)
    all_wrong = len(wrong) == shape.blocks - 1 > 0
    return replace(shape, refused=frozenset(wrong), why=wrong[shape.blocks - 1] if all_wrong else "")


def _wrong(live: Any, shape: Shape, run: Callable[[], Any]) -> dict[int, str]:
    """The blocks at which a pass cannot begin, and why: where the outputs are not those of the whole pass."""
    found: dict[int, str] = {}
    outputs: list[list[Tensor]] = []
    hook = live.register_forward_hook(lambda module, arguments, output: outputs.append(_tensors(output)))
    trunk = Trunk(live, shape, memory=sys.maxsize)
    try:
        with trunk.running():
            trunk.begin(0, frozenset(range(1, shape.blocks)))
            run()
            for at in range(shape.blocks - 1, 0, -1):
                trunk.begin(at, frozenset())
                try:
                    run()
                except _FAULTS as error:
                    found[at] = f"a pass cannot begin at block {at}: {' '.join(str(error).split())}"
                    continue
                if trunk.ran != shape.blocks - at or not _same(outputs[0], outputs[-1]):
                    found[at] = f"a pass that begins at block {at} gives other outputs: blocks share more than states"
    finally:
        hook.remove()
    return found


class Seen:
    """What is seen of one forward pass.

    Attributes:
        order: indices of the blocks as they ran.
        depths: by path, the index in ``order`` of the block that was last entered.
        forms: by index of the block, as in :class:`Shape`.
        why: as in :class:`Shape`.
    """

    def __init__(self, live: Any, paths: Iterable[str]) -> None:
        self.order: list[int] = []
        self.depths: dict[str, int] = {}
        self.forms: dict[int, int] = {}
        self.why = ""
        self._live, self._paths, self._inside = live, list(paths), False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the model inside."""
        hooks = []
        for at, block in enumerate(blocks_of(self._live, self._paths)):
            hooks.append(block.register_forward_pre_hook(partial(self._enter, at)))
            hooks.append(block.register_forward_hook(partial(self._leave, at), with_kwargs=True))
        base = self._live.get_base_model()
        for path in self._paths:
            hooks.append(base.get_submodule(path).register_forward_pre_hook(partial(self._reach, path)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if not self.order:
            self.why = "the model has no list of blocks with adapters in them"

    def _reach(self, path: str, module: nn.Module, arguments: tuple) -> None:
        self.depths.setdefault(path, len(self.order) - 1)

    def _enter(self, at: int, module: nn.Module, arguments: tuple) -> None:
        if self._inside or at in self.order:
            self.why = f"{type(module).__name__} runs more than once, or inside another block"
        self._inside = True
        self.order.append(at)

    def _leave(self, at: int, module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        self._inside = False
        several = isinstance(output, tuple)
        self.forms[at] = len(output) if several else 0
        first, rest = (output[0], output[1:]) if several else (output, ())
        given = _hidden(arguments, named)
        if not isinstance(first, Tensor) or not isinstance(given, Tensor) or any(one is not None for one in rest):
            self.why = f"{type(module).__name__} hands on more than its hidden states"
        elif (first.shape, first.dtype) != (given.shape, given.dtype):
            self.why = f"{type(module).__name__} changes the shape of its hidden states"


def _hidden(arguments: tuple, named: Mapping[str, Any]) -> Any:
    return arguments[0] if arguments else named.get("hidden_states")


def _tensors(output: Any) -> list[Tensor]:
    """What a bench reads of an output: the logits or the last hidden states; else all tensors.

    Some outputs hold more, such as a picture's features, which are not made where a pass begins above them.
    """
    if isinstance(output, Tensor):
        return [output]
    held = dict(enumerate(output)) if isinstance(output, tuple) else vars(output)
    read = [held[name] for name in ("logits", "last_hidden_state") if name in held] or held.values()
    return [one for one in read if isinstance(one, Tensor)]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Equal but for what a GPU's kernels may round otherwise."""
    return len(one) == len(other) > 0 and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()), equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )
