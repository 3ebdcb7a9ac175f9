"""Cases of damage, run in children with little memory and little time; `make fuzz` runs ten thousand of new ones."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from child import Child, quick_folder
from fuzz.readers import READERS, adapter, damage
from loraloom.store import save

SECONDS, MEMORY = 30.0, 1 << 30  # of one case; it needs a hundredth of both
MOST_WORDS = 20_000  # characters of a message; on the command line a twentieth


def run_case(name: str, seed: int, whole: Path) -> str:
    """Damage an example and read it: "read", "refused", or what is wrong with how it was refused."""
    chance = random.Random(f"{name} {seed}")
    work = whole / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(whole / name, work)
    told = damage(work, chance)
    outcome = "read"
    try:
        READERS[name].read(work)
        if chance.random() < 0.1:
            READERS[name].further(work)
    except (ValueError, OSError) as error:
        outcome, said = "refused", str(error)
        if not said or len(said) > MOST_WORDS or len(said.splitlines()) > 1:
            return f"{told}: not one line but {type(error).__name__} {said[: 2 * MOST_WORDS]!r}"
    except BaseException:
        return f"{told}: {traceback.format_exc()}"
    if READERS[name].command and chance.random() < 0.04:
        return on_command_line(READERS[name].command, work, told) or outcome
    return outcome


def on_command_line(words: Sequence[str], folder: Path, told: str) -> str:
    """What is wrong with how a command ends; empty if nothing is."""
    from typer.testing import CliRunner

    from loraloom.cli import app

    os.chdir(folder)
    done = CliRunner().invoke(app, list(words), prog_name="loraloom")
    os.chdir("/")
    said = done.stderr.strip()
    if done.exit_code == 0 or (done.exit_code == 2 and len(said.splitlines()) == 1 and len(said) < MOST_WORDS / 20):
        return ""
    return f"{told}: loraloom {' '.join(words)} ended with {done.exit_code}: {said[-500:]} {done.exception!r}"


def run_cases(cases: Sequence[tuple[str, int]], say: Callable[[str], object] = lambda line: None) -> Counter[str]:
    """Run cases and count what became of them; each fault is told as it is found."""
    found: Counter[str] = Counter()
    with quick_folder() as whole:
        save(adapter(), whole / "plain")
        for name in dict.fromkeys(name for name, _ in cases):
            (whole / name).mkdir()
            READERS[name].make(whole / name)
        left = list(cases)
        while left:
            left = left[_run_some(left, whole, found, say) :]
    return found


def _run_some(cases: Sequence[tuple[str, int]], whole: Path, found: Counter[str], say: Callable[[str], object]) -> int:
    """Run cases in one child until it ends or has to be ended; how many were run."""

    def work(tell: Callable[[str], None]) -> None:
        warnings.simplefilter("ignore")
        for name, seed in cases:
            tell(run_case(name, seed, whole))

    child, done = Child(work, memory=MEMORY), 0
    try:
        while done < len(cases) and (line := child.line(SECONDS)) is not None:
            done += 1
            found[line if line in ("read", "refused") else "fault"] += 1
            if line not in ("read", "refused"):
                say(f"{cases[done - 1]}: {line}")
    except TimeoutError:
        child.end(kill=True)
    if (status := child.end()) and done < len(cases):
        found["fault"] += 1
        say(f"{cases[done]}: the process hung, or ended with {status}")
        done += 1
    return done


def main() -> None:
    """Run many cases and tell what was found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first case; the next ones follow")
    parser.add_argument("--only", choices=list(READERS), help="one reader")
    given = parser.parse_args()
    every = [name for name, reader in READERS.items() for _ in range(reader.fixed)]  # fewer of those that take long
    names = [given.only] if given.only else every
    cases = [(names[at % len(names)], given.seed + at) for at in range(given.cases)]
    began = time.monotonic()
    found: Counter[str] = Counter()
    for at in range(0, len(cases), 500):
        found += run_cases(cases[at : at + 500], lambda line: print(line.replace("\\n", "\n"), flush=True))
        print(f"{sum(found.values())} cases: {dict(found)}", flush=True)
    print(f"seed {given.seed}: {dict(found)} in {time.monotonic() - began:.0f} s")
    sys.exit(bool(found["fault"]))


if __name__ == "__main__":
    main()
