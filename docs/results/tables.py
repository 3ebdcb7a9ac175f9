"""Write the tables of both README.md from the figures of the pages beside this file.

    python docs/results/tables.py            # write what stands between the markers
    python docs/results/tables.py --check    # write nothing; exit status 1 if a table is stale

A marker names a form, a page, and its arms if not all are shown: `<!-- gaps: images, LoRA, CoTo -->` to `<!-- end -->`.
The forms: `means` of every arm, marked where it is better or worse than the first beyond the interval over seeds;
`gaps` to the first arm with that interval, in bold where it leaves out zero; `short`, gaps in the main measurements;
`both`, of two arms, with the interval over tasks too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FILES = (HERE / "README.md", HERE.parent.parent / "README.md")
MARKED = re.compile(r"(<!-- (means|gaps|short|both): ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
OVER_TASKS, MERGED = "Over the tasks", "tasks merged, "
WORDS = {
    "half way, factors": "two seeds half way, factors",
    "half way, delta": "two seeds half way, updates",
    "merge 1:2, linear delta": "two seeds 1:2, updates",
    "merge 1:1:1, linear delta": "three seeds, updates",
    "kept: every-other": "every other layer",
    "kept: low": "low third of the layers",
    "kept: middle": "middle third",
    "kept: high": "high third",
    "kept: density 0.5": "half of the entries",
    "kept: density 0.25": "a quarter of the entries",
    "kept: density 0.1": "a tenth of the entries",
    "kept: modules q_proj": "only query",
    "kept: modules k_proj": "only key",
    "kept: modules v_proj": "only value",
}
SHORT = (
    "alone",
    "half way, factors",
    "half way, delta",
    "tasks merged, linear delta",
    "kept: low",
    "kept: middle",
    "kept: high",
    "kept: every-other",
    "kept: density 0.5",
    "kept: density 0.25",
)
METHODS = {
    "linear delta": "updates averaged",
    "linear factors": "factors averaged",
    "cat": "factors side by side",
    "ties density 0.2": "TIES, a fifth kept",
    "ties knots density 0.2": "TIES in KnOTS' space, a fifth kept",
    "dare density 0.5": "DARE, half kept",
    "lego": "LoRA-LEGO",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
}


@dataclass(frozen=True)
class Figure:
    """One arm's figures of one measurement: its mean, its gap to the first arm, and the ends of two intervals."""

    mean: float
    gap: float | None
    seeds: tuple[float | None, float | None]
    tasks: tuple[float | None, float | None]

    @property
    def apart(self) -> int:
        """1 and -1: better and worse than the first arm beyond the interval over seeds; 0: not told apart."""
        low, high = self.seeds
        return 0 if low is None or high is None else (low > 0) - (high < 0)


Name = tuple[str, ...]  # a measurement, and the values of the axes that several tables of a page differ by


def figures(page: str) -> dict[Name, dict[str, Figure]]:
    """By measurement and arm, in the page's order."""
    content = json.loads((HERE / page / "results.json").read_text(encoding="utf-8"))
    (panel,) = (one for one in content["panels"] if one["title"] == OVER_TASKS)
    start, rows = panel["columns"].index("measurement"), panel["rows"]
    differ = [at for at in range(start) if len({str(row[at]) for row in rows}) > 1]
    found: dict[Name, dict[str, Figure]] = {}
    for row in rows:
        name, arm, score, ahead, *ends = row[start:]
        place = tuple(f"{panel['columns'][at]} {row[at]}" for at in differ)
        found.setdefault((name, *place), {})[arm] = Figure(score, ahead, (ends[0], ends[1]), (ends[2], ends[3]))
    return found


def signed(value: float) -> str:
    """A gap without the nought before its point."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def interval(ends: tuple[float | None, float | None]) -> str:
    """An interval, or nothing where there is none."""
    low, high = ends
    return "" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def mean(one: Figure) -> str:
    """A mean with the mark of what it is beside the first arm."""
    return f"{one.mean:.3f}".removeprefix("0") + ("", " ▲", " ▼")[one.apart]


def gap(one: Figure) -> str:
    """A gap with its interval, in bold where it is told apart."""
    text = " ".join(filter(None, (signed(one.gap or 0.0), interval(one.seeds))))
    return f"**{text}**" if one.apart else text


def called(name: str) -> str | None:
    """What README.md calls a measurement; None of one that only figures show."""
    if name.startswith(MERGED):
        return "tasks in one: " + METHODS[name.removeprefix(MERGED)]
    return None if name.startswith("at 0.") else WORDS.get(name, name)


def table(form: str, page: str, *arms: str) -> str:
    """The lines of one table, of the named arms or of all."""
    found = figures(page)
    first, *rest = next(iter(found.values()))
    reference, *others = arms or (first, *rest)
    if reference != first:
        raise ValueError(f"page {page} compares its arms with {first}; a table of it begins with that, not {reference}")
    ends = [*others, "difference, over seeds", "over tasks"] if form == "both" else others
    lines = [["", reference, *ends], ["---", "--:", *["--:"] * len(ends)]]
    for (name, *place), by in found.items():
        words = called(name)
        if words is None or (form == "short" and name not in SHORT):
            continue
        told = [by[arm] for arm in others]
        cells = [(mean if form == "means" else gap)(one) for one in told]
        if form == "both":
            cells = [mean(told[0]).split()[0], *cells, interval(told[0].tasks)]
        lines.append([", ".join([words, *place]), mean(by[reference]), *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def written(text: str) -> str:
    """The text with the tables between its markers as the pages have them."""

    def fill(found: re.Match[str]) -> str:
        start, form, told, end = found.groups()
        return f"{start}\n{table(form, *told.split(', '))}\n{end}"

    return MARKED.sub(fill, text)


def main(arguments: Sequence[str]) -> int:
    """Write both files, or with ``--check`` say which are stale."""
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    stale = [path for path, text in texts.items() if written(text) != text]
    for path in stale:
        if "--check" in arguments:
            print(f"{path} is not as the pages say: run python docs/results/tables.py")
        else:
            path.write_text(written(texts[path]), encoding="utf-8")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
