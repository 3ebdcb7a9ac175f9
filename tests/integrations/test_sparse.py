"""LoRI on live PEFT models: what trains, what stays, what is saved, and how much memory it takes."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import tiny_runs as tiny
from loraloom.adapter import Adapter, UnsupportedKind
from loraloom.calibration import plan_of
from loraloom.integrations.adapting import training
from loraloom.integrations.fit import FitOptions, fit
from loraloom.integrations.peft import from_model
from loraloom.integrations.sparse import SparseDict, gradient_scores, sparse_parameters
from loraloom.masks import Mask, support
from loraloom.recipe import parse
from loraloom.strategies.progressive import CoTo
from loraloom.strategies.sparse import LoRI, calibrate

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Every(nn.Module):
    """Every layer kind that PEFT's LoRA has a layer for."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(32, 6)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), padding=1)
        self.conv3 = nn.Conv3d(1, 2, (2, 3, 2), padding=1)
        self.turned = Conv1D(5, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv2(self.conv1(self.embed(ids).transpose(1, 2))[:, None]).relu()
        return self.head(self.turned(self.conv3(x[:, None]).mean((2, 3, 4))))


TARGETS = ["embed", "conv1", "conv2", "conv3", "turned", "head"]
IDS = torch.arange(12).reshape(2, 6)


def every(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out for Conv1D, and says so
        return get_peft_model(Every(), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **options))


def masks(model: nn.Module, density: float = 0.3, seed: int = 0) -> Mask:
    """A random mask for a model's adapter."""
    generator = torch.Generator().manual_seed(seed)
    adapter = from_model(model)
    shapes = {name: adapter.shape(name) for name in adapter.modules}
    return calibrate({n: torch.rand(s.out, s.rank, generator=generator) for n, s in shapes.items()}, density=density)


def train(model: nn.Module, steps: int = 3, accumulate: int = 2, **optimizer: Any) -> None:
    chosen = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], **{"lr": 0.1, "weight_decay": 0.5} | optimizer
    )
    for step in range(steps):
        for micro in range(accumulate):
            out = model(IDS + step + micro)
            (out.square().sum() if isinstance(out, Tensor) else out.loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        chosen.step()
        chosen.zero_grad()


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"target_modules": ["turned", "head"], "use_dora": True}]
)
def test_of_b_only_kept_entries_move_and_a_never_does(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Every(), LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS} | options))
    dense = copy.deepcopy(model)
    mask = masks(model)
    plan, whole = LoRI(mask=mask, start="fresh"), LoRI(start="fresh")
    plan.attach(model)
    whole.attach(dense)
    before, start = from_model(model), from_model(dense)
    for name in mask:
        assert torch.equal(before.modules[name].A, start.modules[name].A) and before.modules[name].A.any()
        assert not before.modules[name].B.any()
    train(model)
    train(dense)
    after, filled = from_model(model), from_model(dense)
    for name in mask:
        assert torch.equal(after.modules[name].A, before.modules[name].A)
        assert torch.equal(filled.modules[name].A, start.modules[name].A)
        assert torch.equal(after.modules[name].B != 0, mask[name]), (
            "weight decay and accumulation touch kept entries only"
        )
        assert (filled.modules[name].B != 0).all()
    extra = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "magnitude" in n)
    assert trainable(model) == mask.kept + extra and trainable(dense) == mask.entries + extra


def test_gradients_are_those_of_the_dense_b_at_the_kept_entries() -> None:
    model = every()
    dense = copy.deepcopy(model)
    mask = masks(model)
    LoRI(mask=mask, start="fresh").attach(model)
    LoRI(start="fresh").attach(dense)
    for live in (model, dense):
        live(IDS).square().sum().backward()
    wanted = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
    for path, kept in sparse_parameters(model):
        key = path.replace(".kept", ".weight")
        name = path.removeprefix("base_model.model.").split(".lora_")[0]
        assert torch.allclose(kept.grad, wanted[key].reshape(mask[name].shape)[mask[name]], atol=1e-6), path
    assert len(list(sparse_parameters(model))) == len(wanted) == len(TARGETS)


