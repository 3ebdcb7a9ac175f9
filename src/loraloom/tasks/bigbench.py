"""Multiple-choice sets of BIG-bench: knowledge, inference, common sense, arithmetic, sentiment.

The package is large (358 MB) and is fetched only when one of these is asked for. What we use of it is kept as one
compressed file a task, each with the canary line by which such data is found in training corpora.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loraloom.packages import Package, converted
from loraloom.tasks import Example, Rows, tasks
from loraloom.tasks.splits import components, normal

FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks"


class Question(NamedTuple):
    """One question as it is read; ``bonds`` name what else it shares with other questions."""

    content: str
    choices: tuple[str, ...]
    answer: str
    bonds: tuple[str, ...] = ()


Parse = Callable[[Mapping[str, Any]], Iterator[Question]]


@dataclass(frozen=True)
class Source:
    """Where a task lies in the package, and how its records are read.

    Attributes:
        path: the task's folder in the package.
        sha256: of its file.
        summary: what is asked, in one line.
        prompt: as in ``Task.prompt``.
        parse: a record's questions.
        fixed: whether all questions have the same choices.
        paper: who made the data.
    """

    path: str
    sha256: str
    summary: str
    prompt: str
    parse: Parse
    fixed: bool
    paper: str


def plain(strip: str = "", bond: str = "") -> Parse:
    """Reads a record with scored choices, of which exactly one is right.

    Args:
        strip: regular expression of the whole input, whose group 1 is the content; all of it if empty.
        bond: regular expression in the content, whose groups are what may not straddle two splits.
    """

    def parse(record: Mapping[str, Any]) -> Iterator[Question]:
        scores = record["target_scores"]
        right = [choice for choice, score in scores.items() if score == 1]
        content = record["input"].strip()
        if content and len(right) == 1:
            if strip and (inner := re.fullmatch(strip, content, re.DOTALL)):
                content = inner[1].strip()
            shared = re.search(bond, content, re.DOTALL) if bond else None
            yield Question(content, tuple(scores), right[0], tuple(map(normal, shared.groups())) if shared else ())

    return parse


def _goal(record: Mapping[str, Any]) -> Iterator[Question]:
    """wikiHow: the goal is quoted in the question, or is the answer; it binds the questions on one article."""
    for question in plain()(record):
        goal = re.search(r"step of '(.*)' is", question.content)
        yield question._replace(bonds=("wikihow " + normal(goal[1] if goal else question.answer),))


def _intent(record: Mapping[str, Any]) -> Iterator[Question]:
    """Intents are written with underscores; words are better for scoring."""
    for question in plain(r"Utterance: (.*)")(record):
        choices = tuple(choice.replace("_", " ") for choice in question.choices)
        yield question._replace(choices=choices, answer=question.answer.replace("_", " "))


def _arithmetic(record: Mapping[str, Any]) -> Iterator[Question]:
    """Problems that differ in their numbers only belong together."""
    for question in plain()(record):
        yield question._replace(bonds=(re.sub(r"\d+", "#", normal(question.content)),))


def _winowhy(record: Mapping[str, Any]) -> Iterator[Question]:
    """Explanations of one Winograd sentence belong together; its twin starts with the same words."""
    for question in plain()(record):
        words = normal(question.content).split()
        yield question._replace(bonds=(" ".join(words[:4]),))


TWINS = re.compile(r"Sentence 1:(.*?)\n?Answer1:(.*?)\n?Sentence 2:(.*?)\n?Answer2:(.*)", re.DOTALL)


def _winogrande(record: Mapping[str, Any]) -> Iterator[Question]:
    """A record writes both twins of each pair; the answer of one is the wrong choice of the other."""
    for target in record["target"]:
        if twins := TWINS.fullmatch(target.strip()):
            one, first, two, second = (part.strip() for part in twins.groups())
            choices = (first.strip(" ."), second.strip(" ."))
            apart = choices[0].casefold() != choices[1].casefold()
            if apart and all(choices) and "_" in one and "_" in two:
                bonds = (normal(one), normal(two))
                yield Question(one, choices, choices[0], bonds)
                yield Question(two, choices, choices[1], bonds)


SOURCES: dict[str, Source] = {
    "elementary-math": Source(
        "elementary_math_qa/question_only",
        "765c8817c43b068720fd3bf99abaed09132420df530e58b2e6bd5a16823d58eb",
        "Arithmetic word problems of one or more steps; 5 choices",
        "Problem: {content}\nAnswer:",
        _arithmetic,
        False,
        "https://arxiv.org/abs/1905.13319",
    ),
    "epistemic-reasoning": Source(
        "epistemic_reasoning",
        "98209623d1bf28ed6b99ec50b772b367f24467d190ceb9d1c0298e91c04548f1",
        "Does a statement about what somebody believes follow from another? 2 classes",
        "{content}\nRelation:",
        plain(bond=r"that (?:\w+ \w+ that )?([^.]*)\. Hypothesis:"),
        True,
        "https://arxiv.org/abs/2206.04615",
    ),
    "fact-checker-fever": Source(
        "fact_checker/fever",
        "662a3bf790a249ffc5de1a7717ece27a28025904c6219bf5e7eba1c6f2b6888d",
        "Is a claim true, without evidence? 2 classes",
        "On June 2017, the following claim was made: {content}\nQ: Was this claim true or false?\nA:",
        plain(r"On June 2017, the following claim was made: (.*)\nQ: Was this claim true or false\?"),
        True,
        "https://arxiv.org/abs/1803.05355",
    ),
    "goal-inference": Source(
        "goal_step_wikihow/goal_inference",
        "ae9d68546ae17707034b284444169b6035ea291dfab15826edaa867888090de6",
        "Which goal has this step? 4 choices",
        "{content}",
        _goal,
        False,
        "https://arxiv.org/abs/2009.07690",
    ),
    "hyperbaton": Source(
        "hyperbaton",
        "8cd85fac8281210a1276a82fddd493a27b0484b84ddf65f0b4f9b4476d6233e2",
        "Which of two sentences has its adjectives in the right order? 2 classes",
        "{content}\nAnswer:",
        plain(),
        True,
        "https://arxiv.org/abs/2206.04615",
    ),
    "intent-recognition": Source(
        "intent_recognition",
        "04ca74852de19abfc64c807b096f0094bacbb82131c793d8c413cad3dfdeb5ae",
        "What does an utterance ask for? 7 classes",
        "Utterance: {content}\nIntent:",
        _intent,
        True,
        "https://arxiv.org/abs/1805.10190",
    ),
    **{
        f"multiemo-{domain}": Source(
            f"multiemo/{domain}_sentence_en",
            digest,
            f"Sentiment of a sentence about {domain}, translated by machine; 4 classes",
            "Opinion: {content}\nSentiment:",
            plain(),
            True,
            "https://aclanthology.org/K19-1092",
        )
        for domain, digest in {
            "hotels": "084d18d069760d534a03201de5ce7c8e1775ef5444c525a6c32d9386ca861a58",
            "medicine": "b6bce13d8916befc056d7eb517b3a990bbc7afb3edf75c9b2513db57b17dbaa5",
            "products": "22e67bed46bb7fb704ab0d17f5dbd3344214a51b62975cac6711dfc1eba1d0c9",
        }.items()
    },
    "social-iqa": Source(
        "social_iqa",
        "edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348",
        "Motives and reactions of people in everyday situations; 3 choices",
        "{content}\nAnswer:",
        plain(bond=r"^(.*[.!\"'])\s+[^.!]*\?$"),
        False,
        "https://arxiv.org/abs/1904.09728",
    ),
    "step-inference": Source(
        "goal_step_wikihow/step_inference",
        "e3cba757d9f6050a90f4a9d7b32d0159f2c0d69a4b6656588f56593f85193494",
        "Which step serves this goal? 4 choices",
        "{content}",
        _goal,
        False,
        "https://arxiv.org/abs/2009.07690",
    ),
    "strategyqa": Source(
        "strategyqa",
        "60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803",
        "Questions whose answer takes several unspoken steps; 2 classes",
        "Question: {content}\nAnswer:",
        plain(),
        True,
        "https://arxiv.org/abs/2101.02235",
    ),
    "vitaminc": Source(
        "vitaminc_fact_verification",
        "10f83da50374701fc7ce69162a7a167b14e1a86351201aa8bf14b56fa0a3214f",
        "Does a passage of Wikipedia support a claim? 3 classes",
        "Passage: {content}\nTrue, False, or Neither?",
        plain(bond=r"^(.*?):.*\nClaim:(.*)$"),
        True,
        "https://arxiv.org/abs/2103.08541",
    ),
    "winogrande": Source(
        "natural_instructions/subtask029_winogrande_full_object",
        "0b50034573d26f63b0b270ac6229ea3535fe4981cb98a8af4c3e184f1635fda2",
        "What does the blank stand for? 2 choices",
        "Sentence: {content}\nThe blank _ stands for:",
        _winogrande,
        False,
        "https://arxiv.org/abs/1907.10641",
    ),
    "winowhy": Source(
        "winowhy",
        "c36fa38ab146fd7cc60e9f4b7a34c979c5ffbcb4a6870302bf8d785fbe64d1f6",
        "Is an explanation of what a pronoun refers to correct? 2 classes",
        "{content}\nThe above reasoning is",
        _winowhy,
        True,
        "https://arxiv.org/abs/2005.05763",
    ),
}
PACKAGE = Package(
    "bigbench==1.0.0",
    {f"{FOLDER}/{source.path}/task.json": source.sha256 for source in SOURCES.values()},
    kind="sdist",
    archive="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)


def _register(name: str, source: Source) -> None:
    """File one task."""

    def rows() -> Rows:
        return _rows(name)

    rows.__doc__ = source.summary + "."
    rows.__name__ = rows.__qualname__ = name.replace("-", "_")
    tasks.register(
        name,
        paper=source.paper,
        modality="text",
        prompt=source.prompt,
        source=PACKAGE.requirement,
        licence="Apache-2.0 (BIG-bench); the texts as their authors say",
    )(rows)


def _rows(name: str) -> Rows:
    """Rows of one task from the extract; the file's first line is the canary."""
    folder = converted("tasks/bigbench", PACKAGE, _convert)
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        next(lines)
        told = [json.loads(line) for line in lines]
    examples = [Example(content, tuple(choices), label, group) for content, choices, label, group in told]
    labels = examples[0].choices if SOURCES[name].fixed else ()
    return Rows.of_texts(examples, labels)


