"""Long names on axes and in legends: what all have in common goes first, so that short forms still differ."""

from __future__ import annotations

import re
from collections.abc import Sequence

AXIS, ROW, LEGEND = 18, 28, 36  # letters of a name on an axis, of a heat map's row, in a legend


def shortened(names: Sequence[object], most: int = AXIS) -> list[str]:
    """Names of at most ``most`` letters; all of them as they are where they fit.

    The parts in which all names begin and end alike are left out first, then the middle of what is still too long; a
    number tells those apart that would be the same.

    Example:
        >>> shortened(["encoder.layers.0.attention.output", "encoder.layers.11.attention.output"], 12)
        ['…0…', '…11…']
        >>> shortened(["value", "attention.output.dense"], 12)
        ['value', 'attent…dense']
    """
    texts = [str(name) for name in names]
    if all(len(text) <= most for text in texts):
        return texts
    if len(set(texts)) > 1:
        start = _whole_parts(_common(texts))
        cut = [text[start:] for text in texts]
        end = _whole_parts(_common([text[::-1] for text in cut])) if any(len(t) >= most for t in cut) else 0
        if start > 1 or end > 1:
            texts = [("…" if start else "") + text[: len(text) - end] + ("…" if end else "") for text in cut]
    short = [_middle_out(text, most) for text in texts]
    twice = {
        text
        for text in short
        if short.count(text) > 1 and len({t for t, s in zip(texts, short, strict=True) if s == text}) > 1
    }
    return [f"{at + 1}: {_middle_out(text, most - 4)}" if text in twice else text for at, text in enumerate(short)]


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    low, high = min(texts), max(texts)
    return next((low[:at] for at, letter in enumerate(low) if high[at : at + 1] != letter), low)


def _whole_parts(common: str) -> int:
    """How much of a common start ends where a part of a path ends."""
    ends = [match.end() for match in re.finditer(r"[./_ -]", common)]
    return ends[-1] if ends else 0


def _middle_out(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - (most - 1 - most // 2) :]}"
