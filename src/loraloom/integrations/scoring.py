"""Scores: one pretrained model and one task, asked the same question with every adapter.

Adapters of different seeds and tasks can only be compared, averaged and pruned when nothing but the adapter differs, so
the head is never trained with it. A causal model scores each choice by the log-likelihood of its text. An encoder
compares its features with fixed prototypes: the mean direction of each label's frozen features, computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.adapter import Adapter
from loraloom.integrations.backbones import load_backbone
from loraloom.integrations.generation import check_judge, judged
from loraloom.integrations.likelihood import BATCH, Continuation
from loraloom.integrations.prefix import Scores
from loraloom.integrations.prototypes import Prototypes, fit_prototypes
from loraloom.integrations.seat import Seat
from loraloom.models import models
from loraloom.registry import UnknownName, edge
from loraloom.tasks import Example, Task, load_task
from loraloom.tasks.hub import HubTask
from loraloom.tasks.metrics import Estimate, accuracy

PROTOTYPE_EXAMPLES = 160  # so many training examples make the prototypes, or 16 a label if that is more


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one adapter on one task, with the outcome of every example for paired comparisons.

    Example:
        >>> Evaluation("digits", "test", accuracy([True, True, False, True]), (True, True, False, True)).value
        0.75
    """

    task: str
    split: str
    estimate: Estimate
    correct: tuple[bool, ...]

    @property
    def value(self) -> float:
        """The accuracy."""
        return self.estimate.value

    def to_json(self) -> dict[str, Any]:
        """Task, split, value, ends of the interval and number of examples."""
        return {"task": self.task, "split": self.split, **self.estimate.to_json()}


