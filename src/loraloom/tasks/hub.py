"""Data sets of the hub, or of a local folder, as tasks: read by ``datasets``, never running code of theirs."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loraloom.tasks import Example, Modality, Rows
from loraloom.tasks import media as media_files
from loraloom.tasks.judges import judge_of
from loraloom.tasks.splits import PARTS, Row, components, normal

_MEDIA = {"image": media_files.image, "audio": media_files.audio}
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


@dataclass(frozen=True)
class HubTask:
    """Which data set, and what its columns mean; plain values, so that a recipe can carry it.

    Example:
        >>> HubTask("openai/gsm8k", config="main", content="question", answer="answer", judge="number").columns()
        ('question', 'answer')

    Attributes:
        dataset: hub id, or a local folder (files of jsonl, csv, parquet or images, or made by ``save_to_disk``).
        content: the column of the text or image; or a template over columns (``"{premise} {hypothesis}"``). A part
            in double brackets is left out where the columns it names are empty (``"{question}[[ Hint: {hint}]]"``).
        image: the column of a picture, or of lists of them (frames), beside the text; it stands where ``prompt`` has
            ``{image}``.
        audio: the column of a sound beside the text, for ``{audio}``; made 16 kHz mono.
        label: the column of the right answer: the answer itself, or a whole number, which is an index into the labels
            or choices where the column has class names or holds numbers that are not among them.
        labels: the classes, in order; if not told, those of the column (its class names, else its sorted values).
        choices: the column of the possible answers where they differ: a list of strings, or a mapping with ``text``
            and, if the answer is told by name, ``label``.
        answer: the column of a free-text answer, or a template over columns; ``label``, ``labels`` and ``choices`` are
            not looked at then. Rows with the same content and different answers are all kept, in one part.
        judge: what says whether a generated answer is right: a name of ``judges.JUDGES``. Without one, such a task can
            be trained on but not evaluated.
        max_new_tokens: length at which a generated answer is cut off.
        prompt: as in ``Task.prompt``.
        group: a column whose equal values bind rows together (a shared context).
        config: the data set's configuration, if it has several.
        train: name of its training split.
        validation: name of its validation split; empty: taken out of train.
        test: name of its test split; empty: taken out of train. Where the published test part has no labels, give
            ``test="validation", validation=""``.
        revision: which version of a hub data set (a commit, for exact repetition).
    """

    dataset: str
    content: str = "text"
    label: str = "label"
    labels: tuple[str, ...] = ()
    choices: str = ""
    prompt: str = "{content}\nAnswer:"
    group: str = ""
    config: str = ""
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    revision: str = ""
    answer: str = ""
    judge: str = ""
    max_new_tokens: int = 256
    image: str = ""
    audio: str = ""

    def __post_init__(self) -> None:
        if self.judge:
            judge_of(self.judge)
            if not self.answer:
                raise ValueError(f"judge {self.judge!r} needs the answer: the column that the right answers stand in")
        for _, field, _, _ in string.Formatter().parse(self.prompt):
            if field is not None and field not in ("content", *self.media):
                allowed = ", ".join(("content", *self.media))
                raise ValueError(f"prompt names {{{field}}}; allowed: {allowed}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    def columns(self) -> tuple[str, ...]:
        """The columns that are read.

        Example:
            >>> HubTask("glue", content="{premise} {hypothesis}", label="label").columns()
            ('premise', 'hypothesis', 'label')
        """
        right = _fields(self.answer) if self.answer else [self.label, *filter(None, [self.choices])]
        content = _fields(self.content) if self.content else []
        return tuple(dict.fromkeys([*content, *right, *filter(None, [self.group]), *self.media.values()]))

    @property
    def media(self) -> dict[str, str]:
        """Columns of what stands beside the text, by modality."""
        return {name: column for name, column in (("image", self.image), ("audio", self.audio)) if column}


class Found(NamedTuple):
    """Rows of a data set with what it tells of itself."""

    rows: Rows
    modality: Modality
    licence: str


def hub_rows(task: HubTask) -> Found:
    """Read a data set as rows.

    Raises:
        ValueError: a split or a column is not there (the message lists those that are), or a label is not among
            the labels or choices.
        OSError: the data set cannot be reached.
    """
    parts = _load(task)
    columns = parts["train"].column_names
    for column in task.columns():
        if column not in columns:
            raise ValueError(f"data set {task.dataset}: there is no column {column!r}; columns: {', '.join(columns)}")
    features = parts["train"].features
    alone = type(features.get(task.content)).__name__ == "Image" and not task.media
    modality: Modality = "audio+text" if task.audio else "image+text" if task.image else "image" if alone else "text"
    media = {"image": task.content} if alone else task.media
    parts = {part: media_files.undecoded(data, media) for part, data in parts.items()}
    labels = () if task.choices or task.answer else task.labels or _labels(task, features[task.label], parts["train"])
    numbered = not task.answer and _numbered(task, features[task.label], parts["train"], labels)
    rows: list[Row] = []
    contents: list[str] = []
    where: list[tuple[str, int]] = []
    answers: list[tuple[tuple[str, ...], int]] = []
    for part, data in parts.items():
        plain = data.select_columns(list(task.columns()))
        for i, record in enumerate(plain):
            choices, label = _answer(task, record, labels, numbered)
            text = [] if alone or not task.content else [normal(_text(task.content, record))]
            content = "\0".join([*text, *(media_files.digest(record[column]) for column in media.values())])
            bond = str(record[task.group]) if task.group else ("" if labels else content)
            asked = content if labels else "\0".join([content, *sorted(choices)])
            rows.append(Row(asked, choices[label], bond, "" if part == "train" else part))
            contents.append(content)
            where.append((part, i))
            answers.append((choices, label))
    if task.answer and task.group:
        rows = _bound_by_content_too(rows, contents)

    def make(k: int) -> Example:
        part, i = where[k]
        record = parts[part][i]
        held = {name: _MEDIA[name](record[column]) for name, column in media.items()}
        if alone:
            return Example(held["image"], *answers[k], group=rows[k].group)
        return Example(_text(task.content, record), *answers[k], group=rows[k].group, media=held)

    return Found(Rows(rows, make, labels, large=bool(media)), modality, parts["train"].info.license or "unknown")


def _load(task: HubTask) -> dict[str, Any]:
    """The splits that there are, under our names."""
    import datasets

    folder = Path(task.dataset).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            path = str(folder) if folder.is_dir() else task.dataset
            with _quiet_for(folder):
                found = datasets.load_dataset(path, task.config or None, revision=task.revision or None)
    except OSError as error:
        raise OSError(f"data set {task.dataset} cannot be read: {_line(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # of all that read its files for `datasets`, each has errors of its own
        raise ValueError(f"data set {task.dataset} cannot be read: {_line(error)}") from error
    if not isinstance(found, datasets.DatasetDict):
        found = {"train": found}
    named = {"train": task.train, "validation": task.validation, "test": task.test}
    told = {part: HubTask.__dataclass_fields__[part].default for part in PARTS}
    parts = {}
    for part, name in named.items():
        if name in found:
            parts[part] = found[name]
        elif name and (part == "train" or name != told[part]):  # a default name that is not there is no error
            raise ValueError(f"data set {task.dataset}: there is no split {name!r}; splits: {', '.join(found)}")
    return parts


@contextmanager
def _quiet_for(folder: Path) -> Iterator[None]:
    """A folder is read in a moment: no progress bar, and errors are told by us. A download shows its own."""
    from datasets.utils import logging

    quiet, level = folder.is_dir() and logging.is_progress_bar_enabled(), logging.get_verbosity()
    if quiet:
        logging.disable_progress_bar()
    if folder.is_dir():
        logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if quiet:
            logging.enable_progress_bar()


def _labels(task: HubTask, feature: Any, train: Any) -> tuple[str, ...]:
    """The class names of the label column, else its values in order."""
    if hasattr(feature, "names"):
        return tuple(feature.names)
    return tuple(str(value) for value in sorted(_values(task, train)))


def _values(task: HubTask, train: Any) -> list[Any]:
    """The different values of the label column.

    Raises:
        ValueError: it has lists, or rows without a label.
    """
    feature = train.features[task.label]
    if not hasattr(feature, "dtype") or feature.dtype in ("list", "dict"):
        raise ValueError(f"data set {task.dataset}: column {task.label!r} holds no single labels, but {feature}")
    found: list[Any] = train.unique(task.label)
    if None in found:
        raise ValueError(f"data set {task.dataset}: column {task.label!r} has rows without a label")
    return found


def _numbered(task: HubTask, feature: Any, train: Any, labels: tuple[str, ...]) -> bool:
    """Whether whole numbers in the label column are indices; else they are answers themselves ("stars": 1 to 5)."""
    if hasattr(feature, "names"):
        return True
    if task.choices:
        told = train.select_columns([task.label, task.choices])
        return not all(record[task.label] in _options(record[task.choices])[1] for record in told)
    return not all(str(value) in labels for value in _values(task, train))


def _answer(
    task: HubTask, record: dict[str, Any], labels: tuple[str, ...], numbered: bool
) -> tuple[tuple[str, ...], int]:
    """Choices of a record and the index of the right one."""
    if task.answer:
        return (_text(task.answer, record),), 0
    names: Sequence[str] = ()
    choices = labels
    if task.choices:
        names, options = _options(record[task.choices])
        choices = tuple(map(str, options))
    value = record[task.label]
    if str(value) in names and names.index(str(value)) < len(choices):
        return choices, names.index(str(value))
    if numbered and isinstance(value, int):
        if 0 <= value < len(choices):
            return choices, int(value)
    elif str(value) in choices:
        return choices, choices.index(str(value))
    raise ValueError(f"data set {task.dataset}: label {value!r} is not among {', '.join(choices) or 'no choices'}")


def _options(told: Any) -> tuple[list[str], list[Any]]:
    """The names of a record's choices, if they have any, and the choices; what is no list has none."""
    names, options = (told.get("label"), told.get("text")) if isinstance(told, dict) else (None, told)
    return [str(one) for one in names] if isinstance(names, list) else [], options if isinstance(options, list) else []


