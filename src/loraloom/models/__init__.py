"""Pretrained models by name: those that come inside registry packages, and everything ``from_pretrained`` knows.

A bundled model is one file of this folder: a function that turns its package into a Hugging Face folder, once.

    >>> models["vit-s14"].facts["family"]
    'vision'
    >>> models["vit-s14"]()                            # doctest: +SKIP
    PosixPath('.../loraloom/models/vit-s14-0.1.1')
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from loraloom.packages import Package, cached, file_digest, unpack
from loraloom.registry import Registry

models: Registry[[], Path] = Registry("model", __name__)
"""Facts of each: ``family`` (causal, encoder, vision or speech), ``licence``, ``parameters``, ``size``, ``package``."""

SOURCE_FILE = "loraloom-source.json"


def resolve(name_or_path: str) -> str:
    """What to hand to ``from_pretrained``: a bundled name becomes its local folder, all else stays as it is.

    An existing path wins over a hub id; a name that is neither bundled nor a path is taken as a hub id.

    Raises:
        FileNotFoundError: it is written as a path (``./x``, ``/x``, ``~/x``) and nothing is there.

    Example:
        >>> resolve("google/vit-base-patch16-224")
        'google/vit-base-patch16-224'
    """
    if name_or_path in models:
        return str(models[name_or_path]())
    path = Path(name_or_path).expanduser()
    if path.exists():
        return str(path)
    if name_or_path.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"model {name_or_path}: there is no such folder; bundled models: {', '.join(models)}")
    return name_or_path


def converted(name: str, package: Package, convert: Callable[[Path, Path], None]) -> Path:
    """The cached Hugging Face folder of a bundled model, made from its package on the first call.

    Args:
        name: the model's registered name.
        package: where the weights come from.
        convert: fills a folder (second argument) from the unpacked package (first argument).
    """

    def build(work: Path) -> None:
        with tempfile.TemporaryDirectory(dir=work.parent, prefix=".unpacked.") as source:
            unpack(package, Path(source))
            convert(Path(source), work)
        for path in work.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        made = {path.name: file_digest(path) for path in sorted(work.iterdir())}
        record = {"model": name, "package": package.requirement, "members": dict(package.members), "files": made}
        (work / SOURCE_FILE).write_text(json.dumps(record, indent=2) + "\n")

    version = package.requirement.partition("==")[2]
    return cached(f"models/{name}-{version}", build)


def write_json(path: Path, content: dict) -> None:
    """Write a configuration file as Transformers does: indented, keys sorted, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


__all__ = ["converted", "models", "resolve", "write_json"]
