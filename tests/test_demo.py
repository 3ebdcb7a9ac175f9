"""The demo's machinery on a tiny random model: all its parts, in seconds. `make demo` runs it on real weights."""

from __future__ import annotations

import json

import pytest

from cli.conftest import recipe_content, tiny_model  # noqa: F401
from loraloom import demo, report


@pytest.fixture
def settings(tiny_model):  # noqa: F811
    return demo.Settings(
        others=("digits",),
        points=(0.0, 0.5, 1.0),
        densities=(0.5,),
        limit=24,
        overrides=(
            ("model", str(tiny_model)),
            ("train.steps", 4),
            ("train.batch_size", 4),
            ("data.image_size", 28),
            ("data.train_limit", 60),
        ),
    )


def test_the_demo_writes_adapters_results_and_a_page(tmp_path, settings):
    said: list[str] = []
    made = demo.run(tmp_path / "demo", settings=settings, say=said.append)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "adapters",
        "report.html",
        "report.md",
        "results.json",
    ]
    assert sorted(path.name for path in (tmp_path / "demo" / "adapters").iterdir()) == [
        f"{method}-digits-{seed}" for method in ("coto", "lora") for seed in (0, 1)
    ]
    assert report.read([tmp_path / "demo"]) == made
    assert list(tmp_path.iterdir()) == [tmp_path / "demo"]


def test_what_it_reports_is_what_it_measured(tmp_path, settings):
    demo.run(tmp_path / "demo", settings=settings, say=lambda line: None)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    by_key = {(r["method"], r["measurement"], r.get("of"), r.get("at")): r for r in results["records"]}
    ends = [by_key["CoTo", "path", "delta", at]["value"] for at in (0.0, 1.0)]
    seeds = by_key["CoTo", "alone", "digits", None]["by_seed"]
    assert ends == seeds[:2]  # the ends of the path are the adapters themselves
    table = next(panel for panel in results["panels"] if panel["title"] == "CoTo against LoRA")
    for _, lora, coto, gap, _ in table["rows"]:
        assert gap == pytest.approx(coto - lora, abs=2e-4)


def test_an_existing_output_is_refused_before_any_work(tmp_path, settings):
    (tmp_path / "demo").mkdir()
    with pytest.raises(FileExistsError, match="--overwrite"):
        demo.run(tmp_path / "demo", settings=settings, say=pytest.fail)
