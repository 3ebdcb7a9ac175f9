"""The demo's machinery on a tiny random model: all its parts, in seconds. `make demo` runs it on real weights."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import chromium
from loraloom import demo, report
from loraloom.cli.shell import line_of
from loraloom.folders import UNFINISHED
from processes import process, status_of
from tiny_vision import tiny_model  # noqa: F401


@pytest.fixture(scope="module")
def settings(tiny_model):  # noqa: F811
    return demo.Settings(
        others=("digits",),
        points=(0.0, 0.5, 1.0),
        densities=(0.5,),
        limit=24,
        overrides=(
            ("model", str(tiny_model)),
            ("train.steps", 3),
            ("train.batch_size", 4),
            ("data.image_size", 28),
            ("data.train_limit", 60),
        ),
    )


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    """The folder that one run left, and the report that it returned."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, demo.run(out, settings=settings, say=lambda line: None)


def test_it_writes_adapters_results_and_a_page(done):
    out, made = done
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "report.html", "report.md", "results.json"]
    assert sorted(path.name for path in (out / "adapters").iterdir()) == [
        f"{method}-digits-{seed}" for method in ("coto", "lora") for seed in (0, 1)
    ]
    assert report.read([out]) == made


def test_what_it_reports_is_what_it_measured(done):
    results = json.loads((done[0] / "results.json").read_text())
    by_key = {(r["method"], r["measurement"], r.get("of"), r.get("at")): r for r in results["records"]}
    ends = [by_key["CoTo", "path", "delta", at]["value"] for at in (0.0, 1.0)]
    seeds = by_key["CoTo", "alone", "digits", None]["by_seed"]
    assert ends == seeds[:2]  # the ends of the path are the adapters themselves
    table = next(panel for panel in results["panels"] if panel["title"] == "CoTo against LoRA")
    for _, lora, coto, gap, _ in table["rows"]:
        assert gap == pytest.approx(coto - lora, abs=2e-4)


def test_its_page_is_quiet_and_whole_in_a_browser(done, tmp_path):
    executable = chromium.find()
    if executable is None:
        pytest.skip(f"no browser on PATH; looked for {', '.join(chromium.NAMES)}")
    out, made = done
    page = (out / "report.html").as_uri()
    with chromium.launched(executable, tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.complaints() == []
        assert browser.requests() == [page]
        drawn = browser.run("document.querySelectorAll('.plot > * svg.main-svg:first-child').length")
    assert drawn == sum(not isinstance(panel, report.Table) for panel in made.panels)


def test_a_failure_leaves_nothing_and_an_existing_output_is_refused(tmp_path, settings, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("the machine caught fire")

    monkeypatch.setattr(demo, "_train", fail)
    with pytest.raises(RuntimeError, match="fire"):
        demo.run(tmp_path / "demo", settings=settings, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "demo").mkdir()
    with pytest.raises(FileExistsError, match="--overwrite"):
        demo.run(tmp_path / "demo", settings=settings, say=pytest.fail)


def stands(out: Path) -> dict[str, bytes | None]:
    """All that is below a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in out.rglob("*")}


@pytest.fixture
def quick(done, monkeypatch):
    """A demo that measures nothing, and what another one wrote."""
    monkeypatch.setattr(demo, "_measure_all", lambda study, work: (work / "adapters").mkdir())
    monkeypatch.setattr(demo, "page_of", lambda study, seconds: done[1])


@pytest.mark.parametrize("what", [".", "thesis/only-copy.txt", "results.json", "adapters/mine/a", "merged/a"])
def test_overwriting_removes_only_what_a_demo_wrote(tmp_path, settings, quick, what):
    out = tmp_path / "runs"
    if what in ("adapters/mine/a", "merged/a"):  # put to a demo
        demo.run(out, settings=settings, say=str)
    (out / what).parent.mkdir(parents=True, exist_ok=True)
    (out / what).write_text("{}")
    before = stands(tmp_path)
    with pytest.raises(FileExistsError, match="is not just what a demo wrote, so it is not overwritten") as refused:
        demo.run(out, overwrite=True, settings=settings, say=pytest.fail)
    assert str(out) in line_of(refused.value) and stands(tmp_path) == before


def test_overwriting_replaces_an_earlier_demo(tmp_path, settings, done, quick):
    out = tmp_path / "demo"
    out.mkdir()
    demo.run(out, overwrite=True, settings=settings, say=str)  # an empty folder
    (out / "adapters" / "coto-digits-0").mkdir()
    demo.run(out, overwrite=True, settings=settings, say=str)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"] and not list((out / "adapters").iterdir())


def killed(place: str, out: Path, settings: demo.Settings, made: report.Report) -> None:
    """A demo that measures nothing and is killed as it measures, or between two steps of taking its place."""
    renamed, plain = [], Path.rename

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def rename(self: Path, target: Path) -> None:
        if self.parent == out.parent and renamed:
            die()
        renamed.append(self)
        plain(self, target)

    Path.rename = rename
    demo._measure_all = die if place == "measuring" else lambda study, work: None
    demo.page_of = lambda study, seconds: made
    demo.run(out, overwrite=True, settings=settings, say=str)


def test_a_killed_demo_leaves_what_was_there_and_is_swept_by_the_next(tmp_path, settings, done, quick):
    out, new = tmp_path / "demo", replace(done[1], summary="new")
    demo.run(out, settings=settings, say=str)
    for place in ("measuring", "replacing"):
        child = process(killed, place, out, settings, new)
        child.start()
        assert status_of(child) in (0, -signal.SIGKILL)
        assert report.read([out]) in (done[1], new)
    child = process(killed, "measuring", out, settings, new)
    child.start()
    assert status_of(child) == -signal.SIGKILL
    assert sum(path.name.endswith(UNFINISHED) for path in tmp_path.iterdir()) == 1
    demo.run(out, overwrite=True, settings=settings, say=str)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
