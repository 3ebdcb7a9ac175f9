"""A tokenizer and a task of a few letters, for tiny text models."""

from __future__ import annotations

from types import MappingProxyType

import torch

from loraloom.tasks import Example, Task

VOCAB = 24


class Letters:
    """A tokenizer of single letters."""

    pad_token_id = 0

    def __call__(self, texts, add_special_tokens=True, max_length=None, **ignored):
        several = [texts] if isinstance(texts, str) else texts
        rows = [self._ids(text, add_special_tokens, max_length) for text in several]
        if isinstance(texts, str):
            return {"input_ids": rows[0]}
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    @staticmethod
    def _ids(text, special, max_length):
        ids = [1] * special + [2 + ord(letter) % (VOCAB - 2) for letter in text]
        return ids[:max_length]


def text_task(labels=("ham", "spam"), n=12):
    rows = [Example(f"text {i * 7 % 5} {'x' * (i % 4)}", labels or (f"a{i}", f"bcd{i}"), i % 2) for i in range(n)]
    splits = MappingProxyType({"train": rows, "validation": rows[:4], "test": rows})
    return Task("made-up", "text", tuple(labels), "Q {content} A", splits, "here", "none")
