"""Mode connectivity: how well do the adapters on the paths between two adapters work?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from loraloom.adapter import Adapter
from loraloom.ops.align import align as aligned
from loraloom.ops.interpolate import interpolate
from loraloom.ops.merge import merge
from loraloom.probes import probes
from loraloom.probes.game import finite, many


@dataclass(frozen=True)
class Path:
    """Scores along one path from a to b.

    Attributes:
        space: in which it is straight, or a parabola: ``delta`` or ``factors``.
        align: how b and the control point were brought to a's gauge first; None: not at all.
        bent: whether it is the Bezier curve with the control point, which it does not go through.
        scores: of the adapter at each position.
        barrier: how far the path sinks below the line between the end scores, at its worst point; at least 0.
        drop: how far its lowest score, ends included, is below the mean of the end scores; at least 0.
        lowest: the position of the lowest score.
        centre: score of the 1:1:1 mean of a, b and the control point in this space; None where there is none.
    """

    space: str
    align: str | None
    bent: bool
    scores: tuple[float, ...]
    barrier: float
    drop: float
    lowest: float
    centre: float | None = None

    @property
    def name(self) -> str:
        """The space, then what else sets it apart: ``factors, invertible, bent``."""
        return ", ".join([self.space, *([self.align] if self.align else []), *(["bent"] if self.bent else [])])


@dataclass(frozen=True)
class Connectivity:
    """Scores along one path of two adapters or several.

    Attributes:
        at: positions on every path, evenly from 0 (a) to 1 (b).
        paths: what was found on each.
        evaluations: calls of the score. The ends are those of all paths and are scored once.
    """

    at: tuple[float, ...]
    paths: tuple[Path, ...]
    evaluations: int

    @property
    def scores(self) -> tuple[float, ...]:
        """Those of the first path."""
        return self.paths[0].scores

    @property
    def barrier(self) -> float:
        """That of the first path."""
        return self.paths[0].barrier

    @property
    def space(self) -> str:
        """That of the first path."""
        return self.paths[0].space

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists; ``scores``, ``barrier`` and ``space`` are those of the first path."""
        paths = [{"name": path.name, **asdict(path), "scores": list(path.scores)} for path in self.paths]
        first = {"scores": list(self.scores), "barrier": self.barrier, "space": self.space}
        return {"at": list(self.at), **first, "paths": paths, "evaluations": self.evaluations}


