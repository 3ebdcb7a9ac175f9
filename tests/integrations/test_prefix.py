"""Passes that begin where variants differ give what whole passes give, and are as few as the order allows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import loraloom as ll
from loraloom.integrations.prefix import Family, Scores
from loraloom.integrations.trunk import Shape
from loraloom.probes.game import many
from tiny_variants import LAYERS, adapter_on, causal, encoder, multimodal, variants, vision


def computed(made, monkeypatch) -> list:
    """Where what a bench computes in every pass is noted: features or likelihoods."""
    seen: list = []
    home, name = (type(made.rows), "_likelihoods") if made.continues else (type(made), "_features")
    plain = getattr(home, name)

    def noted(*arguments):
        seen.append(torch.as_tensor(got := plain(*arguments)))
        return got

    monkeypatch.setattr(home, name, noted)
    return seen


@pytest.mark.parametrize("kind", [causal, encoder, vision])
def test_passes_that_begin_higher_give_the_same_numbers_to_the_bit(kind, monkeypatch):
    made, adapter = kind()
    made.ready()
    asked = variants(adapter)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    score = Scores(made, rows=1)
    plan = score.plan(asked)
    assert (plan.why, plan.naive, plan.passes) == ("", 8 * LAYERS, 2 + 4 + 8)
    seen = computed(made, monkeypatch)
    plain = {}
    for at, one in enumerate(asked):
        plain[at] = (made.evaluate(one).value, torch.cat(seen))
        seen.clear()
    for at, value in score.stream(asked, plan.runs):
        assert value == plain[at][0] and torch.equal(torch.cat(seen), plain[at][1])
        seen.clear()
    assert len({str(numbers.tolist()) for _, numbers in plain.values()}) == 8  # no two variants compute the same
    assert score.ran == plan.passes
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert not any("forward" in vars(module) for module in made.model.modules())


def test_many_counts_and_answers_in_the_order_of_the_question():
    made, adapter = vision()
    asked, score = variants(adapter)[::-1], Scores(made)
    assert many(score, asked) == [made.evaluate(one).value for one in asked]
    assert score.work == (14, 24, 0) and score.ran == 14
    modules = variants(adapter, "projection")  # q_proj and fc1 of all layers: in the first block already all differs
    assert many(score, modules) == [made.evaluate(one).value for one in modules]
    assert score.work == (14 + 12, 24 + 12, 0)


def test_two_towers_are_one_trunk():
    made, adapter = multimodal()
    towers = {name.rpartition(".layers.")[0] for name in adapter.modules}
    asked, score = variants(adapter), Scores(made)
    assert len(towers) == 2 and score.plan(asked).why == ""
    assert many(score, asked) == [made.evaluate(one).value for one in asked]
    assert score.ran == 31 and score.work == (31, 60, 0)
    (shape,) = score._shapes.values()
    assert shape.refused == {1}  # what the language model sees are the inputs of the last block of the vision tower


def test_states_never_take_more_than_their_room_and_what_has_none_is_computed_again():
    made, adapter = vision()
    asked = variants(adapter)
    expected = [made.evaluate(one).value for one in asked]
    batch, rest = 64 * 5 * 16 * 4, 6 * 5 * 16 * 4  # bytes: 70 examples of 5 tokens of 16 numbers
    ran = {}
    for memory in (0, rest, batch + rest, 2 * (batch + rest)):
        score = Scores(made, memory=memory)
        assert many(score, asked) == expected
        ran[memory] = score.ran
    assert ran[0] == 24 and ran[2 * (batch + rest)] == 14
    assert 24 > ran[rest] > ran[batch + rest] > 14
    assert score.work == (14, 24, 0)


def test_a_model_whose_blocks_share_more_runs_whole_and_says_why():
    class Leaking(nn.Module):
        """A block that leaves something for the next beside the hidden states."""

        def __init__(self, block: nn.Module, shared: dict) -> None:
            super().__init__()
            self.block, self.shared = block, shared

        def forward(self, hidden: torch.Tensor, *arguments, **named):
            self.shared["sum"] = self.shared.get("sum", 0.0) + 1.0
            return self.block(hidden, *arguments, **named) + self.shared["sum"]

    made, _ = encoder()
    shared: dict = {}
    layers = made.model.encoder.layer
    for at in range(LAYERS):
        layers[at] = Leaking(layers[at], shared)
    made.model.register_forward_pre_hook(lambda *a: shared.clear())
    adapter = adapter_on(made.model, ("query",))
    asked, score = variants(adapter), Scores(made)
    expected = [made.evaluate(one).value for one in asked]
    assert many(score, asked) == expected and score.work == (24, 24, 0) and score.ran == 24
    assert score.plan(asked).why.startswith("a pass that begins at block 2 gives other outputs")


def test_what_is_not_one_adapter_with_modules_left_out_is_scored_one_by_one(monkeypatch):
    made, adapter = vision()
    score = Scores(made)
    name = next(iter(adapter.modules))
    other = replace(adapter, modules={**adapter.modules, name: adapter.modules[name].scaled(2.0)})
    asked = [adapter, other, None]
    plan = score.plan(asked)
    assert plan.why == f"the adapters differ in what they hold of {name}" and (plan.runs, plan.naive) == (
        ((0,), (1,), (2,)),
        0,
    )
    assert many(score, asked) == [made.evaluate(one).value for one in asked] and score.work == (0, 0, 3)
    for given, why in (
        ([adapter], "one adapter alone"),
        ([adapter, replace(adapter, config={**adapter.config, "use_rslora": True})], "differ in more than the modules"),
        (
            [None, replace(adapter, extras={"norm.weight": torch.ones(16)})],
            "the base lacks the adapter's whole tensors",
        ),
    ):
        assert why in Family.of(given)
    parts = {"q[text]": adapter.modules[name], "q[image]": adapter.modules[name]}
    half = replace(adapter, modules={"q[text]": parts["q[text]"]})
    assert "some of a module's updates" in Family.of([replace(adapter, modules=parts), half])


def test_variants_read_from_files_share_too(tmp_path):
    made, adapter = vision()
    ll.save(adapter, tmp_path / "a")
    kept = ll.prune(adapter, keep="0,1")
    asked = [ll.load(tmp_path / "a"), kept, None]
    score = Scores(made)
    assert many(score, asked) == [made.evaluate(one).value for one in asked]
    assert score.work == (3 + 3 + 1, 9, 0)


def test_the_plan_keeps_only_what_is_begun_with_again():
    parts = {name: (name,) for name in "abc"}
    shape = Shape(parts, (0, 1, 2), (0, 1, 2), (0, 0, 0), "")
    rows = sorted(itertools.product([False, True], repeat=3))
    assert shape.starts(rows) == [0, 2, 1, 2, 0, 2, 1, 2]
    keeps = [sorted(one.keep) for one in shape.passes(rows)]
    assert keeps == [[1, 2], [], [2], [], [1, 2], [], [2], []]
    assert Shape(parts, (0, 1, 2), (0, 1, 2), (0, 0, 0), "no").starts(rows) == [0] * 8
    refused = Shape(parts, (0, 1, 2), (0, 1, 2), (0, 0, 0), "", frozenset({2}))
    assert refused.starts(rows) == [0, 1, 1, 1, 0, 1, 1, 1]
    assert [sorted(one.keep) for one in refused.passes(rows)][:2] == [[1], []]
    above = Shape(parts, (-1, 1, 3), (0, 1, 2), (0, 0, 0), "")  # below the blocks, in one, behind them
    assert above.starts([(False,) * 3, (True, False, False), (True, True, False), (True, True, True)]) == [0, 0, 1, 2]
