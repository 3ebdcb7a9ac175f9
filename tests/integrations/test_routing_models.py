"""MokA on models of Transformers: every layer meets the routing, and each modality its own A."""

from __future__ import annotations

import pytest
import torch

import loraloom as ll
from loraloom.adapter import UnsupportedKind
from loraloom.integrations.modality import MokALinear
from loraloom.integrations.routing import current
from tiny_multimodal import AUDIO, CASES, IMAGE, PADDING, VIDEO, lively, tiny_whisper, without


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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}])
def test_generate_gives_the_same_with_padding_and_with_any_cache(name, how):
    model, batch = adapted(CASES[name]), without(CASES[name].batch(), "labels")
    fixed = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [AUDIO, VIDEO, IMAGE]}
    beams = {"num_beams": how.get("num_beams", 1)}
    plain = model.generate(**batch, **fixed, **beams)
    padded = dict(batch)
    for key, value in (("input_ids", PADDING), ("attention_mask", 0), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if key in batch:
            padded[key] = torch.nn.functional.pad(batch[key], (2, 0), value=value)
    assert torch.equal(model.generate(**padded, **fixed, **how)[:, 2:], plain)


# An encoder-decoder ---------------------------------------------------------------------------------------------------


def whisper():
    plan = ll.MokA({"audio": 1}, rank=2, dropout=0.0, attention="none")
    return lively(plan.wrap(tiny_whisper())).eval()


def speech():
    features = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "labels": torch.tensor([[5, 6, 7], [8, 9, 4]])}


def test_an_encoder_has_no_text_to_look_at():
    with pytest.raises(UnsupportedKind, match=r"attention='cross': the encoder of Whisper.*needs attention='none'"):
        ll.MokA({"audio": 1}).wrap(tiny_whisper())


def test_audio_is_what_the_encoder_sees_and_text_what_the_decoder_sees(tmp_path):
    """As one LoRA for what reads the encoder's tokens and one for what reads the decoder's."""
    model, batch = whisper(), speech()
    layers = moka_layers(model)
    assert len(layers) == 2 * 6 + 2 * 10
    entered, expected = {}, {}
    for path, layer in layers.items():

        def seen(layer, args, output, path=path):
            x, a, b = args[0], layer.lora_A["default"].weight, layer.lora_B["default"].weight
            of_audio = ".encoder." in path or path.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
            entered[path] = output
            own = a[2:] if of_audio else a[:2]
            expected[path] = layer.base_layer(x) + layer.scaling["default"] * (x @ own.T @ b.T)

        layer.register_forward_hook(seen)
    model(**batch).loss.backward()
    assert set(entered) == set(layers)
    for path in layers:
        assert torch.allclose(entered[path], expected[path], atol=1e-5), path
        assert layers[path].lora_A["default"].weight.grad.abs().sum() > 0, path
    model.save_pretrained(tmp_path)


def test_an_encoder_decoder_generates():
    model, batch = whisper(), without(speech(), "labels")
    start = torch.ones(2, 1, dtype=torch.long)
    found = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    tokens = start
    with torch.no_grad():
        for _ in range(3):
            scores = model(**batch, decoder_input_ids=tokens).logits[:, -1]
            scores[:, [2, PADDING]] = -torch.inf
            tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found[:, -3:], tokens[:, -3:])
