"""The way to lm-evaluation-harness and back; the harness itself runs in peers/test_lm_eval.py (`make peers`)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import loraloom as ll
from loraloom.cli import app
from loraloom.integrations import lm_eval
from loraloom.registry import UnknownName
from tiny import tiny_llama

NAMES = ["ai2_arc", "gsm8k", "hellaswag", "mmlu", "piqa"]
TOLD = {
    "results": {
        "piqa": {
            "alias": "piqa",
            "acc,none": 0.75,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        }
    },
    "n-samples": {"piqa": {"original": 1838, "effective": 84}},
}
FILTERED = {
    "results": {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.01,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": 0.02,
        }
    },
    "n-samples": {"gsm8k": {"original": 1319, "effective": 100}},
}
GROUPED = {
    "results": {
        "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "mmlu_law": {"alias": " - law", "acc,none": 0.25, "acc_stderr,none": 0.2},
        "mmlu_art": {"alias": " - art", "acc,none": 0.75, "acc_stderr,none": 0.2},
    },
    "n-samples": {name: {"original": 100, "effective": 30} for name in ("mmlu_law", "mmlu_art")},
}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the harness: notes what it is asked and answers as the harness does."""
    asked: dict[str, Any] = {}

    def simple_evaluate(model: Any, **options: Any) -> Any:
        asked.update(model=model, training=model.pretrained.training, **options)
        return {"piqa": TOLD, "gsm8k": FILTERED, "mmlu": GROUPED}[options["tasks"][0]]

    parts = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")}
    parts["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    parts["lm_eval.models.huggingface"].HFLM = SimpleNamespace  # type: ignore[attr-defined]
    manager = lambda **told: SimpleNamespace(all_tasks=NAMES, all_tags=["ai2_arc"], **told)  # noqa: E731
    parts["lm_eval.tasks"].TaskManager = manager  # type: ignore[attr-defined]
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    live = SimpleNamespace(model=tiny_llama().train(), family="causal", processor="tokenizer")
    monkeypatch.setattr(lm_eval, "load_backbone", lambda name: live)
    return asked


def test_what_is_asked_and_what_comes_back(harness: dict[str, Any]) -> None:
    made: Any = ll.evaluate(None, "lm_eval:piqa", model="some", limit=84)
    assert made.to_json() == {
        "task": "lm_eval:piqa:acc",
        "split": "test",
        "value": 0.75,
        "low": pytest.approx(0.652),
        "high": pytest.approx(0.848),
        "n": 84,
    }
    assert made.metrics == {"acc": 0.75, "acc_norm": 0.5}
    assert harness["tasks"] == ["piqa"] and harness["limit"] == 84 and harness["training"] is False
    assert harness["model"].tokenizer == "tokenizer" and harness["task_manager"].include_path is None
    normed = ll.evaluate(None, "lm_eval:piqa:acc_norm", model="some").estimate
    assert (normed.low, normed.value, normed.high) == (0.5, 0.5, 0.5)  # no error told: a point


def test_each_filter_of_a_metric_is_told_with_its_own_error(harness: dict[str, Any]) -> None:
    names = {"": "strict-match", ":exact_match": "strict-match"}
    names |= {f":exact_match,{name}": name for name in ("strict-match", "flexible-extract")}
    for asked, name in names.items():
        made: Any = ll.evaluate(None, f"lm_eval:gsm8k{asked}", model="some")
        value, error = (0.25, 0.01) if name == "strict-match" else (0.5, 0.02)
        assert (made.task, made.value) == (f"lm_eval:gsm8k:exact_match,{name}", value)
        assert made.estimate.high == pytest.approx(value + 1.96 * error)
        assert made.metrics == {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}


def test_a_group_has_the_examples_of_its_tasks_and_a_tag_has_no_score(harness: dict[str, Any]) -> None:
    made: Any = ll.evaluate(None, "lm_eval:mmlu", model="some")
    assert (made.task, made.value, made.estimate.n) == ("lm_eval:mmlu:acc", 0.5, 60)
    with pytest.raises(ValueError, match="ai2_arc is a tag of lm-evaluation-harness, which has no score of its own"):
        ll.evaluate(None, "lm_eval:ai2_arc", model="some")


def test_a_file_that_defines_a_task(harness: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("task: piqa\nprocess_docs: !function code.run\n")
    assert ll.evaluate(None, f"lm_eval:{file}", model="some").value == 0.75
    assert harness["task_manager"].include_path == str(tmp_path)
    assert harness["task_manager"].include_defaults is False
    file.write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match="has a line `task: NAME`"):
        ll.evaluate(None, f"lm_eval:{file}", model="some")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml: no such file"):
        ll.evaluate(None, "lm_eval:nothing.yaml", model="some")


def test_names_that_are_not_there(harness: dict[str, Any]) -> None:
    with pytest.raises(UnknownName, match=r"'hellaswagg' is not known \(did you mean 'hellaswag'\?\)"):
        ll.evaluate(None, "lm_eval:hellaswagg", model="some")
    with pytest.raises(UnknownName, match="metric of piqa 'f1' is not known"):
        ll.evaluate(None, "lm_eval:piqa:f1", model="some")


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["evaluate", "base", "--model", "smollm2", "--task", "lm_eval:piqa"])
    assert done.exit_code == 2
    assert "pip install 'loraloom[lm-eval]'" in done.stderr and len(done.stderr.splitlines()) == 1
