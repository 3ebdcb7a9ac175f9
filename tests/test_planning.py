"""What is planned on the meta device is what a real step on the CPU does: weights, operations, memory, what is sent."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import loraloom as ll
from loraloom import planning
from loraloom.cli import app
from loraloom.integrations import shapes, trainees
from loraloom.integrations.gates import Gates
from loraloom.integrations.peft import from_model
from loraloom.masks import save_mask
from loraloom.recipe import Recipe, parse

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=256, num_key_value_heads=2, architectures=["LlamaForCausalLM"], **SIZE
    ),
    "bert": transformers.BertConfig(
        vocab_size=256, attention_probs_dropout_prob=0.0, architectures=["BertModel"], **SIZE
    ),
    "vit": transformers.ViTConfig(image_size=32, patch_size=8, architectures=["ViTModel"], **SIZE),
}
FAMILY = {"llama": "causal", "bert": "encoder", "vit": "vision"}
BATCH = 8
SEEN: dict[tuple, Any] = {}
KINDS: dict[str, dict[str, Any]] = {
    "some": {"adapter": {"target_modules": ["v_proj"]}},
    "dora": {"adapter": {"kind": "dora"}},
    "hira": {"adapter": {"kind": "hira"}},
    "moka": {"adapter": {"kind": "moka"}, "moka": {"modalities": {"image": 1, "audio": 2}, "attention": "none"}},
    "lori": {"lori": {}},
    "none": {"adapter": {"kind": "none", "modules_to_save": ["lm_head"]}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    for name, folder in made.items():
        CONFIGS[name].save_pretrained(folder)
    return {name: str(folder) for name, folder in made.items()}


@pytest.fixture(autouse=True)
def _seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pass is watched once for all tests: it takes a second."""
    watch = trainees.traced

    def traced(recipe: Recipe, *, batch: int, unit: str = "layer") -> Any:
        key = (recipe.model_dump_json(exclude={"train", "strategy"}), recipe.train.bf16, batch, unit)
        if key not in SEEN:
            SEEN[key] = watch(recipe, batch=batch, unit=unit)
        return SEEN[key]

    monkeypatch.setattr(trainees, "traced", traced)


def recipe_of(folder: str, checkpointing: bool = False, **more: Any) -> Recipe:
    train = {"batch_size": BATCH, "gradient_checkpointing": checkpointing, **more.pop("train", {})}
    data = {"max_length": 32, "image_size": 32}
    return parse({"model": folder, "task": "digits", "output": "x", "data": data, "train": train, **more})


