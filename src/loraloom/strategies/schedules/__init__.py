"""Curves: how fast the chance that a unit takes part in training rises, as functions f of the share of the ramp done.

f maps [0, 1] to [0, 1], never falls, has f(0) = 0 and f(1) = 1; a plan turns it into p = start + (1 - start) f(x)
(``strategies.progressive``). A curve that does not reach 1 declares ``breaks=("reaches_one",)``. A new curve is one new
file in this folder.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from loraloom.registry import Registry

schedules: Registry[[float], float] = Registry("schedule", __name__)


def sketch(name: str, width: int = 240, height: int = 140) -> str:
    """A plot of p(t) as a small self-contained SVG, for the docs: ramp 0.75, start 0 (0.5 where p never rises).

    Args:
        name: a registered curve.
        width: pixels, at least 80.
        height: pixels, at least 60.

    Raises:
        UnknownName: there is no such curve.
        ValueError: the picture is too small to hold its axes.

    Example:
        >>> sketch("linear").startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        True
    """
    curve = schedules[name]
    if width < 80 or height < 60:
        raise ValueError(f"a sketch needs at least 80 x 60 pixels, got {width} x {height}")
    start, ramp, points = (0.5 if "reaches_one" in curve.breaks else 0.0), 0.75, 200
    left, top, right, bottom = 28, 22, width - 10, height - 24
    across, down = right - left, bottom - top

    def at(t: float, p: float) -> str:
        return f"{left + t * across:.1f},{bottom - p * down:.1f}"

    values = [start + (1 - start) * curve(min(1.0, i / points / ramp)) for i in range(points + 1)]
    line = " ".join(at(i / points, p) for i, p in enumerate(values))
    end = left + ramp * across
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="10" fill="#444" role="img" aria-label="p(t) of {escape(name)}">'
        f'<text x="{left}" y="12">{escape(name)}: p(t)</text>'
        f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="#888"/>'
        f'<path d="M{end:.1f},{top}V{bottom}" stroke="#bbb" stroke-dasharray="3,3"/>'
        f'<text x="{left - 5}" y="{top + 4}" text-anchor="end">1</text>'
        f'<text x="{left - 5}" y="{bottom + 3}" text-anchor="end">0</text>'
        f'<text x="{end:.1f}" y="{bottom + 13}" text-anchor="middle">3/4 T</text>'
        f'<text x="{right}" y="{bottom + 13}" text-anchor="end">T</text>'
        f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/></svg>'
    )
