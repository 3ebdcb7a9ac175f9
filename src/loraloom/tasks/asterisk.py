"""Asterisk's English prompts: short clips of one speaker with their transcripts, from two Debian packages."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from loraloom.packages import Package, fetch
from loraloom.tasks import Example, Row, Rows, tasks
from loraloom.tasks.media import RATE, audio

VOICE = "usr/share/asterisk/sounds/en_US_f_Allison"
TOLD = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
CLIPS = Package(
    "asterisk-core-sounds-en-wav",
    {f"{VOICE}/*.wav": "6c486c66f9f96efd3619c854e45036064d5fb8b830b279ed370774e1c2283946"},
    kind="debian",
)
TRANSCRIPTS = Package(
    "asterisk-core-sounds-en", {TOLD: "436538195b7c7361bd227036686f1a4039f694648c76573bdaca956655d34450"}, kind="debian"
)
SECONDS, CHOICES = 2, 4


@tasks.register(
    "asterisk-speech",
    paper="https://www.asterisk.org",
    modality="audio+text",
    prompt="{audio}\nTranscript:",
    source="asterisk-core-sounds-en-wav (Debian)",
    licence="CC-BY-SA-3.0",
)
def asterisk_speech() -> Rows:
    """What is said in a clip of up to 2 seconds: its transcript among four of like length; one speaker."""
    folder = fetch(CLIPS) / VOICE
    said = transcripts(gzip.decompress((fetch(TRANSCRIPTS) / TOLD).read_bytes()).decode())
    clips = {name: _samples(folder / f"{name}.wav") for name in said if (folder / f"{name}.wav").is_file()}
    names = [name for name, clip in clips.items() if len(clip) <= SECONDS * RATE]
    texts = sorted({said[name] for name in names}, key=lambda text: (len(text), _number(text)))
    place = {text: i for i, text in enumerate(texts)}
    rows = [Row(name, said[name], group=f"asterisk {said[name]}") for name in names]

    def make(k: int) -> Example:
        choices = near(texts, place[said[names[k]]])
        return Example("", choices, choices.index(said[names[k]]), rows[k].group, {"audio": clips[names[k]]})

    return Rows(rows, make)


def transcripts(text: str) -> dict[str, str]:
    """Words by file, in lower case and without the full stop; sounds that are not speech are left out.

    Example:
        >>> transcripts("hello: Hello there.")
        {'hello': 'hello there'}
    """
    lines = (line.partition(":") for line in text.splitlines() if ":" in line and not line.startswith(";"))
    said = {name.strip(): " ".join(re.sub(r"[.\s]+$", "", words).lower().split()) for name, _, words in lines}
    return {name: words for name, words in said.items() if words and "[" not in words}


def near(texts: list[str], at: int) -> tuple[str, ...]:
    """The text at a place among its neighbours in length; neither order nor length tells which it is.

    Example:
        >>> near(["a", "bb", "cc", "dd", "eeee"], 2)
        ('bb', 'cc', 'dd', 'eeee')
    """
    start = min(max(at - _number(texts[at]) % CHOICES, 0), len(texts) - CHOICES)
    return tuple(sorted(texts[start : start + CHOICES]))


def _number(text: str) -> int:
    """A number that looks like chance and is always the same."""
    return zlib.crc32(text.encode())


def _samples(path: Path) -> np.ndarray:
    """A clip of 8 kHz at 16 kHz, in [-1, 1]."""
    return audio({"path": path})
