"""A tiny world for the command line: a random vision model, the digits of scikit-learn, two trained adapters."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import yaml
from typer.testing import CliRunner

from loraloom.cli import app
from tiny_vision import recipe_content, tiny_model  # noqa: F401


class CommandLine:
    """``loraloom`` as a user types it, in a folder of its own; in this process, or in another where that matters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *words: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "loraloom", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def process(self, *words: str) -> subprocess.CompletedProcess:
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def __call__(self, *words: str) -> subprocess.CompletedProcess:
        environment = {"COLUMNS": "160", "NO_COLOR": "1"}
        with contextlib.chdir(self.folder), mock.patch.object(sys, "argv", ["loraloom", *words]):
            done = CliRunner(env=environment).invoke(app, list(words), prog_name="loraloom")
        faults = "" if done.exception is None else "".join(traceback.format_exception(done.exception))
        err = done.stderr if isinstance(done.exception, SystemExit | None) else done.stderr + faults
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, err)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, recipe_content: dict) -> Path:  # noqa: F811
    """A folder with recipe.yaml and two trained adapters, a and b (another seed)."""
    from loraloom import recipe, run

    folder = tmp_path_factory.mktemp("world")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    (folder / "reviews").mkdir()
    (folder / "reviews" / "train.jsonl").write_text('{"words": "fine", "stars": 5}\n{"words": "poor", "stars": 1}\n')
    for name, seed in (("a", 0), ("b", 1)):
        run.train(recipe.parse({**recipe_content, "output": str(folder / name), "seed": seed}))
    return folder


@pytest.fixture(scope="session")
def loraloom(world: Path) -> CommandLine:
    return CommandLine(world)
