"""Sentiment in three domains: the sentences with human ratings that come with VADER."""

from __future__ import annotations

import html
import tarfile
from pathlib import Path
from typing import Any

from loraloom.packages import Package, fetch
from loraloom.tasks import Example, Rows, tasks

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
PACKAGE = Package(
    "vaderSentiment==3.3.2",
    {ARCHIVE: "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"},
    kind="sdist",
    archive="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
LABELS = ("negative", "positive")
FACTS: dict[str, Any] = {
    "paper": "https://doi.org/10.1609/icwsm.v8i1.14550",
    "modality": "text",
    "source": PACKAGE.requirement,
    "licence": "MIT",
}


@tasks.register("sent-movie", prompt="Review: {content}\nSentiment:", **FACTS)
def sent_movie() -> Rows:
    """Is a sentence of a film review negative or positive? 2 classes, mean rating at least 0.8 of 4 from neutral."""
    return _rows("movieReviewSnippets", 0.8)


@tasks.register("sent-amazon", prompt="Review: {content}\nSentiment:", **FACTS)
def sent_amazon() -> Rows:
    """Is a sentence of a product review negative or positive? 2 classes, mean rating at least 0.5 of 4 from neutral."""
    return _rows("amazonReviewSnippets", 0.5)


@tasks.register("sent-tweets", prompt="Tweet: {content}\nSentiment:", **FACTS)
def sent_tweets() -> Rows:
    """Is a tweet negative or positive? 2 classes, mean rating at least 0.8 of 4 from neutral (Hutto & Gilbert 2014)."""
    return _rows("tweets", 0.8)


def _rows(name: str, least: float) -> Rows:
    """Rows of one file: number TAB mean rating in [-4, 4] TAB text; ``3_2`` is sentence 2 of review 3."""
    examples = []
    for line in _lines(fetch(PACKAGE) / ARCHIVE, f"hutto_ICWSM_2014/{name}_GroundTruth.txt"):
        number, rating, text = line.split("\t", 2)
        review, _, sentence = number.partition("_")
        if abs(float(rating)) >= least and text.strip():
            content = " ".join(html.unescape(text).split())
            group = f"{name} {review}" if sentence else ""
            examples.append(Example(content, LABELS, int(float(rating) > 0), group))
    return Rows.of_texts(examples, LABELS)


def _lines(archive: Path, member: str) -> list[str]:
    """The lines of a text file in a tar file."""
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(member)
        if stream is None:
            raise ValueError(f"{archive.name}: {member} is not a file")
        return stream.read().decode("utf-8").rstrip("\n").split("\n")
