"""Everything that reads a file which others may have made: an example of its input, and how it is read to the end."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

import loraloom as ll
from fuzz.folders import FOLDERS
from fuzz.journals import JOURNALS
from fuzz.mutate import damaged_bytes, damaged_json, damaged_lines, damaged_tensors, damaged_yaml
from fuzz.reader import Reader
from loraloom import recipe, report
from loraloom.adapter import Adapter, Factors
from loraloom.checkpoint import Checkpoint
from loraloom.integrations.checkpoints import is_whole, seal
from loraloom.integrations.scoring import trained_with
from loraloom.masks import load_mask, save_mask, support
from loraloom.measured import Statistics, load_statistics, save_statistics
from loraloom.packages import Package, unpack
from loraloom.probing import balance_report
from loraloom.store import load, save
from loraloom.untrusted import read_json


def adapter(modules: int = 2, seed: int = 0, **config: Any) -> Adapter:
    """A small LoRA (with use_dora: DoRA) with a classifier beside it."""
    draw = torch.Generator().manual_seed(seed)

    def factors() -> Factors:
        magnitude = torch.rand(4, generator=draw) if config.get("use_dora") else None
        return Factors(torch.randn(4, 2, generator=draw), torch.randn(2, 3, generator=draw), magnitude=magnitude)

    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM"}
    told |= {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {}, "alpha_pattern": {"v_proj": 4}, **config}
    names = [f"model.layers.{at}.{part}" for at in range(modules) for part in ("q_proj", "v_proj")]
    extras = {"classifier.weight": torch.randn(2, 4, generator=draw)}
    record = {"seconds": 1.5, "log": [{"loss": 1.0, "step": 2}], "lori": {"a": {"seed": 0, "task": ""}, "kept": 3}}
    inputs = [{"operation": "train", "arguments": {"data": {"image_size": 28}}, "record": record}]
    made = {"operation": "merge", "arguments": {"method": "linear"}, "record": {"error": {}, "norm": {}}}
    return Adapter(told, {name: factors() for name in names}, extras, {**made, "inputs": inputs})


def moka() -> Adapter:
    """A small MokA adapter."""
    plan = ll.MokA({"image": 1, "audio": 2}, rank=2, attention="cross", weight={"image": 1.0, "audio": 0.5})
    draw = torch.Generator().manual_seed(0)
    b = torch.randn(4, 2, generator=draw)
    names = [f"model.layers.0.q_proj[{group}]" for group in plan.groups]
    told = {"peft_type": "MOKA", "r": 2, "moka": plan.to_json(), "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return Adapter(told, {name: Factors(b, torch.randn(2, 3, generator=draw)) for name in names})


def whole_adapter(folder: Path) -> None:
    """Everything that can be asked of an adapter's folder."""
    held = load(folder / "a")
    ll.summary(held)
    ll.cosines([held, held])
    [held.extras[path] for path in held.extras]
    repr(held)
    trained_with(held)


def copied_adapter(folder: Path) -> None:
    """A copy of an adapter."""
    load(save(load(folder / "a"), folder / "copy")).loaded()


def whole_mask(folder: Path) -> None:
    """A mask, all of it."""
    held = load_mask(folder / "mask.safetensors")
    [held[name] for name in held]
    repr((held, held.density, held.overlap(held)))


def whole_report(folder: Path) -> None:
    """A report."""
    report.read([folder / "results.json"]).to_markdown()


def report_page(folder: Path) -> None:
    """A report's page."""
    page = report.read([folder / "results.json"]).to_html()
    assert "<script>alert(1)" not in page, "text of a report became code of its page"


def whole_base(folder: Path) -> None:
    """A base model's weights."""
    held = Checkpoint(folder)
    [held[name] for name in held]


