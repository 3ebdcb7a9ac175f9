"""A few hundred damaged files of every kind; `make fuzz` reads ten thousand new ones."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.cases import run_case, run_cases
from fuzz.mutate import bomb
from fuzz.readers import READERS
from loraloom import recipe
from loraloom.layout import check_config
from loraloom.untrusted import DEPTH, expression, parse_json, parse_yaml
from processes import answer_of

CASES = [(name, seed) for name, reader in READERS.items() for seed in range(reader.fixed)]


def test_what_is_damaged_is_refused_in_one_line() -> None:
    found, faults = answer_of(run_in_children, CASES)
    assert faults == []
    assert found["refused"] > found["read"] > len(READERS)  # damage that nobody can see is not all there is


def run_in_children(
    cases: list[tuple[str, int]], bad: Callable[[Path], object] | None = None
) -> tuple[Counter, list[str]]:
    if bad is not None:
        READERS["seal"] = READERS["seal"].__class__(READERS["seal"].make, bad)
    faults: list[str] = []
    return run_cases(cases, faults.append), faults


def unforeseen(folder: Path) -> object:
    return {}["key"]


def ending(folder: Path) -> object:
    return sys.exit(3)


def greedy(folder: Path) -> object:
    return bytes(1 << 40)


def test_a_fault_is_seen() -> None:
    """A reader that lets another error through, ends its process, or takes all memory."""
    faults = [answer_of(run_in_children, [("seal", 0)], bad)[1][0] for bad in (unforeseen, ending, greedy)]
    assert ["KeyError" in faults[0], "SystemExit" in faults[1], "MemoryError" in faults[2]] == [True] * 3
    assert run_case.__doc__


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def one_line_of(read: object, *given: object) -> None:
    """Whatever it is given, it takes it, or refuses it in one line."""
    try:
        read(*given)
    except ValueError as error:
        assert str(error) and len(str(error).splitlines()) == 1


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_values_of_any_kind_in_recipes_and_configurations(data: st.DataObject) -> None:
    told = {"model": "m", "task": "digits", "output": "o"}
    section = data.draw(st.sampled_from([*recipe.Recipe.model_fields]))
    one_line_of(recipe.parse, told | {section: data.draw(plain)})
    keys = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "init_lora_weights",
        "peft_type",
        "moka",
    )
    config = {
        "peft_type": data.draw(st.sampled_from(["LORA", "MOKA"])),
        data.draw(st.sampled_from(keys)): data.draw(plain),
    }
    one_line_of(check_config, config, "config")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_any_text_as_json_and_yaml(text: str) -> None:
    one_line_of(parse_json, text, "a")
    one_line_of(parse_yaml, text, "a")


BAD_YAML = {
    "a bomb": (bomb(random.Random(0)).decode(), "more than"),
    "a value that holds itself": ("a: &a [*a]", "nested too deep"),
    "code": ("a: !!python/object/apply:os.system [exit]", "not YAML"),
    "a key twice": ("train: {steps: 1}\nseed: 1\ntrain: {steps: 2}", "'train' is there twice"),
    "an empty number": ("a: !!int ''", "not YAML"),
    "a day that is none": ("a: 2001-99-99", "not YAML"),
    "deep": ("[" * 5000, "nested too deep"),
}


@pytest.mark.parametrize(("text", "said"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for read in (recipe.read, lambda path: recipe.read_task(str(path))):
        with pytest.raises(ValueError, match=said) as caught:
            read(path)
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_yaml_and_json_that_are_as_they_should_be() -> None:
    assert parse_yaml("a: &one {lr: 1e-3, n: [2E4, e5]}\nb: {<<: *one, lr: -1.5e2}\nc: *one", "a") == {
        "a": {"lr": 0.001, "n": [20000.0, "e5"]},
        "b": {"lr": -150.0, "n": [20000.0, "e5"]},
        "c": {"lr": 0.001, "n": [20000.0, "e5"]},
    }
    assert parse_yaml("", "a") is None
    levels = "[" * (DEPTH - 1) + "]" * (DEPTH - 1)
    assert parse_json(levels, "a") and parse_yaml(levels, "a")
    for text in ("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "[" * 100_000):
        with pytest.raises(ValueError, match="a: nested too deep"):
            parse_json(text, "a")
    with pytest.raises(ValueError, match="a: 'x' is there twice"):
        parse_json('[{"y": 1, "x": 1, "x": 2}]', "a")


def test_an_expression_that_takes_years_is_given_up() -> None:
    slow = expression("((a|a)*b|(.*.*.*.*.*.*.*.*x))$")
    with pytest.raises(ValueError, match=r"expression .* takes too long on .aaa"):
        slow("a" * 400)
    assert slow("x")


TASKS = {
    "a number for a column": ({"dataset": "d", "label": 3}, "label: input should be a valid string, got 3"),
    "no list": ({"dataset": "d", "labels": 3}, "labels: input should be a valid tuple, got 3"),
    "an unknown name in the prompt": (
        {"dataset": "d", "prompt": "{contnt}"},
        "prompt names {contnt}; allowed: content",
    ),
    "code in the prompt": ({"dataset": "d", "prompt": "{content.__class__}"}, "prompt names {content.__class__}"),
    "a picture that is not told": ({"dataset": "d", "prompt": "{image}{content}"}, "prompt names {image}"),
}


@pytest.mark.parametrize(("told", "said"), TASKS.values(), ids=TASKS)
def test_task_descriptions_that_are_refused(told: dict, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        recipe.task_of(told)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert recipe.task_of({"dataset": "d", "validation": None, "labels": ["a", "b"]}).labels == ("a", "b")