def _bound_by_content_too(rows: Sequence[Row], contents: Sequence[str]) -> list[Row]:
    """The same rows, in groups that hold all rows of a content: it may have several answers in several groups."""
    last = chr(0x10FFFF)  # a group's own name sorts before, so that it names the whole
    bonds = ([*filter(None, [row.group]), last + content] for row, content in zip(rows, contents, strict=True))
    return [row._replace(group=name) for row, name in zip(rows, components(bonds), strict=True)]


def _fields(told: str) -> list[str]:
    """The columns that a column name or a template names."""
    return [field for _, field, _, _ in string.Formatter().parse(told) if field] if "{" in told else [told]


def _text(told: str, record: dict[str, Any]) -> str:
    """A column of a record, or a template filled from it, as text."""
    values = {name: "" if value is None else str(value) for name, value in record.items()}
    if not told:
        return ""
    if "{" not in told:
        return values[told]

    def part(found: re.Match[str]) -> str:
        fields = _fields(found[1]) if "{" in found[1] else []
        if not fields:
            return found[0]
        return found[1] if any(values[field].strip() for field in fields) else ""

    return _OPTIONAL.sub(part, told).format_map(values)


def _line(error: Exception) -> str:
    """The first line of an error's message, or of what caused it, without addresses."""
    while type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    words = (lines[0] if lines else type(error).__name__).split()
    return " ".join(word for word in words if "://" not in word)