def package_in(folder: Path) -> None:
    """An archive of a registry."""
    away = mock.patch("loraloom.packages._download", side_effect=OSError("nothing is fetched here"))
    with away, mock.patch.dict(os.environ, {"LORALOOM_PACKAGES": str(folder)}):
        (folder / "into").mkdir()
        unpack(Package("thing==1.0", {"data/*": "0" * 64}), folder / "into")
    outside = {path.name for path in folder.iterdir()} - {"into", "thing-1.0-py3-none-any.whl"}
    assert not outside, outside


def wheel(folder: Path) -> None:
    """A wheel with two files."""
    with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/one.txt", "one " * 50)
        archive.writestr("data/two.txt", "two")


def tarred(folder: Path) -> None:
    """An archive of another kind under a wheel's name."""
    with tarfile.open(folder / "thing-1.0-py3-none-any.whl", "w:gz") as archive:
        info = tarfile.TarInfo("data/one.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))


RECIPE = {
    **{"model": "nowhere/model", "task": {"dataset": "nowhere", "label": "stars", "labels": ["a", "b"]}},
    **{"output": "out", "seed": 3, "adapter": {"kind": "moka", "rank": 4, "target_modules": ["q_proj"]}},
    **{"moka": {"modalities": {"image": 1}, "rank": {"text": 4, "image": 2}, "weight": 0.5, "span": [3, 4]}},
    **{"strategy": {"name": "coto", "ramp": 0.5, "curve": "linear"}, "data": {"image_size": 28}},
    "train": {"steps": 8, "learning_rate": "1e-3", "warmup": 0.1, "schedule": "linear"},
}
LORI = {
    **{"model": "nowhere/model", "task": "digits", "output": "out", "protect": ["m"], "continue_from": "x"},
    **{"lori": {"calibrate": {"density": 0.1, "exclude": ["a"]}, "start": "reuse"}, "strategy": {"name": "none"}},
}


def read_recipe(folder: Path) -> None:
    """A recipe and its plan."""
    read = recipe.read(folder / "recipe.yaml")
    read.plan()
    read.model_dump_json()


def results(folder: Path) -> None:
    """A report of every kind of panel."""
    from loraloom.report.panels import Bars, Curve, Heatmap, Series, Table

    line = Series("CoTo", (0, 0.5, 1), (0.9, 0.8, 0.9))
    panels = (
        Curve("Path", "t", "accuracy", (line,)),
        Bars("Worth", "value", categories=("0", "1"), series=(Series("one", ("0", "1"), (0.1, 0.2)),)),
        Heatmap("Norms", "projection", "layer", ("q", "v"), (0, 1), ((1, 2), (3, None))),
        Table("Time", ("run", "seconds"), (("LoRA", 61.5), ("CoTo", None))),
    )
    report.write(report.Report("Demo", "All well.\n\nSecond.", panels, {"seeds": [0, 1]}, ({"at": 0.5},)), folder)
    for name in ("report.md", "report.html"):
        (folder / name).unlink()


def record(folder: Path) -> None:
    """What the record of an adapter tells that was trained, and cut."""
    log = [{"step": at, "loss": 1.0 / at, "grad_norm": 0.5} for at in (1, 2)]
    names = [f"layers.{at}.{part}" for at in range(2) for part in "qv"]
    cut = {"error": dict.fromkeys(names, 0.5), "norm": dict.fromkeys(names, 2.0)}
    told = {"operation": "train", "seed": 0, "arguments": {"method": "linear"}, "command": "loraloom train a.yaml"}
    told |= {"inputs": [{"operation": "merge", "source": "a"}], "record": {"seconds": 1.5, "log": log, **cut}}
    (folder / "a").mkdir()
    (folder / "a" / "loraloom.json").write_text(json.dumps(told))


def whole_record(folder: Path) -> None:
    """The page of an adapter's record, as markdown."""
    report.read([folder / "a"]).to_markdown()


def evenness(folder: Path) -> None:
    """What a run noted of its balance."""
    rows = [[0.0] * 4, [1.0, 2.0, None, 1.5], [2.0, 1.0, 1.5, 3.0]]
    told = {"steps": [0, 5, 10], "modules": [f"layers.{at}.{part}" for at in range(2) for part in "qv"], "since": 0}
    (folder / "b.json").write_text(json.dumps(told | dict.fromkeys(("gradient", "update", "distance"), rows)))


def whole_balance(folder: Path) -> None:
    """The page of a balance, as markdown."""
    balance_report([read_json(folder / "b.json")], ["b"]).to_markdown()


def sharded(folder: Path) -> None:
    """A model in two shards."""
    from safetensors.torch import save_file

    for at, key in enumerate(("embed.weight", "fc.weight")):
        save_file({key: torch.ones(2, 3)}, folder / f"model-{at}.safetensors")
    told = {"embed.weight": "model-0.safetensors", "fc.weight": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": told}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def sealed(folder: Path) -> None:
    """A checkpoint with its seal."""
    (folder / "weights").write_bytes(b"1234")
    seal(folder)


def yaml_file(name: str, content: Any) -> Callable[[Path], object]:
    """Writes one YAML file."""
    return lambda folder: (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))


TASK = {**RECIPE["task"], "image": "picture", "prompt": "{image} {content}", "max_new_tokens": 8}
READERS: dict[str, Reader] = {
    "lora": Reader(lambda folder: save(adapter(), folder / "a"), whole_adapter, copied_adapter, ("inspect", "a")),
    "dora": Reader(lambda folder: save(adapter(1, use_dora=True), folder / "a"), whole_adapter, copied_adapter),
    "moka": Reader(
        lambda folder: save(moka(), folder / "a"), whole_adapter, copied_adapter, ("inspect", "a", "--json")
    ),
    "mask": Reader(
        lambda folder: save_mask(support(adapter()), folder / "mask.safetensors"),
        whole_mask,
        command=("calibrate", "../plain", "-o", "m.safetensors", "--exclude", "mask.safetensors"),
    ),
    "statistics": Reader(
        lambda folder: save_statistics(Statistics("gram", {"fc": torch.eye(2)}), folder / "s.safetensors"),
        lambda folder: dict(load_statistics(folder / "s.safetensors")),
    ),
    "recipe": Reader(yaml_file("recipe.yaml", RECIPE), read_recipe),
    "lori": Reader(yaml_file("recipe.yaml", LORI), read_recipe),
    "task": Reader(yaml_file("task.yaml", TASK), lambda folder: recipe.read_task(str(folder / "task.yaml")).columns()),
    "results": Reader(results, whole_report, report_page, ("report", "results.json", "-o", "page.html")),
    "record": Reader(record, whole_record, command=("report", "a", "-o", "page.html")),
    "balance": Reader(evenness, whole_balance, command=("probe", "balance", "b.json", "-o", "out.json")),
    "base": Reader(sharded, whole_base),
    "seal": Reader(sealed, is_whole),
    "wheel": Reader(wheel, package_in),
    "tar": Reader(tarred, package_in),
    **JOURNALS,
    **FOLDERS,
}
LINES = {".jsonl": damaged_lines, ".part": damaged_lines}
DAMAGE = {".json": damaged_json, ".yaml": damaged_yaml, ".safetensors": damaged_tensors, **LINES}


def damage(folder: Path, chance: random.Random) -> str:
    """Damage one file of a folder; which, and how, is up to chance. What was done is told."""
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"))
    data = file.read_bytes()
    if chance.random() < 0.02:
        file.unlink()
        return f"{file.name} removed"
    if chance.random() < 0.02:
        file.unlink()
        file.mkdir() if chance.random() < 0.5 else file.symlink_to(chance.choice(["/dev/zero", file.name, "/etc"]))
        return f"{file.name} is no file"
    file.write_bytes(DAMAGE.get(file.suffix, damaged_bytes)(data, chance))
    return f"{file.name} damaged"
