"""Pictures and sounds of a data set, as it stores them: files as bytes or paths, or decoded samples."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000


def undecoded(data: Any, columns: Mapping[str, str]) -> Any:
    """The same data set with its media as files: only what is wanted is decoded, later.

    Args:
        data: of ``datasets``.
        columns: column by modality, ``image`` or ``audio``; paths are taken as files too.
    """
    import datasets

    kinds = {"image": datasets.Image, "audio": datasets.Audio}
    for modality, column in columns.items():
        feature = data.features[column]
        file = kinds[modality](decode=False)
        if isinstance(feature, datasets.List):
            data = data.cast_column(column, datasets.List(file))
        elif isinstance(feature, kinds[modality]) or getattr(feature, "dtype", "") in ("string", "binary"):
            data = data.cast_column(column, file)
    return data


def digest(stored: Any) -> str:
    """A name for the content of a file, of several, or of samples."""
    if isinstance(stored, list):
        return hashlib.sha256("".join(map(digest, stored)).encode()).hexdigest()
    if "array" in stored:
        return hashlib.sha256(np.asarray(stored["array"], np.float32).tobytes()).hexdigest()
    return hashlib.sha256(_content(stored)).hexdigest()


def image(stored: Any) -> Any:
    """uint8, height x width x 3; of a list of files a list."""
    from PIL import Image

    if isinstance(stored, list):
        return [image(one) for one in stored]
    return np.array(Image.open(io.BytesIO(_content(stored))).convert("RGB"))


def audio(stored: Mapping[str, Any]) -> np.ndarray:
    """Mono float32 samples at 16 kHz. WAV files need nothing more; other files need the package ``soundfile``.

    Raises:
        ValueError: the file cannot be read.
    """
    if "array" in stored:
        return resampled(np.asarray(stored["array"], np.float32), int(stored["sampling_rate"]))
    content = _content(stored)
    if content[:4] == b"RIFF":
        from scipy.io import wavfile

        rate, samples = wavfile.read(io.BytesIO(content))
        if samples.dtype.kind != "f":
            middle = 128 if samples.dtype == np.uint8 else 0
            samples = (samples.astype(np.float32) - middle) / (128 if middle else np.iinfo(samples.dtype).max + 1.0)
        return resampled(samples, rate)
    try:
        import soundfile
    except ImportError:
        raise ValueError(f"audio {stored.get('path')}: no WAV file; pip install soundfile to read others") from None
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    return resampled(samples, rate)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples (n, or n x channels) at some rate as mono float32 at 16 kHz.

    Example:
        >>> resampled(np.zeros((80, 2)), 8000).shape
        (160,)
    """
    from math import gcd

    from scipy.signal import resample_poly

    mono = samples.mean(1) if samples.ndim > 1 else samples
    shared = gcd(RATE, rate)
    if rate != RATE:
        mono = resample_poly(mono.astype(np.float32), RATE // shared, rate // shared)
    return np.ascontiguousarray(mono, np.float32)


def _content(stored: Mapping[str, Any]) -> bytes:
    return stored["bytes"] if stored.get("bytes") is not None else Path(stored["path"]).read_bytes()