def test_gradcheck_of_the_scatter() -> None:
    from loraloom.integrations.sparse import _Scatter

    kept = torch.randn(5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 3, 4, 7, 11], dtype=torch.int32)
    rest = torch.randn(4, 3, dtype=torch.float64)
    for held in (None, rest):
        assert torch.autograd.gradcheck(lambda k, r=held: _Scatter.apply(k, index, r, torch.Size((4, 3))) * 2, kept)
    assert torch.equal(_Scatter.apply(kept, index, rest, rest.shape).flatten()[[1, 2]], rest.flatten()[[1, 2]])


def test_saved_as_an_ordinary_peft_lora_and_loaded_again(tmp_path: Path) -> None:
    model = every()
    mask = masks(model)
    LoRI(mask=mask, start="fresh").attach(model)
    train(model)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT announces that it saves an embedding's adapter
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        plain = PeftModel.from_pretrained(Every(), tmp_path).eval()
    assert torch.equal(plain(IDS), model(IDS))
    state = get_peft_model_state_dict(model)
    assert not any("kept" in key or "index" in key or "mask" in key for key in state)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in get_peft_model_state_dict(plain).items()}
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(IDS), model(IDS), atol=1e-5)
    # and back into a sparse model, which holds the mask itself
    again = every()
    LoRI(mask=mask, start="fresh").attach(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(IDS), model(IDS))
    with pytest.raises(RuntimeError, match="other values than this model where its LoRI mask does not train"):
        other = every()
        LoRI(mask=masks(model, seed=1), start="fresh").attach(other)
        other.load_state_dict(model.state_dict())
    lacking = {k: v for k, v in model.state_dict().items() if "head.lora_B" not in k and "lora_embedding_B" not in k}
    with pytest.raises(RuntimeError, match=r'Missing key.*embed.lora_embedding_B.default.*head.lora_B.default.weight"'):
        again.load_state_dict(lacking)


def test_detached_it_is_an_ordinary_lora_again() -> None:
    model, untouched = every(), every()
    plan = LoRI(mask=masks(model), start="fresh")
    plan.attach(model)
    train(model)
    out = model.eval()(IDS)
    plan.detach(model)
    assert torch.equal(model(IDS), out) and trainable(model) == trainable(untouched)
    assert [(type(m), list(m.state_dict())) for m in model.modules()] == [
        (type(m), list(m.state_dict())) for m in untouched.modules()
    ]
    train(model)
    plan.attach(model)  # and once more
    with pytest.raises(ValueError, match="attached already"):
        plan.attach(model)


def test_a_stays_frozen_and_b_sparse_through_pefts_own_switches() -> None:
    model = every()
    LoRI(mask=masks(model), start="fresh").attach(model)
    count = trainable(model)
    with model.disable_adapter():
        model(IDS)
    assert trainable(model) == count
    model.set_adapter("default")
    assert trainable(model) == count
    model.base_model.set_adapter("default", inference_mode=True)
    assert trainable(model) == 0
    model.base_model.set_adapter("default")
    assert trainable(model) == count
    again = pickle.loads(pickle.dumps(model))
    assert trainable(again) == count and torch.equal(again(IDS), model(IDS))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for _, p in sparse_parameters(half)) and trainable(half) == count


def test_an_adapter_that_is_deleted_takes_its_sparse_b_with_it() -> None:
    model, untouched = every(), every()
    LoRI(mask=masks(model), start="fresh").attach(model)
    options = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", options)
        model.set_adapter("second")
        model.delete_adapter("default")
        assert not any("default" in name for name in model.state_dict()) and not list(sparse_parameters(model))
        model.add_adapter("default", options)
        model.set_adapter("default")
        model.delete_adapter("second")
    assert trainable(model) == trainable(untouched)
    assert [(type(m), list(m.state_dict())) for m in model.modules()] == [
        (type(m), list(m.state_dict())) for m in untouched.modules()
    ]
    LoRI(mask=masks(model), start="fresh").attach(model)
    model.base_model.model.embed.lora_embedding_B["default"] = nn.Parameter(torch.ones(6, 3))
    assert type(model.base_model.model.embed.lora_embedding_B) is nn.ParameterDict
    model(IDS)


