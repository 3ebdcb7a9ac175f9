"""lm-evaluation-harness: its tasks on a base model with an adapter. Needs the extra ``loraloom[lm-eval]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloom.adapter import Adapter
from loraloom.integrations.backbones import load_backbone
from loraloom.integrations.peft import attached
from loraloom.registry import UnknownName
from loraloom.tasks.metrics import Estimate
from loraloom.untrusted import parse_yaml

PREFIX = "lm_eval:"
_WITHIN = 1.96  # standard errors to either end of a 95 % interval


@dataclass(frozen=True)
class HarnessEvaluation:
    """What the harness says of one adapter on one of its tasks.

    Attributes:
        task: ``lm_eval:NAME:METRIC``, or ``lm_eval:NAME:METRIC,FILTER`` where the harness filters answers.
        split: ``test``: which one that is, the task's definition decides.
        estimate: of the metric, with the normal interval from the harness's standard error (a point where it has none).
        metrics: every metric of the task, by the name that it has in ``task``.

    Example:
        >>> HarnessEvaluation("lm_eval:piqa:acc", "test", Estimate(0.7, 0.6, 0.8, 84), {"acc": 0.7}).value
        0.7
    """

    task: str
    split: str
    estimate: Estimate
    metrics: Mapping[str, float]

    @property
    def value(self) -> float:
        """The metric."""
        return self.estimate.value

    def to_json(self) -> dict[str, Any]:
        """Task, split, value, ends of the interval and number of examples."""
        return {"task": self.task, "split": self.split, **self.estimate.to_json()}


def evaluate(
    adapter: Adapter | None, task: str, *, model: str, limit: int | None = None, max_length: int | None = None
) -> HarnessEvaluation:
    """Score an adapter (None: the base) with lm-evaluation-harness.

    Args:
        adapter: on the causal model that ``model`` names.
        task: ``lm_eval:NAME`` or ``lm_eval:NAME:METRIC`` (by default the task's first metric), where NAME is a task or
            a group of the harness, or a file ``tasks/mine.yaml`` that defines one. METRIC may name one of several
            filters of answers (``exact_match,flexible-extract``), by default the first.
        model: a bundled name, a local folder or a hub id.
        limit: only the first so many examples.
        max_length: most tokens of a prompt with its answer; by default what the model takes.

    Raises:
        ValueError: the harness is not installed, the model is not causal, or the file defines no task.
        UnknownName: the harness has no such task, or the task no such metric.

    Source: Gao et al., "A framework for few-shot language model evaluation", https://doi.org/10.5281/zenodo.5371628
    """
    name, wanted, folder = _asked(task)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"task {task} needs lm-evaluation-harness, which is not installed ({error}): "
            "pip install 'loraloom[lm-eval]'"
        ) from None
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if name not in manager.all_tasks:
        raise UnknownName("task of lm-evaluation-harness", name, sorted(manager.all_tasks)[:20])
    if name in manager.all_tags:
        raise ValueError(
            f"task {task}: {name} is a tag of lm-evaluation-harness, which has no score of its own; name one"
        )
    backbone = load_backbone(model)
    if backbone.family != "causal":
        raise ValueError(f"task {task}: lm-evaluation-harness asks causal models, and {model} is {backbone.family}")
    with attached(backbone.model, adapter) as live:
        live.eval()
        asked = HFLM(pretrained=live, tokenizer=backbone.processor, backend="causal", max_length=max_length)
        told: Any = simple_evaluate(asked, tasks=[name], limit=limit, task_manager=manager, log_samples=False)
    return _translated(name, wanted, told)


def _asked(task: str) -> tuple[str, str, str | None]:
    """Name, metric (or "") and the folder of the task's own definition (or None)."""
    name, _, wanted = task.removeprefix(PREFIX).partition(":")
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return name, wanted, None
    if not path.is_file():
        raise FileNotFoundError(f"task {path}: no such file")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("task:")]
    named = parse_yaml(lines[0], f"task {path}") if lines else None
    if not isinstance(named, dict) or not isinstance(named.get("task"), str):
        raise ValueError(f"task {path}: a task of lm-evaluation-harness has a line `task: NAME`")
    return named["task"], wanted, str(path.parent)


def _translated(name: str, wanted: str, told: Mapping[str, Any]) -> HarnessEvaluation:
    """The harness writes ``{"acc,none": 0.7, "acc_stderr,none": 0.01, ...}``; ``none`` is the name of a filter."""
    held = {key.removesuffix(",none"): x for key, x in told["results"][name].items() if "," in key}
    held = {key: float(x) for key, x in held.items() if isinstance(x, int | float)}
    metrics = {key: x for key, x in held.items() if "_stderr" not in key}
    metric = next((key for key in metrics if wanted in ("", key, key.partition(",")[0])), wanted)
    if metric not in metrics:
        raise UnknownName(f"metric of {name}", metric, list(metrics))
    of, comma, chosen = metric.partition(",")
    value, within = metrics[metric], _WITHIN * held.get(f"{of}_stderr{comma}{chosen}", 0.0)
    count = sum(int(told_of["effective"]) for told_of in told["n-samples"].values())  # of a group: of its tasks
    return HarnessEvaluation(
        f"{PREFIX}{name}:{metric}", "test", Estimate(value, value - within, value + within, count), metrics
    )
