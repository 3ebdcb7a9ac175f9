"""The report itself: panels, what they say in words, what was run, and the raw measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loraloom.report.panels import JSON, Panel, build, from_json, kind, plain, to_json

FORMAT = "loraloom.report/1"


@dataclass(frozen=True)
class Report:
    """What a run found. The JSON is the truth; the page and the markdown are made from it.

    Attributes:
        title: one line.
        summary: the finding in plain language, a few sentences; a blank line starts a new paragraph.
        panels: curves, bars, heat maps and tables, in reading order.
        run: recipe, seeds, versions, machine, times: plain JSON.
        records: the raw measurements, one flat map each.

    Raises:
        ValueError: a number is not finite or a value is not JSON; the message says where.

    Example:
        >>> Report("Demo", "All well.", run={"seeds": (0, 1)}).run["seeds"]
        [0, 1]
    """

    title: str
    summary: str
    panels: tuple[Panel, ...] = ()
    run: Mapping[str, JSON] = field(default_factory=dict)
    records: tuple[Mapping[str, JSON], ...] = ()

    def __post_init__(self) -> None:
        for name in ("title", "summary"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"report: {name} is {getattr(self, name)!r}, not text")
        for panel in self.panels:
            kind(panel)
        if not isinstance(self.run, Mapping):
            raise ValueError(f"report: run is {self.run!r}, not a map")
        for i, record in enumerate(self.records):
            if not isinstance(record, Mapping):
                raise ValueError(f"report: records[{i}] is {record!r}, not a map")
        object.__setattr__(self, "panels", tuple(self.panels))
        object.__setattr__(self, "run", plain(self.run, "run"))
        object.__setattr__(self, "records", tuple(plain(list(self.records), "records")))

    def to_json(self) -> dict[str, JSON]:
        """The report as plain JSON: dicts, lists, text, finite numbers; ``from_json`` gives an equal report back."""
        return {
            "format": FORMAT,
            "title": self.title,
            "summary": self.summary,
            "panels": [to_json(panel) for panel in self.panels],
            "run": dict(self.run),
            "records": [dict(record) for record in self.records],
        }

    @classmethod
    def from_json(cls, value: JSON) -> Report:
        """The report that ``to_json`` wrote.

        Raises:
            ValueError: it is not one, or a key is missing, unknown or impossible; one line says which.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            found = value.get("format") if isinstance(value, Mapping) else type(value).__name__
            raise ValueError(f"this is not a report: its format is {found!r}; allowed: {FORMAT!r}")
        entries = {key: item for key, item in value.items() if key != "format"}
        for name in ("panels", "records"):
            if not isinstance(entries.get(name), list):
                raise ValueError(f"report: {name!r} is missing or not a list")
        entries["panels"] = tuple(from_json(item, f"panels[{i}]") for i, item in enumerate(entries["panels"]))
        entries["records"] = tuple(entries["records"])
        report: Report = build(cls, entries, "report")
        return report

    def to_markdown(self, figures: Sequence[str] = ()) -> str:
        """The report as markdown: curves, bars and heat maps as tables of their values.

        Args:
            figures: paths of images, one for each panel that is no table, to show before its values.
        """
        from loraloom.report.markdown import markdown

        return markdown(self, figures)

    def to_html(self) -> str:
        """The report as one self-contained page: plotly.js is inside, nothing is fetched."""
        from loraloom.report.webpage import webpage

        return webpage(self)
