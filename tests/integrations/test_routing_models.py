"""MokA on models of Transformers: every layer meets the routing, and each modality its own A."""

from __future__ import annotations

import pytest
import torch
from tiny_multimodal import AUDIO, CASES, IMAGE, lively, tiny_llama, tiny_moe, tiny_whisper, without

import loraloom as ll
from loraloom.integrations.modality import MokALinear
from loraloom.integrations.routing import current
from loraloom.strategies.rankspace import RoutingError


def adapted(case, **plan):
    told = {"modalities": case.modalities, "rank": 2, "dropout": 0.0, **plan}
    return lively(ll.MokA(**told).wrap(case.make())).eval()


def moka_layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, MokALinear)}


def changed(model, number, rank=2):
    """Disturb one A in all layers."""
    with torch.no_grad():
        for layer in moka_layers(model).values():
            layer.lora_A["default"].weight[number * rank : (number + 1) * rank] += 0.5


def text_of(batch):
    """The batch's text, without media."""
    ids = batch["input_ids"][:, -6:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", CASES)
def test_every_layer_of_the_language_model_meets_one_routing(name):
    case = CASES[name]
    model = adapted(case)
    layers = moka_layers(model)
    assert len(layers) == 2 * 7  # layers x projections, none in an encoder
    assert all("language_model.layers." in path for path in layers)
    met = {}

    def seen(layer, args):
        met[layer] = current(args[0].shape[:-1])

    for layer in layers.values():
        layer.register_forward_pre_hook(seen)
    model(**case.batch())
    assert set(met) == set(layers.values())
    assert len({id(routing) for routing in met.values()}) == 1
    routing = next(iter(met.values()))
    media = {AUDIO: "audio", IMAGE: "image"} | {29: "video"}
    for id_, modality in media.items():
        here = case.batch()["input_ids"] == id_
        assert (routing.types[here] == case.modalities.get(modality, -5)).all()
    assert ((routing.types > 0) == torch.isin(case.batch()["input_ids"], torch.tensor(list(media)))).all()


@pytest.mark.parametrize("name", CASES)
def test_each_modality_uses_its_own_a_and_text_only_that_of_the_text(name):
    case = CASES[name]
    model = adapted(case)
    batch, text = case.batch(), text_of(case.batch())
    there = {AUDIO: "audio", IMAGE: "image", 29: "video"}
    used = {0} | {case.modalities[there[i]] for i in there if (batch["input_ids"] == i).any()}
    with torch.no_grad():
        for number in range(1 + max(case.modalities.values())):
            before, before_text = model(**batch).logits, model(**text).logits
            changed(model, number)
            assert torch.equal(model(**batch).logits, before) == (number not in used)
            assert torch.equal(model(**text).logits, before_text) == (number != 0)


@pytest.mark.parametrize("name", CASES)
def test_decoding_from_the_cache_is_the_teacher_forced_pass(name):
    """Generation sees what training saw: the prompt's keys, then one token at a time."""
    case = CASES[name]
    model, batch = adapted(case), case.batch()
    prompt = without(batch, "labels")
    grown = model.generate(
        **prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = grown.sequences.shape[1] - batch["input_ids"].shape[1]
    longer = {**batch, "input_ids": grown.sequences, "attention_mask": torch.ones_like(grown.sequences)}
    longer["labels"] = grown.sequences.clone()
    longer["labels"][:, : batch["input_ids"].shape[1]] = -100
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in batch:
            fill = 1 if name == "paligemma" else 0
            longer[key] = torch.nn.functional.pad(batch[key], (0, new), value=fill)
    with torch.no_grad():
        forced = model(**longer).logits[:, -new - 1 : -1]
    stepwise = torch.stack(grown.logits, 1)
    tolerance = 1e-6 * float(stepwise.abs().max())
    assert (forced - stepwise).abs().max() <= 4 * tolerance


@pytest.mark.parametrize("name", CASES)
def test_a_step_trains_every_a_that_is_met_and_the_folder_is_written(name, tmp_path):
    case = CASES[name]
    model, batch = adapted(case).train(), case.batch()
    model(**batch).loss.backward()
    there = {AUDIO: "audio", IMAGE: "image", 29: "video"}
    used = {0} | {case.modalities[there[i]] for i in there if (batch["input_ids"] == i).any()}
    for path, layer in moka_layers(model).items():
        for number in range(1 + max(case.modalities.values())):
            gradient = layer.lora_A["default"].weight.grad[2 * number : 2 * number + 2]
            if number not in used:
                assert not gradient.any(), path
            elif "layers.0" in path:  # what the last layer makes of media tokens reaches no answer
                assert gradient.any(), path
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