@dataclass(frozen=True, eq=False)
class Bench:
    """A pretrained model set up for a task: examples to batches, outputs to a loss and to choices.

    Attributes:
        model: the frozen base; adapters are attached to it and taken off again.
        name: the model as the user gave it.
        task: the task.
        family: ``causal``, ``multimodal``, ``encoder`` or ``vision``.
        processor: tokenizer, the model's own processor if it is multimodal, or the mean and deviation of pixels.
        image_size: pixels a side that images are resized to.
        max_length: tokens that text is cut to.
        train_limit: at most so many training examples; the head does not depend on it.
    """

    model: nn.Module
    name: str
    task: Task
    family: str
    processor: Any
    image_size: int = 98
    max_length: int = 128
    train_limit: int | None = None

    @property
    def continues(self) -> bool:
        """Whether the model continues a text: then choices are scored by their likelihood, and there is no head."""
        return self.family in ("causal", "multimodal")

    @property
    def rows(self) -> Continuation:
        """The task's examples as rows of tokens."""
        return Continuation(self.processor, self.task, self.max_length)

    @cached_property
    def seat(self) -> Seat:
        """Where adapters take turns on the model: those of one shape swap weights."""
        return Seat(self.model)

    @property
    def training(self) -> Sequence[Example]:
        """The examples to train on."""
        return self.task.splits["train"][: self.train_limit]

    # --- examples to batches -------------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A training batch: model inputs and ``labels``."""
        if self.continues:
            return self.rows.collate(examples)
        batch = self._inputs(examples)
        return {**batch, "labels": torch.tensor([example.label for example in examples])}

    def _inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        if self.family == "vision":
            return {"pixel_values": pixels([example.content for example in examples], self.image_size, self.processor)}
        texts = [str(example.content) for example in examples]
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        return dict(self.processor(texts, **options))

    # --- outputs to losses and choices ---------------------------------------------------------------------------

    @cached_property
    def head(self) -> Prototypes:
        """The fixed head of an encoder: a function of model, task and input size alone, so that adapters can share it.

        Made from the frozen features of the first training examples, as many as are needed to have each label.
        """
        if not self.task.labels:
            raise ValueError(
                f"task {self.task.name}: choices differ by example; {self.name} is no causal model to score them"
            )
        train, classes = self.task.splits["train"], range(len(self.task.labels))
        count = max(PROTOTYPE_EXAMPLES, 16 * len(classes))
        while count < len(train) and {example.label for example in train[:count]} != set(classes):
            count *= 2
        examples = train[:count]
        pool = _pool(self.name, self.family)
        blank = Prototypes(torch.zeros(1), torch.zeros(1, 1), pool)
        features = torch.cat([self._features(self.model, batch, blank) for batch in self._batches(examples)])
        return fit_prototypes(features, torch.tensor([e.label for e in examples]), len(classes), pool)

    @property
    def loss(self) -> Callable[..., Tensor] | None:
        """``(outputs, labels, num_items_in_batch) -> loss`` for encoders; None where the model has its own."""
        if self.continues:
            return None
        head = self.head
        if head.pool == "mean" and self.family == "encoder":
            self._hand_on_masks()

        def prototype_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            features = head.features(outputs.last_hidden_state, outputs.get("attention_mask"))
            summed = F.cross_entropy(head.logits(features), labels, reduction="sum")
            return summed / (num_items_in_batch if num_items_in_batch is not None else len(labels))

        return prototype_loss

    def _hand_on_masks(self) -> None:
        """Have the model's output carry the attention mask: a Trainer's loss sees outputs, not inputs."""

        def hand_on(module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
            output["attention_mask"] = named.get("attention_mask")

        if not any(hook.__name__ == hand_on.__name__ for hook in self.model._forward_hooks.values()):
            self.model.register_forward_hook(hand_on, with_kwargs=True)

    def _features(self, model: nn.Module, batch: dict[str, Tensor], head: Prototypes) -> Tensor:
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch.get("attention_mask")
        return head.features(hidden, mask if mask is None else mask.repeat(len(hidden) // len(mask), 1)).cpu()

    def _batches(self, examples: Sequence[Example], size: int = 64) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(examples), size):
            yield self._inputs(examples[start : start + size])

    def choose(self, model: nn.Module, examples: Sequence[Example]) -> np.ndarray:
        """The chosen label of every example, (n,)."""
        return self.choices(model, examples)[0]

    def choices(self, model: nn.Module, examples: Sequence[Example], copies: int = 1) -> np.ndarray:
        """The same, (copies, n), of a model that answers each batch so many times, one after the other."""
        if self.continues:
            return self.rows.choices(model, examples, copies)
        logits = [self.head.logits(self._features(model, batch, self.head)) for batch in self._batches(examples)]
        return torch.cat([one.unflatten(0, (copies, -1)) for one in logits], 1).argmax(-1).numpy()

    @property
    def batch(self) -> int:
        """Examples in a forward pass."""
        return BATCH if self.continues else 64

    # --- scores --------------------------------------------------------------------------------------------------

    def evaluate(self, adapter: Adapter | None, split: str = "test", limit: int | None = None) -> Evaluation:
        """Accuracy of the base with ``adapter`` (None: the base alone) on a split, with its interval."""
        self.ready(split, limit)
        with self.seat.attached(adapter) as model:
            return self.outcomes(model, split, limit)[0]

    def ready(self, split: str = "test", limit: int | None = None) -> Sequence[Example]:
        """The examples of a split, once all is there to score them; the base must be bare.

        Raises:
            UnknownName: no such split.
        """
        if split not in self.task.splits:
            raise UnknownName("split", split, list(self.task.splits))
        examples = self.task.splits[split][:limit]
        check_judge(self.task, examples, self.name, self.family)
        if not self.continues:
            _ = self.head  # made while the base is bare: it is of frozen features
        return examples

    def outcomes(
        self, model: nn.Module, split: str = "test", limit: int | None = None, copies: int = 1
    ) -> list[Evaluation]:
        """What :meth:`evaluate` gives, of a model that has its adapters on, ``copies`` of them as in :meth:`choices`.

        :meth:`ready` comes before.
        """
        examples = self.task.splits[split][:limit]
        training = model.training
        model.eval()
        if self.task.judge:
            found = [judged(model, self.processor, self.task, examples, max_length=self.max_length)]
        else:
            found = list(self.choices(model, examples, copies) == np.array([example.label for example in examples]))
        model.train(training)
        name = self.task.name
        return [Evaluation(name, split, accuracy(correct), tuple(bool(c) for c in correct)) for correct in found]


def pixels(images: Sequence[Any], size: int, stats: Mapping[str, Sequence[float]]) -> Tensor:
    """Images (uint8, H x W x 3) resized, scaled to [0, 1] and normalised: n x 3 x size x size, float32."""
    from PIL import Image

    mean, std = np.asarray(stats["image_mean"], np.float32), np.asarray(stats["image_std"], np.float32)
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    stacked = np.stack([np.asarray(image, np.float32) for image in resized]) / 255
    return torch.from_numpy(np.ascontiguousarray(((stacked - mean) / std).transpose(0, 3, 1, 2), np.float32))


def bench(
    model: str | nn.Module,
    task: str | HubTask | Task,
    *,
    family: str | None = None,
    processor: Any = None,
    image_size: int = 98,
    max_length: int = 128,
    dtype: str = "float32",
    train_limit: int | None = None,
) -> Bench:
    """Load a model and a task and set them up for each other.

    Args:
        model: a bundled name, a hub id, a local folder, or a live model.
        task: a task, its name, or the description of a data set.
        family: ``causal``, ``multimodal``, ``encoder`` or ``vision``; by default what the model's configuration says.
        processor: of a live model: its tokenizer or processor, or a mapping with ``image_mean`` and ``image_std``.
        image_size: pixels a side for vision models.
        max_length: tokens for text models.
        dtype: of the frozen weights of a model that is loaded here.
        train_limit: at most so many training examples.

    Raises:
        ValueError: the model takes another kind of input than the task has.

    Example:
        >>> made = bench("vit-s14", "digits", image_size=42)   # doctest: +SKIP
        >>> made.evaluate(None).value                          # doctest: +SKIP
        0.6
    """
    made = task if isinstance(task, Task) else load_task(task)
    backbone = load_backbone(model, family=family, processor=processor, dtype=dtype)
    takes = {"vision": ("image",), "multimodal": ("image+text", "audio+text", "text")}.get(backbone.family, ("text",))
    if made.modality not in takes:
        raise ValueError(
            f"task {made.name} is of {made.modality}; {backbone.name} ({backbone.family}) takes {' or '.join(takes)}"
        )
    return Bench(
        backbone.model, backbone.name, made, backbone.family, backbone.processor, image_size, max_length, train_limit
    )


def score(
    model: str | nn.Module,
    task: str | HubTask | Task,
    *,
    split: str = "test",
    limit: int | None = None,
    rows: int | None = None,
    **options: Any,
) -> Callable[[Adapter | None], float]:
    """A score for analyses: a function from an adapter (None: the base) to accuracy on a task.

    The model is loaded once; each call attaches the adapter, evaluates and takes it off. Asked for many variants of
    one adapter at once, as probes do, it runs what they have in common once, and where there are few examples several
    variants in one pass of at most ``rows`` rows (``integrations/prefix.py``). ``options`` are those of ``bench``.

    Example:
        >>> probe = score("vit-s14", "digits", split="validation", image_size=42)   # doctest: +SKIP
        >>> probe(ll.load("runs/coto-0")) > probe(None)                             # doctest: +SKIP
        True
    """
    return Scores(bench(model, task, **options), split, limit, rows=rows)


def evaluate(
    adapter: Adapter | None,
    task: str | HubTask,
    *,
    model: str = "",
    split: str = "test",
    limit: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
) -> Evaluation:
    """Accuracy of an adapter (None: of the base, then ``model`` is needed) on a task, with its 95 % interval.

    Model, image size and text length are by default those that the adapter was trained with, as its folder tells.
    ``lm_eval:NAME`` is a task of lm-evaluation-harness (``integrations.lm_eval``), which decides its split.

    Raises:
        ValueError: neither the adapter nor the caller names a model.

    Example:
        >>> evaluate(ll.load("runs/coto-0"), "digits", limit=200).estimate   # doctest: +SKIP
        Estimate(value=0.97, low=0.945, high=0.99, n=200)
    """
    name = model or (adapter.base if adapter is not None else "")
    if not name:
        raise ValueError("no base model is named; say which with --model")
    if isinstance(task, str) and task.startswith("lm_eval:"):
        return edge("lm_eval").evaluate(adapter, task, model=name, limit=limit, max_length=max_length)
    data = trained_with(adapter)
    made = bench(
        name,
        task,
        image_size=image_size or int(data.get("image_size", 98)),
        max_length=max_length or int(data.get("max_length", 128)),
    )
    return made.evaluate(adapter, split, limit)


def trained_with(adapter: Adapter | None) -> Mapping[str, Any]:
    """The data options of the (first) training run that an adapter comes from."""
    source: Any = adapter.provenance if adapter is not None else {}
    while isinstance(source, Mapping) and source.get("operation") != "train" and source.get("inputs"):
        source = source["inputs"][0]
    arguments = source.get("arguments") if isinstance(source, Mapping) else None
    return dict((arguments or {}).get("data") or {})


def _pool(name: str, family: str) -> str:
    if name in models and "pool" in models[name].facts:
        return str(models[name].facts["pool"])
    return "cls" if family == "vision" else "mean"


__all__ = ["Bench", "Evaluation", "Prototypes", "bench", "evaluate", "fit_prototypes", "pixels", "score"]
