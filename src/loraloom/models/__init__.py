"""Pretrained models by name: those that come inside registry packages, and everything ``from_pretrained`` knows.

A bundled model is one file of this folder: a function that turns its package into a Hugging Face folder, once.

    >>> models["vit-s14"].facts["family"]
    'vision'
    >>> models["vit-s14"]()                            # doctest: +SKIP
    PosixPath('.../loraloom/models/vit-s14-0.1.1')
"""

from __future__ import annotations

import json
from pathlib import Path

from loraloom.registry import Registry

models: Registry[[], Path] = Registry("model", __name__)
"""Facts of each: ``family`` (that of a backbone, or speech), ``licence``, ``parameters``, ``size``, ``package``."""


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


def write_json(path: Path, content: dict) -> None:
    """Write a configuration file as Transformers does: indented, keys sorted, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


__all__ = ["models", "resolve", "write_json"]
