"""What the words of a report mean, for readers who do not know the project: those that stand in it, once each."""

from __future__ import annotations

import re
from collections.abc import Iterable

MEANING = {
    "adapter": "a small set of trained weights that is added to a model, whose own weights stay as they are",
    "LoRA": "low-rank adaptation: the adapter of each linear layer is a product of two thin matrices (Hu et al. 2021)",
    "CoTo": "LoRA trained with a part of the layers' adapters switched off, fewer and fewer of them (arXiv 2506.05713)",
    "LoRI": "LoRA with its first factor frozen at random and only a part of the second trained (arXiv 2504.07448)",
    "MokA": "LoRA with a first factor for each modality, such as text and image (arXiv 2506.05191)",
    "DoRA": "LoRA that learns the size and the direction of a weight apart (arXiv 2402.09353)",
    "update": "what an adapter adds to the weights of a layer: dW = scale * B A",
    "delta": "the update as a full matrix, dW = scale * B A",
    "factors": "the two thin matrices A and B whose product is the update",
    "rank": "the number of rows of A and of columns of B",
    "module": "one linear layer of the model that has an adapter",
    "layer": "one block of the model; it has several modules",
    "projection": "what a module does in its layer, such as query or value; the same in all layers",
    "merge": "to make one adapter of several, without training",
    "merged": "made of several adapters, without training",
    "density": "the share of entries that is kept, in (0, 1]",
    "barrier": "how far the score sinks between two adapters, below the straight line from one to the other",
    "cosine": "likeness of two directions: 1 the same, 0 nothing in common, -1 opposite",
    "norm": "size of a matrix: the root of the sum of its squared entries (Frobenius)",
    "gradient": "the direction in which the weights of a step would make the loss grow fastest",
    "optimizer step": "one change of the weights, after one batch of examples",
    "seed": "the number that all that is random follows from; two seeds give two runs of one recipe",
    "Shapley": "a fair division of a gain among those who made it: each one's mean contribution over all orders",
    "Gini": "a measure of inequality: 0 if all have the same, towards 1 if one has all",
    "accuracy": "share of test examples that are answered rightly",
    "95 % interval": "holds the true value in 95 of 100 such measurements, by the chance that the note beside it names",
}
_FORMS = {
    "merge": r"merges?",
    "layer": r"layers?",
    "adapter": r"adapters?",
    "95 % interval": r"95 %(?: \w+)? intervals?",
}


def words_of(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Word and meaning of all that occur in the texts, in alphabetical order.

    Example:
        >>> [word for word, _ in words_of(["Norms of the update by layers"])]
        ['adapter', 'layer', 'module', 'norm', 'update']
    """
    held = "\n".join(texts)
    found = {word for word in MEANING if _stands_in(word, held)}
    for _ in range(3):  # a meaning may use another word
        found |= {word for word in MEANING if any(_stands_in(word, MEANING[known]) for known in found)}
    return sorted(((word, MEANING[word]) for word in found), key=lambda pair: pair[0].lower())


def _stands_in(word: str, text: str) -> bool:
    form = _FORMS.get(word, re.escape(word) + "s?")
    return re.search(rf"(?<![\w-]){form}(?![\w-])", text, re.IGNORECASE if word.islower() else 0) is not None
