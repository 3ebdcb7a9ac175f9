"""The recipes of the LoRI paper are what their table says, and the program takes them as they are."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from loraloom.recipe import read

FOLDER = Path(__file__).parents[1] / "recipes" / "lori" / "paper"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def test_the_files_are_those_of_the_table(tmp_path: Path) -> None:
    made = runpy.run_path(str(FOLDER / "make.py"))
    made["main"](["--folder", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == NAMES and len(NAMES) == 32
    for name in NAMES:
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_recipe(name: str) -> None:
    recipe = read(FOLDER / name)
    sparse = name.endswith("-s.yaml")
    assert recipe.lori is not None and (recipe.lori.mask is not None) == sparse
    assert recipe.lori.start == ("fresh" if sparse else "reuse")
    assert recipe.train.batch_size * recipe.train.accumulate == 32
    assert recipe.adapter.rank in (32, 64) and f"-r{recipe.adapter.rank}-" in name
