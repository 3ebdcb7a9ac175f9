"""A tiny LLaVA with a processor of its own, as a folder, and a task of questions about pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loraloom.tasks import Example, Task
from tiny_multimodal import IMAGE, PADDING, tiny_llava

WORDS = ("<unk>", "<s>", "</s>", "what", "is", "it", "?", "red", "dark", "blue", "yes", "no", "a", "very", "Answer:")


def processor():
    """Words apart, an image token, pictures of 8 x 8 in patches of 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(WORDS)} | {"<image>": IMAGE, "<pad>": PADDING}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **special, extra_special_tokens={"image_token": "<image>"}
    )
    side = {"height": 8, "width": 8}
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=side)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def folder(path: Path) -> Path:
    """Model and processor, saved."""
    tiny_llava().save_pretrained(path)
    processor().save_pretrained(path)
    return path


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 255, (10, 10, 3), dtype=np.uint8)


CHOICES = ("red", "very dark blue", "dark blue", "dark", "no")


def task(n: int = 10, prompt: str = "{image} {content} Answer:") -> Task:
    """Choices of several lengths, some of which begin alike."""
    rows = [
        Example("what is it ?" if i % 2 else "is it a red", CHOICES, i % len(CHOICES), media={"image": picture(i)})
        for i in range(n)
    ]
    return Task("pictures", "image+text", CHOICES, prompt, dict.fromkeys(("train", "validation", "test"), rows), "", "")
