"""What else can be read as a report: the record in an adapter's folder, and rows (``loraloom evaluate --json``)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.ops.certificate import total
from loraloom.report.document import FORMAT, Report
from loraloom.report.grid import flat
from loraloom.report.panels import Bars, Curve, Heatmap, Panel, Series, Table
from loraloom.strategies.units import group, layer, role
from loraloom.untrusted import is_number

# Key of the Trainer's log: title and what the axis says.
_CURVES = {
    "loss": ("Training loss", "loss"),
    "eval_loss": ("Validation loss", "loss"),
    "grad_norm": ("Gradient norm before clipping", "norm"),
    "learning_rate": ("Learning rate", "learning rate"),
    "coto/probability": ("Chance of a layer's adapter to take part", "p(t)"),
    "coto/active": ("Layers that took part", "number of layers"),
    "balance/top_third": ("Share of the upper third of the layers in the update", "share of the squared norm"),
}


def report_of(content: Any, name: str) -> Report:
    """A report from the content of a JSON file.

    Args:
        content: a report, the record of an adapter (``loraloom.json``), or a list of flat maps.
        name: what to call it.

    Raises:
        ValueError: it is none of them.

    Example:
        >>> found = report_of([{"task": "digits", "value": 0.9, "low": 0.8, "high": 0.95}], "scores")
        >>> [type(panel).__name__ for panel in found.panels], found.panels[0].series[0].low
        (['Bars', 'Table'], (0.8,))
    """
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        return Report.from_json(content)
    if isinstance(content, Mapping) and isinstance(content.get("operation"), str):
        return _of_record(content, name)
    if _is_rows(content):
        return _of_rows(content, name)
    found = f"its format is {content.get('format')!r}" if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(
        f"this is not a report: {found}; allowed: {FORMAT!r}, an adapter's loraloom.json, or a list of flat maps "
        "as `loraloom evaluate --json` prints it"
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _is_rows(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(row, Mapping) and any(map(_plain, row.values())) for row in content)
    )


# --- records of adapters -------------------------------------------------------------------------------------------


def _of_record(told: Mapping[str, Any], name: str) -> Report:
    told = _finite(told)
    operation, record = str(told["operation"]), _map(told.get("record"))
    command = _command(told)
    log, inputs = _maps(record.get("log")), _maps(told.get("inputs"))
    panels = [*_logged(log, command), *_errors(record, command)]
    if inputs:
        rows = tuple((at + 1, _text(one.get("operation")), _text(one.get("source"))) for at, one in enumerate(inputs))
        panels.append(Table("Inputs", ("input", "made by", "source"), rows, command=command))
    run = {key: value for key, value in told.items() if key not in ("record", "inputs", "operation") and value != ""}
    said = [f"{name} was made by {operation}{_by(told)}."]
    if is_number(seconds := record.get("seconds")):
        said.append(f"Training took {seconds:.0f} s.")
    if losses := [row["loss"] for row in log if is_number(row.get("loss"))]:
        said.append(f"The training loss went from {losses[0]:.3g} to {losses[-1]:.3g}.")
    if (error := total(record)) is not None:
        said.append(f"Over all modules that were cut, the result is {100 * error:.2g} % off what was asked for.")
    return Report(f"{name}: {operation}", " ".join(said), tuple(panels), run=run, records=(dict(told),))


def _finite(value: Any) -> Any:
    """None for numbers that are not finite, at any depth: a log has them where training stumbled, JSON does not."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by(told: Mapping[str, Any]) -> str:
    method = _map(told.get("arguments")).get("method")
    return f" by {method}" if isinstance(method, str) else ""


def _command(told: Mapping[str, Any]) -> str:
    """The command line; of a training run, where none was noted, what stands in for it."""
    if isinstance(told.get("command"), str) and told["command"]:
        return str(told["command"])
    return "loraloom train RECIPE.yaml   # with the recipe below" if told["operation"] == "train" else ""


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _maps(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _logged(log: Sequence[Mapping[str, Any]], command: str) -> list[Panel]:
    """A curve for each number of the Trainer's log that has a name here, over the steps."""
    rows = [row for row in log if is_number(row.get("step"))]
    panels: list[Panel] = []
    for key, (title, label) in _CURVES.items():
        points = [(row["step"], float(row[key])) for row in rows if is_number(row.get(key))]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            panels.append(Curve(title, "optimizer step", label, (Series(label, steps, values),), command=command))
    return panels


def _errors(record: Mapping[str, Any], command: str) -> list[Panel]:
    """Relative errors of what was cut, by layer and projection."""
    errors = {name: value for name, value in _map(record.get("error")).items() if is_number(value)}
    if not errors:
        return []
    note = "Relative error |asked - result| / |asked| in Frobenius norms, of the modules that were cut."
    layers, roles = tuple(group(list(errors), "layer")), tuple(dict.fromkeys(map(role, errors)))
    cells = {(layer(name), role(name)): value for name, value in errors.items()}
    if len(cells) < len(errors) or min(len(layers), len(roles)) < 2:
        rows = tuple((name, value) for name, value in errors.items())
        return [Table("Error by module", ("module", "relative error"), rows, note, command)]
    z = tuple(tuple(cells.get((one, other)) for other in roles) for one in layers)
    return [Heatmap("Error by module", "projection", "layer", roles, layers, z, note, command, "relative error")]


# --- rows ----------------------------------------------------------------------------------------------------------


def _of_rows(rows: Sequence[Mapping[str, Any]], name: str) -> Report:
    """A table of what is plain; scores with intervals are bars too."""
    told = [{key: value for key, value in flat(dict(row)) if _short(value)} for row in rows]
    columns = tuple(dict.fromkeys(key for row in told for key in row))
    if not columns:
        raise ValueError("no row has a value that a table can show: text of at most 120 characters or a finite number")
    cells = tuple(tuple(row.get(key) for key in columns) for row in told)
    panels: list[Panel] = [Table(name, columns, cells)]
    if all({"task", "value", "low", "high"} <= set(row) for row in told):
        panels.insert(0, _scores(told, name))
    count = f"{len(rows)} row{'s' if len(rows) > 1 else ''}"
    return Report(name, f"{count} of measurements.", tuple(panels), records=tuple(map(dict, rows)))


def _short(value: Any) -> bool:
    """What a table can show: lists of outcomes by example are for machines."""
    return not (isinstance(value, float) and not math.isfinite(value)) and len(str(value)) <= 120


def _scores(rows: Sequence[Mapping[str, Any]], name: str) -> Bars:
    """Bars are called by adapter, split where there are several, and a number where that is not enough."""
    tasks = tuple(dict.fromkeys(str(row["task"]) for row in rows))
    splits = {row.get("split") for row in rows}
    seen: Counter[tuple[str, str]] = Counter()
    by: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        who, task = str(row.get("adapter", "score")), str(row["task"])
        who += f", {row.get('split')}" if len(splits) > 1 else ""
        seen[who, task] += 1
        who += f" #{seen[who, task]}" if seen[who, task] > 1 else ""
        by.setdefault(who, {})[task] = row
    series = tuple(
        Series(who, tuple(held), *(tuple(row[end] for row in held.values()) for end in ("value", "low", "high")))
        for who, held in by.items()
    )
    return Bars(
        f"Scores: {name}", "accuracy", tasks, series, "Bars have 95 % intervals over the examples of the split."
    )