@probes.register("connectivity", paper="https://arxiv.org/abs/2110.06296")
def connectivity(
    a: Adapter,
    b: Adapter,
    score: Callable[[Adapter | None], float],
    points: int = 11,
    space: str | Sequence[str] = "delta",
    *,
    via: Adapter | None = None,
    align: str | Sequence[str | None] | None = None,
) -> Connectivity:
    """Score along the paths from ``a`` to ``b``: straight ones, and with ``via`` bent ones too.

    There is a straight path for every space and, in ``factors``, every alignment; with ``via`` also the quadratic
    Bezier curve of each (Garipov et al. 2018, arXiv 1802.10026, section 3) and the 1:1:1 mean of the three. An
    alignment changes no update, so it changes nothing in ``delta`` and is left out there.

    A path has two heights. ``barrier`` is ``max_t (1-t) s(0) + t s(1) - s(t)``, that of Entezari et al. 2022, section 2
    (there of a loss, so the sign is turned). ``drop`` is ``(s(0) + s(1)) / 2 - min_t s(t)``, that of Frankle et al.
    2020 (arXiv 1912.05671), section 2. They are the same where both ends score the same. Both are those of the points
    looked at: more points in between can only find higher ones, and where the score is an accuracy on few examples the
    highest of many differences is above 0 by chance alone.

    Args:
        a: where t is 0.
        b: where t is 1.
        score: called once for each point, in the order of t, path by path, and of the ends once; higher is better.
        points: how many points, ends included, at least 2.
        space: ``delta``, ``factors``, or several (see :func:`loraloom.ops.interpolate.interpolate`).
        via: the control point: a third adapter, such as one trained for it. None is looked for here: a score has no
            gradient to train one by.
        align: ``orthogonal``, ``invertible`` (see :func:`loraloom.ops.align.align`), None for as they are, or several.

    Raises:
        ValueError: fewer than 2 points, an alignment without ``factors``, the adapters do not interpolate, or a score
            is not finite.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))
        >>> a, b = Adapter({"r": 1}, {"fc": one}), Adapter({"r": 1}, {"fc": one.scaled(-1.0)})
        >>> r = connectivity(a, b, score=lambda adapter: adapter.modules["fc"].norm() ** 2, points=5)
        >>> r.scores, r.barrier
        ((1.0, 0.25, 0.0, 0.25, 1.0), 1.0)
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points must be a whole number of at least 2 (both ends count), got {points!r}")
    at = tuple(i / (points - 1) for i in range(points))
    lines = [_Line(a, b, via, *which) for which in _asked(space, align)]
    routes = [(line, bent) for line in lines for bent in ((False,) if via is None else (False, True))]
    for line, bent in routes:
        line.point(0.5, bent)  # what does not go together is refused before anything is scored
    asked: dict[tuple[float, Any], Adapter] = {(0.0, None): a}
    for route in routes:
        asked |= {(t, route): route[0].point(t, route[1]) for t in at[1:-1]}
        asked.setdefault((1.0, None), b)
    scored = dict(zip(asked, many(score, list(asked.values())), strict=True))
    known = {(t, route): finite(value, f"at t = {t:.4g}") for (t, route), value in scored.items()}
    middles = [] if via is None else many(score, [line.centre() for line in lines])
    centres = {line: finite(value, "of the 1:1:1 mean") for line, value in zip(lines, middles, strict=False)}
    found = []
    for line, bent in routes:
        inside = [known[t, (line, bent)] for t in at[1:-1]]
        scores = (known[0.0, None], *inside, known[1.0, None])
        found.append(_told(line, bent, at, scores, centres.get(line)))
    return Connectivity(at, tuple(found), len(asked) + len(middles))


def _asked(space: str | Sequence[str], align: str | Sequence[str | None] | None) -> list[tuple[str, str | None]]:
    """Each space with each alignment that makes a path of its own."""
    spaces = [space] if isinstance(space, str) else list(dict.fromkeys(space))
    aligns = [align] if align is None or isinstance(align, str) else list(dict.fromkeys(align))
    if not spaces or not aligns:
        raise ValueError("space and align must each hold at least one entry")
    if any(aligns) and "factors" not in spaces:
        raise ValueError(f"align={align!r} needs space='factors': an alignment changes no update, got {space!r}")
    pairs = [(one, how) for one in spaces for how in aligns]
    return list(dict.fromkeys((one, how if one == "factors" else None) for one, how in pairs))


@dataclass(frozen=True, eq=False)
class _Line:
    """The paths of one space and one alignment."""

    a: Adapter
    b: Adapter
    via: Adapter | None
    space: str
    align: str | None

    @cached_property
    def others(self) -> tuple[Adapter, Adapter | None]:
        """b and the control point in a's gauge, found once and not for each point."""
        if self.align is None:
            return self.b, self.via
        b = aligned(self.b, to=self.a, by=self.align).loaded()
        return b, None if self.via is None else aligned(self.via, to=self.a, by=self.align).loaded()

    def point(self, t: float, bent: bool) -> Adapter:
        b, via = self.others
        return interpolate(self.a, b, t, via=via if bent else None, space=self.space)

    def centre(self) -> Adapter:
        b, via = self.others
        return merge([self.a, b, *([] if via is None else [via])], space=self.space)


def _told(line: _Line, bent: bool, at: Sequence[float], scores: tuple[float, ...], centre: float | None) -> Path:
    start, end, worst = scores[0], scores[-1], min(scores)
    falls = [(1 - t) * start + t * end - y for t, y in zip(at[1:-1], scores[1:-1], strict=True)]
    return Path(
        space=line.space,
        align=line.align,
        bent=bent,
        scores=scores,
        barrier=max([0.0, *falls]),
        drop=(start + end) / 2 - worst,
        lowest=at[scores.index(worst)],
        centre=centre,
    )
