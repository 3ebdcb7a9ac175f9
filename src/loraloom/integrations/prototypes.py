"""A fixed linear head on features, made from frozen ones: each label is the mean direction of its examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 1 / 16  # of the cosine logits of prototype heads; 16 is high enough to fit, low enough to keep a gradient


@dataclass(frozen=True, eq=False)
class Prototypes:
    """A fixed linear head on features: ``logits = cos(feature - centre, direction of the label) / temperature``.

    Attributes:
        centre: mean of the frozen features, (width,).
        directions: unit vectors, labels x width.
        pool: ``cls`` (first token) or ``mean`` (over unmasked tokens).
    """

    centre: Tensor
    directions: Tensor
    pool: str

    def features(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Batch x tokens x width -> batch x width; means are taken in float32, where sums of many tokens have room."""
        if self.pool == "cls":
            return hidden[:, 0]
        hidden = hidden.float()
        if mask is None:
            return hidden.mean(1)
        weight = mask[..., None].float()
        return (hidden * weight).sum(1) / weight.sum(1)

    def logits(self, features: Tensor) -> Tensor:
        """Batch x width -> batch x labels."""
        centred = F.normalize(features.float() - self.centre.to(features.device), dim=-1)
        return centred @ self.directions.to(features.device).T / TEMPERATURE


def fit_prototypes(features: Tensor, labels: Tensor, classes: int, pool: str) -> Prototypes:
    """Prototypes from frozen features (n x width) and their labels (n).

    Raises:
        ValueError: a label has no example.

    Example:
        >>> head = fit_prototypes(torch.eye(2), torch.tensor([0, 1]), classes=2, pool="cls")
        >>> head.logits(torch.tensor([[5.0, 0.0]])).argmax().item()
        0
    """
    missing = sorted(set(range(classes)) - set(labels.tolist()))
    if missing:
        raise ValueError(f"labels {missing} have no training example, so they have no prototype")
    features = features.float()
    centre = features.mean(0)
    unit = F.normalize(features - centre, dim=-1)
    means = torch.stack([unit[labels == label].mean(0) for label in range(classes)])
    return Prototypes(centre, F.normalize(means, dim=-1), pool)
