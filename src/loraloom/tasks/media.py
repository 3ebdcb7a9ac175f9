"""Pictures and sounds of a data set, as it stores them: files as bytes or paths, or decoded samples."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loraloom.untrusted import short

RATE = 16_000
MOST_PIXELS, MOST_RATE = 1 << 26, 768_000  # of a picture; samples a second of a sound


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
    if isinstance(stored, Mapping) and "array" in stored:
        return hashlib.sha256(np.asarray(stored["array"], np.float32).tobytes()).hexdigest()
    return hashlib.sha256(_content(stored)).hexdigest()


def image(stored: Any) -> Any:
    """uint8, height x width x 3, turned as the camera says; of a list of files a list. Of 16 bits the upper 8 are kept.

    Raises:
        ValueError: a file cannot be read.
    """
    from PIL import Image, ImageOps

    if isinstance(stored, list):
        return [image(one) for one in stored]
    content = _content(stored)
    with _told("image", stored):
        found = Image.open(io.BytesIO(content))
        if found.width * found.height > MOST_PIXELS:
            raise ValueError(f"{found.width} x {found.height} pixels; at most {MOST_PIXELS} in all")
        turned = ImageOps.exif_transpose(found)
        if turned.mode.startswith("I;16"):  # the conversion would cut them off at 255
            turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
        return np.array(turned.convert("RGB"))


def audio(stored: Mapping[str, Any]) -> np.ndarray:
    """Mono float32 samples at 16 kHz. WAV files need nothing more; other files need the package ``soundfile``.

    Raises:
        ValueError: the file cannot be read.
    """
    if "array" in stored:
        return resampled(np.asarray(stored["array"], np.float32), int(stored["sampling_rate"]))
    content = _content(stored)
    if content[:4] == b"RIFF":
        with _told("audio", stored):
            return _wave(content)
    try:
        import soundfile
    except ImportError:
        raise ValueError(f"audio {stored.get('path')}: no WAV file; pip install soundfile to read others") from None
    with _told("audio", stored):
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
        return resampled(samples, rate)


def _wave(content: bytes) -> np.ndarray:
    from scipy.io import wavfile

    rate, samples = wavfile.read(io.BytesIO(content))
    if not 0 < rate <= MOST_RATE:
        raise ValueError(f"{rate} samples a second; allowed are 1 to {MOST_RATE}")
    if samples.dtype.kind != "f":
        middle = 128 if samples.dtype == np.uint8 else 0
        samples = (samples.astype(np.float32) - middle) / (128 if middle else np.iinfo(samples.dtype).max + 1.0)
    return resampled(samples, rate)


@contextmanager
def _told(kind: str, stored: Mapping[str, Any]) -> Iterator[None]:
    """What fails in reading a file, in one line: the packages that decode have errors of their own, any kind."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{kind} {stored.get('path') or 'of a data set'} cannot be read: {what}") from None


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


def _content(stored: Any) -> bytes:
    """The bytes of a file that a data set holds or names.

    Raises:
        ValueError: there is none.
    """
    held = stored if isinstance(stored, Mapping) else {}
    if held.get("bytes") is not None:
        return bytes(held["bytes"])
    if not held.get("path") or not Path(held["path"]).is_file():
        raise ValueError(f"a data set names a file that is none: {short(held.get('path'))}")
    return Path(held["path"]).read_bytes()
