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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Changes to the LLaVA recipe that make it one of a tiny model and task."""
    import datasets

    folder = tmp_path_factory.mktemp("llava")
    tiny_llava.folder(folder / "model")
    rows = {"question": [f"what is {i}" for i in range(24)]}
    rows |= {"answer": [f"very {w}" for w in ("red", "blue", "dark", "no")] * 6}
    rows |= {"image": [tiny_llava.picture(i) for i in range(24)], "image_id": [str(i) for i in range(24)]}
    texts = {name: datasets.Value("string") for name in ("question", "answer", "image_id")}
    features = datasets.Features({**texts, "image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "data"))
    small = ["train.steps=2", "train.bf16=false", "dtype=float32", "train.accumulate=1"]
    return [f"model={folder / 'model'}", f"task.dataset={folder / 'data'}", "task.test=", "task.validation=", *small]


def test_the_llava_recipe_trains_a_tiny_llava(tmp_path, tiny):
    made = train(read(FOLDER / "paper" / "vt-llava15-7b.yaml", [*tiny, f"output={tmp_path / 'out'}"])).adapter
    assert made.kind == "moka" and len(made.extras) == 4  # the projector's
    assert len(made.modules) == 2 * 7 * 2
    assert any(factors.B.abs().max() > 0 for factors in made.modules.values())


def test_dropout_of_a_strategy_reaches_moka_and_its_projector_may_come_later(tmp_path, tiny):
    recipe = FOLDER / "paper" / "vt-llava15-7b.yaml"
    first = ["adapter.dropout=0", "adapter.modules_to_save=[]", "strategy={name: progressive-dropout, end: 0.25}"]
    made = train(read(recipe, [*tiny, *first, f"output={tmp_path / 'first'}"])).adapter
    assert made.config["lora_dropout"] == made.config["moka"]["dropout"] == 0.25 and not made.extras
    second = ["adapter={modules_to_save: [multi_modal_projector]}", "moka=null", f"continue_from={tmp_path / 'first'}"]
    again = train(read(recipe, [*tiny, *second, f"output={tmp_path / 'second'}"])).adapter
    assert again.kind == "moka" and len(again.extras) == 4
    assert again.config["lora_dropout"] == again.config["moka"]["dropout"] == 0
