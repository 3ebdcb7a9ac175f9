"""Data sets from local folders, in the forms that the hub has, through the same door as bundled ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loraloom.tasks import load_task
from loraloom.tasks.hub import HubTask
from loraloom.tasks.splits import PARTS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


REVIEWS = [{"text": f"film {i}", "mood": ["bad", "good"][i % 2], "who": f"w{i // 5}"} for i in range(100)]


def test_jsonl_with_one_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "data/train.jsonl", REVIEWS)
    told = {"content": "text", "label": "mood", "group": "who", "prompt": "{content}:"}
    task = load_task(f"hub:{tmp_path / 'data'}", **told)
    assert (task.modality, task.labels, task.prompt) == ("text", ("bad", "good"), "{content}:")
    assert sum(len(task.splits[part]) for part in PARTS) == 100
    groups = [{example.group for example in task.splits[part]} for part in PARTS]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    for part in PARTS:
        for example in task.splits[part]:
            assert example.label == int(str(example.content).split()[1]) % 2
    same = load_task(HubTask(str(tmp_path / "data"), **told), limit=3)
    assert same.splits["test"] == task.splits["test"][:3]


def test_parquet_with_class_names_and_own_parts(tmp_path: Path) -> None:
    import datasets

    names = datasets.Features(
        {"a": datasets.Value("string"), "b": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])}
    )
    for part, start in (("train", 0), ("validation", 100), ("test", 200)):
        rows = {"a": [f"p{start + i}" for i in range(40)], "b": ["h"] * 40, "y": [i % 2 for i in range(40)]}
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=names).to_parquet(tmp_path / f"data/{part}.parquet")
    task = load_task(f"hub:{tmp_path / 'data'}", content="{a} implies {b}", label="y")
    assert task.labels == ("no", "yes")
    assert [len(task.splits[part]) for part in PARTS] == [40, 40, 40]
    assert sorted(str(e.content) for e in task.splits["test"])[0] == "p200 implies h"
    glue = load_task(f"hub:{tmp_path / 'data'}", content="a", label="y", test="validation", validation="")
    assert {str(e.content) for e in glue.splits["test"]} == {f"p{i}" for i in range(100, 140)}
    assert len(glue.splits["train"]) + len(glue.splits["validation"]) == 40


def test_save_to_disk_with_choices(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"q": f"q{i}", "options": {"text": [f"x{i}", f"y{i}", f"z{i}"], "label": ["A", "B", "C"]}, "key": "ABC"[i % 3]}
        for i in range(30)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    task = load_task(f"hub:{tmp_path / 'data'}", content="q", label="key", choices="options")
    assert task.labels == ()
    for part in PARTS:
        for example in task.splits[part]:
            i = int(str(example.content)[1:])
            assert example.choices == (f"x{i}", f"y{i}", f"z{i}")
            assert example.label == i % 3


def test_choices_as_a_list_and_labels_by_number(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "options": ["left", "right", f"o{i}"], "answer": i % 3} for i in range(30)]
    jsonl(tmp_path / "data/train.jsonl", rows)
    task = load_task(f"hub:{tmp_path / 'data'}", content="q", label="answer", choices="options")
    assert all(e.label == int(str(e.content)[1:]) % 3 for part in PARTS for e in task.splits[part])


def test_images(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(24):
        folder = tmp_path / "data/train" / ("dark" if i % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        shade = i if i % 2 else 255 - i
        Image.fromarray(np.full((4, 6), shade, np.uint8)).save(folder / f"{i}.png")
    task = load_task(f"hub:{tmp_path / 'data'}", content="image", label="label", prompt="Dark?", limit=6)
    assert (task.modality, task.labels) == ("image", ("dark", "light"))
    for part in PARTS:
        for example in task.splits[part]:
            assert isinstance(example.content, np.ndarray)
            assert example.content.shape == (4, 6, 3)
            assert example.content.dtype == np.uint8
            assert example.label == int(example.content[0, 0, 0] > 100)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"content": "txt", "label": "mood"}, "there is no column 'txt'; columns: text, mood, who"),
        ({"content": "{text} {other}", "label": "mood"}, "there is no column 'other'; columns: text, mood, who"),
        ({"content": "text", "label": "mood", "test": "held"}, "there is no split 'held'; splits: train"),
        ({"content": "text", "label": "mood", "train": "all"}, "there is no split 'all'; splits: train"),
        ({"content": "text", "label": "mood", "labels": ("bad", "fine")}, "label 'good' is not among bad, fine"),
    ],
)
def test_refusals(tmp_path: Path, told: dict, message: str) -> None:
    jsonl(tmp_path / "data/train.jsonl", REVIEWS)
    with pytest.raises(ValueError, match=message) as error:
        load_task(f"hub:{tmp_path / 'data'}", **told)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "data") in str(error.value)


def test_no_such_data_set(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="cannot be read") as error:
        load_task(f"hub:{tmp_path / 'none'}", content="text", label="mood")
    assert "\n" not in str(error.value)
