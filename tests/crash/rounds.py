"""Kills at random moments of train, merge, prune, probe and save: the output is the old one or the new one, whole.

One process that has everything loaded forks a child for each round; it never computes by itself, so that it has no
threads. `make crash` runs this.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sklearn.datasets  # noqa: F401 - loaded here, so that the children need not
import torch
import transformers
import yaml

import loraloom.cli
import loraloom.integrations.fit
import loraloom.integrations.scoring
from child import Child, quick_folder, status_of
from crash.operations import content
from loraloom import report
from loraloom.adapter import Adapter, Factors
from loraloom.store import load, save
from tiny_vision import make_model, make_recipe

STEPS = ("--set", "train.steps=20", "--set", "train.save_every=2", "--set", "adapter.dropout=0.1")
TRAIN = ("train", "recipe.yaml", *STEPS, "--set", "output=killed", "--resume")
COMMANDS = {
    "merge": ("merge", "a", "b", "-o", "merged", "--method", "ties", "--rank", "2", "--overwrite"),
    "prune": ("prune", "a", "-o", "pruned", "--density", "0.5", "--overwrite"),
    "probe": ("probe", "connectivity", "a", "b", "--task", "digits", "--limit", "8", "-o", "path.json", "--overwrite"),
}


def typed(words: tuple[str, ...], quiet: bool = True) -> None:
    """A command in this process, which ends with its status."""
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["loraloom", *words]
    loraloom.cli.main()


def done(words: tuple[str, ...]) -> None:
    """A command in a child, which must end well."""
    assert status_of(partial(ended, words)) == 0, words


def ended(words: tuple[str, ...]) -> None:
    """A command whose exit is that of the work."""
    try:
        typed(words)
    except SystemExit as end:
        if end.code:
            raise


def large() -> Adapter:
    """An adapter that takes a while to write."""
    draw = torch.Generator().manual_seed(0)
    names = [f"layers.{at}.q" for at in range(200)]
    modules = {
        name: Factors(torch.randn(256, 4, generator=draw), torch.randn(4, 256, generator=draw)) for name in names
    }
    return Adapter({"peft_type": "LORA", "r": 4, "lora_alpha": 4}, modules)


def killed(work: Callable[[], object], after: float) -> bool:
    """Run in a child and kill it after so many seconds; False if it ended before."""
    child = Child(lambda tell: work())
    return child.end(kill=child.lives(after)) < 0


@dataclass
class Rounds:
    """Rounds over one output that is overwritten again and again."""

    work: Callable[[], object]
    out: Path
    old: Callable[[Path], object]
    whole: Callable[[Path], object] = lambda out: load(out).loaded()

    def run(self, rounds: int, chance: random.Random) -> Counter[str]:
        """Kill so many runs; what was there afterwards."""
        found: Counter[str] = Counter()
        began = time.monotonic()
        assert status_of(self.work) == 0
        seconds = time.monotonic() - began
        while sum(found.values()) < rounds:
            if self.out.is_dir():
                shutil.rmtree(self.out)
            self.old(self.out)
            before = content(self.out)
            began = time.monotonic()
            if not killed(self.work, chance.uniform(0, seconds)):
                seconds = min(seconds, time.monotonic() - began)  # of a machine that is less busy now
            else:
                same = content(self.out) == before
                found["old" if same else "new"] += 1
                if not same:
                    self.whole(self.out)
        assert status_of(self.work) == 0
        left = [path.name for path in self.out.parent.iterdir() if path.name.startswith(f".{self.out.name}.")]
        assert left == [], left
        return found


def train_rounds(rounds: int, chance: random.Random) -> Counter[str]:
    """Kill trainings until each has come to its end: in the bits of one that was never killed."""
    found: Counter[str] = Counter()
    began = time.monotonic()
    done(("train", "recipe.yaml", *STEPS, "--set", "output=whole"))
    seconds = time.monotonic() - began
    expected = content(Path("whole"))["adapter_model.safetensors"]
    while found["killed"] < rounds:
        began = time.monotonic()
        if killed(partial(ended, TRAIN), chance.uniform(0, seconds)):
            found["killed"] += 1
            print(f"\rtrain: {dict(found)}", end="", flush=True)
            if not Path("killed").exists():
                continue
        else:
            found["came to its end"] += 1
            seconds = min(seconds, time.monotonic() - began)  # of a machine that is less busy now
        assert content(Path("killed"))["adapter_model.safetensors"] == expected
        shutil.rmtree("killed")
        shutil.rmtree("killed.training", ignore_errors=True)
    done(TRAIN)
    assert content(Path("killed"))["adapter_model.safetensors"] == expected
    assert not Path("killed.training").exists()
    return found


def main() -> None:
    """Run the rounds and tell what was there afterwards."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="in all")
    parser.add_argument("--only", choices=[*COMMANDS, "save", "train"], help="all rounds for one of them")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    chance = random.Random(given.seed)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    each, began = given.rounds if given.only else -(-given.rounds // 5), time.monotonic()
    with quick_folder() as folder:
        os.chdir(folder)
        Path("recipe.yaml").write_text(yaml.safe_dump(make_recipe(make_model(folder / "model"))))
        for name, seed in (("a", 0), ("b", 1)):
            done(("train", "recipe.yaml", "--set", f"output={name}", "--set", f"seed={seed}"))
        places = {
            name: Rounds(
                partial(ended, words), folder / words[words.index("-o") + 1], partial(save, load(folder / "b"))
            )
            for name, words in COMMANDS.items()
        }
        places["probe"].old = lambda out: out.write_text("old")
        places["probe"].whole = lambda out: report.read([out])
        places["save"] = Rounds(
            partial(save, large(), folder / "saved", overwrite=True),
            folder / "saved",
            partial(save, load(folder / "b")),
        )
        total = 0
        for name, place in places.items():
            if given.only not in (None, name):
                continue
            found = place.run(each, chance)
            total += sum(found.values())
            print(f"{name}: killed {sum(found.values())} times; afterwards {dict(found)}", flush=True)
        if given.only in (None, "train"):
            found = train_rounds(each, chance)
            total += found["killed"]
            print(f"\rtrain: {dict(found)}; every end in the same bits", flush=True)
        full_disk(folder)
    print(f"{total} kills, seed {given.seed}, {time.monotonic() - began:.0f} s")


def full_disk(folder: Path) -> None:
    """A real disk that is full, where one can be mounted: one line, the old output stays, nothing is left over."""
    small = folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)]
    if os.getuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        print("no small disk could be mounted here; the limit of a process for its files stood for one")
        return
    try:
        save(load(folder / "a"), small / "kept")
        held = content(small / "kept")
        (small / "filler").write_bytes(b"0" * (shutil.disk_usage(small).free - 8192))
        try:
            save(load(folder / "b"), small / "kept", overwrite=True)
        except OSError as error:
            print(f"a full disk: {error}")
        else:
            raise AssertionError("the disk was not full")
        assert content(small / "kept") == held and {path.name for path in small.iterdir()} == {"kept", "filler"}
    finally:
        subprocess.run(["umount", str(small)], check=True)


if __name__ == "__main__":
    main()
