"""Models that continue a text, or a text with media in it: examples as rows of tokens, choices by their likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.integrations.generation import answer_tokens, ended, following, is_free
from loraloom.tasks import Example, Task
from loraloom.tasks.media import RATE

BATCH = 16  # examples in a forward pass
ONE_A_TOKEN = ("token_type_ids", "mm_token_type_ids")  # what a processor tells of each token; text that follows has 0


class Row(NamedTuple):
    """Tokens of a prompt, what the processor gave beside them, and the tokens that follow."""

    asked: list[int]
    beside: Mapping[str, Tensor]
    told: list[int]


@dataclass(frozen=True, eq=False)
class Continuation:
    """A task as a causal or multimodal model sees it.

    Attributes:
        processor: the model's tokenizer, or its processor.
        task: prompts and choices.
        max_length: tokens of a row. Longer contents lose their end, not what the prompt has behind them; rows with
            media in them are refused.
    """

    processor: Any
    task: Task
    max_length: int

    @property
    def tokenizer(self) -> Any:
        """The tokenizer alone."""
        return getattr(self.processor, "tokenizer", self.processor)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A training batch; labels are -100 but on the tokens of the right answer."""
        return self._stacked([self._answered(example) for example in examples])

    def _answered(self, example: Example) -> Row:
        choice = example.choices[example.label]
        if not is_free(self.task, example):
            answer = self._tokens(choice)
            return Row(*self._asked(example, len(answer)), answer)
        if example.media:
            answer = ended(self.tokenizer, choice)
            return Row(*self._asked(example, len(answer)), answer)
        asked, answer = answer_tokens(self.tokenizer, self._prompt(example), choice, self.max_length)
        return Row(asked, {}, answer)

    def _tokens(self, answer: str) -> list[int]:
        return following(self.tokenizer, answer)

    def _prompt(self, example: Example) -> str:
        """The template with the content, and for each medium the processor's placeholder."""
        placed = {}
        for name, media in example.media.items():
            token = getattr(self.processor, f"{name}_token", None)
            if token is None:
                raise ValueError(f"task {self.task.name}: {type(self.processor).__name__} takes no {name}")
            placed[name] = token * len(_each(media))
        return self.task.prompt.format(content=example.content, **placed)

    def _asked(self, example: Example, answer: int) -> tuple[list[int], Mapping[str, Tensor]]:
        """Tokens of the prompt, so many that the answer has room, and the tensors beside them."""
        prompt, room = self._prompt(example), self.max_length - answer
        if room < 1:
            raise ValueError(
                f"task {self.task.name}: an answer of {answer} tokens leaves no room for a prompt in data.max_length "
                f"{self.max_length}"
            )
        if not example.media:
            return self._cut(list(self.tokenizer(prompt)["input_ids"]), room), {}
        given: dict[str, Any] = {}
        if "image" in example.media:
            given["images"] = [_each(example.media["image"])]
        if "audio" in example.media:
            given |= {"audio": [example.media["audio"]], "sampling_rate": RATE}
        made = dict(self.processor(text=[prompt], return_tensors="pt", **given))
        asked = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        if len(asked) > room:
            raise ValueError(
                f"task {self.task.name}: a prompt of {len(asked)} tokens and an answer of {answer} do not fit into "
                f"data.max_length {self.max_length}; cutting would lose media"
            )
        return asked, made

    def _cut(self, asked: list[int], room: int) -> list[int]:
        """A prompt that fits: the content loses its end, what the template has behind it ("Answer:") stays."""
        if len(asked) <= room:
            return asked
        behind = self.task.prompt.rpartition("{content}")[2]
        bare, longer = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", f"a{behind}"))
        kept = min(len(longer) - len(bare), room - 1)
        return asked[: room - kept] + asked[len(asked) - kept :]

    def _stacked(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows padded on the right to one length; media one after the other."""
        length = max(len(row.asked) + len(row.told) for row in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id or 0)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for key in rows[0].beside:
            parts = [row.beside[key] for row in rows]
            batch[key] = torch.zeros_like(ids) if key in ONE_A_TOKEN else _joined(parts)
        for at, (asked, beside, told) in enumerate(rows):
            start, end = len(asked), len(asked) + len(told)
            ids[at, :end] = torch.tensor(asked + told)
            labels[at, start:end] = torch.tensor(told)
            mask[at, :end] = 1
            for key in beside.keys() & set(ONE_A_TOKEN):
                batch[key][at, :start] = beside[key][0]
        return batch

    def choose(self, model: nn.Module, examples: Sequence[Example]) -> np.ndarray:
        """The choice with the highest mean log-likelihood per token, (n,)."""
        return self.choices(model, examples)[0]

    def choices(self, model: nn.Module, examples: Sequence[Example], copies: int = 1) -> np.ndarray:
        """The same, (copies, n), of a model that answers each batch so many times, one after the other."""
        batches = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
        found = [self._likelihoods(model, batch, copies) for batch in batches]
        return np.array([[int(np.argmax(scores)) for part in found for scores in part[copy]] for copy in range(copies)])

    def likelihoods(self, model: nn.Module, examples: Sequence[Example], batch: int = BATCH) -> Iterator[list[float]]:
        """Mean log-likelihood per token of each choice of each example, in nats.

        Choices that begin alike share a row: where all are one token, an example is one row.
        """
        for start in range(0, len(examples), batch):
            yield from self._likelihoods(model, examples[start : start + batch])[0]

    def _likelihoods(self, model: nn.Module, examples: Sequence[Example], copies: int = 1) -> list[list[list[float]]]:
        answers = [[self._tokens(choice) for choice in example.choices] for example in examples]
        rows: list[Row] = []
        places: list[list[int]] = []  # row of each choice
        for example, told in zip(examples, answers, strict=True):
            asked = self._asked(example, max(map(len, told)))
            shared = longest([answer[:-1] for answer in told])
            places.append(
                [len(rows) + next(i for i, s in enumerate(shared) if s[: len(a) - 1] == tuple(a[:-1])) for a in told]
            )
            rows += [Row(*asked, list(beginning)) for beginning in shared]
        batch = self._stacked(rows)
        if not rows[0].beside or copies > 1:
            del batch["labels"]  # else they tell which tokens no other modality may look at; a loss would need copies
        with torch.inference_mode():
            device = next(model.parameters()).device
            logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
        return [_of_choices(part, rows, places, answers) for part in logits.chunk(copies)]


def _of_choices(
    logits: Tensor, rows: Sequence[Row], places: Sequence[Sequence[int]], answers: Sequence[Sequence[list[int]]]
) -> list[list[float]]:
    """The likelihoods of each example's answers, each read from its row."""
    logs = [
        torch.log_softmax(held[len(row.asked) - 1 : len(row.asked) + len(row.told)].float(), -1).cpu()
        for held, row in zip(logits, rows, strict=True)
    ]
    return [
        [logs[row][torch.arange(len(a)), torch.tensor(a)].mean().item() for row, a in zip(where, told, strict=True)]
        for where, told in zip(places, answers, strict=True)
    ]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other; shorter ones (sounds that the processor did not fill up) get zeros at the end."""
    sizes = [max(size) for size in zip(*(part.shape[1:] for part in parts), strict=True)]
    missing = [[(0, full - size) for full, size in zip(sizes, part.shape[1:], strict=True)] for part in parts]
    padded = [
        F.pad(part, [n for pair in reversed(lack) for n in pair]) for part, lack in zip(parts, missing, strict=True)
    ]
    return torch.cat(padded)


def _each(media: Any) -> list[Any]:
    """One medium as a list of one."""
    return list(media) if isinstance(media, list | tuple) else [media]


def longest(rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The rows that are not the beginning of another, each once.

    Example:
        >>> longest([[], [], [5], [5, 7], [6]])
        [(5, 7), (6,)]
    """
    distinct = dict.fromkeys(map(tuple, rows))
    beginnings = {row[:length] for row in distinct for length in range(len(row))}
    return [row for row in distinct if row not in beginnings]


__all__ = ["Continuation", "longest"]
