"""A new merge method is one file: with no other edit it is in the list, the docs, the command line and the laws."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loraloom
from loraloom.adapter import Adapter, Factors
from loraloom.store import load, save

ROOT = Path(loraloom.__file__).parents[2]
METHOD = '''"""The update of the largest norm."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods


@merge_methods.register("loudest", paper="https://example.org/loudest", space="core", spaces=("core", "delta"))
def loudest(
    deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"], *, share: float = 1.0
) -> Float[Tensor, " *shape"]:
    """The one update with the largest Frobenius norm, times its weight.

    Args:
        deltas: the k tensors, stacked.
        weights: one weight per tensor.
        share: multiplies the result.

    Example:
        >>> import torch
        >>> loudest(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 0.5]))
        tensor([1.5000, 2.0000])
    """
    chosen = int(deltas.flatten(1).norm(dim=1).argmax())
    return share * weights[chosen] * deltas[chosen]
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project with one file more."""
    root = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("src", "docs", "tests"):
        shutil.copytree(ROOT / part, root / part, ignore=ignored)
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, root / part)
    (root / "src/loraloom/ops/merge_methods/loudest.py").write_text(METHOD, encoding="utf-8")
    return root


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def test_it_is_short():
    assert len(METHOD.splitlines()) < 40


def test_it_is_listed(copy):
    rows = json.loads(run(copy, "-m", "loraloom", "list", "methods", "--json").stdout)
    assert [row["space"] for row in rows if row["name"] == "loudest"] == ["core"]


def test_the_documentation_has_it(copy):
    assert "methods.md is stale" in run(copy, "docs/generate.py", "--check").stderr
    assert run(copy, "docs/generate.py").returncode == 0
    page = (copy / "docs/methods.md").read_text(encoding="utf-8")
    assert "## loudest" in page and "`share=1.0`" in page


def test_the_command_line_runs_it(copy, tmp_path):
    for at in (1, 2):
        factors = Factors(B=torch.full((3, 1), float(at)), A=torch.ones(1, 2))
        save(Adapter({"peft_type": "LORA", "r": 1}, {"layers.0.q": factors}), tmp_path / f"a{at}")
    adapters, out = [str(tmp_path / name) for name in ("a1", "a2")], tmp_path / "out"
    done = run(copy, "-m", "loraloom", "merge", *adapters, "-o", str(out), "--method", "loudest", "--set", "share=3")
    assert done.returncode == 0, done.stderr
    assert torch.allclose(load(out).modules["layers.0.q"].delta(), torch.full((3, 2), 3.0))  # 3 * 0.5 * 2


def test_the_laws_hold_for_it(copy):
    laws = run(copy, "-m", "pytest", "-q", "tests/contracts/test_merge_methods.py", "-k", "loudest")
    assert laws.returncode == 0 and " passed" in laws.stdout, laws.stdout
