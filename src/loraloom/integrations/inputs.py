"""What a forward pass of a Transformers model is told of its tokens: padding, packing, what its cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loraloom.strategies.rankspace import PAD, TEXT, RoutingError, segments_of


def whole_numbers(name: str, told: Any) -> Int[Tensor, "batch tokens"]:
    """An argument that has a number a token.

    Raises:
        RoutingError: it has not.
    """
    if not isinstance(told, Tensor) or told.is_floating_point() or told.ndim != 2:
        what = f"{told.dtype} of {told.ndim} dimensions" if isinstance(told, Tensor) else type(told).__name__
        raise RoutingError(f"{name} must be a tensor of whole numbers, batch x tokens, got {what}")
    return told


def fitted(name: str, told: Any, like: Tensor, repeat: bool) -> Int[Tensor, "batch tokens"]:
    """An argument as :func:`whole_numbers`, one a token of a batch; rows are repeated for beams if so told.

    Raises:
        RoutingError: it is of other tokens.
    """
    told, batch = whole_numbers(name, told), like.shape[0]
    if repeat and len(told) and batch % len(told) == 0:
        told = told.repeat_interleave(batch // len(told), dim=0)
    if told.shape != like.shape[:2]:
        raise RoutingError(f"{name} is {tuple(told.shape)}, the tokens are {tuple(like.shape[:2])}; give one a token")
    return told.to(like.device)


def token_labels(given: Mapping[str, Any]) -> Tensor | None:
    """Labels of tokens; not those of whole rows, as in classification."""
    labels = given.get("labels")
    return labels if labels is not None and labels.ndim == 2 and not labels.is_floating_point() else None


def padding(
    given: Mapping[str, Any], types: Int[Tensor, "batch tokens"], past: int
) -> tuple[Bool[Tensor, "batch tokens"], Bool[Tensor, "batch tokens tokens"] | None]:
    """Which tokens are padding; of a mask of four dimensions also which token (dim 1) sees which (dim 2).

    Raises:
        RoutingError: the mask is none that can be read, and nobody told the modalities.
    """
    pads, length, mask = types == PAD, types.shape[1], given.get("attention_mask")
    if isinstance(mask, Mapping):  # by kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return pads, None
    if not isinstance(mask, Tensor):
        if given.get("modality_ids") is None:
            raise RoutingError(
                f"attention_mask is a {type(mask).__name__}, which does not tell the padding; pass modality_ids, "
                f"{PAD} on padding"
            )
        return pads, None
    last = past + length if mask.shape[-1] >= past + length else mask.shape[-1]  # a static cache has room behind
    mask = mask[..., max(last - length, 0) : last].to(types.device)
    if mask.ndim == 2:
        return (pads | ~mask.bool() if mask.shape[1] == length else pads), None
    allowed = mask[:, 0] > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask[:, 0].bool()
    return (pads | ~allowed.any(1), allowed) if allowed.shape[1] == length else (pads, None)


def segments(given: Mapping[str, Any], types: Tensor, pads: Tensor) -> Int[Tensor, "batch tokens"] | None:
    """Segments of packed rows, from what we or Transformers are given for them; None where no row is packed."""
    bounds, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    for name in ("segment_ids", "seq_idx"):
        if given.get(name) is not None:
            return given[name].expand(types.shape)
    if bounds is not None:
        places = torch.arange(types.shape[1], device=types.device)
        return torch.bucketize(places, bounds[1:].to(places), right=True).expand(types.shape)
    if positions is not None and positions.ndim == 3 and positions.shape[0] == 4:  # text, time, height, width
        positions = positions[0]
    if positions is None or positions.ndim != 2 or types.shape[1] == 1:
        return None
    return segments_of(positions.expand(types.shape), pads)


def refuse_parted(allowed: Bool[Tensor, "batch tokens tokens"], types: Int[Tensor, "batch tokens"]) -> None:
    """Refuse packed rows that a mask alone tells.

    Raises:
        RoutingError: no token of a row sees all the others.
    """
    real = types != PAD
    if bool(((allowed & real[:, None]).sum(2).amax(1) < real.sum(1)).any()):
        raise RoutingError(
            "the attention mask parts a row into several sequences (packing), and nothing tells which; "
            "pass position_ids that begin again in each, or segment_ids (batch x tokens)"
        )


def open_end(types: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch 1"]:
    """In which rows the last token that is no padding is of another modality.

    Example:
        >>> open_end(torch.tensor([[0, 1, -1], [1, 0, -1]])).flatten()
        tensor([ True, False])
    """
    places = torch.arange(types.shape[1], device=types.device)
    last = torch.where(types == PAD, 0, places).amax(1, keepdim=True)
    return types.gather(1, last) > TEXT


def cached(cache: Any) -> int:
    """Tokens in a cache before this forward pass."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0][0].shape[-2])


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or None."""
    parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def placeholder(model: Any, name: str) -> int | None:
    """The id that stands for a token of a modality in ``input_ids``."""
    config = getattr(model, "config", None)
    found = (getattr(config, f"{name}_{key}", None) for key in ("token_id", "token_index"))
    return next((id_ for id_ in found if isinstance(id_, int)), None)


__all__ = [
    "cache_of",
    "cached",
    "fitted",
    "open_end",
    "padding",
    "placeholder",
    "refuse_parted",
    "segments",
    "token_labels",
    "whole_numbers",
]
