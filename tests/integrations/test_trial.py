"""Several variants in one pass give what each gives alone; where a model does not allow it, they go one by one."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny_llava
from loraloom.adapter import Adapter
from loraloom.integrations.prefix import Scores
from loraloom.integrations.scoring import bench
from loraloom.integrations.trunk import Shape, Trunk
from loraloom.registry import edge
from loraloom.strategies.modality import MokA
from tiny_multimodal import lively
from tiny_variants import adapter_on, causal, encoder, image_task, multimodal, variants, vision

FEW, ROWS = 8, 128  # examples, and rows of a pass


class Noted:
    """What a bench computes for each variant of a score: features or likelihoods, variants x examples x numbers."""

    def __init__(self, made, score, runs, asked, monkeypatch):
        seen: list[torch.Tensor] = []
        found: dict[int, float] = {}
        home, name = (type(made.rows), "_likelihoods") if made.continues else (type(made), "_features")
        plain = getattr(home, name)

        def noted(*arguments):
            seen.append(torch.as_tensor(got := plain(*arguments)))
            return got

        with monkeypatch.context() as inside:
            inside.setattr(home, name, noted)
            for at, value in score.stream(asked, runs):
                found[at] = value
        examples = len(made.ready(limit=score.limit))
        self.values = [found[at] for at in sorted(found)]
        numbers = torch.cat([one.reshape(-1, examples, one.shape[-1]) for one in seen])
        self.numbers = numbers[torch.tensor(list(found)).argsort()]
        self.steps = len(seen)


def some(adapter: Adapter, count: int = 20) -> list[Adapter | None]:
    """So many adapters with random modules of one, no two the same; the base and the whole are among them."""
    draw, sets = random.Random(0), {(): None, tuple(adapter.modules): None}
    while len(sets) < count:
        sets.setdefault(tuple(name for name in adapter.modules if draw.random() < 0.5))
    return [replace(adapter, modules={n: adapter.modules[n] for n in names}) if names else None for names in sets]


@pytest.mark.parametrize("kind", [causal, encoder, vision, multimodal])
def test_variants_that_share_a_pass_compute_what_each_computes_alone(kind, monkeypatch):
    made, adapter = kind()
    asked = some(adapter)
    alone, joined = Scores(made, limit=FEW, rows=1), Scores(made, limit=FEW, rows=ROWS)
    one, other = alone.plan(asked), joined.plan(asked)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    plain = Noted(made, alone, one.runs, asked, monkeypatch)
    shared = Noted(made, joined, other.runs, asked, monkeypatch)
    assert plain.steps == len(asked) > shared.steps and not other.why
    assert shared.values == plain.values
    assert torch.allclose(shared.numbers, plain.numbers, rtol=1e-5, atol=1e-5)
    apart = torch.pdist(plain.numbers.flatten(1)) > 1e-3
    assert apart.all() or (kind is multimodal and apart.sum() > 0.9 * len(apart))  # one of its layers goes nowhere
    assert alone.ran == one.passes and joined.ran == other.passes
    assert one.passes <= other.passes < one.naive == other.naive  # each run begins at the bottom
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert not any("forward" in vars(module) for module in made.model.modules())
    assert joined.many(asked) == plain.values


def test_one_run_has_as_many_blocks_as_one_by_one(monkeypatch):
    made, adapter = vision()
    asked = variants(adapter)
    joined = Scores(made, limit=FEW)
    assert {len(run) for run in joined.plan(asked).runs} == {8}  # 64 rows, as a full batch has
    assert joined.many(asked) == Scores(made, limit=FEW, rows=1).many(asked)
    assert joined.work == (14, 24, 0) and joined.ran == 14


def test_runs_give_the_same_bits_whatever_else_is_scored(monkeypatch):
    made, adapter = encoder()
    asked, score = some(adapter, 32), Scores(made, limit=FEW, rows=32)
    runs = score.plan(asked).runs
    assert len(runs) == 4 and sorted(itertools.chain(*runs)) == list(range(32))
    whole, ran = Noted(made, score, runs, asked, monkeypatch), score.ran
    for run in runs:
        part = Noted(made, score, [run], asked, monkeypatch)
        assert torch.equal(part.numbers, whole.numbers[sorted(run)])
    assert score.ran == 2 * ran  # no run begins with what another left
    assert list(score.stream(asked, [])) == []


@pytest.mark.parametrize("memory", [0, 3 * FEW * 5 * 16 * 4, 1 << 20])
def test_states_of_shared_passes_have_the_same_room(memory, monkeypatch):
    made, adapter = vision()
    asked = some(adapter, 60)
    held = []
    joined = Trunk._joined

    def noting(self, *arguments):
        found = joined(self, *arguments)
        kept = {
            state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in self._states[0].values()
        }
        assert sum(kept.values()) == self.held
        held.append(self.held)
        return found

    score = Scores(made, limit=FEW, rows=32, memory=memory)
    plan = score.plan(asked)
    monkeypatch.setattr(Trunk, "_joined", noting)
    found = Noted(made, score, plan.runs, asked, monkeypatch)
    assert max(held) <= memory and (score.ran > plan.passes) == (memory == 0)
    plain = Scores(made, limit=FEW, rows=1)
    expected = Noted(made, plain, plain.plan(asked).runs, asked, monkeypatch)
    assert found.values == expected.values and torch.allclose(found.numbers, expected.numbers, rtol=1e-5, atol=1e-5)


def test_layers_of_any_kind_are_switched_by_rows():
    made, adapter = vision()
    draw = torch.Generator().manual_seed(5)
    dora = {
        name: replace(one, magnitude=torch.rand(one.B.shape[0], generator=draw) + 0.5)
        for name, one in adapter.modules.items()
    }
    asked = some(replace(adapter, config={**adapter.config, "use_dora": True}, modules=dora))
    score = Scores(made, limit=FEW, rows=ROWS)
    assert score.many(asked) == [made.evaluate(one, limit=FEW).value for one in asked]
    assert score.ran == score.work.passes and not score.why
    (shape,) = score._shapes.values()
    assert shape.floor == 0


class Block(nn.Module):
    """A residual layer; ``places`` go by tokens."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.fc, self.mixing = nn.Linear(8, 8), mixing

    def forward(self, hidden: torch.Tensor, places: torch.Tensor, about: dict) -> torch.Tensor:
        made = hidden + torch.tanh(self.fc(hidden)) + places
        return made - made.mean(0) if self.mixing else made