def _convert(source: Path, target: Path) -> None:
    """One compressed file a task: the canary, then a line an example."""
    for name, told in SOURCES.items():
        stored = json.loads((source / FOLDER / told.path / "task.json").read_text(encoding="utf-8"))
        questions = [question for record in stored["examples"] for question in told.parse(record)]
        with gzip.GzipFile(target / f"{name}.jsonl.gz", "wb", mtime=0) as out:
            for line in ({"canary": stored["canary"]}, *_lines(questions, told.fixed)):
                out.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def _lines(questions: list[Question], fixed: bool) -> Iterator[list]:
    """Content, choices, label and group. Choices that differ are shuffled, for their order in the source tells."""
    keys = ([*(f"context {bond}" for bond in q.bonds), f"is {normal(q.content)}"] for q in questions)
    names = components(keys)  # "context" sorts first: one article is named alike in all tasks that use it
    rng = np.random.Generator(np.random.Philox(0))
    for question, name in zip(questions, names, strict=True):
        choices = questions[0].choices if fixed else question.choices
        if sorted(choices) != sorted(question.choices):
            raise ValueError(f"choices {question.choices} differ from {choices}")
        if not fixed:
            choices = tuple(choices[i] for i in rng.permutation(len(choices)))
        yield [question.content, choices, choices.index(question.answer), name]


for _name, _source in SOURCES.items():
    _register(_name, _source)
