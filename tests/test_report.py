"""The report: JSON is the truth and comes back equal, bad numbers are named, pages hold no live text of others."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.report import Bars, Curve, Heatmap, Report, Series, Table, page, read, replace_file, write
from report_demo import EVIL, demo_report, evil_report

EXACT = settings(derandomize=True, deadline=None, max_examples=60)
finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | finite | words
trees = st.recursive(
    scalars, lambda item: st.lists(item, max_size=3) | st.dictionaries(words, item, max_size=3), max_leaves=8
)


@st.composite
def series(draw, places=None):
    x = places if places is not None else tuple(draw(st.lists(finite | words, min_size=1, max_size=5)))
    y = [draw(finite) for _ in x]
    if draw(st.booleans()):
        return Series(draw(words), x, y)
    ends = [sorted((draw(finite), draw(finite))) for _ in x]
    return Series(draw(words), x, y, tuple(low for low, _ in ends), tuple(high for _, high in ends))


def several(draw, places=None):
    return tuple(draw(st.lists(series(places), min_size=1, max_size=3, unique_by=lambda s: s.name)))


@st.composite
def panels(draw):
    kind = draw(st.sampled_from(["curve", "bars", "heatmap", "table"]))
    if kind == "curve":
        return Curve(draw(words), draw(words), draw(words), several(draw), draw(words), draw(words))
    if kind == "bars":
        names = tuple(draw(st.lists(words, min_size=1, max_size=4, unique=True)))
        return Bars(draw(words), draw(words), names, several(draw, names), draw(words), draw(words))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if kind == "heatmap":
        z = [[draw(st.none() | finite) for _ in range(columns)] for _ in range(rows)]
        return Heatmap(draw(words), draw(words), draw(words), range(columns), tuple(map(str, range(rows))), z)
    cells = [[draw(st.none() | st.integers() | finite | words) for _ in range(columns)] for _ in range(rows)]
    return Table(draw(words), tuple(map(str, range(columns))), cells, draw(words), draw(words))


reports = st.builds(
    Report,
    words,
    words,
    st.lists(panels(), max_size=3).map(tuple),
    st.dictionaries(words, trees, max_size=3),
    st.lists(st.dictionaries(words, trees, max_size=2), max_size=2).map(tuple),
)


# JSON ----------------------------------------------------------------------------------------------------------------


@EXACT
@given(reports)
def test_json_comes_back_equal_bit_for_bit(report):
    text = json.dumps(report.to_json(), allow_nan=False)
    back = Report.from_json(json.loads(text))
    assert back == report
    assert json.dumps(back.to_json()) == text


def test_numbers_of_other_libraries_become_plain():
    made = Report(
        "t", "s", (Curve("c", "x", "y", (Series("a", np.arange(2), np.float32([0.5, 1])),)),), {"n": np.int64(3)}
    )
    assert made == Report("t", "s", (Curve("c", "x", "y", (Series("a", (0, 1), (0.5, 1.0)),)),), {"n": 3})
    assert type(made.run["n"]) is int
    assert type(made.panels[0].series[0].y[0]) is float


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(bad):
    refused = [
        (lambda: Series("CoTo", (0, 1), (1.0, bad)), r"series 'CoTo': y\[1\]"),
        (lambda: Series("CoTo", (0, bad), (1.0, 1.0)), r"series 'CoTo': x\[1\]"),
        (lambda: Series("CoTo", (0,), (1.0,), (bad,), (1.0,)), r"series 'CoTo': low\[0\]"),
        (lambda: Heatmap("H", "", "", ("q",), ("0",), ((bad,),)), r"heat map 'H': z\[0\]\[0\]"),
        (lambda: Table("T", ("a", "b"), ((1, bad),)), "table 'T': row 0, cell 1"),
        (lambda: Report("t", "s", run={"times": {"train": [1.0, bad]}}), r"run\.times\.train\[1\]"),
        (lambda: Report("t", "s", records=({}, {"score": bad})), r"records\[1\]\.score"),
    ]
    for make, where in refused:
        with pytest.raises(ValueError, match=where):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Series("a", (0, 1), (1.0,)), "2 values of x but 1 of y"),
        (lambda: Series("a", (0,), (1.0,), low=(0.0,)), "low and high come together"),
        (lambda: Series("a", (0,), (1.0,), (2.0,), (1.0,)), r"low\[0\] = 2.0 is above high\[0\] = 1.0"),
        (lambda: Series("a", (0,), ("1",)), r"y\[0\]: '1' is not a number"),
        (lambda: Series("a", (0,), (True,)), r"y\[0\]: True is not a number"),
        (lambda: Curve("c", "x", "y", ()), "there is no series"),
        (lambda: Curve("c", "x", "y", (Series("a", (), ()), Series("a", (), ()))), "two series are named 'a'"),
        (lambda: Curve("c", "x", 3, (Series("a", (), ()),)), r"y_label: 3 is not text"),
        (lambda: Bars("b", "y", ("all",), (Series("a", ("al",), (1.0,)),)), "'al' is no category; allowed: all"),
        (lambda: Heatmap("h", "", "", ("q", "k"), (0,), ((1.0,),)), "2 columns are named and row 0 has 1"),
        (lambda: Heatmap("h", "", "", ("q",), (0, 1), ((1.0,),)), "2 rows are named and 1 are given"),
        (lambda: Table("t", ("a",), ((1, 2),)), "1 columns are named and row 0 has 2"),
        (lambda: Report("t", "s", ("curve",)), "is not a panel; allowed: curve, bars, heatmap, table"),
        (lambda: Report("t", "s", run={"path": {1: 2}}), r"run\.path: key 1 is not text"),
        (lambda: Report("t", "s", run={"seeds": {0, 1}}), r"run\.seeds: set is not JSON"),
        (lambda: Report("t", 3), "summary is 3, not text"),
    ],
)
def test_impossible_panels_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as fault:
        make()
    assert "\n" not in str(fault.value)


def test_unknown_and_missing_keys_are_named():
    def broken(change):
        value = demo_report().to_json()
        change(value)
        with pytest.raises(ValueError) as fault:
            Report.from_json(value)
        return str(fault.value)

    assert "panels[0].series[1]: 'z' is not known; allowed: name, x" in broken(
        lambda v: v["panels"][0]["series"][1].update(z=1)
    )
    assert broken(lambda v: v["panels"][0].pop("note")) == "panels[0]: 'note' is missing"
    assert "panels[2] has no kind" in broken(lambda v: v["panels"][2].update(kind="pie"))
    assert "'records' is missing" in broken(lambda v: v.pop("records"))
    assert "'colour' is not known" in broken(lambda v: v.update(colour=1))
    assert "format is None" in broken(lambda v: v.pop("format"))


# Files ---------------------------------------------------------------------------------------------------------------


def test_write_then_read_gives_the_same_report(tmp_path):
    write(demo_report(), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.md", "results.json"]
    assert read([tmp_path / "run"]) == demo_report()
    assert read([tmp_path / "run" / "results.json"]) == demo_report()


def test_several_are_joined_and_keep_apart(tmp_path):
    first, second = demo_report(), replace(demo_report(), panels=demo_report().panels[:2])
    write(first, tmp_path / "a")
    write(second, tmp_path / "b")
    write(Report("Other", "Else."), tmp_path / "c")
    both = read([tmp_path / "a", tmp_path / "b" / "results.json", tmp_path / "c"])
    names = [f"{first.title} (a)", f"{first.title} (b)", "Other"]
    assert list(both.run) == names
    assert both.run[names[0]] == first.run
    assert len(both.panels) == len(first.panels) + 2
    assert both.panels[-1] == replace(second.panels[-1], title=f"{second.panels[-1].title} ({names[1]})")
    assert len(both.records) == 2 * len(first.records)
    assert both.records[0] == {"report": names[0], **first.records[0]}
    assert "Other: Else." in both.summary


def test_a_page_of_results_is_written_once_unless_asked(tmp_path):
    write(demo_report(), tmp_path / "run")
    out = tmp_path / "pages" / "all.html"
    assert page([tmp_path / "run"], out) == out
    assert out.read_text(encoding="utf-8") == demo_report().to_html()
    write(Report("Other", "Else."), tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"all\.html is there already; --overwrite replaces it"):
        page([tmp_path / "run"], out)
    page([tmp_path / "run"], out, overwrite=True)
    assert "Else." in out.read_text(encoding="utf-8")
    with pytest.raises(FileExistsError, match="is a folder"):
        page([tmp_path / "run"], tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "loraloom.report/1", "title"', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"results": {}}', "this is not a report: its format is None"),
        (b"[1]", "this is not a report: list; allowed: .*loraloom.json"),
        (b"[]", "this is not a report: list"),
        (b'[{"a": [1]}, {}]', "this is not a report: list"),
        (
            b'{"format": "loraloom.report/1", "panels": [{"kind": []}], "records": []}',
            r"panels\[0\] has no kind of a panel",
        ),
        (b'{"operation": 3}', "this is not a report: its format is None"),
        (json.dumps(demo_report().to_json()).replace("0.9,", "NaN,", 1).encode(), r"panels\[0\].*is nan"),
    ],
)
def test_torn_and_foreign_files_are_one_line(tmp_path, content, message):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as fault:
        read([tmp_path])
    assert str(fault.value).startswith(str(tmp_path / "results.json"))
    assert "\n" not in str(fault.value)


def test_a_whole_number_larger_than_any_float_is_refused():
    with pytest.raises(ValueError, match=r"series 'CoTo': y\[1\] is 1000"):
        Series("CoTo", (0, 1), (1.0, 10**400))


def test_missing_files_and_no_files_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results\.json is not there"):
        read([tmp_path])
    with pytest.raises(ValueError, match="no results are named"):
        read([])


def test_a_torn_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    replace_file(path, "old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_old_or_new_and_nothing_between(tmp_path):
    path = tmp_path / "page.html"
    texts = {"a" * 300_000, "b" * 200_000}
    replace_file(path, "a" * 300_000)
    stop, seen = threading.Event(), []

    def watch():
        while not stop.is_set():
            seen.append(path.read_text())

    thread = threading.Thread(target=watch)
    thread.start()
    for i in range(30):
        replace_file(path, sorted(texts)[i % 2])
    stop.set()
    thread.join()
    assert seen
    assert all(text in texts for text in seen)


# Markdown and page ---------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Elements, texts and attributes of a page."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def test_every_text_is_escaped():
    harmless, evil = Outline(replace_texts(evil_report(), "calm").to_html()), Outline(evil_report().to_html())
    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in harmless.elements]
    assert len(evil.all("script")) == 3
    assert sum(EVIL in text for text in evil.texts) >= 20  # it is all there, as text
    assert evil_report().to_html().count("<script>alert") == 0


def replace_texts(report, word):
    return Report.from_json(json.loads(json.dumps(report.to_json()).replace(json.dumps(EVIL)[1:-1], word)))


def test_page_is_self_contained_and_accessible():
    from plotly.offline import get_plotlyjs

    report = demo_report()
    html = report.to_html()
    assert html.count(get_plotlyjs()) == 1
    outline = Outline(html)
    own = html.replace(get_plotlyjs(), "")
    assert not re.search(r"https?://|//cdn|@import|url\(", own)
    assert all("src" not in attrs for _, attrs in outline.elements)
    assert outline.all("html") == [{"lang": "en"}]
    assert len(outline.all("h1")) == 1
    assert len(outline.all("h2")) == len(report.panels) + 2  # what was run, words
    assert all(attrs.get("scope") in ("col", "row") for attrs in outline.all("th"))
    plots = [attrs for attrs in outline.all("div") if attrs.get("role") == "img"]
    assert len(plots) == sum(not isinstance(panel, Table) for panel in report.panels)
    assert all(len(attrs["aria-label"]) > 40 for attrs in plots)
    assert len(outline.all("details")) == len(plots)
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in outline.all("a")} <= set(ids)
    assert {attrs["aria-labelledby"] for attrs in outline.all("section")} <= set(ids)
    for panel in report.panels:
        assert panel.command in outline.texts or not panel.command
    assert "recipe.learning_rate" in outline.texts
    assert "0.0025" in outline.texts


@pytest.mark.parametrize(("second", "count"), [("loraloom b", 2), ("loraloom a", 1)])
def test_markdown_tells_a_command_of_all_panels_once(second, count):
    panels = [Table(title, ("x",), ((1,),), command=told) for title, told in (("p", "loraloom a"), ("q", second))]
    text = Report("r", "s", tuple(panels)).to_markdown()
    assert text.count("made by") + text.count("Made by") == text.count("    loraloom") == count
    assert (text.index("loraloom a") < text.index("## p")) == (count == 1)


def test_markdown_has_every_number_and_breaks_no_table():
    text = demo_report().to_markdown()
    assert text.count("\n## ") == len(demo_report().panels) + 1
    assert "| 0.5 | 0.730 \\[0.712, 0.748\\] |" in text
    assert "| recipe.rank | 8 |" in text
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in evil_report().to_markdown().splitlines() if line[:1] == "|"
    }
    assert widths == {2, 3}
    assert not re.search(r"(?<!\\)<script", re.sub(r"(?m)^    .*$", "", evil_report().to_markdown()))


def test_an_empty_report_has_a_page_too():
    empty = Report("Nothing", "Nothing was measured.", (Table("Empty", ("a",), ()), Heatmap("H", "", "", (), (), ())))
    assert "Nothing was measured." in empty.to_html()
    assert "## Empty" in empty.to_markdown()


def test_what_was_run_is_told_as_it_was() -> None:
    """A column of numbers is rounded alike; keys and values are no column."""
    page = Report("t", "s", run={"density": 0.5, "limit": 400, "rate": 5e-4, "none": None}).to_markdown()
    assert [line for line in page.splitlines() if line.startswith("| ")][2:] == [
        "| density | 0.5 |",
        "| limit | 400 |",
        "| rate | 0.0005 |",
        "| none | – |",
    ]
