"""Fashion-MNIST from Debian's package: 60000 + 10000 images of 28 x 28 pixels."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np

from loraloom.packages import Package, fetch
from loraloom.tasks import Example, Row, Rows, tasks

FOLDER = "usr/share/datasets/fashion-mnist"
PACKAGE = Package(
    "dataset-fashion-mnist",
    {
        f"{FOLDER}/t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        f"{FOLDER}/t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        f"{FOLDER}/train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        f"{FOLDER}/train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    },
    kind="debian",
)
LABELS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@tasks.register(
    "fashion-mnist",
    paper="https://arxiv.org/abs/1708.07747",
    modality="image",
    prompt="Which piece of clothing is in the image?",
    source="dataset-fashion-mnist (Debian)",
    licence="MIT",
)
def fashion_mnist() -> Rows:
    """Pictures of clothes, 28 x 28 pixels (Xiao et al. 2017); 10 classes, its own test part."""
    folder = fetch(PACKAGE) / FOLDER
    train, test = (_read(folder / f"{part}-images-idx3-ubyte.gz", 16) for part in ("train", "t10k"))
    images = np.concatenate([train, test]).reshape(-1, 28, 28)
    labels = np.concatenate([_read(folder / f"{part}-labels-idx1-ubyte.gz", 8) for part in ("train", "t10k")])
    parts = [""] * (len(images) - 10_000) + ["test"] * 10_000
    rows = [
        Row(hashlib.sha256(image.tobytes()).hexdigest(), LABELS[label], part=part)
        for image, label, part in zip(images, labels, parts, strict=True)
    ]

    def make(i: int) -> Example:
        return Example(np.repeat(images[i][..., None], 3, axis=2), LABELS, int(labels[i]))

    return Rows(rows, make, LABELS)


def _read(path: Path, header: int) -> np.ndarray:
    """The bytes of an IDX file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)
