"""The examples run as they stand, and say what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LAST_LINE = {
    "hf_trainer.py": "step 12: p = 1.00, 4 layers active",
    "lori.py": "step 7: 0.20 of B in use, the first task's part untouched: True",
    "moka.py": "step 5: the loss fell: True, loaded bit for bit: True",
    "plain_loop.py": "step 11: p = 1.00, loss ",
    "accelerate_loop.py": "step 7: p = 1.00, loss ",
    "trl_sft.py": "step 12: p = 1.00, 4 layers active",
    "trl_dpo.py": "step 12: p = 1.00, 4 layers active",
    "lightning_trainer.py": "step 7: p = 1.00, 4 layers active",
    "diffusers_unet.py": "step 6: compressed to rank 2, and the same in diffusers: True",
}

# TRL and PEFT use names that Transformers has just deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # Lightning advises more workers, and uses a name that torch has deprecated
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def test_every_script_is_listed() -> None:
    assert sorted(LAST_LINE) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", LAST_LINE)
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert said[-1].startswith(LAST_LINE[name])
