"""A run killed by SIGKILL, at random moments and at the worst ones, and resumed ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny_runs as tiny
from loraloom.integrations import checkpoints
from loraloom.integrations.checkpoints import SEAL, SafeCheckpoints, is_whole, last_complete, remove_torn, seal
from loraloom.integrations.fit import Fit, FitOptions, fit
from loraloom.strategies.progressive import CoTo
from processes import process, status_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

STEPS, EVERY = 25, 3

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    # the last step of an epoch has fewer batches than the others
    "accumulated": {"accumulate": 2, "batch_size": 5, "scheduler": "cosine", "warmup": 4, "weight_decay": 0.1},
}


class Slow(TrainerCallback):
    """Makes a step last long enough to be killed in."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.03)


def run(folder: Path, setting: str, callbacks: tuple[TrainerCallback, ...] = ()) -> tuple[Fit, dict[str, Tensor]]:
    torch.set_num_threads(1)
    options = FitOptions(
        **{"output": folder, "steps": STEPS, "batch_size": 4, "lr": 1e-2, "seed": 0, "log_every": EVERY, "resume": True}
        | {"save_every": EVERY}
        | SETTINGS[setting]
    )
    model = tiny.model(dropout=0.2)
    done = fit(
        model, tiny.sentences(), collate=tiny.collate, options=options, plan=CoTo(None, seed=1), callbacks=callbacks
    )
    return done, tiny.weights(model)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(folder: Path, setting: str, place: str, nth: int) -> None:
    """A run that kills itself at the nth time it comes to ``place``."""
    left = [nth]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    if place == "optimizer":  # half of the optimizer's state is written
        save = torch.save

        def torn(what: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(what, path, *args, **kwargs)
            if str(path).endswith("optimizer.pt") and now():
                os.truncate(path, Path(path).stat().st_size // 2)
                die()

        torch.save = torn
    if place == "unsealed":  # all is written, and not yet sealed
        checkpoints.seal = lambda folder: die() if now() else seal(folder)
    if place == "sealing":  # the seal is drafted, and not yet in its place
        sync = checkpoints._sync
        checkpoints._sync = lambda path: die() if path.name.endswith(".draft") and now() else sync(path)
    if place == "rotating":  # an old checkpoint is half deleted
        rmtree = shutil.rmtree

        def half(path: Any, *args: Any, **kwargs: Any) -> None:
            if now():
                (Path(path) / "adapter_model.safetensors").unlink()
                die()
            rmtree(path, *args, **kwargs)

        checkpoints.shutil.rmtree = half
    run(folder, setting, (Slow(),) if place == "random" else ())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Fit, dict[str, Tensor]]]:
    return {name: run(tmp_path_factory.mktemp(name) / "run", name) for name in SETTINGS}


def killed(folder: Path, setting: str, place: str, nth: int = 1, after: float | None = None) -> bool:
    """Start a run and see it killed: by itself, or by us ``after`` seconds from when it begins to save anew."""

    def newest() -> int:
        return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)

    begun = newest()
    run_of_its_own = process(child, folder, setting, place, nth)
    run_of_its_own.start()
    if after is not None:
        started = time.monotonic()
        while run_of_its_own.is_alive() and newest() <= begun and time.monotonic() - started < 60:
            time.sleep(0.002)
        run_of_its_own.join(after)
        run_of_its_own.kill()
    status = status_of(run_of_its_own)
    assert status in (0, -signal.SIGKILL)
    return status == -signal.SIGKILL


def assert_same(setting: str, folder: Path, unbroken: dict[str, tuple[Fit, dict[str, Tensor]]]) -> Fit:
    done, found = run(folder, setting)
    expected, weights = unbroken[setting]
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    numbers = [{k: v for k, v in entry.items() if "train_" not in k} for entry in done.log_history]
    same = [{k: v for k, v in entry.items() if "train_" not in k} for entry in expected.log_history]
    assert numbers == same  # losses, gradient norms, draws: logs and checkpoints fall together
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-24", "checkpoint-25"]
    assert all(map(is_whole, folder.iterdir()))
    return done


