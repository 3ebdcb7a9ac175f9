"""Write the pages of the documentation that the code already knows: the registries and the command line.

    python docs/generate.py            # write docs/{methods,schedules,tasks,models,probes,cli}.md, docs/schedules/*.svg
    python docs/generate.py --check    # write nothing; exit status 1 and a list if a page is stale

The words come from docstrings, facts and help texts; to change a page, change those.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import ArgumentInfo

from loraloom.listing import KINDS, registry
from loraloom.registry import Technique

HERE = Path(__file__).parent
MADE = "<!-- Made by docs/generate.py from the code. Change the docstrings, then run `make docs`. -->"
INTRO = {
    "methods": "Merge methods: how `loraloom merge --method NAME` and `ll.merge(adapters, method=NAME)` bring adapters "
    "together. The space a method works in is a second, separate choice (`--space`).",
    "schedules": "Schedules: how the chance that a unit takes part in training rises: "
    "`p(t) = start + (1 - start) f(x)` for the share x of the ramp. Choose one with `ll.CoTo(curve=NAME)` or "
    "`strategy.curve` in a recipe.",
    "tasks": "Tasks that come with the library: real data from registry packages, fetched once, then offline. Data "
    "sets of the hub or of a local folder work too, by name or path.",
    "models": "Models that come with the library: real weights from registry packages, fetched once, then offline. "
    "Everything that `from_pretrained` knows works too, by name or path.",
    "probes": "Probes: analyses that score adapters and return a frozen result, `loraloom probe NAME`.",
}
SECTION = re.compile(r"^(Args|Returns|Raises|Example|Attributes|Yields|Source):", re.MULTILINE)
STATUS = (
    "Exit status: 0 done; 2 the request or an input is wrong (one line says what, where and what is allowed); 1 a "
    "fault of ours. An output folder appears whole or not at all, and an existing one is refused without `--overwrite`."
)


def prose(text: str) -> str:
    """Docstring text as markdown: roles and double backticks become code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def cell(value: Any) -> str:
    """One table cell on one line."""
    words = ", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)
    words = {"True": "yes", "False": "no"}.get(words, words)
    return prose(" ".join(words.split())).replace("|", "\\|")


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def knobs(function: Any) -> str:
    """Keyword-only parameters with their defaults, as they are written in the signature."""
    parameters = inspect.signature(function).parameters.values()
    named = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters if p.kind is p.KEYWORD_ONLY
    ]
    return ", ".join(f"`{name}`" for name in named)


def told(technique: Technique, kind: str) -> bool:
    """Whether there is more to say of a technique than its row in the table does."""
    return kind == "schedules" or len((technique.function.__doc__ or "").strip().splitlines()) > 1


def section(technique: Technique, kind: str) -> str:
    """A technique in full: what its docstring tells, its example, its paper."""
    doc = inspect.getdoc(technique.function) or ""
    parts = [f"## {technique.name}"]
    if kind == "schedules":
        parts.append(f"![p(t) of {technique.name}](schedules/{technique.name}.svg)")
    found = list(SECTION.finditer(doc))
    parts.append(prose(doc[: found[0].start()] if found else doc).strip())
    for i, match in enumerate(found):
        body = doc[match.end() : found[i + 1].start() if i + 1 < len(found) else len(doc)]
        if match.group(1) == "Example":
            parts.append(f"```python\n{inspect.cleandoc(body)}\n```")
    if technique.paper:
        parts.append(f"Source: <{technique.paper}>")
    return "\n\n".join(part for part in parts if part)


def listing(kind: str) -> str:
    """The page of one registry: a table of all, then each in full."""
    techniques = list(registry(kind).values())
    facts = list(dict.fromkeys(name for technique in techniques for name in technique.facts))
    breaks = any(technique.breaks for technique in techniques)
    has_knobs = any(knobs(technique.function) for technique in techniques)
    columns = ["name", "what", *(["knobs"] if has_knobs else []), *facts, *(["breaks"] if breaks else []), "reference"]
    rows = [
        [
            f"[{one.name}](#{one.name})" if told(one, kind) else one.name,
            one.summary,
            *([knobs(one.function)] if has_knobs else []),
            *(one.facts.get(name) for name in facts),
            *([one.breaks] if breaks else []),
            f"<{one.paper}>" if one.paper else "",
        ]
        for one in techniques
    ]
    law = "`breaks` names the laws of tests/contracts that a technique declares it does not keep." if breaks else ""
    parts = [MADE, f"# {kind.capitalize()}", INTRO[kind], table(columns, rows), law]
    return (
        "\n\n".join(part for part in [*parts, *(section(one, kind) for one in techniques if told(one, kind))] if part)
        + "\n"
    )