def test_told_parameters_are_the_kept_ones(capsys: pytest.CaptureFixture[str]) -> None:
    model = every()
    mask = masks(model)
    LoRI(mask=mask, start="fresh").attach(model)
    model.print_trainable_parameters()
    assert f"trainable params: {mask.kept:,} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop]
)
def test_gradients_and_optimizer_state_have_the_size_of_the_kept_entries(optimizer: Any) -> None:
    """At density 0.1 at most 0.12 of LoRI-D's, in bytes."""

    def used(density: float | None) -> int:
        model = get_peft_model(nn.Sequential(nn.Linear(64, 512)), LoraConfig(r=32, target_modules=["0"]))
        LoRI(mask=None if density is None else masks(model, density), start="fresh").attach(model)
        chosen = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(torch.randn(3, 64)).sum().backward()
        chosen.step()
        state = [v for held in chosen.state.values() for v in held.values() if isinstance(v, Tensor)]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return sum(t.numel() * t.element_size() for t in [*state, *grads])

    assert used(0.1) <= 0.12 * used(None)


def test_no_dense_gradient_outlives_backward() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(64, 512)), LoraConfig(r=32, target_modules=["0"]))
    LoRI(mask=masks(model, 0.1), start="fresh").attach(model)
    model(torch.randn(3, 64)).sum().backward()
    assert {tuple(p.grad.shape) for p in model.parameters() if p.grad is not None} == {(round(0.1 * 512 * 32),)}


def test_modules_of_which_nothing_is_kept(tmp_path: Path) -> None:
    model = every()
    adapter = from_model(model)
    entries = {n: torch.zeros(adapter.shape(n).out, adapter.shape(n).rank) > 0 for n in adapter.modules}
    entries["head"] = ~entries["head"]
    LoRI(mask=Mask.of(entries), start="fresh").attach(model)
    train(model)
    after = from_model(model)
    assert [n for n in after.modules if after.modules[n].B.any()] == ["head"]


# --- what A starts from -----------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """PEFT merges and unmerges the adapter of such a layer in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x)[0])


def test_multihead_attention() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Attends(), LoraConfig(r=2, target_modules=["attn", "head"]))
    shapes = {"attn": (24, 2), "attn.base_layer.out_proj": (8, 2), "head": (3, 2)}
    mask = calibrate({name: torch.rand(*shape) for name, shape in shapes.items()}, density=0.3)
    LoRI(mask=mask, start="fresh").attach(model)
    assert trainable(model) == mask.kept
    x = torch.randn(2, 5, 8)
    chosen = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        chosen.step()
        chosen.zero_grad()
    state = get_peft_model_state_dict(model)
    for name in shapes:
        held = state[f"base_model.model.{name}.lora_B.weight"]
        assert torch.equal(held != 0, mask[name]), name


def test_the_parameters_of_a_mixture_of_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, **sizes)

    def mixture() -> PeftModel:
        torch.manual_seed(0)
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return get_peft_model(
            MixtralForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
        )

    def learn(model: PeftModel) -> Adapter:
        chosen = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            chosen.step()
            chosen.zero_grad()
        return from_model(model)

    dense = mixture()
    LoRI(task="x").attach(dense)
    trained = learn(dense)
    mask = calibrate(trained, density=0.2)
    assert "model.layers.0.mlp.experts" in mask and mask.kept == round(0.2 * mask.entries)
    sparse = mixture()
    LoRI(mask=mask, start=trained).attach(sparse)
    assert trainable(sparse) == mask.kept
    found = support(learn(sparse))
    assert found.kept > 0.9 * mask.kept and found.overlap(mask) == 1, "an expert that no token meets stays at 0"


def test_a_comes_from_the_seed_from_an_adapter_or_stays() -> None:
    first, second, other = every(), every(), every()
    LoRI(seed=3, task="x").attach(first)
    torch.manual_seed(99)
    LoRI(seed=3, task="x").attach(second)
    LoRI(seed=3, task="y").attach(other)
    a, b, c = (from_model(m) for m in (first, second, other))
    assert all(torch.equal(a.modules[n].A, b.modules[n].A) for n in a.modules)
    assert all(not torch.equal(a.modules[n].A, c.modules[n].A) for n in a.modules)
    assert 0.5 < a.modules["embed"].A.abs().max() <= 1, "an embedding's input is one-hot"
    train(first)
    trained = from_model(first)
    taken = every()
    LoRI(mask=calibrate(trained, density=0.5), start=trained).attach(taken)
    got = from_model(taken)
    assert all(torch.equal(got.modules[n].A, a.modules[n].A) and not got.modules[n].B.any() for n in a.modules)
    bad = Adapter(trained.config, {n: f for n, f in trained.modules.items() if n != "head"})
    with pytest.raises(ValueError, match="has no module head"):
        LoRI(start=bad).attach(every())


