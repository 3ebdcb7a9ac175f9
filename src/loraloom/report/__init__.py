"""Results as they were measured, and the page that shows them: JSON is the truth, HTML and markdown are made from it.

>>> curve = Curve("Path", "t", "accuracy", (Series("CoTo", x=(0, 0.5, 1), y=(0.9, 0.89, 0.9)),))
>>> report = Report("Two seeds", "The path is flat.", (curve,))
>>> Report.from_json(report.to_json()) == report
True
"""

from __future__ import annotations

from loraloom.report.context import ran
from loraloom.report.document import Report
from loraloom.report.files import page, read, replace_file, write
from loraloom.report.panels import Bars, Curve, Heatmap, Panel, Series, Table

__all__ = [
    "Bars",
    "Curve",
    "Heatmap",
    "Panel",
    "Report",
    "Series",
    "Table",
    "page",
    "ran",
    "read",
    "replace_file",
    "write",
]