class Tower(nn.Module):
    """Blocks on the first eight columns of an image."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(mixing) for _ in range(3))

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        hidden = pixel_values[:, 0, :8, :8]
        places = torch.linspace(0, 1, 64).reshape(8, 8)
        for block in self.layers:
            hidden = block(hidden, places, {})
        return SimpleNamespace(last_hidden_state=hidden)


def tower(mixing: bool):
    torch.manual_seed(0)
    stats = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    made = bench(Tower(mixing).eval(), image_task(), family="vision", processor=stats, image_size=8)
    return made, adapter_on(made.model, ("fc",))


def test_as_many_tokens_as_examples_are_no_rows():
    made, adapter = tower(mixing=False)
    score = Scores(made, limit=8, rows=ROWS)  # eight examples of eight tokens
    asked = variants(adapter)
    assert score.many(asked) == [made.evaluate(one, limit=8).value for one in asked]
    (shape,) = score._shapes.values()
    assert shape.fixed == {"1"} and shape.floor == 0 and not score.why


def test_a_model_whose_rows_are_not_by_themselves_takes_variants_one_by_one_and_says_why():
    made, adapter = tower(mixing=True)
    score, asked = Scores(made, limit=FEW, rows=ROWS), variants(adapter)
    assert score.many(asked) == [made.evaluate(one, limit=FEW).value for one in asked]
    assert score.why == "variants that share a pass give other outputs: rows of a batch are not by themselves"
    assert score.work == (14, 24, 0) and score.ran == 14


class Experts(nn.Module):
    """A layer of two experts; the first number of a row says which of them it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden: torch.Tensor, places: torch.Tensor, about: dict) -> torch.Tensor:
        made, second = hidden.clone(), hidden[:, 0, 0] > 0
        for rows, expert in zip((~second, second), self.experts, strict=True):
            if rows.any():
                made[rows, :, 1:] += torch.tanh(expert(hidden[rows]))[..., 1:]
        return made


