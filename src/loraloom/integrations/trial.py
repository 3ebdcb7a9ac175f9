"""What a model with an adapter on allows, tried out: where passes may begin, and what may share one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapter import UnsupportedKind
from loraloom.integrations.gates import Gates
from loraloom.integrations.trunk import Pass, Shape, Trunk, blocks_of, hidden_of, tensors_in

_FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


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
        gates = Gates(live, "module")
    except UnsupportedKind as error:
        return str(error)
    if strange := set(gates.units) ^ set(parts):
        return f"{min(strange)} is no layer that is switched by itself"
    seen = Seen(live, parts)
    with seen.watching():
        run()
    ordered = sorted(parts, key=lambda path: seen.depths.get(path, -1))
    depth = tuple(seen.depths.get(path, -1) for path in ordered)
    forms = tuple(seen.forms.get(at, 0) for at in seen.order)
    shape = Shape({path: parts[path] for path in ordered}, depth, tuple(seen.order), forms, seen.why)
    shape = replace(shape, rows=seen.rows, states=seen.states, fixed=frozenset(seen.fixed))
    if idle := [path for path in parts if path not in seen.depths]:
        shape = replace(shape, why=shape.why or f"{idle[0]} does not run for the examples that were tried")
    if shape.why:
        return shape
    wrong = _wrong(Trunk(live, shape, gates, memory=sys.maxsize), run)
    all_wrong = len(wrong) == shape.blocks - 1 > 0
    return replace(shape, refused=frozenset(wrong), why=wrong[shape.blocks - 1] if all_wrong else "")


def _wrong(trunk: Trunk, run: Callable[[], Any]) -> dict[int, str]:
    """The blocks at which a pass cannot begin, and why: where the outputs are not those of the whole pass."""
    found: dict[int, str] = {}
    shape = trunk.shape
    everything = ((True,) * len(shape.parts),)
    with _outputs(trunk.live) as outputs, trunk.running():
        trunk.begin(Pass(everything, (0,), frozenset(range(1, shape.blocks))))
        run()
        for at in range(shape.blocks - 1, 0, -1):
            trunk.begin(Pass(everything, (at,)))
            try:
                run()
            except _FAULTS as error:
                found[at] = f"a pass cannot begin at block {at}: {_line(error)}"
                continue
            if trunk.ran != shape.blocks - at or not _same(outputs[0], outputs[-1]):
                found[at] = f"a pass that begins at block {at} gives other outputs: blocks share more than states"
    return found


def shared(live: Any, shape: Shape, run: Callable[[int], Any]) -> Shape:
    """Find out whether several variants may share a pass.

    Above the last block at which no pass may begin, too: there one tower may end and another begin.

    Args:
        live: a PeftModel with all modules on.
        shape: of :func:`tried`, for the same examples.
        run: one forward pass, told how many variants it carries.

    Returns:
        The shape with ``floor`` and ``apart``.
    """
    whys: list[str] = []
    for floor in sorted({0, max(shape.refused, default=-1) + 1}):
        if shape.why or floor >= shape.blocks:
            break
        one = replace(shape, floor=floor)
        whys.append(_apart(live, one, run))
        if not whys[-1]:
            return one
    return replace(shape, apart=whys[0] if whys else shape.why)


def _apart(live: Any, shape: Shape, run: Callable[[int], Any]) -> str:
    """Why variants may not part at the floor of a shape; empty where they may.

    Three do here: with all that is above the floor off, with half of it on, and with all.
    """
    ends = (shape.floor, (shape.floor + shape.blocks) // 2, shape.blocks + 1)
    rows = list(dict.fromkeys(tuple(depth < end for depth in shape.depths) for end in ends))
    trunk = Trunk(live, shape, Gates(live, "module"), memory=sys.maxsize)
    with _outputs(live) as outputs, trunk.running(several=True):
        try:
            for most in (1, len(rows)):
                for given in shape.passes(rows, most):
                    trunk.begin(given)
                    run(len(given.starts))
        except _FAULTS as error:
            return f"variants cannot share a pass: {_line(error)}"
    *alone, together = outputs
    if any(one.element_size() < 4 for one in together):
        return "variants that share a pass would be rounded otherwise, which shows in 16 bits"
    parts = zip(*(one.chunk(len(rows)) for one in together), strict=True)
    if len(alone) == len(rows) and all(_same(one, part) for one, part in zip(alone, parts, strict=True)):
        return ""
    return "variants that share a pass give other outputs: rows of a batch are not by themselves"


@contextlib.contextmanager
def _outputs(live: Any) -> Iterator[list[list[Tensor]]]:
    """What a model gives inside, pass by pass."""
    found: list[list[Tensor]] = []
    hook = live.register_forward_hook(lambda module, arguments, output: found.append(_tensors(output)))
    try:
        yield found
    finally:
        hook.remove()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


class Seen:
    """What is seen of one forward pass.

    Attributes:
        order: indices of the blocks as they ran.
        depths: by path, the index in ``order`` of the block that was last entered.
        forms: by index of the block, as in :class:`Shape`.
        why, rows, states, fixed: as in :class:`Shape`.
    """

    def __init__(self, live: Any, paths: Iterable[str]) -> None:
        self.order: list[int] = []
        self.depths: dict[str, int] = {}
        self.forms: dict[int, int] = {}
        self.why = ""
        self.rows = self.states = 1
        self.fixed: set[str] = set()
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
        given = hidden_of(arguments, named)
        if not isinstance(first, Tensor) or not isinstance(given, Tensor) or any(one is not None for one in rest):
            self.why = f"{type(module).__name__} hands on more than its hidden states"
        elif (first.shape, first.dtype) != (given.shape, given.dtype):
            self.why = f"{type(module).__name__} changes the shape of its hidden states"
        else:
            self.rows, self.states = len(given), given.shape[:-1].numel()
            for name, value in {**{str(at): one for at, one in enumerate(arguments)}, **named}.items():
                self.fixed |= {at for at, one in tensors_in(name, value) if one.ndim and len(one) not in (1, self.rows)}


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
