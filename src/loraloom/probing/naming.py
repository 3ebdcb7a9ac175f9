"""What pages share: how adapters and pairs are called, what is left out, the plane, what was saved."""

from __future__ import annotations

from collections.abc import Sequence

from loraloom.report import Curve, Series

BEYOND = {
    "dora": "Of scale * B @ A; the magnitudes of DoRA are not looked at.",
    "hira": "Of B @ A; what HiRA multiplies it with, the base weights, is not looked at.",
    "moka": "Of B @ A of each modality; what attention adds to it is not looked at.",
}


def plane(names: Sequence[str], positions: Sequence[Sequence[float]], shares: Sequence[float]) -> Curve:
    """Points on the first two principal axes."""
    along = [f"axis {at + 1} ({100 * share:.0f} % of the spread)" for at, share in enumerate(shares)]
    points = tuple(Series(name, (place[0],), (place[1],)) for name, place in zip(names, positions, strict=True))
    note = "Principal component analysis of the dense updates, exact; distances on the plane are at most the true ones."
    return Curve("Where the adapters lie", along[0], along[1], points, note=note)


def pair_of(names: Sequence[str], i: int, j: int) -> str:
    """How a pair is called."""
    return f"{names[i]} | {names[j]}"


def apart(names: Sequence[str]) -> list[str]:
    """Names that are all different."""
    return list(names) if len(set(names)) == len(names) else [f"{at + 1}: {name}" for at, name in enumerate(names)]


def passes_row(run: int | None, saved: int | None, why: str = "") -> list[tuple[str, int | None, str]]:
    """The row of a table that tells how many blocks of the model ran, or why none was saved; none where unknown.

    Example:
        >>> passes_row(20, 80)
        [('block passes', 20, 'blocks of the model to run over all examples; 5.0 times as many without what is shared')]
    """
    if why and not saved:
        return [("block passes", run, f"every pass runs all blocks of the model: {why}")]
    if not run or saved is None:
        return []
    times = f"{(run + saved) / run:.1f} times as many without what is shared"
    return [("block passes", run, f"blocks of the model to run over all examples; {times}")]
