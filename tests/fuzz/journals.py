"""Sweep files, what sweeps and probes note of what they have done, files of scores, task files of lm-eval."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

import loraloom as ll
from fuzz.reader import Reader
from loraloom import recipe
from loraloom.integrations.lm_eval import _asked
from loraloom.probing import scores_in
from loraloom.probing.journal import Journal as ProbeJournal
from loraloom.store import load
from loraloom.sweep import plan
from loraloom.sweep.results import summarised
from loraloom.sweep.table import Sweep
from loraloom.sweep.work import Journal
from loraloom.untrusted import read_json

RECIPE = {"model": "nowhere/model", "task": "digits", "output": "out", "train": {"steps": 8}}
TABLE: dict[str, Any] = {
    **{"title": "Tiny", "recipe": "recipe.yaml", "arms": {"LoRA": {}, "CoTo": {"strategy.name": "coto"}}},
    **{"tasks": ["digits", "fashion-mnist"], "seeds": [0, 1], "rates": ["1e-2", 0.03], "tuned_on": [0]},
    **{"axes": {"train.steps": [4]}, "limit": 4, "threads": 1},
    "measure": {
        **{"rates": "chosen", "split": "test", "interpolate": {"at": [0.0, 0.5], "spaces": ["factors"]}},
        **{"merge": [{"weights": [1, 2], "space": "delta"}], "tasks": [{"method": "linear", "space": "factors"}]},
        **{"prune": [{"keep": "every-other"}, {"density": 0.5}], "coalitions": {"off": [0.5], "draws": 2}},
    },
}
ASKED = {"probe": "shapley", "seed": 0, "units": ["0", "1"]}
NAMES = [f"model.layers.{at}.{part}" for at in (0, 1) for part in ("q_proj", "v_proj")]


def sweep_file(folder: Path) -> None:
    """A sweep and its recipe."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))


def read_sweep(folder: Path) -> None:
    """A sweep and all its jobs."""
    read = plan.read(folder / "sweep.yaml")
    for job in chain(*plan.phases(read, lambda cell: read.rates[0])):
        assert job.key


@cache
def table() -> Sweep:
    """A sweep whose jobs are all done."""
    own = Path(recipe.__file__).parents[2] / "recipes" / "demo" / "lora.yaml"
    return Sweep.model_validate({**TABLE, "recipe": own})


def sweep_journal(folder: Path) -> None:
    """What the jobs of a sweep found."""
    journal = Journal(folder / "journal")
    for job in chain(*plan.phases(table(), lambda cell: 0.01)):
        told = {"operation": job.operation.name, "arm": job.cell.arm, "seeds": [0], "seconds": 1.5, "broken": False}
        journal.put(job, {**told, "took": 2.0, "scores": dict.fromkeys(job.splits, "1011")})


def read_sweep_journal(folder: Path) -> None:
    """The report of a sweep."""
    summarised(table(), Journal(folder / "journal"), seconds=1.0, processes=1).to_markdown()


def probe_journal(folder: Path) -> None:
    """What a probe has scored."""
    held = ProbeJournal(folder / "out.json.part", ASKED)
    held.mark("model", "a model")
    for key in ("base", "0,1", "1"):
        held.add(key, 0.25)
    held.close()


def read_probe_journal(folder: Path, fresh: bool = False) -> None:
    """The same, to go on with."""
    held = ProbeJournal(folder / "out.json.part", ASKED, fresh=fresh)
    held.mark("model", "a model")
    assert all(isinstance(score, float) and not math.isnan(score) for score in held.known.values())
    held.add("new", 0.5)
    held.close()


def scores_file(content: Any) -> Any:
    """Writes a file of scores."""
    return lambda folder: (folder / "scores.json").write_text(json.dumps(content))


def use_scores(folder: Path) -> None:
    """An adapter pruned and compressed by scores."""
    file, adapter = folder / "scores.json", load(folder.parent / "plain")
    told = read_json(file)
    if isinstance(told, dict):
        unit = "module" if NAMES[0] in scores_in(told, "scores") else "layer"
        ll.prune(adapter, density=0.5, unit=unit, by=scores_in(told, "scores")).loaded()
        ll.compress(adapter, budget="0.5x", scores=scores_in(told, "scores", least=0.0)).loaded()


LISTS = {"units": NAMES, "values": [0.5, -0.25, 1, 2e-3]}
SCORES = dict(zip(NAMES, (0.5, 0, 1, 2e-3), strict=True))
HARNESS = {
    **{"task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}},
    **{"output_type": "multiple_choice", "doc_to_text": "{{text}}", "metric_list": [{"metric": "acc"}]},
}
PRUNE = ("prune", "../plain", "-o", "out", "--density", "0.5", "--unit", "module", "--by", "scores.json")
COMPRESS = ("compress", "../plain", "-o", "out", "--budget", "0.5x", "--scores", "scores.json")
JOURNALS = {
    "sweep": Reader(sweep_file, read_sweep, command=("sweep", "sweep.yaml", "-o", "sweep.yaml"), fixed=6),
    "sweep journal": Reader(sweep_journal, read_sweep_journal, fixed=6),
    "probe journal": Reader(probe_journal, read_probe_journal, lambda folder: read_probe_journal(folder, fresh=True)),
    "scores": Reader(scores_file(SCORES), use_scores, command=PRUNE),
    "scores in lists": Reader(scores_file(LISTS), use_scores, command=COMPRESS),
    "scores in a report": Reader(
        scores_file({"format": "loraloom report", "records": [{"at": 1}, LISTS]}), use_scores, command=PRUNE
    ),
    "harness task": Reader(
        lambda folder: (folder / "tiny.yaml").write_text(yaml.safe_dump(HARNESS, sort_keys=False)),
        lambda folder: _asked(f"lm_eval:{folder / 'tiny.yaml'}"),
    ),
}