def parameters(function: Any) -> list[tuple[Any, Any, Any, Any]]:
    """(name, type, typer's Argument or Option, default) of a command's parameters, read from its signature.

    The signature says the same in every version of typer; the parser that typer makes of it does not.
    """
    found = []
    for one in inspect.signature(inspect.unwrap(function), eval_str=True).parameters.values():
        kind, info = one.annotation, typer.Option()
        if get_origin(kind) is Annotated:
            kind, info = get_args(kind)
        found.append((one.name, kind, info, one.default))
    return found


def option(name: str, kind: Any, info: Any, default: Any) -> list[str]:
    """Name, meaning and default of one argument or option."""
    if isinstance(info, ArgumentInfo):
        shown = f"`{info.metavar or name.upper()}`"
    else:
        # In an annotation typer takes the first name for the default, as there is no other place for it.
        words = [*([info.default] if isinstance(info.default, str) else []), *(info.param_decls or ())]
        words = [side for word in words or [f"--{name.replace('_', '-')}"] for side in word.split("/")]
        shown = ", ".join(f"`{word}`" for word in words)
    text = info.help or ""
    for choices in [kind, *get_args(kind)]:
        if isinstance(choices, type) and issubclass(choices, Enum):
            text = f"{text} One of {', '.join(f'`{choice.value}`' for choice in choices)}.".strip()
    value = default.value if isinstance(default, Enum) else default
    required = value is inspect.Parameter.empty
    return [
        shown,
        text,
        "required" if required else "" if value is None or value is False or value == "" else f"`{value}`",
    ]


def command_line() -> str:
    """The page of the command line: every command with its arguments and options."""
    from loraloom.cli import app

    commands = {one.name or "": one.callback for one in app.registered_commands}
    for group in app.registered_groups:
        inner = group.typer_instance
        commands |= {f"{inner.info.name} {one.name}": one.callback for one in inner.registered_commands}
    told = {name: inspect.cleandoc(function.__doc__ or "") for name, function in commands.items()}
    rows = [[f"[{name}](#loraloom-{name.replace(' ', '-')})", text.split("\n\n")[0]] for name, text in told.items()]
    parts = [MADE, "# Command line", STATUS, table(["command", "does"], rows)]
    for name, function in commands.items():
        given = parameters(function)
        words = [info.metavar or word.upper() for word, _, info, _ in given if isinstance(info, ArgumentInfo)]
        parts.append(f"## loraloom {name}")
        parts.append(f"`{' '.join(['loraloom', name, *words, '[OPTIONS]'])}`")
        parts.append(prose(told[name]))
        if given:
            parts.append(table(["argument or option", "meaning", "default"], (option(*one) for one in given)))
    return "\n\n".join(part for part in parts if part) + "\n"


def documents() -> dict[str, str]:
    """Every generated file, by its path below docs/."""
    from loraloom.strategies.schedules import sketch

    pages = {f"{kind}.md": listing(kind) for kind in KINDS}
    sketches = {f"schedules/{name}.svg": sketch(name) + "\n" for name in registry("schedules")}
    return {**pages, "cli.md": command_line(), **sketches}


def stale(folder: Path) -> list[str]:
    """Paths below the folder that are missing, differ from what the code says, or belong to nothing any more."""
    wanted = documents()
    differing = [
        name
        for name, text in wanted.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
    left_over = [f"schedules/{path.name}" for path in sorted((folder / "schedules").glob("*.svg"))]
    return differing + [name for name in left_over if name not in wanted]


def write(folder: Path) -> list[str]:
    """Bring the folder up to date; returns what was changed."""
    changed, wanted = stale(folder), documents()
    for name in changed:
        if name in wanted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(wanted[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 if ``--check`` found a stale page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is stale")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the pages are; default: this script's folder")
    options = parser.parse_args(arguments)
    if options.check:
        found = stale(options.folder)
        for name in found:
            print(f"docs/{name} is stale; run `make docs`", file=sys.stderr)
        return 1 if found else 0
    for name in write(options.folder):
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