def test_a_is_the_same_whatever_is_around_the_model() -> None:
    class Owner(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    def compiled(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")

    mask = masks(every())
    plain = every()
    LoRI(mask=mask, start="fresh").attach(plain)
    for around in (compiled, nn.DataParallel, Owner, lambda model: nn.DataParallel(compiled(model))):
        model = every()
        wrapped = around(model)
        LoRI(mask=mask, start="fresh").attach(wrapped)
        ours, theirs = from_model(model), from_model(plain)
        assert all(torch.equal(ours.modules[n].A, theirs.modules[n].A) for n in theirs.modules)
        LoRI().detach(wrapped)
        assert trainable(model) == trainable(every())
    inside = tiny.model()
    layers = inside.get_base_model().model.layers
    layers[0] = compiled(layers[0])
    outside = tiny.model()
    for model in (inside, outside):
        LoRI(seed=1).attach(model)
    for own, other in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("named", ["as the plain model", "as the model with wrapped layers"])
def test_masks_and_adapters_fit_a_model_of_which_layers_are_compiled_or_checkpointed(named: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped() -> nn.Module:
        model = tiny.model()
        layers = model.get_base_model().model.layers
        layers[0] = torch.compile(layers[0], backend="eager")
        layers[1] = checkpoint_wrapper(layers[1])
        return model

    source, model = wrapped() if named.endswith("layers") else tiny.model(), wrapped()
    mask, other = masks(source, 0.3, seed=0), masks(source, 0.5, seed=1)
    LoRI(mask=mask, start=from_model(source), protect=(other,)).attach(model)
    plain = tiny.model()
    LoRI(mask=masks(plain, 0.3, seed=0), start=from_model(plain), protect=(masks(plain, 0.5, seed=1),)).attach(plain)
    assert trainable(model) == trainable(plain) == (mask - other).kept
    for (_, own), (_, theirs) in zip(sparse_parameters(model), sparse_parameters(plain), strict=True):
        assert own.shape == theirs.shape


def test_going_on_trains_the_mask_and_leaves_every_other_bit() -> None:
    model = every()
    first = LoRI(mask=masks(model, 0.3, seed=0), start="fresh")
    first.attach(model)
    train(model)
    before = from_model(model)
    first.detach(model)
    second = masks(model, 0.3, seed=1)
    for protect in ((), (support(before),)):
        live = copy.deepcopy(model)
        plan = LoRI(mask=second, start="keep", protect=protect)
        plan.attach(live)
        assert torch.equal(live.eval()(IDS), model.eval()(IDS))
        train(live.train())
        after = from_model(live)
        for name in second:
            allowed = plan.allowed(name, tuple(second[name].shape))
            old, new = before.modules[name].B, after.modules[name].B
            assert torch.equal(old[~allowed], new[~allowed]) and (old[allowed] != new[allowed]).all()
            assert torch.equal(before.modules[name].A, after.modules[name].A)


# --- calibration from gradients ---------------------------------------------------------------------------------------


def test_gradient_scores_are_what_one_step_of_sgd_makes_of_b() -> None:
    model = tiny.model()
    LoRI(task="x").attach(model)
    batches = [tiny.collate(tiny.sentences()[at : at + 4]) for at in (0, 4, 8)]
    scores = gradient_scores(model, batches)
    assert all(p.grad is None for p in model.parameters())
    chosen = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for batch in batches:
        model(**batch).loss.backward()
    chosen.step()
    after = from_model(model)
    for name, score in scores.items():
        assert torch.allclose(after.modules[name].B, -score, atol=1e-6)
    mask = calibrate(scores, density=0.1)
    assert mask.kept == round(0.1 * mask.entries)
    with pytest.raises(ValueError, match="no batch"):
        gradient_scores(model, [])
    sparse = tiny.model()
    LoRI(mask=mask, start="fresh").attach(sparse)
    with pytest.raises(ValueError, match="sparse or frozen"):
        gradient_scores(sparse, batches)


def test_gradient_scores_take_batches_to_the_model() -> None:
    model = tiny.model().to("meta")
    LoRI(task="x", start="keep").attach(model)
    batch = tiny.collate(tiny.sentences()[:4])
    seen: list[str] = []

    def arrived(module: nn.Module, arguments: tuple, named: dict) -> None:
        seen.extend(value.device.type for value in named.values())
        raise InterruptedError  # on from here there would have to be numbers

    model.register_forward_pre_hook(arrived, with_kwargs=True)
    with pytest.raises(InterruptedError):
        gradient_scores(model, [batch])
    assert seen == ["meta"] * len(batch) and batch["input_ids"].device.type == "cpu"


def test_a_calibration_by_gradients_is_that_of_all_examples_at_once_whatever_the_dropout(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    torch.manual_seed(0)
    base = BertModel(BertConfig(num_hidden_layers=2, **size)).eval().requires_grad_(False)
    examples = [(torch.randint(32, (6,)), i % 3) for i in range(21)]

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack([ids for ids, _ in rows]), "labels": torch.tensor([of for _, of in rows])}

    def loss(outputs: Any, labels: Tensor, count: Any = None) -> Tensor:
        scores = outputs.last_hidden_state[:, 0, :3]
        return nn.functional.cross_entropy(scores, labels, reduction="sum") / (count or len(labels))

    def attached(dropout: float = 0.5) -> Any:
        return training(base, rank=2, target_modules=["query", "value"], dropout=dropout)

    told = {"calibrate": {"by": "gradients", "density": 0.3}}
    recipe = parse({"model": "m", "task": "t", "output": "o", "lori": told})
    bench = SimpleNamespace(task=SimpleNamespace(name="t"), training=examples, collate=collate, loss=loss)
    torch.manual_seed(9)
    found = plan_of(recipe, None, bench, attached, None, tmp_path).mask
    with attached(dropout=0.0) as model:
        LoRI(task="t").attach(model)
        wanted = calibrate(gradient_scores(model, [collate(examples)], loss=loss), density=0.3)
    assert found.kept == wanted.kept == (found & wanted).kept


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_gradient_scores_are_0_where_the_loss_does_not_reach() -> None:
    model = tiny.model()
    last = model.get_base_model().model.layers[-1]
    last.forward = lambda hidden, *args, **kwargs: hidden
    ids = torch.arange(6)[None]
    scores = gradient_scores(model, [{"input_ids": ids, "labels": ids}])
    unreached = [name for name in scores if f"layers.{tiny.LAYERS - 1}." in name]
    assert unreached == [name for name, score in scores.items() if not score.any()] != []


def test_a_refused_attach_changes_nothing() -> None:
    class Odd(nn.Linear):
        """A kind of B that cannot be made sparse."""

    model = every()
    for name, weight in model.named_parameters():
        if "lora_" in name and "B" in name:
            nn.init.ones_(weight)
    adapter = from_model(model)
    last = list(adapter.modules)[-1]
    short = replace(adapter.modules[last], A=adapter.modules[last].A[:2], B=adapter.modules[last].B[:, :2])
    wrong = replace(adapter, modules={**adapter.modules, last: short})
    mask = masks(model)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}

    def unchanged() -> None:
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(torch.equal(after[name], v) and after[name].requires_grad == r for name, (v, r) in before.items())

    with pytest.raises(ValueError, match=f"{last}: the A to start from is 2 x 2"):
        LoRI(start=wrong).attach(model)
    unchanged()
    model.base_model.model.head.lora_B["default"].__class__ = Odd
    with pytest.raises(UnsupportedKind, match="make a Odd sparse"):
        LoRI(mask=mask, start="fresh").attach(model)
    unchanged()


def test_the_sparse_b_of_an_inactive_adapter_is_trained_when_it_is_active() -> None:
    model = every()
    mask = masks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS))
    LoRI(mask=mask, start="fresh").attach(model, "second")
    assert not any(kept.requires_grad for _, kept in sparse_parameters(model))
    model.set_adapter("second")
    assert all(kept.requires_grad for _, kept in sparse_parameters(model))


