"""Data sets from local folders, in the forms that the hub has, through the same door as bundled ones."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from loraloom.tasks import Task, load_task, media
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


def labelled(task: Task) -> set[tuple[int, str]]:
    """The number in each content with the answer that it has."""
    examples = [example for part in PARTS for example in task.splits[part]]
    return {(int(str(e.content).strip("t")), e.choices[e.label]) for e in examples}


def test_a_number_of_a_class_is_an_index_though_another_class_is_called_so(tmp_path: Path) -> None:
    """Yelp's stars and folders of images are often called 1, 2, ...: class 1 is the second one."""
    import datasets

    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2", "3"])})
    rows = {"text": [f"t{i}" for i in range(40)], "label": [i % 3 for i in range(40)]}
    datasets.Dataset.from_dict(rows, features=names).save_to_disk(tmp_path / "data")
    assert labelled(load_task(f"hub:{tmp_path / 'data'}")) == {(i, str(1 + i % 3)) for i in range(40)}


def test_a_number_among_choices_that_are_texts_is_an_index_though_they_are_numerals(tmp_path: Path) -> None:
    """MMLU's mathematics: choice 1 of 8, 2, 24, 1 is 2."""
    options = ["8", "2", "24", "1"]
    jsonl(tmp_path / "data/train.jsonl", [{"text": f"t{i}", "of": options, "label": i % 4} for i in range(40)])
    task = load_task(f"hub:{tmp_path / 'data'}", choices="of")
    assert labelled(task) == {(i, options[i % 4]) for i in range(40)}


def test_a_number_among_choices_that_are_numbers_is_the_answer_itself(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "of": [3, 1, 2], "label": 1 + i % 3} for i in range(40)]
    jsonl(tmp_path / "data/train.jsonl", rows)
    task = load_task(f"hub:{tmp_path / 'data'}", choices="of")
    assert labelled(task) == {(i, str(1 + i % 3)) for i in range(40)}


@pytest.mark.parametrize(
    ("first", "told", "expected"),
    [
        (1, {}, "123"),  # the values are the labels
        (1, {"labels": ("3", "2", "1")}, "123"),  # the values are among the labels: they are the answers
        (0, {"labels": ("1", "2", "3")}, "123"),  # 0 is not: they are indices, all of them
        (0, {"labels": ("a", "b", "c")}, "abc"),
    ],
)
def test_plain_numbers_are_answers_or_indices_all_alike(tmp_path: Path, first: int, told: dict, expected: str) -> None:
    jsonl(tmp_path / "data/train.jsonl", [{"text": f"t{i}", "label": first + i % 3} for i in range(40)])
    task = load_task(f"hub:{tmp_path / 'data'}", **told)
    assert labelled(task) == {(i, expected[i % 3]) for i in range(40)}


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


def test_pictures_are_held_by_the_hundred_and_not_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MUSIC-AVQA has some 300,000 frames."""
    import gc
    import weakref

    from PIL import Image

    monkeypatch.setattr("loraloom.tasks.HELD", 5)
    for i in range(60):
        (tmp_path / f"data/train/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(tmp_path / f"data/train/{i % 2}/{i}.png")
    train = load_task(f"hub:{tmp_path / 'data'}", content="image").splits["train"]
    seen = [(weakref.ref(example.content), int(example.content[0, 0, 0]), example.label) for example in train]
    gc.collect()
    assert sum(held() is not None for held, *_ in seen) == 5 < len(train) == len(seen)
    assert all(shade % 2 == label for _, shade, label in seen)
    assert [int(example.content[0, 0, 0]) for example in train[3:20:2]] == [shade for _, shade, _ in seen[3:20:2]]


def test_pictures_stand_upright_and_keep_their_greys() -> None:
    """Cameras store how they were held; 16 bits of grey are not cut off at 255."""
    from PIL import Image

    grey = np.arange(32, dtype=np.uint16).reshape(4, 8) * 2000
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise by a quarter
    for pixels in (grey, (grey // 256).astype(np.uint8)):
        Image.fromarray(pixels).save(held := BytesIO(), "PNG")
        found = media.image({"bytes": held.getvalue()})
        assert np.array_equal(found, np.repeat(grey[..., None] // 256, 3, 2))
        Image.open(held).save(again := BytesIO(), "PNG", exif=turned)
        assert np.array_equal(media.image({"bytes": again.getvalue()}), np.rot90(found, -1))


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


@pytest.mark.parametrize(
    ("label", "message"),
    [(None, "column 'label' has rows without a label"), ([1], r"column 'label' holds no single labels, but List")],
)
@pytest.mark.parametrize("told", [{}, {"labels": ("no", "yes")}])
def test_labels_that_are_none_are_refused(tmp_path: Path, label: object, message: str, told: dict) -> None:
    kind = label if label is None else [0]
    rows = [{"text": f"t{i}", "label": label if i == 3 else (kind if kind else i % 2)} for i in range(40)]
    jsonl(tmp_path / "data/train.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_task(f"hub:{tmp_path / 'data'}", **told)


def test_no_such_data_set(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="cannot be read") as error:
        load_task(f"hub:{tmp_path / 'none'}", content="text", label="mood")
    assert "\n" not in str(error.value)
