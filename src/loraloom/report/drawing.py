"""A drawing of lines, areas, marks and text that becomes SVG or PNG: what figures need, without a browser.

Pillow, which is here for images of data sets, paints the PNG, with a sans-serif typeface of the machine where there is
one, else with its own (Latin letters alone); the SVG is text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from html import escape
from itertools import pairwise
from typing import Any

from loraloom.report.look import channels

FAMILY = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
TYPEFACES = ("Arial.ttf", "LiberationSans-Regular.ttf", "DejaVuSans.ttf")
DASHED = {"dash": (7, 4), "dot": (2, 3), "dashdot": (7, 3, 2, 3), "longdash": (12, 5), "longdashdot": (12, 4, 2, 4)}
Point = tuple[float, float]


@cache
def _font(size: float) -> Any:
    from PIL import ImageFont

    for name in TYPEFACES:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _xml(text: str) -> str:
    """Text for SVG: escaped, without the characters that XML does not know."""
    return escape(re.sub("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\ud800-\\udfff\\ufffe\\uffff]", "", text))


def width(text: str, size: float) -> float:
    """Width of a line of text in px."""
    return float(_font(100.0).getlength(text)) * size / 100


def fitted(text: str, size: float, most: float) -> str:
    """The text, with its middle left out where it is wider than ``most`` px: both ends of a path tell it from others.

    Example:
        >>> short = fitted("encoder.layer.11.attention.output.dense", 12, 120)
        >>> short.startswith("encoder"), short.endswith("dense"), width(short, 12) <= 120
        (True, True, True)
    """
    if width(text, size) <= most:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
        if width(short, size) <= most:
            return short
    return "..."


@dataclass(frozen=True)
class Shape:
    """One thing drawn: ``line`` (through points), ``area`` (closed), ``mark`` or ``text``."""

    kind: str
    points: tuple[Point, ...]
    fill: str = ""
    stroke: str = ""
    thick: float = 1.0
    dash: str = "solid"
    alpha: float = 1.0
    text: str = ""
    size: float = 12.0
    anchor: str = "start"
    turned: bool = False


@dataclass
class Drawing:
    """A sheet of ``width`` x ``height`` px, drawn on in order; x goes right and y down.

    Example:
        >>> sheet = Drawing(40, 20, "#ffffff", "a line")
        >>> sheet.line([(0, 0), (40, 20)], "#000000")
        >>> "<polyline" in sheet.svg(), sheet.png()[1:4]
        (True, b'PNG')
    """

    width: float
    height: float
    paper: str
    title: str
    shapes: list[Shape] = field(default_factory=list)

    def line(self, points: Sequence[Point], stroke: str, thick: float = 1.0, dash: str = "solid") -> None:
        """A line through points."""
        self.shapes.append(Shape("line", tuple(points), stroke=stroke, thick=thick, dash=dash))

    def area(self, points: Sequence[Point], fill: str, alpha: float = 1.0) -> None:
        """A filled area with ``points`` around it."""
        self.shapes.append(Shape("area", tuple(points), fill=fill, alpha=alpha))

    def box(self, x: float, y: float, wide: float, high: float, fill: str, alpha: float = 1.0) -> None:
        """A filled rectangle; its left upper corner is at (x, y)."""
        self.area([(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)], fill, alpha)

    def mark(self, at: Point, symbol: str, hue: str, size: float = 7.0, *, open_: bool = False) -> None:
        """A marker of a point, filled or hollow."""
        around = [(at[0] + size * x, at[1] + size * y) for x, y in _outline(symbol)]
        if symbol == "x":
            self.line(around[:2], hue, 2.0)
            self.line(around[2:], hue, 2.0)
            return
        self.area(around, self.paper if open_ else hue)
        self.line([*around, around[0]], hue if open_ else self.paper, 1.8 if open_ else 0.8)

    def text(
        self, at: Point, text: str, fill: str, size: float = 12.0, anchor: str = "start", *, turned: bool = False
    ) -> None:
        """A line of text, its middle at the height of ``at``; ``turned`` reads upwards."""
        self.shapes.append(Shape("text", (at,), fill=fill, text=text, size=size, anchor=anchor, turned=turned))

    def svg(self) -> str:
        """The drawing as an SVG document, whose title says what it shows."""
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FAMILY}">']
        parts += [f"<title>{_xml(self.title)}</title>", f'<rect width="100%" height="100%" fill="{self.paper}"/>']
        return "\n".join([*parts, *map(_svg, self.shapes), "</svg>"]) + "\n"

    def png(self, scale: int = 3) -> bytes:
        """The drawing as PNG, ``scale`` pixels a px."""
        from PIL import Image

        fine = 2 * scale
        size = (round(self.width * fine), round(self.height * fine))
        sheet = Image.new("RGB", size, self.paper)
        for shape in self.shapes:
            _paint(sheet, shape, fine)
        sheet = sheet.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        sheet.save(out, "PNG", optimize=True, dpi=(96 * scale, 96 * scale))
        return out.getvalue()


def _outline(symbol: str) -> list[Point]:
    """Corners of a marker of size 1 around 0; of an x the ends of its two strokes."""
    if symbol == "x":
        return [(-0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (0.5, -0.5)]
    if symbol == "square":
        return [(-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)]
    if symbol == "star":
        turns = [(0.65 if i % 2 == 0 else 0.27, math.pi * (i / 5 - 0.5)) for i in range(10)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in turns]
    corners = {"diamond": 4, "triangle-up": 3, "hexagon": 6}.get(symbol, 24)
    size = 0.6 if corners < 24 else 0.5
    around = (math.tau * i / corners - math.pi / 2 for i in range(corners))
    return [(size * math.cos(a), size * math.sin(a)) for a in around]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _svg(shape: Shape) -> str:
    points = " ".join(f"{_number(x)},{_number(y)}" for x, y in shape.points)
    if shape.kind == "line":
        gaps = f' stroke-dasharray="{" ".join(map(str, DASHED[shape.dash]))}"' if shape.dash in DASHED else ""
        style = f'fill="none" stroke="{shape.stroke}" stroke-width="{shape.thick:g}" stroke-linejoin="round"'
        return f'<polyline points="{points}" {style}{gaps}/>'
    if shape.kind == "area":
        seen = f' fill-opacity="{shape.alpha:g}"' if shape.alpha < 1 else ""
        return f'<polygon points="{points}" fill="{shape.fill}"{seen}/>'
    (x, y) = shape.points[0]
    turn = f' transform="rotate(-90 {_number(x)} {_number(y)})"' if shape.turned else ""
    place = f'x="{_number(x)}" y="{_number(y)}" dy="0.35em" text-anchor="{shape.anchor}"'
    return f'<text {place} font-size="{shape.size:g}" fill="{shape.fill}"{turn}>{_xml(shape.text)}</text>'


def _paint(sheet: Any, shape: Shape, fine: int) -> None:
    from PIL import Image, ImageDraw

    points = [(x * fine, y * fine) for x, y in shape.points]
    draw = ImageDraw.Draw(sheet)
    if shape.kind == "line":
        for part in _dashes(points, [fine * size for size in DASHED.get(shape.dash, ())]):
            draw.line(part, shape.stroke, max(1, round(shape.thick * fine)), joint="curve")
    elif shape.kind == "area" and shape.alpha == 1:
        draw.polygon(points, shape.fill)
    elif shape.kind == "area":
        left, top = (max(0, math.floor(min(along))) for along in zip(*points, strict=True))
        right, bottom = (math.ceil(max(along)) + 1 for along in zip(*points, strict=True))
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in points], round(255 * shape.alpha))
        sheet.paste(channels(shape.fill), (left, top, right, bottom), mask)
    else:
        _write(sheet, shape, points[0], fine)


def _write(sheet: Any, shape: Shape, at: Point, fine: int) -> None:
    from PIL import Image, ImageDraw

    font = _font(shape.size * fine)
    letter = {"start": "l", "middle": "m", "end": "r"}[shape.anchor]
    if not shape.turned:
        ImageDraw.Draw(sheet).text(at, shape.text, shape.fill, font, anchor=f"{letter}m")
        return
    wide, high = math.ceil(font.getlength(shape.text)) + 2, math.ceil(2 * shape.size * fine)
    mask = Image.new("L", (wide, high))
    ImageDraw.Draw(mask).text((0, high // 2), shape.text, 255, font, anchor="lm")
    mask = mask.rotate(90, expand=True)
    below = {"start": 0, "middle": wide // 2, "end": wide}[shape.anchor]
    corner = (round(at[0]) - high // 2, round(at[1]) - wide + below)
    sheet.paste(channels(shape.fill), (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)


def _dashes(points: list[Point], pattern: list[float]) -> list[list[Point]]:
    """The drawn parts of a line; all of it without a pattern."""
    if not pattern:
        return [points]
    parts: list[list[Point]] = []
    at, left, on = 0, pattern[0], True
    for start, end in pairwise(points):
        whole = math.dist(start, end)
        done = 0.0
        while done < whole:
            step = min(left, whole - done)
            if on:
                parts.append([_between(start, end, done / whole), _between(start, end, (done + step) / whole)])
            done, left = done + step, left - step
            if left <= 0:
                at, on = (at + 1) % len(pattern), not on
                left = pattern[at]
    return parts


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share
