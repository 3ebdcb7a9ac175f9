"""The demo's machinery on a tiny random model: all its parts, in seconds. `make demo` runs it on real weights."""

from __future__ import annotations

import json

import pytest

import chromium
from loraloom import demo, report
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
    (tmp_path / "demo" / "kept").touch()
    with pytest.raises(FileNotFoundError):  # the new folder cannot be put in place: the old one is there again
        demo._put_in_place(tmp_path / "nowhere", tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["kept"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        demo.run(tmp_path / "demo", settings=settings, say=pytest.fail)
