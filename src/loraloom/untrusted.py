"""JSON and YAML that others wrote: bounded in size and depth, no code, and every fault is a ValueError of one line."""

from __future__ import annotations

import json
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import regex
import yaml

MOST_JSON, MOST_YAML = 1 << 28, 1 << 20  # bytes of a file
DEPTH = 200  # levels of lists and maps
ENTRIES = 100_000  # of a YAML file, each alias (*name) counted as what it stands for


def parse_json(text: str | bytes, where: object) -> Any:
    """What a JSON text says.

    Args:
        text: bytes are UTF-8.
        where: what messages call it.

    Raises:
        ValueError: it is not JSON, a map has a key twice, or it is nested too deep.

    Example:
        >>> parse_json('{"rank": 8, "rank": 4}', "a.json")
        Traceback (most recent call last):
        ValueError: a.json: 'rank' is there twice
    """
    try:
        found = json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_once)
    except _Twice as error:
        raise ValueError(f"{where}: {short(error.args[0])} is there twice") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise _too_deep(where) from None
    _check_depth(found, where)
    return found


def parse_yaml(text: str, where: object) -> Any:
    """What a YAML text says: plain values only, whatever its tags ask for; ``1e-3`` is a number.

    Raises:
        ValueError: it is not YAML, a map has a key twice, it is nested too deep, or has too many values, those of
            aliases counted each time.

    Example:
        >>> parse_yaml("rank: 8", "a.yaml"), parse_yaml("a: !!python/object:os.system []", "b.yaml")
        Traceback (most recent call last):
        ValueError: b.yaml: not YAML: could not determine a constructor for the tag ...
    """
    depths = accumulate(1 if sign in "[{" else -1 for sign in re.findall(r"[\[\]{}]", text))
    if max(depths, default=0) > DEPTH:  # the reader would take long to find that out
        raise _too_deep(where)
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_keys(node)
        found = None if node is None else loader.construct_document(node)
    except _Twice as error:
        raise ValueError(f"{where}: {short(error.args[0])} is there twice") from None
    except RecursionError:
        raise _too_deep(where) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())[:300]}") from None
    finally:
        if loader is not None:
            loader.dispose()
    _check_depth(found, where, most=ENTRIES)
    return _numbers(found)


def read_json(path: Path) -> Any:
    """What a JSON file says; see ``parse_json``."""
    return parse_json(_content(path, MOST_JSON), path)


def read_yaml(path: Path, where: object = None) -> Any:
    """What a YAML file says; see ``parse_yaml``."""
    where = path if where is None else where
    try:
        text = _content(path, MOST_YAML).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not YAML: {error}") from None
    return parse_yaml(text, where)


def read_mapping(path: str | Path, what: str) -> dict[Any, Any]:
    """The keys and values of a YAML file of one mapping, such as a recipe.

    Args:
        path: the file.
        what: what messages call it, before its path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or no mapping.

    Example:
        >>> read_mapping("nowhere.yaml", "recipe")
        Traceback (most recent call last):
        FileNotFoundError: recipe nowhere.yaml: no such file
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    content = read_yaml(path, f"{what} {path}")
    if not isinstance(content, dict):
        raise ValueError(f"{what} {path}: a mapping of keys is needed, got {type(content).__name__}")
    return content


def short(value: object, most: int = 80) -> str:
    """A value for a message: on one line, and cut where it is long.

    Example:
        >>> short("rank"), short(list(range(1000)), most=12)
        ("'rank'", '[0, 1, 2, 3,...')
    """
    try:
        told = repr(value[: 4 * most] if isinstance(value, str | bytes | list | tuple) else value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        told = f"a {type(value).__name__}"
    told = re.sub(r"\s+", " ", told)
    return told if len(told) <= most else told[:most] + "..."


def _numbers(value: Any) -> Any:
    """YAML reads ``1e-3`` as text (it wants ``1.0e-3``); users mean the number."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[0] in "0123456789.+-" else value
        except ValueError:
            return value
    return value


def _check_keys(root: yaml.Node | None) -> None:
    """Refuse a YAML map with a key twice."""
    left, seen = [root], set[int]()
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            left += [part for pair in node.value for part in pair]
        else:
            left += node.value


@lru_cache(maxsize=1 << 16)
def expression(text: str) -> Callable[[str], bool]:
    """A regular expression as a test of whether another text begins with what it describes; it gives up after a second.

    Raises:
        ValueError: it is not a regular expression; from the test: it takes too long.

    Example:
        >>> expression("a+$")("aaa"), expression("a+$")("b")
        (True, False)
    """
    try:
        compiled = regex.compile(text)
    except regex.error as error:
        raise ValueError(f"{short(text)} is not a regular expression: {error}") from None

    def begins(other: str) -> bool:
        try:
            return compiled.match(other, timeout=1) is not None
        except TimeoutError:  # there are some that take years
            raise ValueError(f"the expression {short(text)} takes too long on {short(other)}") from None

    return begins


def is_number(value: object) -> bool:
    """Whether it is a number that a float can hold: not NaN, infinite, larger than any float, True or False.

    Example:
        >>> is_number(2), is_number(float("nan")), is_number(10**400), is_number(True), is_number("2")
        (True, False, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def word(key: object) -> str:
    """A key for a message: as it is where it is a plain word, else as ``short`` has it.

    Example:
        >>> word("train.steps"), word("a\\nb")
        ('train.steps', "'a\\\\nb'")
    """
    return str(key) if re.fullmatch(r"[\w.-]{1,40}", str(key)) else short(key)


class _Twice(Exception):
    """A map with a key twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _content(path: Path, most: int) -> bytes:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # some of those that are none never end
        raise ValueError(f"{path} is no file")
    if found.st_size > most:
        raise ValueError(f"{path} has {found.st_size} bytes; such a file has at most {most}")
    with path.open("rb") as file:
        return file.read(most)


def _too_deep(where: object) -> ValueError:
    return ValueError(f"{where}: nested too deep; at most {DEPTH} levels")


def _check_depth(value: Any, where: object, most: int | None = None) -> None:
    """Refuse what is nested too deep, and more than ``most`` values; what is held several times counts each time."""
    level: list[Any] = [[value]]
    count = 0
    for _ in range(DEPTH + 1):
        found = []
        for one in _inner(level):
            count += 1
            if most is not None and count > most:
                raise ValueError(f"{where}: more than {most} values, aliases written out")
            if isinstance(one, dict | list | tuple | set):
                found.append(one)
        if not found:
            return
        level = found
    raise _too_deep(where)


def _inner(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, dict):
            yield from value
            yield from value.values()
        elif isinstance(value, list | tuple | set):
            yield from value
