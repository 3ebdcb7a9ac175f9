"""Data sets in folders: CSV, JSON lines, parquet and pictures, as ``datasets`` reads them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fuzz.reader import Reader
from loraloom.tasks import load_task, media
from loraloom.tasks.hub import HubTask

ROWS = [{"text": f"the {who} sat on mat {at}", "label": at % 2} for at, who in enumerate(["cat", "dog"] * 10)]


def picture(at: int) -> bytes:
    """A small PNG."""
    from PIL import Image

    held, drawn = io.BytesIO(), np.random.default_rng(at).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(held, "png")
    return held.getvalue()


def csv(folder: Path) -> None:
    """Texts in two files."""
    lines = [f"{row['text']},{row['label']}\n" for row in ROWS]
    (folder / "train.csv").write_text("text,label\n" + "".join(lines[:16]))
    (folder / "test.csv").write_text("text,label\n" + "".join(lines[16:]))


def json_lines(folder: Path) -> None:
    """Texts with choices of their own."""
    rows = [{**row, "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "label": "AB"[at % 2]} for at, row in T]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


T = list(enumerate(ROWS))


def parquet(folder: Path) -> None:
    """Pictures beside texts, in one file."""
    import datasets

    rows = [{**row, "picture": {"bytes": picture(at), "path": None}} for at, row in T]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.Value("int64"), "picture": datasets.Image()}
    )
    datasets.utils.logging.disable_progress_bar()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    datasets.utils.logging.enable_progress_bar()


def pictures(folder: Path) -> None:
    """Pictures in a folder for each class."""
    for at in range(8):
        place = folder / ("left", "right")[at % 2]
        place.mkdir(exist_ok=True)
        (place / f"{at}.png").write_bytes(picture(at))


def read(**columns: Any) -> Callable[[Path], object]:
    """Every example of a folder; what ``datasets`` keeps of it lies beside."""

    def examples(folder: Path) -> None:
        import datasets

        with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", str(folder.parent / "kept")):
            load_task(HubTask(str(folder), **columns))

    return examples


def media_files(folder: Path) -> None:
    """A picture and a sound."""
    from scipy.io import wavfile

    (folder / "a.png").write_bytes(picture(0))
    wavfile.write(folder / "a.wav", 8000, np.arange(400, dtype=np.int16))


def read_media(folder: Path) -> None:
    """Both, decoded."""
    assert media.image({"bytes": None, "path": str(folder / "a.png")}).ndim == 3
    assert media.audio({"bytes": None, "path": str(folder / "a.wav")}).dtype == np.float32


FOLDERS = {
    "media": Reader(media_files, read_media),
    "csv": Reader(csv, read(labels=("no", "yes")), fixed=2),
    "json lines": Reader(json_lines, read(choices="choices"), fixed=2),
    "parquet": Reader(parquet, read(image="picture", prompt="{image}{content}"), fixed=2),
    "pictures": Reader(pictures, read(content="image"), fixed=2),
}
