"""Recipes: what is typed wrong is said in one line with the nearest right name; what is right is what runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import loraloom as ll
from loraloom import recipe

GOOD = {"model": "m", "task": "digits", "output": "runs/a"}

WRONG = {
    "unknown key": ({"tsak": 1}, "tsak is not known (did you mean 'task'?)"),
    "unknown key in a section": ({"train": {"step": 3}}, "train.step is not known (did you mean 'steps'?)"),
    "unknown key of a strategy": (
        {"strategy": {"name": "coto", "rmap": 1}},
        "strategy.rmap is not known (did you mean 'ramp'?); allowed: name, ramp",
    ),
    "a key of another strategy": ({"strategy": {"name": "none", "ramp": 0.5}}, "strategy.ramp is not known"),
    "unknown strategy": ({"strategy": {"name": "cotto"}}, "'cotto' is not known (did you mean 'coto'?)"),
    "strategy without a name": ({"strategy": {"ramp": 0.5}}, "strategy.name"),
    "unknown curve": ({"strategy": {"name": "coto", "curve": "liner"}}, "'linear'"),
    "a plan that never trains": ({"strategy": {"name": "coto", "curve": "constant"}}, "strategy: "),
    "rank 0": ({"adapter": {"rank": 0}}, "adapter.rank: input should be greater than or equal to 1, got 0"),
    "text for a number": ({"train": {"steps": "many"}}, "train.steps"),
    "missing": ({"model": None}, "model"),
    "share above 1": ({"strategy": {"name": "coto", "ramp": 1.5}}, "strategy.ramp"),
    "unknown kind": ({"adapter": {"kind": "lroa"}}, "'lora'"),
    "output without a name": ({"output": "/"}, "output"),
    "unknown key of a data set": ({"task": {"dataset": "x", "lable": "y"}}, "(did you mean 'label'?)"),
    "a data set without a place": ({"task": {"label": "y"}}, "task: dataset is missing"),
    "seed below 0": ({"seed": -1}, "seed"),
    "two masks": ({"lori": {"mask": "m", "calibrate": {}}}, "lori: mask and calibrate are two ways to the mask"),
    "protect without lori": ({"protect": ["x"]}, "protect goes with lori"),
    "lori on hira": ({"lori": {}, "adapter": {"kind": "hira"}}, "not hira"),
    "rank of the adapter continued": ({"continue_from": "a", "adapter": {"rank": 4}}, "adapter.rank: the adapter of"),
    "balance of no adapter": (
        {"adapter": {"kind": "none", "modules_to_save": ["lm_head"]}, "train": {"balance_every": 1}},
        "adapter.kind none has no adapter for a strategy, continue_from or train.balance_every",
    ),
    "a warm-up without a schedule for it": (
        {"train": {"schedule": "constant", "warmup": 0.1}},
        "train: schedule constant has no warmup; constant_with_warmup has",
    ),
    "a density of 0": ({"lori": {"calibrate": {"density": 0}}}, "lori.calibrate.density"),
    "a key of calibrate": (
        {"lori": {"calibrate": {"densty": 0.1}}},
        "lori.calibrate.densty is not known (did you mean 'density'?); allowed: density, scope",
    ),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_recipe_is_one_line(change, said):
    with pytest.raises(ValueError, match=r"^recipe: ") as caught:
        recipe.parse({**GOOD, **change})
    assert "\n" not in str(caught.value)
    assert said in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="recipe: task is missing"):
        recipe.parse({"model": "m", "output": "x"})


def test_numbers_are_read_as_people_write_them(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntask: digits\noutput: x\ntrain: {learning_rate: 2e-3}\n")
    assert recipe.read(file).train.learning_rate == 2e-3
    assert recipe.read(file, ["train.learning_rate=5e-4", "adapter.rank=3"]).adapter.rank == 3


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "\x00"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"r\.yaml: ") as caught:
        recipe.read(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["train.steps", "=3", "model.x=3"])
def test_an_override_that_is_none(tmp_path: Path, override: str):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntask: digits\noutput: x\n")
    with pytest.raises(ValueError, match="--set"):
        recipe.read(file, [override])


def test_a_constant_rate_has_no_warm_up_and_stays_so_when_it_is_read_again():
    def warmup(**train):
        made = recipe.parse({**GOOD, "train": train})
        assert recipe.parse(made.model_dump(mode="json")) == made
        return made.train.warmup

    assert warmup(schedule="constant") == warmup(schedule="constant", warmup=0) == 0
    assert warmup() == warmup(schedule="constant_with_warmup") == 0.06


def test_strategies_are_the_plans_they_name():
    def plan(**strategy):
        return recipe.parse({**GOOD, "seed": 3, "train": {"steps": 100}, "strategy": strategy}).plan()

    assert recipe.parse(GOOD).plan() is None
    assert plan(name="coto", curve="sine", ramp=0.5) == ll.CoTo(100, ramp=0.5, curve="sine", seed=3)
    assert {plan(name="stochastic-depth", keep=0.7).probability(step) for step in (0, 50, 99)} == {0.7}
    assert plan(name="progressive-dropout", end=0.25).probability(99) == 0.25


@pytest.mark.parametrize("name", ["demo/lora.yaml", "demo/coto.yaml"])
def test_bundled_recipes_are_valid(name):
    assert recipe.bundled_recipe(name).model == "vit-s14"


def test_a_task_may_describe_a_data_set(tmp_path: Path):
    described = {"dataset": "reviews", "content": "body", "labels": ["bad", "good"]}
    made = recipe.parse({**GOOD, "task": described})
    assert (made.task.content, made.task.labels) == ("body", ("bad", "good"))
    assert recipe.parse(made.model_dump(mode="json")) == made
    (tmp_path / "task.yaml").write_text("dataset: reviews\ncontent: body\nlabels: [bad, good]\n")
    assert recipe.read_task(str(tmp_path / "task.yaml")) == made.task
    assert recipe.read_task("digits") == "digits"
