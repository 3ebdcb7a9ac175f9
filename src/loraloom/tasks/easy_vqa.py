"""Easy-VQA: 5000 pictures of one coloured shape each; what is in them is told by questions and answers only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from loraloom.packages import Package, converted
from loraloom.tasks import Example, Row, Rows, tasks

FOLDER = "easy_vqa/data"
PACKAGE = Package(
    "easy-vqa==1.0",
    {
        f"{FOLDER}/*/questions.json": "1af0b219703735dd6c8b66b4ca75f31909128425802fc401350c7496ce611d61",
        f"{FOLDER}/*/images/*.png": "be5f3308db49d52b3dfbb1b9af39d9e5035207217717b295978f0c14e6792a62",
    },
)
VALUES = {
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
FACTS: dict[str, Any] = {
    "paper": "https://github.com/vzhou842/easy-VQA",
    "modality": "image",
    "source": PACKAGE.requirement,
    "licence": "MIT",
}


@tasks.register("easy-vqa", prompt="{image}\n{content} Answer:", **{**FACTS, "modality": "image+text"})
def easy_vqa() -> Rows:
    """Questions about pictures of 64 x 64 pixels; 13 answers, of which yes and no are three quarters; own test part."""
    images, told = _stored()
    asked = [
        (part, i, question, answer)
        for part in images
        for i, pairs in enumerate(told[part]["asked"])
        for question, answer in pairs
    ]
    answers = ("yes", "no", *VALUES["shape"], *VALUES["colour"])
    digests = {part: [hashlib.sha256(picture).hexdigest() for picture in held] for part, held in images.items()}
    rows = [_row(part, i, f"{digests[part][i]} {question}", answer) for part, i, question, answer in asked]

    def make(k: int) -> Example:
        part, i, question, answer = asked[k]
        return Example(question, answers, answers.index(answer), rows[k].group, {"image": images[part][i]})

    return Rows(rows, make, answers)


@tasks.register("easy-vqa-caption", prompt="{image}\nThis is a", **{**FACTS, "modality": "image+text"})
def easy_vqa_caption() -> Rows:
    """Colour and shape of what is in a picture of 64 x 64 pixels, in words; 24 captions, its own test part."""
    images, told = _stored()
    captions = tuple(f"{colour} {shape}" for colour in VALUES["colour"] for shape in VALUES["shape"])
    found = [
        (part, i, f"{colour} {shape}")
        for part in images
        for i, (colour, shape) in enumerate(zip(told[part]["colour"], told[part]["shape"], strict=True))
        if colour and shape
    ]
    rows = [_row(part, i, hashlib.sha256(images[part][i]).hexdigest(), caption) for part, i, caption in found]

    def make(k: int) -> Example:
        part, i, caption = found[k]
        return Example("", captions, captions.index(caption), rows[k].group, {"image": images[part][i]})

    return Rows(rows, make, captions)


@tasks.register("easy-vqa-shape", prompt="What shape is in the image?", **FACTS)
def easy_vqa_shape() -> Rows:
    """The shape in a picture of 64 x 64 pixels; 3 classes, its own test part."""
    return _rows("shape")


@tasks.register("easy-vqa-colour", prompt="What colour is the shape in the image?", **FACTS)
def easy_vqa_colour() -> Rows:
    """The colour of the shape in a picture of 64 x 64 pixels; 8 classes, its own test part."""
    return _rows("colour")


def attribute(questions: Iterable[tuple[str, str]], values: tuple[str, ...]) -> str | None:
    """Which of the values a picture has, from its questions and answers; None where they leave it open.

    An answer other than yes and no tells one attribute and its question the other ("what is the red shape?"). A yes
    or no tells whether the value that is named is there; "not" and "no" in the question turn it round.

    Raises:
        ValueError: the answers contradict each other.

    Example:
        >>> attribute([("is there not a circle?", "yes"), ("is a triangle present?", "no")], VALUES["shape"])
        'rectangle'
    """
    possible = set(values)
    for question, answer in questions:
        words = re.findall(r"[a-z]+", question)
        said = [value for value in values if value in (*words, answer)]
        if not said:
            continue
        turned = "not" in words or "no" in words
        holds = answer not in ("yes", "no") or (answer == "yes") != turned
        possible &= set(said) if holds else set(values) - set(said)
    if not possible:
        raise ValueError("the questions and answers of a picture contradict each other")
    return min(possible) if len(possible) == 1 else None


def _rows(kind: str) -> Rows:
    """Rows of one attribute; pictures whose answers leave it open are not there."""
    images, told = _stored()
    values = VALUES[kind]
    where = [(part, i) for part in images for i, value in enumerate(told[part][kind]) if value is not None]
    rows = [_row(part, i, hashlib.sha256(images[part][i]).hexdigest(), told[part][kind][i]) for part, i in where]

    def make(k: int) -> Example:
        part, i = where[k]
        return Example(images[part][i], values, values.index(told[part][kind][i]), rows[k].group)

    return Rows(rows, make, values)


def _row(part: str, i: int, content: str, answer: str) -> Row:
    """A row about picture i of a part: all that is asked of it stays together."""
    return Row(content, answer, group=f"easy-vqa {part} {i}", part="test" if part == "test" else "")


def _stored() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Pictures by part, and what is asked and told of them."""
    folder = converted("tasks/easy-vqa", PACKAGE, _convert, version=2)
    with np.load(folder / "images.npz") as stored:
        images = {part: stored[part] for part in ("train", "test")}
    return images, json.loads((folder / "labels.json").read_text())


def _convert(source: Path, target: Path) -> None:
    """All pictures as two arrays, what is asked of them, and what is in them."""
    from PIL import Image

    images: dict[str, np.ndarray] = {}
    told: dict[str, dict[str, list]] = {}
    for part in ("train", "test"):
        folder = source / FOLDER / part
        files = sorted((folder / "images").glob("*.png"), key=lambda path: int(path.stem))
        images[part] = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
        asked: dict[int, list[tuple[str, str]]] = {int(path.stem): [] for path in files}
        for question, answer, number in json.loads((folder / "questions.json").read_text()):
            asked[number].append((question, answer))
        told[part] = {kind: [attribute(asked[i], values) for i in asked] for kind, values in VALUES.items()}
        told[part]["asked"] = list(asked.values())
    np.savez_compressed(target / "images.npz", train=images["train"], test=images["test"])
    (target / "labels.json").write_text(json.dumps(told))
