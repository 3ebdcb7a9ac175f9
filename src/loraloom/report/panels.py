"""What a report can show: curves, bars, heat maps and tables, as frozen data that is plain JSON and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeAlias

from loraloom.untrusted import short

JSON: TypeAlias = Any  # None, bool, int, float, str, list and dict of these
Cell: TypeAlias = str | int | float | None


def plain(value: JSON, where: str) -> JSON:
    """The value as JSON gives it back: mappings as dicts, sequences as lists, numbers as int or finite float.

    Raises:
        ValueError: a number that is not finite, a key that is no text or a value that JSON has no word for.

    Example:
        >>> plain({"seeds": (0, 1)}, "run")
        {'seeds': [0, 1]}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return _finite(value, where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is not text; keys of JSON objects are")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(
        f"{where}: {type(value).__name__} is not JSON; allowed: text, numbers, true, false, null, lists, maps"
    )


def _finite(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{where}: {short(value)} is not a number")
    try:
        found = float(value)
    except OverflowError:  # a whole number may be larger than any float
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{where} is {short(value)}; a report holds finite numbers only")
    return found


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {value!r} is not text")
    return value


def _label(value: object, where: str) -> str | int | float:
    if isinstance(value, str):
        return value
    found = _finite(value, where)
    return int(value) if isinstance(value, Integral) else found


def _items(value: object, where: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{where}: {value!r} is not a list")
    return tuple(value)


def _floats(values: object, where: str) -> tuple[float, ...]:
    return tuple(_finite(value, f"{where}[{i}]") for i, value in enumerate(_items(values, where)))


def _labels(values: object, where: str) -> tuple[str | int | float, ...]:
    return tuple(_label(value, f"{where}[{i}]") for i, value in enumerate(_items(values, where)))


def _texts(values: object, where: str) -> tuple[str, ...]:
    return tuple(_text(value, f"{where}[{i}]") for i, value in enumerate(_items(values, where)))


def _settle(panel: object, **values: object) -> None:
    """Put the checked values in a frozen dataclass; called from ``__post_init__`` alone."""
    for name, value in values.items():
        object.__setattr__(panel, name, value)


def _check_texts(panel: object, where: str) -> None:
    """Check the fields that every panel has as text, by name."""
    for name in ("title", "x_label", "y_label", "z_label", "note", "command"):
        if hasattr(panel, name):
            _text(getattr(panel, name), f"{where}.{name}")


@dataclass(frozen=True)
class Series:
    """One line or one set of bars, with 95 % intervals where they are known.

    The part of the name before the first comma picks the colour and the marker, the rest the dash: "CoTo, factors" and
    "CoTo, delta" look related, and "CoTo" looks the same in every panel of a report.

    Attributes:
        name: what the legend says.
        x: positions, numbers or names.
        y: values, finite.
        low, high: ends of the interval of each value; both or none.

    Raises:
        ValueError: lengths differ, a number is not finite, or an interval is upside down.

    Example:
        >>> Series("LoRA", x=(0, 1), y=(0.5, float("nan")))
        Traceback (most recent call last):
        ValueError: series 'LoRA': y[1] is nan; a report holds finite numbers only
    """

    name: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        where = f"series {_text(self.name, 'series name')!r}:"
        _settle(self, x=_labels(self.x, f"{where} x"), y=_floats(self.y, f"{where} y"))
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{where} low and high come together; only one of them is given")
        if self.low is not None:
            _settle(self, low=_floats(self.low, f"{where} low"), high=_floats(self.high, f"{where} high"))
        for name in ("y", "low", "high"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"{where} {len(self.x)} values of x but {len(values)} of {name}")
        for i, (low, high) in enumerate(zip(self.low or (), self.high or (), strict=True)):
            if low > high:
                raise ValueError(f"{where} low[{i}] = {low} is above high[{i}] = {high}")

    def said(self) -> tuple[str, ...]:
        """Each value with its interval as people read them: ``0.883 [0.861, 0.903]``."""
        if self.low is None or self.high is None:
            return tuple(numbers(self.y, significant=3))
        texts = numbers([*self.y, *self.low, *self.high], significant=3)
        n = len(self.y)
        return tuple(f"{texts[i]} [{texts[n + i]}, {texts[2 * n + i]}]" for i in range(n))


def _series(values: object, where: str) -> tuple[Series, ...]:
    items = _items(values, where)
    for item in items:
        if not isinstance(item, Series):
            raise ValueError(f"{where}: {item!r} is not a Series")
    names = [item.name for item in items]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice or not items:
        raise ValueError(f"{where}: " + (f"two series are named {twice[0]!r}" if twice else "there is no series"))
    return items


@dataclass(frozen=True)
class Curve:
    """Lines over a numeric or named axis, with bands for the intervals.

    Attributes:
        note: a sentence or two below the plot: what it shows and on what it was measured.
        command: the command that makes the figure again.

    Example:
        >>> Curve("p(t)", "t", "p", (Series("linear", (0, 1), (0, 1)),)).series[0].y
        (0.0, 1.0)
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    note: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        where = f"curve {self.title!r}"
        _check_texts(self, where)
        _settle(self, series=_series(self.series, where))


@dataclass(frozen=True)
class Bars:
    """Groups of bars from zero, one group a category, with the intervals as error bars.

    Attributes:
        categories: names of the groups, in order; the x of a series is drawn from them.

    Example:
        >>> Bars("Pruned", "accuracy", ("all", "low"), (Series("CoTo", ("all", "low"), (0.9, 0.7)),)).categories
        ('all', 'low')
    """

    title: str
    y_label: str
    categories: tuple[str, ...]
    series: tuple[Series, ...]
    note: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        where = f"bars {self.title!r}"
        _check_texts(self, where)
        categories = _texts(self.categories, f"{where}.categories")
        _settle(self, series=_series(self.series, where), categories=categories)
        for series in self.series:
            for name in series.x:
                if name not in categories:
                    raise ValueError(
                        f"{where}, series {series.name!r}: {name!r} is no category; allowed: {', '.join(categories)}"
                    )


@dataclass(frozen=True)
class Heatmap:
    """A matrix of values: ``z[row][column]`` belongs to ``y[row]`` and ``x[column]``; None is an empty cell.

    Attributes:
        z_label: what the values are; by default the title says it.

    Example:
        >>> Heatmap("Norms", "projection", "layer", ("q", "v"), (0, 1), ((1, 2), (3, None))).z
        ((1.0, 2.0), (3.0, None))
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[float | str, ...]
    y: tuple[float | str, ...]
    z: tuple[tuple[float | None, ...], ...]
    note: str = ""
    command: str = ""
    z_label: str = ""

    def __post_init__(self) -> None:
        where = f"heat map {self.title!r}"
        _check_texts(self, where)
        rows = tuple(
            tuple(
                None if value is None else _finite(value, f"{where}: z[{i}][{j}]")
                for j, value in enumerate(_items(row, f"{where}: z[{i}]"))
            )
            for i, row in enumerate(_items(self.z, f"{where}: z"))
        )
        _settle(self, x=_labels(self.x, f"{where}: x"), y=_labels(self.y, f"{where}: y"), z=rows)
        if len(rows) != len(self.y):
            raise ValueError(f"{where}: {len(self.y)} rows are named and {len(rows)} are given")
        for i, row in enumerate(rows):
            if len(row) != len(self.x):
                raise ValueError(f"{where}: {len(self.x)} columns are named and row {i} has {len(row)}")


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; the page sorts them by any column. None is an empty cell.

    Example:
        >>> Table("Time", ("run", "seconds"), (("LoRA", 61.5), ("CoTo", 55.0))).rows[1]
        ('CoTo', 55.0)
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        where = f"table {self.title!r}"
        _check_texts(self, where)
        rows = tuple(
            tuple(
                None if cell is None else _label(cell, f"{where}: row {i}, cell {j}")
                for j, cell in enumerate(_items(row, f"{where}: row {i}"))
            )
            for i, row in enumerate(_items(self.rows, f"{where}: rows"))
        )
        _settle(self, columns=_texts(self.columns, f"{where}: columns"), rows=rows)
        for i, row in enumerate(rows):
            if len(row) != len(self.columns):
                raise ValueError(f"{where}: {len(self.columns)} columns are named and row {i} has {len(row)}")


Panel: TypeAlias = Curve | Bars | Heatmap | Table
KINDS: dict[str, type[Panel]] = {"curve": Curve, "bars": Bars, "heatmap": Heatmap, "table": Table}
_NAMES = {kind: name for name, kind in KINDS.items()}


def kind(panel: Panel) -> str:
    """Name of a panel's kind in JSON: ``curve``, ``bars``, ``heatmap`` or ``table``."""
    if type(panel) not in _NAMES:
        raise ValueError(f"{panel!r} is not a panel; allowed: {', '.join(KINDS)}")
    return _NAMES[type(panel)]


def to_json(panel: Panel) -> dict[str, JSON]:
    """A panel as plain JSON, with its kind."""

    def put(value: object) -> JSON:
        if isinstance(value, Series):
            return {item.name: put(getattr(value, item.name)) for item in fields(value)}
        return [put(item) for item in value] if isinstance(value, tuple) else value

    return {"kind": kind(panel)} | {item.name: put(getattr(panel, item.name)) for item in fields(panel)}


def from_json(value: JSON, where: str) -> Panel:
    """The panel that ``to_json`` wrote.

    Raises:
        ValueError: the kind is unknown, a key is missing or unknown, or a value is impossible; ``where`` says which.
    """
    if not isinstance(value, Mapping) or value.get("kind") not in [*KINDS]:
        raise ValueError(f"{where} has no kind of a panel; allowed: {', '.join(KINDS)}")
    entries = {key: item for key, item in value.items() if key != "kind"}
    if "series" in entries:
        series = _items(entries["series"], f"{where}.series")
        entries["series"] = tuple(build(Series, item, f"{where}.series[{i}]") for i, item in enumerate(series))
    panel: Panel = build(KINDS[value["kind"]], entries, where)
    return panel


def build(cls: type, value: JSON, where: str) -> Any:
    """A dataclass from a mapping of its fields, which may lack ``z_label``; else a ValueError that names the key."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is not a map of a {cls.__name__}'s fields")
    names = [item.name for item in fields(cls)]
    for name in names:
        if name not in value and name != "z_label":  # reports of version 0.1.0 have none
            raise ValueError(f"{where}: {name!r} is missing")
    for name in value:
        if name not in names:
            raise ValueError(f"{where}: {name!r} is not known; allowed: {', '.join(names)}")
    try:
        return cls(**value)
    except ValueError as fault:
        raise ValueError(f"{where}: {fault}") from None


def numbers(cells: Sequence[Cell], significant: int = 4) -> list[str]:
    """Cells of one column as people read them: numbers with the same count of decimals, so that they line up.

    Text stays, None is a dash, very large and very small numbers have an exponent, all others as many decimals as show
    the significant digits of the largest, and no more than the values need. Numbers beside text are of several
    quantities: each is written for itself.

    Example:
        >>> numbers([0.9, 0.98125, None]), numbers([12000, 3]), numbers([0.00001])
        (['0.9000', '0.9812', '–'], ['12000', '3'], ['1.000e-05'])
        >>> numbers(["a | b", 718.4, -0.003])
        ['a | b', '718.4', '-0.003']
    """
    if len(cells) > 1 and any(isinstance(cell, str) for cell in cells):
        return [number(cell) for cell in cells]
    sizes = [abs(cell) for cell in cells if isinstance(cell, float) and cell != 0]
    largest = max(sizes, default=0.0)
    wide = largest >= 1e7 or (bool(sizes) and largest < 1e-3)
    digits = 0 if wide or not sizes else max(0, significant - 1 - math.floor(math.log10(largest)))
    while digits and all(round(cell, digits) == round(cell, digits - 1) for cell in cells if isinstance(cell, float)):
        digits -= 1

    def one(cell: Cell) -> str:
        if cell is None:
            return "–"
        if not isinstance(cell, float):
            return str(cell)
        return f"{cell:.3e}" if wide else f"{cell:.{digits}f}"

    return [one(cell) for cell in cells]


def number(cell: Cell) -> str:
    """One cell as people read it.

    Example:
        >>> number(0.5), number(0.883333), number(12000), number(None)
        ('0.5', '0.8833', '12000', '–')
    """
    return numbers([cell])[0]
