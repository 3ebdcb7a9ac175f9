"""Live MokA adapters to folders and back, by PEFT, the store and HF Trainer; plain PEFT refuses to load them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import loraloom as ll
from loraloom.adapter import Adapter, AdapterMismatch, UnsupportedKind
from loraloom.integrations.peft import attached, from_model
from loraloom.modalities import as_moka, plan_of
from loraloom.strategies.modality import MokA
from tiny_multimodal import image_batch, lively, tiny_llava, tiny_qwen_vl, tiny_whisper, without

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TARGETS = ["q_proj", "down_proj"]
BATCH = without(image_batch(), "labels")
PLANS = {
    "A": MokA({"image": 1}, rank=2),
    "B": MokA({"image": 1}, rank=2, own="B"),
    "both": MokA({"image": 1}, rank=2, own="both"),
    "ranks": MokA({"image": 1, "audio": 2}, rank={"text": 3, "image": 2, "audio": 5}),
    "ranks-of-both": MokA({"image": 1}, rank={"text": 3, "image": 2}, own="both"),
    "shared": MokA({"image": 1, "video": 1, "audio": 2}, rank=2, weight={"image": 0.5, "video": 0.5, "audio": 1.0}),
    "official": MokA({"image": 1}, rank=2, alpha=7.0, logits="official", attention="text-as-query"),
    "active": MokA({"image": 1}, rank=2, active=("image",)),
}


def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or BATCH)).logits


def trained(plan: MokA, base: nn.Module | None = None, seed: int = 1, **options: Any) -> Any:
    live = plan.wrap(tiny_llava() if base is None else base, TARGETS, **options)
    for name, parameter in lively(live, seed).named_parameters():
        if parameter.requires_grad and "lora_" not in name:  # whole saved modules
            parameter.data.mul_(1.5)
    return live


def equal(one: Adapter, other: Adapter) -> bool:
    unlike = ("target_modules", "init_lora_weights")  # a set in any order; and what is loaded is not started
    told = [{key: value for key, value in a.config.items() if key not in unlike} for a in (one, other)]
    if list(one.modules) != list(other.modules) or list(one.extras) != list(other.extras) or told[0] != told[1]:
        return False
    pairs = [(one.modules[name], other.modules[name]) for name in one.modules]
    return all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and a.scale == b.scale for a, b in pairs) and all(
        torch.equal(one.extras[name], other.extras[name]) for name in one.extras
    )


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_saved_adapter_gives_the_logits_of_the_live_one_bit_for_bit(tmp_path, plan):
    live = trained(plan, modules_to_save=["multi_modal_projector"])
    want = logits(live)
    assert not torch.equal(want, logits(tiny_llava()))
    live.save_pretrained(tmp_path / "peft")
    held = ll.load(tmp_path / "peft")
    assert plan_of(held.config) == plan
    assert len(held.extras) == 4
    assert equal(held, from_model(live))
    ll.save(held, tmp_path / "ours")
    base = tiny_llava()
    for adapter in (held, ll.load(tmp_path / "ours"), from_model(live)):
        with attached(base, adapter) as model:
            assert torch.equal(logits(model), want)
    assert torch.equal(logits(base), logits(tiny_llava()))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_base_may_be_of_16_bits(tmp_path):
    base = tiny_llava().bfloat16()
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in BATCH.items()}
    live = trained(PLANS["A"], base)
    live.save_pretrained(tmp_path / "a")
    with attached(tiny_llava().bfloat16(), ll.load(tmp_path / "a")) as model:
        assert torch.equal(logits(model, **batch), logits(live, **batch))


def test_factors_of_16_bits_stay_so_on_disk_and_are_held_in_32(tmp_path):
    live = trained(PLANS["A"])
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    live.save_pretrained(tmp_path / "a")
    held = ll.load(ll.save(ll.load(tmp_path / "a"), tmp_path / "b"))
    assert {factors.A.dtype for factors in held.modules.values()} == {torch.bfloat16}
    live.base_model._cast_adapter_dtype(adapter_name="default", autocast_adapter_dtype=True)
    with attached(tiny_llava(), held) as model:
        assert torch.equal(logits(model), logits(live))


@pytest.mark.parametrize("make", [tiny_qwen_vl, tiny_whisper])
def test_other_models(tmp_path, make):
    if make is tiny_whisper:
        batch: Any = {"input_features": torch.randn(1, 8, 16), "decoder_input_ids": torch.arange(3, 8)[None]}
        live = lively(MokA({"audio": 1}, rank=2, attention="none").wrap(make(), ["q_proj", "fc1"]))
    else:
        batch = {
            "input_ids": torch.arange(3, 12)[None],
            "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0]]),
        }
        live = lively(MokA({"image": 1}, rank=2).wrap(make(), TARGETS))
        batch = {"input_ids": batch["input_ids"], "modality_ids": batch["mm_token_type_ids"]}
    want = logits(live, **batch)
    live.save_pretrained(tmp_path / "a")
    with attached(make(), ll.load(tmp_path / "a")) as model:
        assert torch.equal(logits(model, **batch), want)


# Going on ------------------------------------------------------------------------------------------------------------


def test_attached_for_good_it_generates_and_saves_the_same(tmp_path):
    trained(PLANS["A"], modules_to_save=["multi_modal_projector"]).save_pretrained(tmp_path / "a")
    live = ll.attach(tiny_llava(), tmp_path / "a")
    assert isinstance(live, PeftModel)
    assert not [name for name, parameter in live.named_parameters() if parameter.requires_grad]
    told = live.generate(**BATCH, max_new_tokens=3, do_sample=False)
    assert told.shape[1] == BATCH["input_ids"].shape[1] + 3
    live.save_pretrained(tmp_path / "b")
    assert equal(ll.load(tmp_path / "a"), ll.load(tmp_path / "b"))


def test_trainable_it_learns_what_the_first_model_would_have(tmp_path):
    first = trained(PLANS["ranks"], modules_to_save=["multi_modal_projector"])
    first.save_pretrained(tmp_path / "a")
    second = ll.attach(tiny_llava(), ll.load(tmp_path / "a"), trainable=True)
    names = [[name for name, p in live.named_parameters() if p.requires_grad] for live in (first, second)]
    assert sorted(names[0]) == sorted(names[1])
    for live in (first, second):
        live.eval()  # no dropout
        steps = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=0.1)
        live(**image_batch()).loss.backward()
        steps.step()
    assert equal(from_model(first), from_model(second))
    assert not equal(from_model(second), ll.load(tmp_path / "a"))


def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    trained(PLANS["A"]).save_pretrained(tmp_path / "a")
    held = ll.load(tmp_path / "a")
    bare = tiny_whisper()
    before = [name for name, _ in bare.named_modules()]
    with pytest.raises(AdapterMismatch, match=r"language_model\.layers\.0.*is not in the model"):
        ll.attach(bare, held)
    assert [name for name, _ in bare.named_modules()] == before
    live = ll.attach(tiny_llava(), held)
    with pytest.raises(ValueError, match="already has adapters"):
        ll.attach(live, held)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.batch = image_batch(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {name: value[at] for name, value in self.batch.items()}


def test_a_trainer_resumes_from_its_checkpoint_exactly(tmp_path):
    from transformers import Trainer, TrainingArguments

    def run(resume: str | None = None) -> Adapter:
        torch.manual_seed(0)
        plan = MokA({"image": 1}, rank=2, dropout=0.1)
        live = plan.wrap(tiny_llava(), TARGETS, modules_to_save=["multi_modal_projector"])
        options: Any = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}
        quiet: Any = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        trainer = Trainer(live, TrainingArguments(tmp_path, **options, **quiet), train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume)
        return from_model(live)

    whole = run()
    half = ll.load(tmp_path / "checkpoint-2")
    assert not equal(whole, half)
    assert equal(run(str(tmp_path / "checkpoint-2")), whole)


# Plain PEFT ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moka") / "a"
    trained(PLANS["A"]).save_pretrained(path)
    return path


LOADERS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_llava(), folder),
    "PeftConfig": PeftConfig.from_pretrained,
    "Transformers": lambda folder: tiny_llava().load_adapter(str(folder)),
    "beside another": lambda folder: get_peft_model(
        tiny_llava(), LoraConfig(r=2, target_modules=["q_proj"])
    ).load_adapter(folder, "second"),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_pefts_own_loaders_name_the_call_that_loads_it(folder, loader):
    with pytest.raises(UnsupportedKind, match=r"a MokA adapter.*loraloom.*ll\.attach\(model, folder\)"):
        loader(folder)


def test_without_loraloom_peft_refuses_the_kind_by_name(folder):
    script = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "KeyError: 'MOKA'"


def test_taken_for_a_lora_its_tensors_do_not_fit(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    plain = LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=TARGETS)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_llava(), folder, config=plain)


# A LoRA as MokA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"layers_to_transform": [1], "layers_pattern": "layers"}]
)
def test_a_lora_taken_as_moka_gives_its_logits(options):
    targets = ["up_proj"] if "layers_pattern" in options else r".*language.*q_proj"  # none of the image's encoder
    live = lively(get_peft_model(tiny_llava(), LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)))
    lora = from_model(live)
    with attached(tiny_llava(), as_moka(lora, {"image": 1})) as model:
        assert torch.allclose(logits(model), logits(live), atol=1e-5)
    with attached(tiny_llava(), None) as model:
        assert not torch.allclose(logits(model), logits(live), atol=1e-2)


def test_a_lora_of_more_than_the_language_model_is_no_moka():
    live = get_peft_model(tiny_llava(), LoraConfig(r=2, target_modules="all-linear"))
    with (
        pytest.raises(
            UnsupportedKind, match=r"vision_tower.* is outside of the language model \(model\.language_model\)"
        ),
        attached(tiny_llava(), as_moka(from_model(live), {"image": 1})),
    ):
        pass


def test_folded_for_text_it_gives_the_live_logits_on_text(tmp_path):
    base = tiny_llava()
    base.save_pretrained(tmp_path / "base")
    live = trained(PLANS["ranks"])
    live.save_pretrained(tmp_path / "a")
    adapter = ll.load(tmp_path / "a")
    with pytest.raises(UnsupportedKind, match=r"cannot fold MokA adapters.*--text-only \(text_only=True\)"):
        ll.fold([adapter], tmp_path / "base", tmp_path / "folded")
    folded = ll.fold([adapter], tmp_path / "base", tmp_path / "folded", weights=[1.0], text_only=True)
    from transformers import LlavaForConditionalGeneration

    text = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
    read = LlavaForConditionalGeneration.from_pretrained(folded)
    assert torch.allclose(logits(read, **text), logits(live, **text), atol=1e-5)
    assert not torch.allclose(logits(read), logits(live), atol=1e-2)  # what it does to images is lost
    record = json.loads((folded / "loraloom.json").read_text())
    assert record["arguments"]["text_only"] is True
    assert record["inputs"][0]["operation"] == "text only"
    assert record["inputs"][0]["inputs"][0]["sha256"]
    lora = Adapter({"peft_type": "LORA"}, adapter.modules)
    with pytest.raises(UnsupportedKind, match=r"this is for MokA adapters, .* not for one of kind lora"):
        ll.fold([adapter, lora], tmp_path / "base", tmp_path / "other", text_only=True)
    assert not (tmp_path / "other").exists()