@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_at_random_moments(tmp_path: Path, setting: str, unbroken: dict[str, Any]) -> None:
    chance = random.Random(setting)
    folder = tmp_path / "run"
    kills = sum(killed(folder, setting, "random", after=chance.uniform(0, 0.1)) for _ in range(3))
    assert kills == 3
    paused = json.loads((last_complete(folder) / "seconds.json").read_text())["seconds"]
    assert assert_same(setting, folder, unbroken).seconds > paused > 0.03 * EVERY  # each step slept 0.03


@pytest.mark.parametrize(
    ("place", "nth", "left_at", "goes_on_from"),
    [
        ("optimizer", 1, 3, 0),
        ("optimizer", 3, 9, 6),
        ("unsealed", 2, 6, 3),
        ("sealing", 2, 6, 3),
        ("rotating", 1, 9, 9),
    ],
)
def test_killed_while_saving(
    tmp_path: Path, place: str, nth: int, left_at: int, goes_on_from: int, unbroken: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    assert killed(folder, "plain", place, nth)
    assert (folder / f"checkpoint-{left_at}").is_dir()
    newest = last_complete(folder)
    assert (int(newest.name.split("-")[1]) if newest else 0) == goes_on_from
    torn = [path for path in folder.iterdir() if not is_whole(path)]
    assert len(torn) == 1
    assert assert_same("plain", folder, unbroken).resumed_from == goes_on_from


def test_a_limit_of_one_never_leaves_none(tmp_path: Path) -> None:
    """With save_total_limit=1 the Trainer alone would delete the old checkpoint before the new one is sealed."""
    whole: list[list[str]] = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            whole.append(sorted(path.name for path in tmp_path.iterdir() if is_whole(path)))

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=1,
        save_total_limit=1,
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        tiny.model(),
        arguments,
        data_collator=tiny.collate,
        train_dataset=tiny.sentences(),
        callbacks=[Look(), SafeCheckpoints()],
    )
    trainer.train()
    assert whole == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]  # just before each is sealed
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"] and is_whole(tmp_path / "checkpoint-4")
    assert arguments.save_total_limit == 1
    trainer.args.save_total_limit = None  # a run that was cut off leaves it so: the same arguments keep their limit
    keeper = next(one for one in trainer.callback_handler.callbacks if isinstance(one, SafeCheckpoints))
    keeper.on_train_begin(arguments, None, None)
    assert keeper._keep == 1
    others = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    keeper.on_train_begin(others, None, None)
    assert keeper._keep is None
    keeper.on_train_end(others, None, None)
    assert others.save_total_limit is None


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.data())
def test_any_damage_shows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "deeper").mkdir()
    files = {"weights": b"0123456789", "deeper/state": b"abc", "empty": b""}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert not is_whole(folder)
    seal(folder)
    (folder / "note added later").touch()
    assert is_whole(folder)
    name = data.draw(st.sampled_from(["weights", "deeper/state", SEAL]))
    content = bytearray((folder / name).read_bytes())
    how = data.draw(st.sampled_from(["gone", "cut", "grown", "flipped"]))
    if how == "gone":
        (folder / name).unlink()
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        damaged = {"cut": content[:at], "grown": content + b"}", "flipped": content[:at] + b"\xff" + content[at + 1 :]}
        (folder / name).write_bytes(damaged[how])
    if not (name == SEAL and how == "cut" and at == len(content) - 1):  # only the newline at the end is missing
        assert not is_whole(folder)


def test_the_newest_whole_one_is_found_and_torn_ones_go(tmp_path: Path) -> None:
    assert last_complete(tmp_path) is None and remove_torn(tmp_path) == []
    for step in (9, 10, 100, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"1")
        if step != 200:
            seal(folder)
    (tmp_path / "checkpoint-best").mkdir()  # not ours
    assert last_complete(tmp_path) == tmp_path / "checkpoint-100"  # by number, not by name
    assert remove_torn(tmp_path) == [tmp_path / "checkpoint-200"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-100",
        "checkpoint-9",
        "checkpoint-best",
    ]
    with pytest.raises(FileNotFoundError, match="no checkpoint folder to seal"):
        seal(tmp_path / "checkpoint-300")