def test_refused_models() -> None:
    model = every()
    with pytest.raises(ValueError, match="no LoRA adapter named 'other'"):
        LoRI().attach(model, "other")
    with pytest.raises(ValueError, match="this is one of hira"):
        LoRI().attach(get_peft_model(nn.Sequential(nn.Linear(4, 4)), HiraConfig(r=2, target_modules=["0"])))
    pissa = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    )
    with pytest.raises(UnsupportedKind, match="changes the base weights"):
        LoRI().attach(pissa)
    with pytest.raises(UnsupportedKind, match="changes the base weights"):
        LoRI().attach(nn.DataParallel(pissa))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says how eva, whose base stays as it was, takes less memory
        eva = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva")
        LoRI().attach(get_peft_model(nn.Sequential(nn.Linear(4, 4)), eva))
    mask = masks(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    few = Mask.of({n: mask[n] for n in mask if n != "head"})
    many = Mask.of({**{n: mask[n] for n in mask}, "tail": mask["head"]})
    turned = Mask.of({n: mask[n].T for n in mask})
    for bad, message in ((few, "has no module head"), (many, "module tail"), (turned, "B is")):
        with pytest.raises(ValueError, match=message):
            LoRI(mask=bad, start="fresh").attach(model)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "nothing is half attached"
        assert not any(isinstance(m, SparseDict) for m in model.modules())


# --- Trainer, CoTo, resume --------------------------------------------------------------------------------------------


def run(folder: Path, steps: int, stop: int | None = None, plan: Any = None, **options: Any) -> tuple[PeftModel, Mask]:
    model = tiny.model(dropout=0.1)
    mask = masks(model, 0.2)
    LoRI(mask=mask, seed=4, start="fresh").attach(model)

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class At(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise Stop

    chosen = FitOptions(
        **{
            "output": folder,
            "steps": steps,
            "batch_size": 4,
            "lr": 1e-2,
            "seed": 0,
            "weight_decay": 0.1,
            "save_every": 2,
        }
        | {"accumulate": 2, "resume": True}
        | options
    )
    with contextlib.suppress(Stop):
        fit(model, tiny.sentences(), collate=tiny.collate, options=chosen, plan=plan, callbacks=[At()])
    return model, mask


@pytest.mark.parametrize("coto", [False, True])
def test_resumed_training_ends_in_the_same_bits(tmp_path: Path, coto: bool) -> None:
    plan = CoTo(None, seed=1) if coto else None
    whole, mask = run(tmp_path / "whole", 7, plan=plan)
    run(tmp_path / "cut", 7, stop=5, plan=plan)
    resumed, _ = run(tmp_path / "cut", 7, plan=plan)
    a, b = from_model(whole), from_model(resumed)
    for name in mask:
        assert torch.equal(a.modules[name].B, b.modules[name].B) and torch.equal(a.modules[name].A, b.modules[name].A)
        assert not (a.modules[name].B[~mask[name]]).any()
    assert any(a.modules[name].B.any() for name in mask)


def test_the_checkpoint_of_a_sparse_run_is_an_ordinary_peft_folder_with_a_small_optimizer(tmp_path: Path) -> None:
    from loraloom.store import load

    model, mask = run(tmp_path, 4)
    saved = load(tmp_path / "checkpoint-4")
    assert all(torch.equal(saved.modules[n].B, from_model(model).modules[n].B) for n in mask)
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert sum(held["exp_avg"].numel() for held in state.values()) == mask.kept


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny.model()
        LoRI(mask=masks(model, 0.2), seed=4, start="fresh").attach(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        model(**tiny.collate(tiny.sentences()[:4])).loss.backward()
        grads.append([p.grad for _, p in sparse_parameters(model)])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo itself
def test_compiled() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    LoRI(mask=masks(model, 0.3), start="fresh").attach(model)
    x = torch.randn(3, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(x)
    out.sum().backward()
    grads = [p.grad.clone() for _, p in sparse_parameters(model)]
    model.zero_grad()
    model(x).sum().backward()
    assert torch.allclose(out, model(x)) and all(
        torch.allclose(g, p.grad) for g, (_, p) in zip(grads, sparse_parameters(model), strict=True)
    )
