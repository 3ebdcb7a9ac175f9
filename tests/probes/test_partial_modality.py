"""The partial-modality probe on a live model: the update is on for just the tokens that it says, and what is told."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import loraloom as ll
from loraloom.adapter import Adapter, UnsupportedKind
from loraloom.integrations import statistics
from loraloom.integrations.peft import attached, from_model
from loraloom.modalities import as_moka, own_plan, restricted
from loraloom.probes.partial_modality import PartialModality
from loraloom.probing import partial_modality_report, partial_modality_report_of
from loraloom.report import Report
from loraloom.strategies.modality import MokA
from tiny_multimodal import IMAGE, image_batch, lively, tiny_llava

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LAYER = "model.language_model.layers.0.self_attn.q_proj"
BATCH = image_batch()


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny_llava()


@pytest.fixture(scope="module")
def moka() -> Adapter:
    return from_model(lively(MokA({"image": 1}, rank=2).wrap(tiny_llava(), ["q_proj", "down_proj"])))


@pytest.fixture(scope="module")
def lora() -> Adapter:
    live = get_peft_model(tiny_llava(), LoraConfig(r=2, lora_alpha=3, target_modules=r".*language.*(q|down)_proj"))
    return from_model(lively(live))


def first_layer(base: nn.Module, adapter: Adapter | None) -> torch.Tensor:
    """What the first adapted layer gives, where every variant sees the same input."""
    seen = []
    with attached(base, adapter) as model, torch.no_grad():
        layer = model.get_submodule(("base_model.model." if adapter else "") + LAYER)
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        model(**BATCH)
        handle.remove()
    return seen[0]


@dataclass
class Loss:
    """A score: minus the loss of a batch, so that higher is better."""

    base: nn.Module

    def __call__(self, adapter: Adapter | None) -> float:
        with attached(self.base, adapter) as model, torch.no_grad():
            return -float(model(**BATCH).loss)


@pytest.mark.parametrize("kind", ["moka", "lora"])
def test_the_update_is_on_for_just_the_named_tokens(base, moka, lora, kind):
    adapter = moka if kind == "moka" else as_moka(lora, {"image": 1})
    image = (BATCH["input_ids"] == IMAGE)[..., None]
    none, whole = first_layer(base, None), first_layer(base, adapter)
    assert ((none - whole).abs() > 1e-3).any(-1).all()  # no token is left as it was
    for names, on in ((["image"], image), (["text"], ~image), (["text", "image"], torch.ones_like(image))):
        part = first_layer(base, restricted(adapter, names))
        assert torch.allclose(part, torch.where(on, whole, none), atol=1e-6)


def test_scores_are_those_of_the_variants(base, moka):
    score = Loss(base)
    found = ll.partial_modality(moka, score)
    assert found.modalities == ("text", "image")
    assert found.values == (score(restricted(moka, ["text"])), score(restricted(moka, ["image"])))
    assert (found.whole, found.base) == (score(moka), score(None))
    assert len({*found.values, found.whole, found.base}) == 4
    assert found.to_json()["values"] == list(found.values)


def test_a_lora_is_asked_by_modality_and_as_a_whole_is_itself(base, lora):
    found = ll.partial_modality(lora, Loss(base), modalities={"image": 1})
    assert found.whole == pytest.approx(Loss(base)(lora), abs=1e-5)
    assert found.base == Loss(base)(None)
    assert found.values[0] != found.values[1]


def test_names_that_share_an_a_are_one_question():
    plan = {"modalities": {"image": 1, "video": 1, "audio": 2}, "rank": 1}
    asked = []

    def score(adapter: Adapter | None) -> float:
        asked.append(None if adapter is None else own_plan(adapter).active)
        return 0.5

    found = ll.partial_modality(Adapter({"peft_type": "MOKA", "moka": plan}, {}), score)
    assert found.modalities == ("text", "image+video", "audio")
    assert asked == [("text",), ("image", "video"), ("audio",), None, None]
    assert found.shares is None  # no gain


def test_refusals(moka, lora):
    def score(adapter: Any) -> float:
        return 0.5

    with pytest.raises(ValueError, match="of kind lora does not tell its modalities"):
        ll.partial_modality(lora, score)
    with pytest.raises(ValueError, match="a MokA adapter tells its own"):
        ll.partial_modality(moka, score, modalities={"image": 1})
    with pytest.raises(ValueError, match="is on for text tokens alone; give the whole one"):
        ll.partial_modality(restricted(moka, ["text"]), score)
    with pytest.raises(UnsupportedKind, match="only a LoRA of one rank and scale"):
        ll.partial_modality(Adapter({**lora.config, "use_dora": True}, lora.modules), score, modalities={"image": 1})
    with pytest.raises(ValueError, match="the score for image tokens alone is nan"):
        ll.partial_modality(moka, lambda a: float("nan") if a and own_plan(a).active == ("image",) else 1.0)


def test_the_report_tells_shares_of_the_gain():
    report = partial_modality_report_of(PartialModality(("text", "image"), (0.8, 0.35), 0.9, 0.4), "mine", "vqa")
    assert report.summary.endswith("keeps, on for one modality alone, 80 % for text, -10 % for image.")
    bars, table = report.panels
    assert (bars.categories, bars.series[0].y) == (("none", "text alone", "image alone", "all"), (0.4, 0.8, 0.35, 0.9))
    assert [row[0] for row in table.rows] == ["text", "image"]
    assert [row[1] for row in table.rows] == pytest.approx([0.8, -0.1])
    assert Report.from_json(report.to_json()) == report
    worse = partial_modality_report_of(PartialModality(("text", "image"), (0.4, 0.4), 0.3, 0.4), "mine", "vqa")
    assert "gains nothing over the base (-0.100)" in worse.summary
    assert worse.panels[1].rows[0] == ("text", None, 0.4)


def test_the_report_asks_the_bench_of_the_adapter(base, lora, monkeypatch):
    asked = []

    def bench_for(adapter: Adapter, task: Any, model: Any) -> Any:
        def evaluate(variant: Adapter | None, split: str, limit: int | None) -> Any:
            asked.append((split, limit))
            return SimpleNamespace(value=Loss(base)(variant))

        return SimpleNamespace(evaluate=evaluate, task=SimpleNamespace(name=task))

    monkeypatch.setattr(statistics, "bench_for", bench_for)
    options: Any = {"modalities": {"image": 1}, "name": "mine", "split": "validation", "limit": 5}
    report = partial_modality_report(lora, "vqa", **options)
    assert asked == [("validation", 5)] * 4
    assert report.records[0] == ll.partial_modality(lora, Loss(base), modalities={"image": 1}).to_json()
    with pytest.raises(ValueError, match="does not tell its modalities"):
        partial_modality_report(lora, "vqa")
    assert len(asked) == 4
