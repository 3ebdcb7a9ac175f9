"""Figures without a browser: well-formed, nothing outside the sheet, the same bytes every time, readable colours."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from PIL import Image

from loraloom.report import Bars, Curve, Heatmap, Report, Series, Table, page, write
from loraloom.report.drawing import Drawing, width
from loraloom.report.figures import figure, figures, write_figures
from loraloom.report.labels import shortened
from loraloom.report.look import DARK, LIGHT, SYMBOLS, colour, contrast, sign, span, ticks
from report_demo import EVIL, demo_report, evil_report, hard_report

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("make", [demo_report, hard_report, evil_report])
def test_every_text_lies_on_the_sheet(make):
    for name, drawing in figures(make()).items():
        root = ET.fromstring(drawing.svg())
        assert root.find(f"{SVG}title").text
        assert (float(root.get("width")), float(root.get("height"))) == (drawing.width, drawing.height)
        for shape in drawing.shapes:
            if shape.kind == "text":
                (x, y), wide = shape.points[0], width(shape.text, shape.size)
                before = {"start": 0, "middle": wide / 2, "end": wide}[shape.anchor]
                along, most = (drawing.height - y, drawing.height) if shape.turned else (x, drawing.width)
                assert along - before >= -1, (name, shape)
                assert along - before + wide <= most + 1, (name, shape)
            for x, y in shape.points:
                assert -1 <= x <= drawing.width + 1, (name, shape)
                assert -1 <= y <= drawing.height + 1, (name, shape)


def test_text_of_others_is_text():
    for drawing in figures(evil_report()).values():
        root = ET.fromstring(drawing.svg())
        assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
            *("svg", "title", "rect", "polyline", "polygon", "text")
        }
        assert EVIL in "".join(root.itertext())


def test_odd_values_and_names_are_drawn():
    nothing = Bars("all 0", "y", ("a",), (Series("s\x00\x1b", ("a",), (0.0,), (0.0,), (0.0,)),))
    for panel in (
        nothing,
        Bars("empty", "y", (), (Series("s", (), ()),)),
        Heatmap("h", "x", "y", (1,), (1,), ((5e-324,),)),
    ):
        ET.fromstring(figure(panel).svg())
        assert figure(panel).png()


def test_pictures_are_the_same_bytes_and_have_the_size_of_print(tmp_path):
    report = Report("r", "s", demo_report().panels[:1])
    first, second = write_figures(report, tmp_path / "a"), write_figures(report, tmp_path / "b")
    assert [path.name for path in first] == [
        f"figure-1-interpolation-between-two-seeds.{form}" for form in ("svg", "png")
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    with Image.open(first[1]) as picture:
        assert picture.size == (1920, 1200)


def test_a_dashed_line_is_drawn_in_parts():
    """It was not drawn at all: all of its parts had no length."""
    sheet = Drawing(100, 20, "#ffffff", "dashes")
    sheet.line([(0, 10), (100, 10)], "#ff0000", 4, "dash")
    picture = Image.open(io.BytesIO(sheet.png(1))).convert("RGB")
    row = [picture.getpixel((x, 10))[1] < 128 for x in range(100)]
    assert 0.5 < sum(row) / 100 < 0.8
    assert sum(a != b for a, b in pairwise(row)) > 10


def test_bands_heat_maps_and_gaps_have_the_colours_of_their_values():
    panel = Heatmap("h", "x", "y", ("a", "b", "c"), ("r",), ((-2.0, 1.0, None),))
    fills = [shape.fill for shape in figure(panel).shapes if shape.kind == "area"][:3]
    assert fills == [colour(LIGHT["diverging"], 0.0), colour(LIGHT["diverging"], 0.75), LIGHT["empty"]]
    band = figure(Curve("c", "x", "y", (Series("s", (0, 1), (1, 2), (0.5, 1.5), (1.5, 2.5)),)))
    assert [shape.alpha for shape in band.shapes if shape.alpha < 1] == [0.15]


def test_a_table_is_no_figure_and_markdown_shows_the_others(tmp_path):
    with pytest.raises(ValueError, match="'t' is a table, which is no figure"):
        figure(Table("t", ("a",), ((1,),)))
    write(Report("Two", "s", demo_report().panels[:2]), tmp_path / "run")
    out = page([tmp_path / "run"], tmp_path / "pages" / "r.md", figures=tmp_path / "figures")
    text = out.read_text(encoding="utf-8")
    assert "](../figures/figure-1-interpolation-between-two-seeds.svg)" in text
    assert text.count("![") == 1
    odd = page([tmp_path / "run"], tmp_path / "odd.md", figures=tmp_path / "my figures (1)")
    assert "](my%20figures%20%281%29/figure-1-interpolation-between-two-seeds.svg)" in odd.read_text()
    with pytest.raises(FileExistsError, match=r"figures is there already; --overwrite"):
        page([tmp_path / "run"], tmp_path / "pages" / "s.md", figures=tmp_path / "figures")
    with pytest.raises(ValueError, match=r"r\.pdf: a page ends in \.html or \.md"):
        page([tmp_path / "run"], tmp_path / "r.pdf")


def test_figures_are_there_whole_with_their_page_or_not_at_all(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "figures"
    write(Report("Two", "s", demo_report().panels[:2]), run)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError):  # the page cannot be written
        page([run], tmp_path / "file" / "r.html", figures=kept)
    (tmp_path / "file").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    page([run], tmp_path / "r.html", figures=kept)
    names = sorted(path.name for path in kept.iterdir())
    (kept / "figure-9-of-an-earlier-report.svg").touch()
    page([run], tmp_path / "r.html", figures=kept, overwrite=True)
    assert sorted(path.name for path in kept.iterdir()) == names
    (kept / "photo.png").touch()
    with pytest.raises(FileExistsError, match="is not just figures of a report, so it is not overwritten"):
        page([run], tmp_path / "r.html", figures=kept, overwrite=True)
    assert (kept / "photo.png").exists()
    with pytest.raises(ValueError, match="would hold the page, too"):
        page([run], tmp_path / "new" / "r.md", figures=tmp_path / "new")


def test_a_page_or_figures_that_came_meanwhile_are_not_lost(tmp_path, monkeypatch):
    out, kept = tmp_path / "r.md", tmp_path / "figures"
    write(Report("Two", "s", demo_report().panels[:2]), tmp_path / "run")
    made = Report.to_markdown

    def meanwhile(path):
        def write(*arguments):
            path.parent.mkdir(exist_ok=True)
            path.write_text("of another")
            return made(*arguments)

        return write

    for path, others in ((out, []), (kept / "mine.svg", ["figures"])):
        monkeypatch.setattr(Report, "to_markdown", meanwhile(path))
        with pytest.raises(FileExistsError):
            page([tmp_path / "run"], out, figures=None if path == out else kept)
        assert path.read_text() == "of another"
        assert sorted(item.name for item in tmp_path.iterdir()) == sorted(["run", *(others or ["r.md"])])
        if path == out:
            out.unlink()


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_from_the_ground(theme):
    """WCAG: 4.5 to 1 for text, 3 to 1 for lines and marks."""
    assert min(contrast(theme[name], theme["paper"]) for name in ("ink", "muted")) >= 4.5
    assert min(contrast(hue, theme["paper"]) for hue in theme["hues"]) >= 3
    assert len(set(theme["hues"])) == len(theme["hues"])


def test_49_groups_differ_in_colour_or_marker():
    assert len({sign(group) for group in range(49)}) == 49
    assert all(marker < len(SYMBOLS) for _, marker in map(sign, range(200)))


def test_short_names_differ_where_the_names_do():
    paths = [f"model.decoder.layers.{at}.self_attn.q_proj" for at in range(40)]
    assert len(set(shortened(paths))) == 40
    alike = [f"{start}-{'x' * 40}-{end}" for start in "ab" for end in "cd"]
    assert len(set(shortened(alike, 10))) == 4
    hidden = [f"aaaaaaaaaaaa{at}bbbbbbbbbbbbbb" for at in range(3)]
    assert len(set(shortened(hidden, 10))) == 3
    assert all(len(name) <= 18 for name in shortened(paths))
    assert shortened(["same" * 10] * 2) == [shortened(["same" * 10])[0]] * 2
    assert shortened([]) == []


def test_ticks_are_round_and_inside():
    for low, high in ((0.0, 1.0), (-3e-9, 2e-9), (12345.0, 99999.0), (5.0, 5.0)):
        found = ticks(low, high)
        assert all(low - 1e-12 <= place <= high + 1e-12 for place in found)
        assert 1 <= len(found) <= 12
    for low, high in ((-1.7e308, 1.7e308), (0.0, 5e-324)):  # the ends of what floats can hold
        assert ticks(low, high) == [low, high]
    assert span([-0.5, 2.0]) == (-2.0, 2.0, True)
