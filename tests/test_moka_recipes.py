"""Recipes of MokA: the bundled ones and the paper's settings are valid and say what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_llava
from loraloom.recipe import read, read_task
from loraloom.run import train

FOLDER = Path(__file__).parents[1] / "recipes" / "moka"
PAPER = sorted((FOLDER / "paper").glob("*.yaml"))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_settings(path):
    run = read(path)
    assert (run.adapter.kind, run.adapter.rank, run.adapter.alpha, run.adapter.dropout) == ("moka", 4, 16, 0.05)
    assert run.adapter.target_modules == PROJECTIONS
    train_ = run.train
    assert train_.batch_size * train_.accumulate == 32 and train_.bf16 and train_.gradient_checkpointing
    assert (train_.learning_rate, train_.schedule, train_.warmup, train_.weight_decay) == (1e-4, "cosine", 0.03, 0)
    plan = run.moka.plan(run.adapter)
    visual = path.stem.startswith("vt-")
    assert (plan.keys, plan.weight) == (("after-last-modality", 0.05) if visual else ("prompt", 1.0))
    assert (plan.attention, plan.logits, plan.own) == ("cross", "paper", "A")
    media = run.task.media
    assert all(f"{{{name}}}" in run.task.prompt for name in media) and set(media) <= set(plan.modalities)
    assert bool(run.adapter.modules_to_save) == (path.stem in ("vt-llava15-7b", "speech-qwen2audio-7b"))


def test_the_papers_tests_are_choices():
    for path in sorted((FOLDER / "paper" / "tasks").glob("*.yaml")):
        task = read_task(str(path))
        assert task.media and (task.labels or task.choices) and not task.answer


@pytest.mark.parametrize("of", ["vqa", "speech"])
def test_the_bundled_stages_fit_together(of):
    first, second = read(FOLDER / f"{of}-projector.yaml"), read(FOLDER / f"{of}-moka.yaml")
    assert second.model == str(first.output) and first.adapter.kind == "none"
    assert second.adapter.modules_to_save == first.adapter.modules_to_save


def test_the_llava_recipe_trains_a_tiny_llava(tmp_path):
    import datasets

    tiny_llava.folder(tmp_path / "model")
    rows = {"question": [f"what is {i}" for i in range(24)]}
    rows |= {"answer": [f"very {w}" for w in ("red", "blue", "dark", "no")] * 6}
    rows |= {"image": [tiny_llava.picture(i) for i in range(24)], "image_id": [str(i) for i in range(24)]}
    texts = {name: datasets.Value("string") for name in ("question", "answer", "image_id")}
    features = datasets.Features({**texts, "image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "data"))
    more = [f"model={tmp_path / 'model'}", f"task.dataset={tmp_path / 'data'}", f"output={tmp_path / 'out'}"]
    more += [
        "train.steps=2",
        "train.bf16=false",
        "dtype=float32",
        "train.accumulate=1",
        "task.test=",
        "task.validation=",
    ]
    made = train(read(FOLDER / "paper" / "vt-llava15-7b.yaml", more)).adapter
    assert made.kind == "moka" and len(made.extras) == 4  # the projector's
    assert len(made.modules) == 2 * 7 * 2
    assert any(factors.B.abs().max() > 0 for factors in made.modules.values())