def test_a_layer_that_the_tried_examples_do_not_reach_has_no_block_and_every_pass_is_whole():
    made, _ = tower(mixing=False)
    made.model.layers = nn.ModuleList(Experts() for _ in range(3))
    for at, example in enumerate(made.task.splits["test"]):
        example.content[0, 0] = 255 if at < 2 or at % 2 else 0
    adapter = adapter_on(made.model, ("experts.0", "experts.1"))
    asked, score = variants(adapter, "module"), Scores(made)
    assert score.many(asked) == [made.evaluate(one).value for one in asked]
    assert score.why == "layers.0.experts.0 does not run for the examples that were tried"


def test_in_sixteen_bits_variants_go_one_by_one():
    made, adapter = encoder()
    made.model.bfloat16()
    score, asked = Scores(made, limit=FEW), some(adapter, 6)
    assert score.many(asked) == [made.evaluate(one, limit=FEW).value for one in asked]
    assert score.why.endswith("which shows in 16 bits") and {len(run) for run in score.plan(asked).runs} == {1}


def test_moka_is_routed_by_the_tokens_of_a_batch_and_goes_one_by_one():
    made = bench(tiny_llava.tiny_llava(), tiny_llava.task(), processor=tiny_llava.processor(), max_length=40)
    with edge("adapting").training(made.model, kind="moka", moka=MokA({"image": 1}, rank=2)) as live:
        adapter = edge("peft").from_model(lively(live))
    layers = {name.partition(".layers.")[2][0] for name in adapter.modules}
    kept = [{n: m for n, m in adapter.modules.items() if f".layers.{at}." not in n} for at in sorted(layers)]
    asked = [adapter, *(replace(adapter, modules=modules) for modules in kept)]
    score = Scores(made, limit=4, rows=ROWS)
    assert score.many(asked) == [made.evaluate(one, limit=4).value for one in asked]
    assert "share a pass" in score.why


def test_towers_share_passes_above_where_they_meet():
    made, adapter = multimodal()
    score = Scores(made, limit=FEW, rows=ROWS)
    plan = score.plan(some(adapter))
    (shape,) = score._shapes.values()
    assert (shape.refused, shape.floor, plan.why) == ({1}, 2, "")


def test_full_batches_are_not_joined_and_nothing_is_tried_for_it(monkeypatch):
    made, adapter = vision()
    asked = variants(adapter)
    monkeypatch.setattr("loraloom.integrations.prefix.shared", None)
    monkeypatch.setattr("loraloom.integrations.prefix._STATES", 4 * FEW * 5 - 1)
    for score in (Scores(made), Scores(made, limit=FEW, rows=4 * FEW - 1), Scores(made, limit=FEW)):
        assert {len(run) for run in score.plan(asked).runs} == {1}
    with pytest.raises(ValueError, match="rows must be a whole number of at least 1, got 0"):
        Scores(made, rows=0)


def test_passes_are_joined_where_all_below_the_floor_is_alike():
    parts = {name: (name,) for name in "xab"}
    rows = sorted(itertools.product([False, True], repeat=3))
    shape = Shape(parts, (-1, 0, 1), (0, 1), (0, 0), "", floor=0)
    passes = shape.passes(rows, 3)
    assert [one.starts for one in passes] == [(0, 1, 0), (1,), (0, 1, 0), (1,)]  # x is below all blocks
    assert [sorted(one.keep) for one in passes] == [[1], [], [1], []]
    above = replace(shape, floor=1)
    assert [one.starts for one in above.passes(rows, 3)] == [(0, 1)] * 4
    assert [one.starts for one in replace(shape, why="no", floor=3).passes(rows, 3)] == [(0,)] * 8