class Peak(TorchDispatchMode):
    """The most bytes of storage that were alive at once."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: dict[int, Any] = {}
        for one in held:
            self.add(one)

    def add(self, one: Tensor) -> None:
        storage = one.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self.add(one)
        return made


def measured(name: str, recipe: Recipe, attention: str, state: tuple[bool, ...] | None = None) -> tuple[int, int, int]:
    """Trained weights, operations and peak bytes of the forward and backward pass of a real model."""
    config = transformers.AutoConfig.from_pretrained(recipe.model)
    auto = transformers.AutoModelForCausalLM if name == "llama" else transformers.AutoModel
    model: nn.Module = auto.from_config(config, attn_implementation=attention).requires_grad_(False)
    empty = shapes.inputs(model, FAMILY[name], batch=BATCH, length=32, image_size=32)
    given = {key: torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) else x for key, x in empty.items()}
    if recipe.moka is not None:
        given |= trainees._tokens(BATCH, 32, 2)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    with trainees.trainee(model, recipe) as trained:
        trained.train()
        weights = [weight for weight in trained.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights)
        gates = None if recipe.adapter.kind == "none" else Gates(trained)
        if gates is not None and state is not None:
            gates.set(state)

        def step() -> None:
            output = trained(**given)
            (output.loss if name == "llama" else output.last_hidden_state.pow(2).sum()).backward()

        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with FlopCounterMode(display=False) as counter:
            step()
        moments = [x for held in optimizer.state.values() for x in held.values()]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        with Peak([*trained.parameters(), *gradients, *moments]) as peak:
            step()
        if gates is not None:
            gates.open()
    return sum(weight.numel() for weight in weights), counter.get_total_flops(), peak.most


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_operations_of_every_kind(folders: dict[str, str], kind: str) -> None:
    recipe = recipe_of(folders["llama"], **KINDS[kind])
    made = ll.plan(recipe)
    trained, flops, _ = measured("llama", recipe, "eager")
    assert made.parameters.trainable == trained
    assert made.flops.forward + made.flops.backward == pytest.approx(flops, rel=0.002)
    assert made.flops.mean == pytest.approx(made.flops.forward + made.flops.backward, rel=1e-12)  # nothing is off


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("llama", True), ("bert", True), ("vit", False)])
def test_operations_and_peak_memory_of_every_family(folders: dict[str, str], name: str, checkpointing: bool) -> None:
    recipe = recipe_of(folders[name], checkpointing)
    made = ll.plan(recipe)
    trained, flops, _ = measured(name, recipe, "eager")
    assert made.parameters.trainable == trained
    peak = measured(name, recipe, "sdpa")[2]
    planned = made.flops.forward + made.flops.backward + checkpointing * made.flops.recomputed
    assert planned == pytest.approx(flops, rel=0.002)
    assert made.peak == made.memory.total(checkpointing) == pytest.approx(peak, rel=0.15)
    assert made.memory.total(True) < 0.7 * made.memory.total(False)


@pytest.mark.parametrize(
    ("state", "checkpointing"),
    [((False, True, False), True), ((False, False, True), True), ((False, True, True), False)],
)
def test_operations_with_units_switched_off(folders: dict[str, str], state: tuple, checkpointing: bool) -> None:
    recipe = recipe_of(folders["llama"], checkpointing)
    seen = trainees.traced(recipe, batch=BATCH)
    blocks = seen.blocks if checkpointing else None
    planned = planning._cost(seen.flops, {tuple(map(float, state)): 1.0}, 3, blocks)
    assert planned == pytest.approx(measured("llama", recipe, "eager", state)[1], rel=0.002)


@pytest.mark.parametrize("p", [(0.3, 0.6, 0.9), (1e-12, 1e-12, 1e-12), (1.0, 1.0, 1.0)])
def test_the_mean_over_the_schedule_is_the_sum_over_all_states(folders: dict[str, str], p: tuple[float, ...]) -> None:
    seen = trainees.traced(recipe_of(folders["llama"]), batch=BATCH)
    weighed, total = 0.0, 0.0
    for state in product([0.0, 1.0], repeat=3):
        chance = float(torch.tensor([x if on else 1 - x for x, on in zip(p, state, strict=True)]).double().prod())
        if any(state):
            total += chance
            weighed += chance * planning._cost(seen.flops, {state: 1.0}, 3, seen.blocks)
    assert planning._cost(seen.flops, {p: 1.0}, 3, seen.blocks) == pytest.approx(weighed / total, rel=1e-6)


@pytest.mark.parametrize("options", [{"nesting": "high-to-low"}, {"unit": "projection"}])
def test_the_mean_is_that_of_the_draws(folders: dict[str, str], options: dict[str, str]) -> None:
    """CoTo's own draws, priced one by one, against the expectation; the first step's limit p = 0 included."""
    recipe = recipe_of(folders["llama"], strategy={"name": "coto", **options}, train={"steps": 4})
    coto: Any = recipe.plan()
    seen = trainees.traced(recipe, batch=BATCH, unit=coto.unit)
    draws = []
    for step, seed in product(range(4), range(40)):
        drawn = replace(coto, seed=seed).active(step, seen.units)
        draws.append(planning._cost(seen.flops, {tuple(map(float, drawn)): 1.0}, len(seen.units), None))
    made = ll.plan(recipe)
    error = 4 * float(torch.tensor(draws).double().std()) / len(draws) ** 0.5
    assert made.flops.mean == pytest.approx(sum(draws) / len(draws), abs=error)
    assert made.flops.mean < made.flops.forward + made.flops.backward
    assert made.units == len(seen.units)


def test_gradients_sent_are_those_of_ddp(folders: dict[str, str]) -> None:
    recipe = recipe_of(folders["llama"])
    config = transformers.AutoConfig.from_pretrained(recipe.model)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    sent = []

    def note(_, bucket):  # DDP looks at annotations, which it wants as objects
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with trainees.trainee(model, recipe) as trained:
            parallel = nn.parallel.DistributedDataParallel(trained.train())
            parallel.register_comm_hook(None, note)
            ids = torch.zeros(2, 8, dtype=torch.long)
            parallel(input_ids=ids, labels=ids).loss.backward()
    finally:
        dist.destroy_process_group()
    for world in (2, 8):
        made = ll.plan(recipe, world=world)
        assert made.communication.gradients == 2 * (world - 1) / world * sum(sent)
        assert made.communication.weights == 0


def test_what_is_sharded_is_divided(folders: dict[str, str]) -> None:
    recipe = recipe_of(folders["llama"], strategy={"name": "coto"})
    one = ll.plan(recipe, world=8)
    parts = {name: ll.plan(recipe, world=8, sharding=name) for name in planning.SHARDINGS}
    split = {
        name: (
            round(one.memory.optimizer / made.memory.optimizer),
            round(one.memory.gradients / made.memory.gradients),
            round(one.memory.weights / made.memory.weights),
        )
        for name, made in parts.items()
    }
    assert split == {"ddp": (1, 1, 1), "zero1": (8, 1, 1), "zero2": (8, 8, 1), "zero3": (8, 8, 8), "fsdp": (8, 8, 8)}
    assert parts["fsdp"].memory.gathered > 0 == parts["zero2"].memory.gathered
    everything = one.memory.weights + one.memory.adapter
    assert 7 / 8 * everything < parts["fsdp"].communication.weights < 2 * 7 / 8 * everything
    for made in parts.values():
        assert 0 < made.communication.active_gradients < made.communication.gradients
    assert one.flops.forward * 8 == ll.plan(recipe).flops.forward  # the ranks share the examples of a step


def test_lori_with_a_density_trains_that_share(folders: dict[str, str]) -> None:
    dense = ll.plan(recipe_of(folders["llama"], lori={}))
    sparse = ll.plan(recipe_of(folders["llama"], lori={"calibrate": {"density": 0.1}}))
    assert sparse.parameters.trainable == round(0.1 * dense.parameters.trainable)
    assert sparse.parameters.frozen == dense.parameters.frozen > 0
    assert sparse.memory.optimizer == pytest.approx(dense.memory.optimizer / 10, rel=0.01)


def test_protected_entries_are_not_trained(folders: dict[str, str], tmp_path: Path) -> None:
    dense = recipe_of(folders["llama"], lori={})
    model, _ = shapes.bare(dense.model)
    with trainees.trainee(model, dense) as live:
        sizes = {
            path: held.lora_B["default"].weight.shape
            for path, held in live.get_base_model().named_modules()
            if hasattr(held, "lora_B")
        }
    drawn = torch.Generator().manual_seed(0)
    first, second = (
        ll.calibrate({n: torch.rand(size, generator=drawn) for n, size in sizes.items()}, density=density)
        for density in (0.3, 0.2)
    )
    files = [str(save_mask(mask, tmp_path / f"{i}.safetensors")) for i, mask in enumerate((first, second))]

    def trained(lori: dict[str, Any]) -> int:
        return ll.plan(recipe_of(folders["llama"], lori=lori, protect=[files[1]])).parameters.trainable

    entries = first.entries
    assert trained({}) == entries - second.kept
    assert trained({"mask": files[0]}) == (first - second).kept < first.kept
    assert trained({"calibrate": {"density": 0.3, "exclude": [files[1]]}}) == round(0.3 * entries)
    assert trained({"calibrate": {"density": 0.3}}) == pytest.approx(0.3 * 0.8 * entries, abs=1)


@pytest.mark.parametrize("given", ["calibrate", "mask"])
@pytest.mark.parametrize("more", [{}, {"kind": "dora"}, {"modules_to_save": ["lm_head"]}])
def test_a_mask_of_lori_thins_out_b_alone(folders: dict[str, str], tmp_path: Path, more: dict, given: str) -> None:
    """Trained weights, their bytes and what is sent, against the model that is trained."""
    dense = recipe_of(folders["llama"], adapter=more, lori={})
    config = transformers.AutoConfig.from_pretrained(dense.model)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    with trainees.trainee(model, dense) as live:
        b = [one for name, one in live.named_parameters() if "lora_B" in name]
        entries = sum(one.numel() for one in b)
        for one in b:
            nn.init.normal_(one)
        mask = ll.calibrate(from_model(live), density=0.1)
        file = save_mask(mask, tmp_path / "mask.safetensors")
        ll.LoRI(mask=mask, start="fresh").attach(live)
        trained = [one for one in live.parameters() if one.requires_grad]
        adapter = [one for name, one in live.named_parameters() if "lora_" in name or one.requires_grad]
        adapter += [one for name, one in live.named_buffers() if name.endswith("_index")]
        own = sum(one.numel() for one in trained) - live.get_output_embeddings().weight.numel() * (
            "modules" in str(more)
        )
    made, without = (
        ll.plan(recipe_of(folders["llama"], adapter=more, lori=lori, strategy={"name": "coto"}), world=2)
        for lori in ({"calibrate": {"density": 0.1}} if given == "calibrate" else {"mask": str(file)}, {})
    )
    size = sum(one.nbytes for one in trained)
    assert made.parameters.trainable == sum(one.numel() for one in trained) > mask.kept * (1 + bool(more)) - 1
    assert made.memory.optimizer == 2 * made.memory.gradients == 2 * size
    assert made.memory.adapter == sum(one.nbytes for one in adapter)
    assert made.memory.activations - without.memory.activations == 4 * entries  # B as it is laid out for a pass
    assert made.communication.gradients == size
    dense_own = own + entries - mask.kept
    unsent, unsent_dense = (one.communication.gradients - one.communication.active_gradients for one in (made, without))
    assert unsent == pytest.approx(unsent_dense * own / dense_own, rel=1e-6)


def test_bf16_keeps_the_base_twice(folders: dict[str, str]) -> None:
    plain, mixed = (ll.plan(recipe_of(folders["llama"], train={"bf16": on})) for on in (False, True))
    assert mixed.memory.weights == plain.memory.weights == 4 * plain.parameters.base
    assert mixed.flops.forward == plain.flops.forward
    half = ll.plan(recipe_of(folders["llama"], dtype="bfloat16"))
    assert half.memory.weights == 2 * half.parameters.base
    assert mixed.memory.activations == half.memory.activations + 2 * half.parameters.base


@pytest.mark.parametrize(("dtype", "size"), [("int8", 1.0), ("nf4", 0.5159)])
def test_a_quantised_base(folders: dict[str, str], dtype: str, size: float) -> None:
    plain, small = (ll.plan(recipe_of(folders["llama"], dtype=one)) for one in ("float32", dtype))
    linear = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert plain.memory.weights - small.memory.weights == pytest.approx((4 - size) * linear, rel=1e-3)
    assert (small.flops, small.memory.activations) == (plain.flops, plain.memory.activations)


def test_an_adapter_that_is_trained_on(folders: dict[str, str], tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folders["llama"])
    model = transformers.AutoModelForCausalLM.from_config(config)
    get_peft_model(model, LoraConfig(r=3, target_modules=["v_proj"])).save_pretrained(tmp_path / "first")
    made = ll.plan(recipe_of(folders["llama"], continue_from=str(tmp_path / "first")))
    assert made.parameters.trainable == 3 * 3 * (64 + 32)
    more = {"continue_from": str(tmp_path / "first"), "adapter": {"modules_to_save": ["lm_head"]}}
    made = ll.plan(recipe_of(folders["llama"], **more))
    assert made.parameters.trainable == 3 * 3 * (64 + 32) + 256 * 64


@pytest.mark.parametrize("saved", [[], ["lm_head"]])
def test_a_moka_adapter_that_is_trained_on_is_planned_as_a_fresh_one(
    folders: dict[str, str], tmp_path: Path, saved: list[str]
) -> None:
    told = {"modalities": {"image": 1, "audio": 2}}
    adapter = {"kind": "moka", "rank": 3, "target_modules": ["v_proj"], "modules_to_save": saved}
    fresh = recipe_of(folders["llama"], adapter=adapter, moka=told)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folders["llama"]))
    ll.MokA(**told, rank=3).wrap(model, ["v_proj"], modules_to_save=saved).save_pretrained(tmp_path / "first")
    again = recipe_of(folders["llama"], continue_from=str(tmp_path / "first"), adapter={"dropout": 0.0})
    assert ll.plan(again) == ll.plan(fresh)


def test_the_command(folders: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {folders['vit']}\ntask: digits\noutput: x\ndata: {{image_size: 32}}\n")
    done = CliRunner().invoke(app, ["plan", str(file), "--world", "2", "--sharding", "zero2", "--json"])
    told = json.loads(done.stdout)
    assert (told["world"], told["sharding"], told["units"]) == (2, "zero2", 3)  # three layers, no pooler
    assert told["memory"]["peak_checkpointed"] < told["memory"]["peak"]
    shown = CliRunner().invoke(app, ["plan", str(file)])
    assert shown.exit_code == 0 and "trained weights" in shown.stdout


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ({"world": 0}, {}, "world must be a whole number from 1 on, got 0"),
        ({"world": 3}, {}, "8 examples a step cannot be split over 3 processes"),
        ({"sharding": "zero"}, {}, "sharding 'zero' is not known"),
        ({}, {"folder": "nobody/nothing"}, "model nobody/nothing: no model folder"),
        ({}, {"adapter": {"target_modules": ["nope"]}}, "adapter.target_modules: Target modules"),
        ({}, {"strategy": {"name": "coto", "unit": "zzz+"}}, "unit 'zzz+' matches none"),
    ],
)
def test_refused_in_one_line(folders: dict[str, str], options: dict, more: dict, said: str) -> None:
    told = {"folder": folders["llama"], **more}
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        ll.plan(recipe_of(**told), **options)
    assert "\n" not in str(caught.value)
