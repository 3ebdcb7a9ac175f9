"""Handwritten digits of scikit-learn: 1797 images of 8 x 8 pixels."""

from __future__ import annotations

import numpy as np

from loraloom.tasks import Example, Row, Rows, tasks

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@tasks.register(
    "digits",
    paper="https://archive.ics.uci.edu/dataset/80",
    modality="image",
    prompt="Which digit is in the image?",
    source="scikit-learn",
    licence="BSD-3-Clause",
)
def digits() -> Rows:
    """Handwritten digits, 8 x 8 pixels (Alpaydin & Kaynak 1998); 10 classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    rows = [Row(image.tobytes().hex(), LABELS[label]) for image, label in zip(images, bunch.target, strict=True)]

    def make(i: int) -> Example:
        return Example(np.repeat(images[i][..., None], 3, axis=2), LABELS, int(bunch.target[i]))

    return Rows(rows, make, LABELS)
