"""MokA adapters in memory and on disk: one module a modality, packed exactly, damaged ones refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind, padded
from loraloom.experts import as_stored
from loraloom.integrations.peft import attached, from_model
from loraloom.layout import to_state_dict
from loraloom.masks import support
from loraloom.modalities import as_moka, plan_of, restricted, text_only
from loraloom.ops.arithmetic import scale
from loraloom.overview import cosines, summary
from loraloom.store import load, save
from loraloom.strategies.modality import MokA
from loraloom.strategies.sparse import LoRI, calibrate
from tiny_multimodal import image_batch, lively, tiny_llava

PLANS = {
    "one": MokA({"image": 1}, rank=2),
    "three": MokA({"image": 1, "audio": 2}, rank=3, alpha=5.0, weight={"image": 0.5, "audio": 2.0}),
    "shared": MokA({"image": 1, "video": 1, "audio": 2}, rank=2),
    "ranks": MokA({"image": 1, "audio": 2}, rank={"text": 3, "image": 2, "audio": 5}),
    "several-B": MokA({"image": 1}, rank=2, own="B"),
    "both": MokA({"image": 1, "audio": 2}, rank={"text": 1, "image": 3, "audio": 2}, own="both"),
    "official": MokA({"image": 1}, rank=2, logits="official", keys="after-last-modality"),
    "span": MokA({"image": 1}, rank=2, keys="span", span=(5, 6), tokens={"image": 30}),
}


def drawn(plan: MokA, names=("model.layers.0.q_proj", "model.layers.1.q_proj"), seed: int = 0, **config) -> Adapter:
    """An adapter of a plan with random factors, in memory."""
    chance = torch.Generator().manual_seed(seed)
    modules = {}
    for owner in names:
        a, b = (torch.randn(size, generator=chance) for size in ((plan.width, 7), (5, plan.width)))
        for group, rank in zip(plan.groups, plan.ranks, strict=True):
            own_a = a if plan.own == "B" else padded(torch.randn(7, rank, generator=chance), plan.width).T
            own_b = b if plan.own == "A" else torch.randn(5, plan.width, generator=chance)
            modules[f"{owner}[{group}]"] = Factors(B=own_b, A=own_a, scale=plan.scale)
    told = {"peft_type": "MOKA", "r": plan.width, "lora_alpha": plan.alpha, "moka": plan.to_json(), **config}
    return Adapter(told, modules)


def same(one: Adapter, other: Adapter) -> bool:
    if list(one.modules) != list(other.modules) or plan_of(one.config) != plan_of(other.config):
        return False
    pairs = [(one.modules[name], other.modules[name]) for name in one.modules]
    return all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and a.scale == b.scale for a, b in pairs)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, plan):
    made = drawn(plan)
    first = load(save(made, tmp_path / "one"))
    again = load(save(first, tmp_path / "two"))
    assert same(made, first)
    assert same(first, again)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    stored = as_stored(first).modules["model.layers.0.q_proj"]
    assert stored.A.shape == (plan.rows, 7)
    assert stored.B.shape == (5, plan.columns)


def test_the_folder_says_what_it_is_and_how_to_load_it(tmp_path):
    folder = save(drawn(PLANS["three"], task_type="CAUSAL_LM"), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOKA"
    assert MokA.from_json(config["moka"]) == PLANS["three"]
    card = (folder / "README.md").read_text()
    assert 'll.attach(model, "a")' in card
    assert "AutoModelForMultimodalLM" in card
    assert "PeftModel" not in card


def test_a_scale_that_the_configuration_does_not_say_goes_into_b_alone(tmp_path):
    made = drawn(PLANS["one"])
    twice = load(save(scale(made, 2.0), tmp_path / "a"))
    name = "model.layers.0.q_proj[image]"
    assert torch.equal(twice.modules[name].A, made.modules[name].A)
    assert torch.allclose(twice.modules[name].delta(), 2 * made.modules[name].delta())
    assert plan_of(twice.config).scale == plan_of(made.config).scale  # of the official code's logits


def test_norms_are_of_each_modality_and_a_shared_b_is_counted_once():
    made = drawn(PLANS["ranks"])
    told = summary(made)
    assert told["parameters"] == 2 * ((3 + 2 + 5) * 7 + 5 * 5)
    assert told["norm"] == pytest.approx(sum(one.norm() ** 2 for one in made.modules.values()) ** 0.5)
    assert [row["layer"] for row in told["layers"]] == ["model.layers.0", "model.layers.1"]
    assert cosines([made, made])[0][1] == pytest.approx(1.0)


# Damaged folders -----------------------------------------------------------------------------------------------------


def damaged(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    plan = changes.pop("moka_", {})
    config.update(changes)
    if plan:
        config["moka"].update(plan)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moka": None}, "needs its plan under moka, got None"),
        ({"moka": []}, "needs its plan under moka"),
        ({"moka": {}}, "modalities must number"),
        ({"moka_": {"modalities": None}}, "modalities must number"),
        ({"moka_": {"heat": 1}}, "heat"),
        ({"moka_": {"rank": 3}}, "r is 2, the plan under moka has rank 3"),
        ({"moka_": {"rank": "2"}}, "rank must be a whole number"),
        ({"moka_": {"attention": "self"}}, "self"),
        ({"r": 4}, "r is 4, the plan under moka has rank 2"),
        ({"moka_": {"own": "both"}}, "A (4, 7) and B (5, 2); the plan asks for 4 rows and 4 columns"),
        ({"moka_": {"modalities": {"image": 1, "audio": 2}}}, "A (4, 7) and B (5, 2); the plan asks for 6 rows"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_a_damaged_configuration_is_refused_in_one_line_that_names_the_file(tmp_path, changes, words):
    folder = damaged(save(drawn(PLANS["one"]), tmp_path / "a"), **changes)
    with pytest.raises(ValueError) as caught:
        load(folder)
    text = str(caught.value)
    assert words in text
    assert str(folder) in text
    assert len(text.splitlines()) == 1


def test_a_missing_factor_and_nan_are_refused(tmp_path):
    folder = save(drawn(PLANS["one"]), tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.model.layers.0.q_proj.lora_A.weight"
    save_file({name: value for name, value in tensors.items() if name != key}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"module model\.layers\.0\.q_proj has no A"):
        load(folder)
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.q_proj\.lora_A\.weight has NaN"):
        load(folder).modules["model.layers.0.q_proj[text]"]


def test_modalities_that_do_not_go_back_into_one_layer_are_refused(tmp_path):
    made = drawn(PLANS["one"])
    text, image = "model.layers.0.q_proj[text]", "model.layers.0.q_proj[image]"
    other = Factors(B=made.modules[image].B + 0.01, A=made.modules[image].A, scale=made.modules[image].scale)
    longer = Factors(B=torch.ones(5, 4), A=torch.ones(4, 7), scale=made.modules[image].scale)
    without = {name: factors for name, factors in made.modules.items() if name != image}
    for modules, words in (
        ({**made.modules, image: other}, "different B's"),
        ({**made.modules, image: longer}, r"q_proj\[image\] has rank 4, the plan says 2"),
        (without, r"needs the modalities text, image; it has model\.layers\.0\.q_proj\[text\]"),
    ):
        with pytest.raises(AdapterMismatch, match=words):
            save(Adapter(made.config, modules), tmp_path / "a")
        assert not (tmp_path / "a").exists()
    assert text in without


# Other kinds ---------------------------------------------------------------------------------------------------------


def test_text_only_is_a_lora_of_the_text_part(tmp_path):
    made = drawn(PLANS["ranks"])
    lora = load(save(text_only(made), tmp_path / "a"))
    assert lora.kind == "lora"
    assert lora.shape("model.layers.0.q_proj").rank == 3
    for name, factors in lora.modules.items():
        assert torch.allclose(factors.delta(), made.modules[f"{name}[text]"].delta(), atol=1e-5)
    with pytest.raises(UnsupportedKind, match=r"this is for MokA adapters, .* not for one of kind lora"):
        text_only(lora)
    with pytest.raises(UnsupportedKind, match="does nothing to text: it is on for image alone"):
        text_only(restricted(made, ["image"]))


def test_a_lora_is_taken_as_moka_where_it_is_one():
    one = Factors(B=torch.ones(3, 2), A=torch.ones(2, 4))
    lora = Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 4}, {"q": one})
    moka = as_moka(lora, {"image": 1, "audio": 2})
    assert list(moka.modules) == ["q[text]", "q[image]", "q[audio]"]
    assert as_stored(moka).modules["q"].A.shape == (6, 4)
    assert plan_of(moka.config).attention == "none"
    strange = ({"use_dora": True}, {"peft_type": "HIRA"}, {"rank_pattern": {"q": 1}}, {"alpha_pattern": {"q": 1}})
    for config in (*strange, {"lora_bias": True}):
        with pytest.raises(UnsupportedKind, match="only a LoRA of one rank and scale"):
            as_moka(Adapter({**lora.config, **config}, lora.modules), {"image": 1})
    with pytest.raises(UnsupportedKind, match="is an expert"):
        as_moka(Adapter(lora.config, {"experts[0/2]": one}), {"image": 1})
    with pytest.raises(UnsupportedKind, match="this is for MokA adapters"):
        restricted(lora, ["text"])
    with pytest.raises(ValueError, match="video"):
        restricted(moka, ["video"])


def test_a_live_adapter_and_its_packed_tensors_are_the_same():
    live = lively(PLANS["one"].wrap(tiny_llava(), ["q_proj"]))
    taken = dict(to_state_dict(from_model(live), bake=False))
    held = {name: value for name, value in live.state_dict().items() if "lora_" in name}
    assert len(taken) == len(held) == 4
    assert all(torch.equal(taken[name.replace(".default", "")], value) for name, value in held.items())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_mask_is_over_b_as_it_is_stored(plan):
    made = drawn(plan)
    mask = calibrate(made, density=0.5)
    assert mask.kept == plan.columns * 5  # of two layers
    for name, stored in as_stored(made).modules.items():
        assert mask[name].shape == stored.B.shape
        assert stored.B.abs()[mask[name]].min() > stored.B.abs().median() / 2


def test_lori_takes_a_moka_adapter(tmp_path):
    """A's are drawn and frozen, one a modality; B is trained where the mask keeps it."""
    plan = MokA({"image": 1}, rank=2, dropout=0.0)
    mask = calibrate(from_model(lively(plan.wrap(tiny_llava(), ["q_proj"]))), density=0.25)
    live = plan.wrap(tiny_llava(), ["q_proj"])
    lori = LoRI(mask=mask, start="fresh", seed=3)
    lori.attach(live)
    trained = [parameter for parameter in live.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == mask.kept
    live(**image_batch()).loss.backward()
    for parameter in trained:
        parameter.data -= 0.1 * parameter.grad
    with torch.no_grad():
        want = live.eval()(**image_batch()).logits
    lori.detach(live)
    live.save_pretrained(tmp_path / "a")
    held = load(tmp_path / "a")
    assert support(held).kept <= mask.kept
    assert len({held.modules[name].A.sum().item() for name in held.modules}) == len(held.modules)
    with attached(tiny_llava(), held) as again, torch.no_grad():
        assert torch.allclose(again(**image_batch()).logits, want, atol=1e-6)
