"""Real files, damaged: what chance does to bytes, to JSON and YAML, and to the header of a safetensors file."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

NASTY: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**40, 2**63, 2**64, 10**400, -(10**30), 0.5, -0.0, 1e308),
    *(float("inf"), float("nan"), "", "x", "1e999", "nan", "\n\n", "a\x00b", "\ud800", "\u202e", "é" * 3000),
    *("..", "../../etc/passwd", "/dev/zero", "a/../b", "(a+)+$", "(a|a)*$", "[", "*", "<script>alert(1)</script>"),
    *([], {}, [[]], [None], {"": None}, ["a"] * 2000, {"a": {"b": {"c": []}}}, [1, "a", None], {"..": ".."}),
)
WORDS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"&a ", b"*a", b"!!python/object:os.system", b"<<: *a", b"- ")


def deep(levels: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bits turned, parts cut out, doubled, moved, or written over."""
    held = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        at, many = chance.randrange(len(held) + 1), chance.choice([1, 1, 4, 40, 400])
        how = chance.randrange(6)
        if how == 0 and at < len(held):
            held[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del held[at:]
        elif how == 2:
            del held[at : at + many]
        elif how == 3:
            held[at:at] = held[at : at + many]
        elif how == 4:
            held[at : at + many] = chance.choice([b"\0", b"\xff", b" ", b"9"]) * many
        else:
            held[at:at] = chance.choice(WORDS)
    return bytes(held)


def damaged_value(root: Any, chance: random.Random) -> Any:
    """Plain JSON in which a few places hold something else, or nothing."""
    root = json.loads(json.dumps(root))
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        places = list(_places(root))
        if not places:
            return copy.deepcopy(chance.choice(NASTY))
        holder, key = chance.choice(places)
        how = chance.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1:
            other, theirs = chance.choice(places)
            if key in holder if isinstance(holder, dict) else key < len(holder):
                taken = other.get(theirs) if isinstance(other, dict) else (other[theirs : theirs + 1] or [None])[0]
                holder[key] = json.loads(json.dumps(taken))
        elif how == 2 and isinstance(holder, dict):
            name = chance.choice([word for word in NASTY if isinstance(word, str)])
            holder[name] = holder.pop(key)
        elif how == 3:
            holder[key] = deep(chance.choice([3, 150, 250]))
        else:
            holder[key] = copy.deepcopy(chance.choice(NASTY))
    return root


def _places(value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def damaged_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON file with other values, a key twice, or other bytes."""
    how = chance.randrange(10)
    if how < 3:
        return damaged_bytes(data, chance)
    if how == 3:
        return b"[" * chance.choice([500, 200_000])
    text = json.dumps(damaged_value(json.loads(data), chance))
    if how == 4 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:]
    return text.encode()


def damaged_lines(data: bytes, chance: random.Random) -> bytes:
    """A file of one JSON text a line: a line damaged, gone, there twice or moved, or other bytes."""
    lines = data.splitlines(keepends=True)
    at, how = chance.randrange(len(lines)), chance.randrange(6)
    if how == 0:
        return damaged_bytes(data, chance)
    if how == 1:
        del lines[at]
    elif how == 2:
        lines.insert(chance.randrange(len(lines)), lines[at])
    else:
        lines[at] = damaged_json(lines[at], chance) + b"\n"
    return b"".join(lines)


def damaged_yaml(data: bytes, chance: random.Random) -> bytes:
    """A YAML file with other values, lines moved, an alias bomb, or other bytes."""
    how = chance.randrange(10)
    if how < 3:
        return damaged_bytes(data, chance)
    if how == 3:
        lines = data.splitlines(keepends=True)
        lines.insert(chance.randrange(len(lines)), chance.choice(lines))
        return b"".join(lines)
    if how == 4:
        return bomb(chance)
    if how == 5:
        tag = chance.choice(
            [b"!!int ''", b"!!bool x", b"!!timestamp x", b"2001-99-99", b"!!python/tuple [1]", b"=", b"~"]
        )
        lines = data.splitlines(keepends=True)
        at = chance.randrange(len(lines))
        lines[at] = lines[at].partition(b":")[0] + b": " + tag + b"\n"
        return b"".join(lines)
    value = damaged_value(yaml.safe_load(data), chance)
    try:
        text = yaml.safe_dump(value, allow_unicode=True) if how > 6 else json.dumps(value)  # JSON is YAML too
    except RecursionError:
        text = json.dumps(value)
    return text.encode("utf-8", "replace")


def bomb(chance: random.Random) -> bytes:
    """Few bytes that stand for very many values, or for themselves."""
    if chance.random() < 0.3:
        return b"model: &a [*a]\ntask: digits\noutput: x\n"
    lines = ["a0: &a0 [1, 2]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    return "\n".join([*lines, "model: *a11", "train: {steps: *a11}", "task: *a11"]).encode()


def damaged_tensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with a header that lies, or other bytes."""
    how = chance.randrange(10)
    size = int.from_bytes(data[:8], "little")
    if how < 3:
        return damaged_bytes(data, chance)
    if how == 3:
        claims = chance.choice([0, 1, 2**40, 2**63, 2**64 - 1, len(data), size + 1, size - 1])
        return claims.to_bytes(8, "little") + data[8:]
    body = data[8 + size :]
    if how == 4:  # infinities, NaN and noise for numbers
        return data[: 8 + size] + bytes(chance.choice([0, 0x7F, 0x80, 0xFF]) for _ in body)
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    lie: Callable[[dict[str, Any]], Any] = chance.choice([_lie, _lie, _rename, lambda h: damaged_value(h, chance)])
    header = lie(header) if lie not in (_lie, _rename) else lie(header, chance)  # type: ignore[call-arg]
    text = json.dumps(header).encode()
    if how == 5 and len(text) > 2:  # every name twice
        text = b"{" + text[1:-1] + b"," + text[1:]
    return len(text).to_bytes(8, "little") + text + body


def _lie(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    entries = [entry for key, entry in header.items() if key != "__metadata__"]
    entry = chance.choice(entries)
    how = chance.randrange(5)
    if how == 0:
        entry["data_offsets"] = chance.choice([[0, 2**40], [2**40, 2**41], [4, 0], [-8, 8], [0, 0], [1, 9]])
    elif how == 1:
        entry["shape"] = chance.choice([[2**40], [0, 2**63], [0, 2**60, 2**60], [-1], [], [1] * 200, [2**32, 2**32]])
    elif how == 2:
        entry["dtype"] = chance.choice(["F8_E4M3", "F4", "BOOL", "I64", "U8", "C64", "F64", "X", "I8"])
    elif how == 3:
        entry |= {"shape": [0, 2**64 - 1], "data_offsets": [0, 0]}
    else:
        entry["data_offsets"] = chance.choice(entries)["data_offsets"]
    return header


def _rename(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    names = [key for key in header if key != "__metadata__"]
    name = chance.choice(names)
    stem = name.rpartition(".")[0]
    new = chance.choice(
        [
            *("", ".", "..", "../x", "/etc/passwd", name + "/..", name + "\0", "base_model.model", "base_model.model."),
            *(name.replace("lora_A", "lora_B"), name.upper(), "base_model.model." + name, name.replace(".0.", ".١.")),
            *(stem, name + ".weight", name.replace("q_proj", "a" * 60), name.replace("q_proj", "q_proj[0/2]")),
        ]
    )
    return {new if key == name else key: value for key, value in header.items()}
