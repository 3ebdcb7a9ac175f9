"""Tasks by name: limits, parsers of each source, and laws over every bundled task that is light to fetch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from loraloom.registry import Technique, UnknownName
from loraloom.tasks import Example, Rows, Task, load_task, tasks
from loraloom.tasks.bigbench import SOURCES, _lines
from loraloom.tasks.easy_vqa import VALUES, attribute
from loraloom.tasks.splits import PARTS, normal

FACTS = {"modality": "text", "prompt": "Text: {content}\nClass:", "source": "made up", "licence": "none"}
LIGHT = (
    "digits",
    "digits-policy",
    "easy-vqa",
    "easy-vqa-caption",
    "easy-vqa-colour",
    "easy-vqa-shape",
    "sent-amazon",
    "sent-movie",
    "sent-tweets",
    "topic-bbc",
)
HEAVY = ("asterisk-speech", "fashion-mnist", *SOURCES)


@pytest.fixture
def toy() -> Iterator[str]:
    def rows() -> Rows:
        """A toy."""
        labels = ("even", "odd")
        return Rows.of_texts([Example(f"number {i}", labels, i % 2, group=str(i // 4)) for i in range(200)], labels)

    found = tasks._scan()
    found["toy"] = Technique("toy", rows, facts=FACTS)
    yield "toy"
    del found["toy"]


def contents(task: Task, part: str) -> list[str]:
    return [str(example.content) for example in task.splits[part]]


def test_limits_take_the_first_and_leave_the_others_alone(toy: str) -> None:
    full = load_task(toy)
    assert sum(len(examples) for examples in full.splits.values()) == 200
    for limit in (0, 1, 7, 10_000):
        task = load_task(toy, limit=limit)
        for part in PARTS:
            assert contents(task, part) == contents(full, part)[:limit]
    some = load_task(toy, limit={"train": 5})
    assert contents(some, "train") == contents(full, "train")[:5]
    assert contents(some, "test") == contents(full, "test")
    assert contents(load_task(toy, seed=1), "test") != contents(full, "test")
    assert contents(load_task(toy), "test") == contents(full, "test")


def test_facts_reach_the_task(toy: str) -> None:
    task = load_task(toy, limit=1)
    assert (task.name, task.modality, task.labels, task.source) == ("toy", "text", ("even", "odd"), "made up")
    assert task.prompt.format(content="x") == "Text: x\nClass:"


def test_refusals(toy: str) -> None:
    with pytest.raises(UnknownName, match=r"task 'sent-movies' is not known \(did you mean 'sent-movie'\?\)"):
        load_task("sent-movies")
    with pytest.raises(ValueError, match=r"limit: train must be at least 0, got -1"):
        load_task(toy, limit=-1)
    with pytest.raises(ValueError, match=r"no split 'dev'; allowed: train, validation, test"):
        load_task(toy, limit={"dev": 3})
    with pytest.raises(ValueError, match="task toy: content can be told only for 'hub:'"):
        load_task(toy, content="text")


def test_every_task_tells_its_facts() -> None:
    assert set(LIGHT) | set(HEAVY) == set(tasks)
    for name in tasks:
        facts: Mapping = tasks[name].facts
        assert set(facts) == {"modality", "prompt", "source", "licence"}
        assert facts["modality"] in ("text", "image", "image+text", "audio+text")
        medium, beside, _ = facts["modality"].partition("+")
        assert ("{content}" in facts["prompt"]) == (facts["modality"] == "text" or name == "easy-vqa")
        assert (f"{{{medium}}}" in facts["prompt"]) == bool(beside)
        assert not facts["prompt"].endswith(" ")
        assert tasks[name].paper.startswith("https://")
        assert tasks[name].summary.endswith((".", "?"))


def test_texts_with_their_own_choices() -> None:
    one = Example("Which?", ("a", "b"), 0)
    turned = Example("which? ", ("b", "a"), 1)
    other = Example("Which?", ("a", "c"), 0)
    rows = Rows.of_texts([one, turned, other]).rows
    assert rows[0] == rows[1]
    assert rows[0].content != rows[2].content
    assert rows[0].group == rows[2].group == "which?"
    assert Rows.of_texts([one, other], labels=("a", "b", "c")).rows[0].group == ""


@pytest.mark.parametrize(
    ("questions", "shape", "colour"),
    [
        ([("what is the red shape?", "circle")], "circle", "red"),
        ([("what color is the triangle?", "teal")], "triangle", "teal"),
        ([("what color is the shape?", "teal")], None, "teal"),
        ([("is there a circle?", "yes")], "circle", None),
        ([("is there not a circle?", "no")], "circle", None),
        ([("is no circle present?", "no")], "circle", None),
        ([("is there a circle?", "no")], None, None),
        ([("is there a circle?", "no"), ("is no rectangle present?", "yes")], "triangle", None),
        ([], None, None),
    ],
)
def test_attributes_of_a_picture(questions: list, shape: str | None, colour: str | None) -> None:
    assert attribute(questions, VALUES["shape"]) == shape
    assert attribute(questions, VALUES["colour"]) == colour


def test_contradictions_are_told() -> None:
    with pytest.raises(ValueError, match="contradict"):
        attribute([("is there a circle?", "yes"), ("what shape is present?", "triangle")], VALUES["shape"])


def scored(text: str, *choices: str) -> dict:
    return {"input": text, "target_scores": {choice: int(i == 0) for i, choice in enumerate(choices)}}


def test_bigbench_parsers() -> None:
    def only(name: str, record: dict) -> tuple:
        (question,) = SOURCES[name].parse(record)
        return tuple(question)

    claim = scored(
        "On June 2017, the following claim was made: A b.\nQ: Was this claim true or false?", "true", "false"
    )
    assert only("fact-checker-fever", claim) == ("A b.", ("true", "false"), "true", ())
    assert only("intent-recognition", scored("Utterance: Hi.", "get_weather", "play_music")) == (
        "Hi.",
        ("get weather", "play music"),
        "get weather",
        (),
    )
    step = only("step-inference", scored("The most reasonable step of 'Fake It' is ", "x", "y"))
    goal = only("goal-inference", scored("The most reasonable goal of 'x' is ", "Fake it", "y"))
    assert step[3] == goal[3] == ("wikihow fake it",)
    one, two = (only("elementary-math", scored(f"{n} is what percent of {m} ?", "1")) for n, m in ((120, 50), (7, 9)))
    assert one[3] == two[3]
    passage = scored("Westlife: They sang .\nClaim: They sing .", "True", "False", "Neither")
    assert only("vitaminc", passage)[3] == ("westlife", "they sing .")
    social = [scored(f"Sasha ran. They won. {ask}?", "a", "b") for ask in ("Why", "How is Sasha")]
    assert len({only("social-iqa", record)[3] for record in social}) == 1
    assert list(SOURCES["strategyqa"].parse({"input": "x?", "target_scores": {"Yes": 1, "No": 1}})) == []
    assert list(SOURCES["strategyqa"].parse(scored(" ", "Yes", "No"))) == []


def test_winogrande_twins() -> None:
    target = "Sentence 1: Rats fled holes for spaces as _ were full. \nAnswer1: holes. \n"
    target += "Sentence 2: Rats fled holes for spaces as _ were empty. \nAnswer2: spaces."
    one, two = SOURCES["winogrande"].parse({"target": [target]})
    assert one.choices == two.choices == ("holes", "spaces")
    assert (one.answer, two.answer) == ("holes", "spaces")
    assert one.bonds == two.bonds
    assert list(SOURCES["winogrande"].parse({"target": ["Sentence 1: none"]})) == []
    lines = list(_lines([one, two], fixed=False))
    assert lines[0][3] == lines[1][3]
    assert [line[1][line[2]] for line in lines] == ["holes", "spaces"]


def test_choices_that_differ_are_shuffled_and_fixed_ones_are_not() -> None:
    from loraloom.tasks.bigbench import Question

    questions = [Question(f"q{i}", ("right", "wrong"), "right") for i in range(100)]
    labels = [line[2] for line in _lines(questions, fixed=False)]
    assert 30 < sum(labels) < 70
    assert {line[2] for line in _lines(questions, fixed=True)} == {0}
    with pytest.raises(ValueError, match="differ from"):
        list(_lines([*questions, Question("q", ("a", "b"), "a")], fixed=True))


def key(example: Example) -> str:
    if example.media:
        held = b"".join(np.asarray(media).tobytes() for media in example.media.values())
        return f"{example.content}\0{hashlib.sha256(held).hexdigest()}"
    if isinstance(example.content, str):
        return "\0".join([normal(example.content), *sorted(example.choices)])
    return example.content.tobytes().hex()


def check_laws(name: str) -> Task:
    """What holds for every task."""
    task = load_task(name)
    seen: dict[str, str] = {}
    groups: dict[str, str] = {}
    for part in PARTS:
        assert len(task.splits[part]) >= 50
        for example in task.splits[part]:
            assert key(example) not in seen
            seen[key(example)] = part
            assert 0 <= example.label < len(example.choices) == len(set(example.choices))
            if example.group:
                assert groups.setdefault(example.group, part) == part
            if task.labels:
                assert example.choices == task.labels
            if task.modality == "image":
                assert isinstance(example.content, np.ndarray)
                assert example.content.dtype == np.uint8
                assert example.content.shape[2:] == (3,)
                assert example.content.flags.writeable
            else:
                assert isinstance(example.content, str)
                assert example.content.strip() == example.content
                assert bool(example.media) == task.modality.endswith("+text")
                assert example.content or example.media
                assert all(media.dtype in (np.uint8, np.float32) for media in example.media.values())
                assert "�" not in example.content or name not in LIGHT  # the source has some
    if task.labels:
        shown = [example.label for example in task.splits["train"]]
        assert sorted(set(shown)) == list(range(len(task.labels)))
    again = load_task(name, limit={"test": 20})
    assert [key(example) for example in again.splits["test"]] == [key(example) for example in task.splits["test"]][:20]
    return task


@pytest.mark.real
@pytest.mark.parametrize("name", LIGHT)
def test_laws_on_light_tasks(name: str) -> None:
    check_laws(name)


@pytest.mark.real
def test_pictures_have_the_colour_that_we_say() -> None:
    """The colours are drawn pure, so that the pixels themselves are the oracle."""
    pure = {
        "black": (0, 0, 0),
        "blue": (0, 0, 255),
        "brown": (165, 42, 42),
        "gray": (128, 128, 128),
        "green": (0, 255, 0),
        "red": (255, 0, 0),
        "teal": (0, 128, 128),
        "yellow": (255, 255, 0),
    }
    task = load_task("easy-vqa-colour", limit=200)
    for part in PARTS:
        for example in task.splits[part]:
            pixels, counts = np.unique(np.asarray(example.content).reshape(-1, 3), axis=0, return_counts=True)
            second = pixels[np.argsort(counts)[-2]]
            assert tuple(second) == pure[task.labels[example.label]]


@pytest.mark.real
def test_captions_answer_the_questions() -> None:
    """The caption of a picture and the answers to what colour and which shape agree."""
    told = {e.group: e.choices[e.label].split() for part in load_task("easy-vqa-caption").splits.values() for e in part}
    asked = 0
    for example in load_task("easy-vqa", limit=500).splits["test"]:
        caption, answer = told.get(example.group), example.choices[example.label]
        if caption and answer not in ("yes", "no"):
            assert answer in caption, (example.content, answer, caption)
            asked += 1
    assert asked > 50


@pytest.mark.real
def test_tasks_on_the_same_pictures_split_alike() -> None:
    parts = [
        {example.group: part for part in PARTS for example in load_task(name).splits[part]}
        for name in ("easy-vqa-shape", "easy-vqa-colour")
    ]
    both = parts[0].keys() & parts[1].keys()
    assert len(both) > 4000
    assert all(parts[0][group] == parts[1][group] for group in both)
