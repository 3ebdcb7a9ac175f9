"""Multimodal models put together from bundled ones: an encoder, a projector of two layers at its start, SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loraloom.models import write_json
from loraloom.packages import cached

PLACEHOLDER, PLACEHOLDER_ID = "<filename>", 6  # one of SmolLM2's tokens that stand for nothing here
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def assembled(
    name: str,
    text: Path,
    encoder: Callable[[], Mapping[str, Any]],
    configuration: Mapping[str, Any],
    processor: Mapping[str, Any],
    width: int,
) -> Path:
    """The cache folder of a model of three parts, made on the first call; its projector is random and is to be trained.

    Args:
        name: of the folder.
        text: folder of the language model.
        encoder: gives the weights of the encoder, under the names that they have in the whole model.
        configuration: of the whole model, without ``text_config``.
        processor: files beside the weights: what ``AutoProcessor`` and its parts read, by file name.
        width: features of the encoder.
    """

    def build(work: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        told = json.loads((text / "config.json").read_text())
        words = load_file(text / "model.safetensors")
        embeddings = words["model.embed_tokens.weight"]
        state = {f"model.language_model.{key.removeprefix('model.')}": held for key, held in words.items()}
        if not configuration.get("tie_word_embeddings"):
            state["lm_head.weight"] = embeddings.clone()
        state |= encoder()
        draw = torch.Generator().manual_seed(0)
        size = told["hidden_size"]
        # what comes out stands beside the language model's embeddings, which are small
        for layer, inside, spread in (("linear_1", width, 1.0), ("linear_2", size, float(embeddings.float().std()))):
            drawn = torch.randn((size, inside), generator=draw) * inside**-0.5 * spread
            state[f"model.multi_modal_projector.{layer}.weight"] = drawn
            state[f"model.multi_modal_projector.{layer}.bias"] = torch.zeros(size)
        save_file({key: state[key].contiguous() for key in sorted(state)}, work / "model.safetensors", {"format": "pt"})
        inner = {key: value for key, value in told.items() if key not in ("architectures", "dtype")}
        write_json(work / "config.json", {**configuration, "text_config": inner, "dtype": "float32"})
        for file in TEXT_FILES:
            (work / file).write_bytes((text / file).read_bytes())
        for file, content in processor.items():
            write_json(work / file, content)

    return cached(f"models/{name}", build)
