"""Free-text answers: token rows to train on, completions by greedy generation, and what a judge says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loraloom.tasks import Example, Task
from loraloom.tasks.judges import JUDGES, judge_of


def is_free(task: Task, example: Example) -> bool:
    """Whether the answer is a free text: the one choice of a task without classes.

    Example:
        >>> is_free(Task("t", "text", (), "{content}", {}, "", ""), Example("2 + 2?", ("it is 4",), 0))
        True
    """
    return not task.labels and len(example.choices) == 1


def following(processor: Any, answer: str) -> list[int]:
    """Tokens of an answer as they follow a prompt, after a space.

    Some tokenizers (LLaVA's, Phi-3's) set a space before every text, so that an answer that is read alone has two.
    """
    before, whole = (processor(text, add_special_tokens=False)["input_ids"] for text in ("a", f"a {answer}"))
    if whole[: len(before)] == before:
        return list(whole[len(before) :])
    return list(processor(f" {answer}", add_special_tokens=False)["input_ids"])


def ended(processor: Any, answer: str) -> list[int]:
    """The same of a free-text answer, with the end of the sequence, so that generation learns to stop.

    Raises:
        ValueError: the tokenizer has no end of sequence.
    """
    end = getattr(processor, "eos_token_id", None)
    if end is None:
        raise ValueError("a free-text answer needs a tokenizer with an end-of-sequence token (eos_token)")
    return [*following(processor, answer), end]


def answer_tokens(processor: Any, prompt: str, answer: str, max_length: int) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its free-text answer with the end of the sequence (:func:`ended`).

    Together they have at most ``max_length`` tokens. Where there are more, the prompt loses its first ones down to a
    half of that (its end says what is asked for), then the answer its last ones, the end of the sequence with them.

    Raises:
        ValueError: the tokenizer has no end of sequence.
    """
    asked, told = processor(prompt)["input_ids"], ended(processor, answer)
    asked = _last(processor, asked, max(max_length - len(told), max_length // 2))
    return asked, told[: max_length - len(asked)]


def completions(
    model: nn.Module,
    processor: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_length: int,
    batch: int = 16,
) -> list[str]:
    """What a causal model writes after each prompt: greedy, up to the end of the sequence, without the prompt.

    Settings that come with the model (sampling, penalties) are not used, but for its end-of-sequence tokens. Prompts of
    like length share a batch, padded on the left; the tokenizer's own padding is neither used nor changed.

    Args:
        model: a model with ``generate``, or a PEFT model around one; in evaluation mode.
        processor: its tokenizer.
        prompts: the texts.
        max_new_tokens: a completion ends there at the latest.
        max_length: tokens that a prompt is cut to; the first ones go, but for the beginning of the sequence.
        batch: prompts at a time.

    Returns:
        One completion per prompt, in the order of the prompts.

    Raises:
        ValueError: a number is below 1, or the model has too few positions.

    Example:
        >>> completions(model, tokenizer, ["2 + 2 ="], max_new_tokens=4, max_length=64)   # doctest: +SKIP
        [' 4']
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("max_length", max_length), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    most = min(max_length, _positions(model) - max_new_tokens)
    if most < 1:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens} leaves no room: the model has {_positions(model)} positions"
        )
    rows = [_last(processor, processor(prompt)["input_ids"], most) for prompt in prompts]
    if [] in rows:
        raise ValueError(f"prompt {prompts[rows.index([])]!r} has no tokens")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    written = [""] * len(rows)
    with _greedy(model, processor, max_new_tokens) as ends:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for i, new in zip(chosen, _continue(model, processor, [rows[i] for i in chosen]), strict=True):
                kept = next((k for k, token in enumerate(new) if token in ends), len(new))
                written[i] = processor.decode(new[:kept], skip_special_tokens=True)
    return written


def judged(model: nn.Module, processor: Any, task: Task, examples: Sequence[Example], *, max_length: int) -> np.ndarray:
    """Whether the model's completion of each example is right, by the task's judge, (n,).

    Raises:
        ValueError: an answer that the judge cannot read, before anything is generated.
    """
    judge = judge_of(task.judge)
    for example in examples:
        judge("", example)
    prompts = [task.prompt.format(content=example.content) for example in examples]
    written = completions(model, processor, prompts, max_new_tokens=task.max_new_tokens, max_length=max_length)
    return np.array([judge(text, example) for text, example in zip(written, examples, strict=True)], bool)


def check_judge(task: Task, examples: Sequence[Example], model: str, family: str) -> None:
    """Refuse what cannot be scored: a judge without a model that writes, or a free-text answer without a judge.

    Raises:
        ValueError: one line.
    """
    if task.judge and family != "causal":
        raise ValueError(f"task {task.name}: answers are generated, and {model} ({family}) is no causal model")
    if not task.judge and not task.labels and any(is_free(task, example) for example in examples):
        raise ValueError(f"task {task.name}: a free-text answer is evaluated by a judge; name one: {', '.join(JUDGES)}")


def _last(processor: Any, tokens: list[int], most: int) -> list[int]:
    """The last tokens of a row, so many that ``most`` are left with a beginning of the sequence that it may have."""
    if len(tokens) <= most:
        return tokens
    head = tokens[:1] if most > 1 and tokens[0] == getattr(processor, "bos_token_id", None) else []
    return head + tokens[len(tokens) - most + len(head) :]


def _positions(model: nn.Module) -> int:
    """Length of the longest sequence that the model is made for."""
    config: Any = getattr(model, "config", None)
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _continue(model: Any, processor: Any, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The new tokens after each row."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), getattr(processor, "pad_token_id", None) or 0)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    device = next(model.parameters()).device
    with torch.inference_mode():
        made: Tensor = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
    return made[:, width:].tolist()


@contextmanager
def _greedy(model: nn.Module, processor: Any, max_new_tokens: int) -> Iterator[set[int]]:
    """The model with settings for greedy generation alone, given back as they were; yields the tokens that end it."""
    from transformers import GenerationConfig

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    own = base.generation_config
    told = own.eos_token_id if own is not None else None
    found = [*(told if isinstance(told, list) else [told]), getattr(processor, "eos_token_id", None)]
    ends = sorted({token for token in found if token is not None})
    pad = getattr(processor, "pad_token_id", None)
    base.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else next(iter(ends), 0),
        use_cache=True,
    )
    try:
        yield set(ends)
    finally:
        base.generation_config = own
