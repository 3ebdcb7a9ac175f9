"""How reports look: one place for the page, the SVG and the PNG. Okabe and Ito's palette, darker or lighter by ground.

Marker, dash and hatch say the same as colour, so that nothing is told by colour alone.
"""

from __future__ import annotations

import math
import sys
from typing import Any

LIGHT: dict[str, Any] = {
    "ink": "#1b1f24",
    "muted": "#57606a",
    "grid": "#e6e9ed",
    "line": "#8c959f",
    "paper": "#ffffff",
    "empty": "#f1f3f5",
    "hues": ["#0072B2", "#D55E00", "#00825F", "#A8487F", "#000000", "#946200", "#6B6B6B"],
    "scale": [[0, "#eef4fa"], [0.5, "#6baed6"], [1, "#08306b"]],
    "diverging": [[0, "#8a3b00"], [0.25, "#e08b4f"], [0.5, "#f7f7f7"], [0.75, "#6baed6"], [1, "#08306b"]],
}
DARK: dict[str, Any] = {
    "ink": "#e8eaed",
    "muted": "#a3abb5",
    "grid": "#2b3037",
    "line": "#6b7480",
    "paper": "#14171b",
    "empty": "#1b1f24",
    "hues": ["#56B4E9", "#E69F00", "#1FBF92", "#CC79A7", "#F0E442", "#FFFFFF", "#A3ABB5"],
    "scale": [[0, "#1d2126"], [0.5, "#2a6f9e"], [1, "#c4e6ff"]],
    "diverging": [[0, "#ffc08a"], [0.25, "#b5652a"], [0.5, "#262b31"], [0.75, "#2a6f9e"], [1, "#c4e6ff"]],
}
DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "hexagon"]
HATCHES = ["", "/", "x", ".", "-", "\\", "|", "+"]
MARKED = 30  # a line of more points than this shows no markers
LOOK = {"light": LIGHT, "dark": DARK, "dashes": DASHES, "symbols": SYMBOLS, "hatches": HATCHES, "marked": MARKED}


def sign(group: int) -> tuple[int, int]:
    """Places of the colour and of the marker of a group of series; no two of the first 49 have both alike.

    Example:
        >>> sign(0), sign(7)
        ((0, 0), (0, 1))
    """
    hues = len(LIGHT["hues"])
    return group % hues, (group + group // hues) % len(SYMBOLS)


def colour(scale: list[Any], share: float) -> str:
    """The colour at ``share`` in [0, 1] of a scale of (place, colour) pairs.

    Example:
        >>> colour([[0, "#000000"], [1, "#ffffff"]], 0.5)
        '#808080'
    """
    share = min(max(share, 0.0), 1.0)
    at = max(i for i, (place, _) in enumerate(scale[:-1]) if place <= share)
    (low, one), (high, other) = scale[at : at + 2]
    part = (share - low) / (high - low)
    mixed = (round((1 - part) * a + part * b) for a, b in zip(channels(one), channels(other), strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def channels(hue: str) -> tuple[int, int, int]:
    """Red, green and blue of ``#rrggbb``, each in [0, 255]."""
    return int(hue[1:3], 16), int(hue[3:5], 16), int(hue[5:7], 16)


def luminance(hue: str) -> float:
    """Relative luminance of a colour in [0, 1] (WCAG 2.2)."""
    parts = [value / 255 for value in channels(hue)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, 1 to 21 (WCAG 2.2).

    Example:
        >>> contrast("#000000", "#ffffff")
        21.0
    """
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def span(values: list[float]) -> tuple[float, float, bool]:
    """Ends of a heat map's colours, and whether they are on both sides of 0, which is then in the middle.

    Example:
        >>> span([-1.0, 0.5]), span([0.2, 0.7]), span([])
        ((-1.0, 1.0, True), (0.2, 0.7, False), (0.0, 1.0, False))
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low < 0 < high:
        most = max(-low, high)
        return -most, most, True
    return low, high, False


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``.

    Example:
        >>> ticks(0.0, 1.0), ticks(37, 212, 4)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [50.0, 100.0, 150.0, 200.0])
    """
    if not high > low:
        return [low]
    rough = high / max(1, about) - low / max(1, about)
    if not sys.float_info.min < rough < sys.float_info.max / 10:
        return [low, high]  # at the ends of what floats can hold
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{at * step:.12g}") for at in range(first, last + 1)]
