"""The page in a real browser: no complaint, no request, everything drawn, at three widths and in the dark."""

from __future__ import annotations

import http.server
import threading

import pytest

import chromium
from loraloom.report import Table, write
from report_demo import demo_report, evil_report, hard_report

WIDTHS = (390, 768, 1280)  # a phone, a tablet, a laptop
DRAWN = """[...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('svg.main-svg').length > 0
  && plot.querySelectorAll('.scatterlayer .trace path, .barlayer .trace path, .heatmaplayer image').length > 0)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = chromium.find()
    if executable is None:
        pytest.skip(f"no browser on PATH; looked for {', '.join(chromium.NAMES)}")
    with chromium.launched(executable, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write(demo_report(), folder)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def hard_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard")
    write(hard_report(), folder)
    return (folder / "report.html").as_uri()


def colour(browser, selector, what):
    return browser.run(f"getComputedStyle(document.querySelector({selector!r}))[{what!r}]")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_quiet_whole_and_fits(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [page]
    drawn = browser.run(DRAWN)
    assert len(drawn) == sum(not isinstance(panel, Table) for panel in demo_report().panels)
    assert all(drawn)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.querySelectorAll('.plot .main-svg')].every(svg => svg.clientWidth <= innerWidth)")
    paper = "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)"
    assert colour(browser, "body", "backgroundColor") == paper
    assert colour(browser, ".plot .main-svg", "backgroundColor") == paper


# What is wrong with the plots: a legend on the data, two ticks that say the same, text that is cut off.
OVERLAPS = """[...document.querySelectorAll('.plot')].flatMap(plot => {
  const box = e => e.getBoundingClientRect(), all = (where, of) => [...where.querySelectorAll(of)].map(box);
  const cross = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const frame = box(plot.querySelector('.bglayer .bg') || plot.querySelector('.draglayer .nsewdrag'));
  const outside = all(plot, '.legend .bg').filter(one => cross(one, frame)).map(() => 'legend on data');
  const page = box(plot);
  const cut = all(plot, '.legendtext, .xtitle, .ytitle, .ytick text, .cbaxis text').filter(one =>
    one.left < page.left - 1 || one.right > page.right + 1 || one.top < page.top - 1 || one.bottom > page.bottom + 1);
  const told = [...plot.querySelectorAll('.ytick text')].map(e => e.textContent);
  const twice = told.filter((text, at) => told.indexOf(text) < at).map(text => 'tick twice: ' + text);
  return [...outside, ...twice, ...cut.map(() => 'cut')].map(what => plot.id + ': ' + what); })"""


# Contrast of each number on a heat map with the colour of its cell, as the page computes it from the values.
CONTRASTS = r"""(() => { const { panels, look } = JSON.parse(document.getElementById('data').textContent);
      const hex = c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16));
      const rgb = c => c.match(/[\d.]+/g).slice(0, 3).map(Number);
      const light = c => { const [r, g, b] = c.map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const theme = matchMedia('(prefers-color-scheme: dark)').matches ? look.dark : look.light;
      return panels.flatMap((panel, i) => { if (panel.kind !== 'heatmap') return [];
        const plot = document.getElementById('plot-' + i), values = panel.z.flat().filter(v => v !== null);
        const texts = [...plot.querySelectorAll('.annotation-text')]; if (texts.length !== values.length) return [];
        const low = Math.min(...values), high = Math.max(...values);
        const both = low < 0 && high > 0, most = Math.max(-low, high);
        const [from, to] = both ? [-most, most] : [low, high], scale = both ? theme.diverging : theme.scale;
        return values.map((v, k) => { const s = to > from ? (v - from) / (to - from) : 0.5;
          const at = Math.max(0, scale.findIndex(([p]) => p >= s) - 1), [[p, a], [q, b]] = scale.slice(at, at + 2);
          const ground = hex(a).map((x, j) => x + (hex(b)[j] - x) * (s - p) / (q - p));
          const [x, y] = [light(rgb(getComputedStyle(texts[k]).fill)), light(ground)].sort((x, y) => y - x);
          return (x + 0.05) / (y + 0.05); }); }); })()"""


@pytest.mark.parametrize("width", [390, 1280])
def test_what_is_hard_to_lay_out_fits(browser, hard_page, width):
    """Long names, 32 layers, nine series: no scrolling sideways, no legend on the data, nothing cut off; contrast."""
    browser.open(hard_page, width=width)
    assert browser.complaints() == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OVERLAPS) == []
    assert browser.run("document.querySelectorAll('#plot-3 .legend .traces').length") == 9
    bars = "[...document.querySelectorAll('.scrollbar')].filter(e => +e.getAttribute('height') > 0).length"
    assert browser.run(bars) == 0
    for dark in (False, True):
        browser.scheme(dark)
        browser.run("new Promise(done => setTimeout(done, 300))")
        found = browser.run(CONTRASTS)
        assert len(found) == (82 if width == 1280 else 1)  # a phone has no room for numbers in 9 columns
        assert min(found) >= 4.5


def test_every_series_has_its_line_and_band(browser, page):
    browser.open(page)
    # Four series with an interval each: a filled band and a line with markers.
    assert browser.run("document.querySelectorAll('#plot-0 .scatterlayer .fills path').length") == 4
    assert browser.run("document.querySelectorAll('#plot-0 .scatterlayer .trace .points path').length") == 4 * 11
    dashes = browser.run(
        "[...document.querySelectorAll('#plot-0 .scatterlayer path.js-line')]"
        ".filter(p => p.style.strokeWidth !== '0px').map(p => p.style.stroke + p.style.strokeDasharray)"
    )
    assert len(set(dashes)) == 4
    assert browser.run("document.querySelectorAll('#plot-2 .errorbar').length") == 2 * 5


def test_plots_follow_the_colour_scheme_and_paper(browser, page):
    browser.open(page, dark=False)
    browser.scheme(dark=True)
    for _ in range(20):  # plots are drawn again one after the other, slowly on a busy machine
        browser.run("new Promise(done => setTimeout(done, 300))")
        if colour(browser, ".plot .main-svg", "backgroundColor") != "rgb(255, 255, 255)":
            break
    assert colour(browser, ".plot .main-svg", "backgroundColor") == "rgb(20, 23, 27)"
    browser.run("window.dispatchEvent(new Event('beforeprint'))")  # paper is white in the dark too
    assert colour(browser, ".plot .main-svg", "backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("document.querySelector('.plot .main-svg').clientWidth") == 640
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert colour(browser, ".plot .main-svg", "backgroundColor") == "rgb(20, 23, 27)"
    assert browser.run("document.querySelector('.plot .main-svg').clientWidth") != 640
    assert browser.complaints() == []


def test_tables_sort(browser, page):
    browser.open(page)
    cells = "[...document.querySelectorAll('#panel-1 tbody tr')].map(row => row.cells[2].textContent)"
    head = "document.querySelectorAll('#panel-1 thead th')[2]"
    before = browser.run(cells)
    browser.run(f"{head}.querySelector('button').click()")
    assert browser.run(cells) == sorted(before, key=float) != before
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    browser.run(f"{head}.querySelector('button').click()")
    assert browser.run(cells) == sorted(before, key=float, reverse=True)
    spaces = "[...document.querySelectorAll('#panel-1 tbody tr')].map(row => row.cells[1].textContent)"
    browser.run("document.querySelectorAll('#panel-1 thead th button')[1].click()")
    assert browser.run(spaces) == ["delta", "delta", "factors", "factors", "–", "–"]  # empty cells last
    assert browser.run("document.querySelectorAll('#panel-1 [aria-sort]').length") == 1


def test_values_below_a_plot_open(browser, page):
    browser.open(page, width=390)
    browser.run("document.querySelector('#panel-0 summary').click()")
    assert browser.run("document.querySelectorAll('#panel-0 details[open] tbody tr').length") == 11
    assert browser.run("document.documentElement.scrollWidth") <= 390


def test_text_of_others_is_never_run_or_lost(browser, tmp_path):
    write(evil_report(), tmp_path)
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.complaints() == []
    assert all(browser.run(DRAWN))
    assert browser.run("document.querySelectorAll('script').length") == 3
    title = browser.run("document.querySelector('#plot-0 .g-xtitle text').textContent")
    assert title == evil_report().panels[0].x_label


def test_text_has_contrast(browser, page):
    """WCAG AA: 4.5 to 1 for every text of the page itself, light and dark."""
    script = """(() => {
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (!c.endsWith(', 0)')) return c; } return 'rgb(255, 255, 255)'; };
      return Math.min(...[...document.querySelectorAll('body *')].filter(e => !e.closest('svg, script, .plot')
        && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
          const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05); })); })()"""
    for dark in (False, True):
        browser.open(page, dark=dark)
        assert browser.run(script) >= 4.5


@pytest.fixture
def server():
    """(address of a picture that is there, paths asked for)."""
    served = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "image/svg+xml")
            self.end_headers()
            self.wfile.write(b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever).start()
        yield f"http://127.0.0.1:{running.server_port}/pixel.svg", served
        running.shutdown()


def test_the_instrument_sees_faults(browser, server, tmp_path):
    """Negative control: a page that throws, logs, fetches and draws nothing is caught on every count."""
    address, served = server
    (tmp_path / "bad.html").write_text(
        f"<!doctype html><title>bad</title><div class=plot></div><img src='{address}'><img src='gone.png'>"
        "<script>console.error('logged')</script><script>throw new Error('thrown')</script>"
    )
    url = (tmp_path / "bad.html").as_uri()
    browser.open(url)
    complaints = " ".join(browser.complaints())
    for fault in ("logged", "thrown", "FILE_NOT_FOUND"):
        assert fault in complaints
    assert sorted(browser.requests()) == sorted([url, address, url.replace("bad.html", "gone.png")])
    assert served == ["/pixel.svg"]
    assert browser.run(DRAWN) == [False]


def test_a_request_slipped_into_the_page_is_blocked_and_seen(browser, server, tmp_path):
    address, served = server
    page = tmp_path / "report.html"
    page.write_text(demo_report().to_html().replace("</main>", f"<img src='{address}'></main>"), encoding="utf-8")
    browser.open(page.as_uri())
    assert served == []
    assert "Content Security Policy" in " ".join(browser.complaints())
