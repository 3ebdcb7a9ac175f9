"""MokA in ``generate`` and with caches: what is generated is never looked at, a prompt is never torn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import loraloom as ll
from loraloom.integrations import routing as routing_module
from loraloom.strategies.rankspace import RoutingError
from tiny_multimodal import IMAGE, PADDING, image_batch, lively, tiny_llama, tiny_llava, without

PLAN = {"modalities": {"image": 1}, "rank": 2, "dropout": 0.0}
LONG = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}


def adapted(make=tiny_llava, **plan):
    return lively(ll.MokA(**{**PLAN, **plan}).wrap(make())).eval()


def prompt(**options):
    return without(image_batch(**options), "labels")


def grown(model, **inputs):
    """Sequences, and the logits of each step."""
    found = model.generate(**{**LONG, **inputs}, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits, 1)


def same(one, other, tolerance=2e-6):
    assert torch.equal(one[0], other[0])
    assert (one[1] - other[1]).abs().max() <= tolerance * float(one[1].abs().max())


def text_with_images(rows=2, length=11):
    """Ids of a text-only model, and which of them are given out as images."""
    ids = torch.randint(3, 26, (rows, length), generator=torch.Generator().manual_seed(8))
    kinds = torch.zeros_like(ids)
    kinds[:, 1:5] = 1
    return ids, kinds


def padded_left(batch, pads=3):
    return {
        **batch,
        "input_ids": nn.functional.pad(batch["input_ids"], (pads, 0), value=PADDING),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (pads, 0)),
    }


# All ways to the same tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", ["base", "tuner"])
def test_generate_of_the_base_is_that_of_the_peft_model(called):
    model = adapted()
    inner = model.get_base_model() if called == "base" else model.base_model
    same(grown(model, **prompt()), grown(inner, **prompt()))


@pytest.mark.parametrize(
    "how", [{"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}]
)
@pytest.mark.parametrize("keys", ["prompt", "after-last-modality", "span"])
def test_every_cache_gives_the_same(how, keys):
    model = adapted(keys=keys, span=(28, 27) if keys == "span" else None)
    batch = prompt(rows=1 if "prompt_lookup_num_tokens" in how else 2)
    batch["input_ids"][:, [6, 9]] = torch.tensor([28, 27])
    batch = batch if "prompt_lookup_num_tokens" in how else padded_left(batch)
    same(grown(model, **batch), grown(model, **batch, **how))


def test_generated_tokens_would_change_the_image_if_they_were_looked_at():
    """The test above can fail: without the prompt's end a pass over everything looks at what was generated."""
    model, batch = adapted(), prompt()
    sequences, steps = grown(model, **batch)
    whole = {**batch, "input_ids": sequences, "attention_mask": torch.ones_like(sequences)}
    with torch.no_grad():
        again = model(**whole).logits[:, -2]
    assert (again - steps[:, -1]).abs().max() > 1e-3 * float(steps.abs().max())


def test_left_padding():
    model, batch = adapted(), prompt(rows=1)
    tokens, steps = grown(model, **batch)
    padded_tokens, padded_steps = grown(model, **padded_left(batch))
    same((tokens, steps), (padded_tokens[:, 3:], padded_steps))
    mixed = {
        "input_ids": torch.cat([padded_left(batch)["input_ids"], prompt(rows=1, text=9, seed=3)["input_ids"]]),
        "attention_mask": torch.cat([padded_left(batch)["attention_mask"], torch.ones(1, 14, dtype=torch.long)]),
        "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1),
    }
    for how in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        both = grown(model, **mixed, **how)
        same((tokens, steps), (both[0][:1, 3:], both[1][:1]), tolerance=5e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "use_cache": False},
    ],
)
@pytest.mark.parametrize("told", ["modality_ids", "question_mask"])
def test_rows_multiply_with_what_was_told_of_them(how, told):
    model, batch = adapted(), prompt()
    images = (batch["input_ids"] == IMAGE).long()
    images[1] = images[1].roll(1)  # each row has its own
    told = {told: images if told == "modality_ids" else 1 - images}
    many = {**LONG, **how}
    del many["do_sample"]
    torch.manual_seed(0)
    found = model.generate(**batch, **told, **many, do_sample=how.get("do_sample", False))
    if "do_sample" in how:  # one row at a time would draw other numbers
        torch.manual_seed(0)
        repeated = {name: value.repeat_interleave(3, 0) for name, value in {**batch, **told}.items()}
        assert torch.equal(found, model.generate(**repeated, **LONG | {"do_sample": True}))
        return
    count = how.get("num_return_sequences", 1)
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in {**batch, **told}.items()}
        assert torch.equal(found[row * count : (row + 1) * count], model.generate(**one, **many, do_sample=False))


def test_ids_of_a_text_only_model_are_given_by_hand():
    model, (ids, kinds) = adapted(tiny_llama), text_with_images()
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        tokens, steps = grown(model, input_ids=ids, modality_ids=kinds, **how)
        forced = model(
            input_ids=tokens, modality_ids=nn.functional.pad(kinds, (0, 4)), labels=_answer(tokens, 4)
        ).logits
        assert torch.allclose(forced[:, -5:-1], steps, atol=2e-6 * float(steps.abs().max()))
    plain = grown(model, input_ids=ids, modality_ids=torch.zeros_like(kinds))
    assert (plain[1] - steps).abs().max() > 1e-3
    with pytest.raises(RoutingError, match="no placeholder id of image"):
        model.generate(input_ids=ids, **LONG)


def _answer(tokens, count):
    labels = torch.full_like(tokens, -100)
    labels[:, -count:] = tokens[:, -count:]
    return labels


def test_embeddings_with_ids_given_by_hand():
    model, (ids, kinds) = adapted(tiny_llama), text_with_images()
    embeds = model.get_input_embeddings()(ids).detach()
    by_ids = grown(model, input_ids=ids, modality_ids=kinds)
    by_embeds = grown(model, inputs_embeds=embeds, modality_ids=kinds)
    same((by_ids[0][:, -4:], by_ids[1]), by_embeds)
    assert torch.equal(
        model(inputs_embeds=embeds, modality_ids=kinds).logits, model(input_ids=ids, modality_ids=kinds).logits
    )
    with pytest.raises(RoutingError, match="modalities cannot be told"):
        model.generate(inputs_embeds=embeds, **LONG)


def test_explicit_keys_are_needed_for_the_prompt_alone():
    model, batch = adapted(keys="explicit"), prompt()
    question = torch.zeros_like(batch["input_ids"])
    question[:, 6:9] = 1
    same(
        grown(model, **batch, question_mask=question),
        grown(model, **batch, question_mask=question, use_cache=False),
    )
    with pytest.raises(RoutingError, match="keys='explicit' needs question_mask"):
        model.generate(**batch, **LONG)


def test_generation_that_fails_leaves_nothing():
    model = adapted()
    with pytest.raises(RoutingError):
        model.generate(**prompt(), modality_ids=torch.zeros(2, 3, dtype=torch.long))
    assert routing_module._here.generation is None
    with pytest.raises(RoutingError, match="leave segment_ids out"):
        model.generate(**prompt(), segment_ids=torch.zeros(2, 11, dtype=torch.long))


def test_two_models_generate_in_turns():
    """Assisted decoding calls ``generate`` of another model inside of ours."""
    model, helper, batch = adapted(tiny_llama), adapted(tiny_llama), text_with_images(rows=1)
    for parameter in (p for n, p in helper.named_parameters() if "lora_" in n):
        parameter.data.mul_(0.7)
    ids, kinds = batch
    expected = grown(model, input_ids=ids, modality_ids=kinds)
    turned = helper.generate(input_ids=ids, modality_ids=kinds, **LONG)
    real = model.get_base_model().forward

    def with_the_helper(*args, **kwargs):
        assert torch.equal(helper.generate(input_ids=ids, modality_ids=kinds, **LONG), turned)
        return real(*args, **kwargs)

    model.get_base_model().forward = with_the_helper
    same(expected, grown(model, input_ids=ids, modality_ids=kinds))


# Caches by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
def test_decoding_by_hand(static):
    model, batch = adapted(), prompt()
    tokens, steps = grown(model, **batch)
    cache = StaticCache(config=model.config.text_config, max_cache_len=20) if static else DynamicCache()
    with torch.no_grad():
        for step in range(4):
            new = batch["input_ids"] if step == 0 else tokens[:, 10 + step : 11 + step]
            extra = {"pixel_values": batch["pixel_values"]} if step == 0 else {}
            seen = model(input_ids=new, past_key_values=cache, **extra).logits[:, -1]
            assert torch.allclose(seen, steps[:, step], atol=2e-6 * float(steps.abs().max()))


def test_a_prompt_in_chunks_is_refused_where_it_holds_an_image():
    model, (ids, kinds) = adapted(tiny_llama), text_with_images()
    with pytest.raises(RoutingError, match=r"prompt of 11 tokens in parts \(up to 7\).*leave prefill_chunk_size out"):
        model.generate(input_ids=ids, modality_ids=kinds, **LONG, prefill_chunk_size=7)
    with pytest.raises(RoutingError, match=r"prompt of 11 tokens in parts \(up to 3\)"):  # no text there to look at
        model.generate(input_ids=ids, modality_ids=kinds.roll(-1, 1), **LONG, prefill_chunk_size=3)
    late = kinds.roll(5, 1)
    with pytest.raises(RoutingError, match="come after 5 cached ones, apart from the text"):
        model.generate(input_ids=ids, modality_ids=late, **LONG, prefill_chunk_size=5)
    none = torch.zeros_like(kinds)
    same(
        grown(model, input_ids=ids, modality_ids=none),
        grown(model, input_ids=ids, modality_ids=none, prefill_chunk_size=4),
    )


@pytest.mark.parametrize("cache", [None, DynamicCache, "tuple"])
def test_an_image_and_its_question_in_two_passes_are_refused(cache):
    model, batch = adapted(), prompt()
    first = {"input_ids": batch["input_ids"][:, :5], "pixel_values": batch["pixel_values"]}
    if cache is DynamicCache:
        first["past_key_values"] = DynamicCache()
    with torch.no_grad():
        out = model(**first, use_cache=True, return_dict=cache != "tuple")
    kept = out[1] if cache == "tuple" else out.past_key_values
    for reused in (kept, copy.deepcopy(kept)):
        with pytest.raises(RoutingError, match=r"cached tokens end in another modality.*whole prompt in one"):
            model(input_ids=batch["input_ids"][:, 5:], past_key_values=reused)
    with pytest.raises(RoutingError, match="cached tokens end in another modality"):
        model.generate(**without(batch, "pixel_values"), past_key_values=kept, **LONG)
    told = torch.ones_like(first["input_ids"])
    with torch.no_grad():
        out = model(**without(first, "past_key_values"), question_mask=told, use_cache=True)
        model(input_ids=batch["input_ids"][:, 5:], past_key_values=out.past_key_values)


def test_a_span_whose_image_follows_is_complete():
    """The markers tell where the question ends, so a prompt may end in an image and be gone on with by hand."""
    model, batch = adapted(keys="span", span=(28, 27)), prompt()
    ids = batch["input_ids"].flip(1)[:, :-1]  # text, then the image
    ids[:, [0, 3]] = torch.tensor([28, 27])
    with torch.no_grad():
        made = model(input_ids=ids, pixel_values=batch["pixel_values"], use_cache=True)
        step = model(input_ids=torch.tensor([[5], [6]]), past_key_values=made.past_key_values).logits
        whole = torch.cat([ids, torch.tensor([[5], [6]])], 1)
        forced = model(input_ids=whole, pixel_values=batch["pixel_values"]).logits
    assert torch.allclose(step[:, 0], forced[:, -1], atol=2e-6 * float(forced.abs().max()))


def test_a_second_turn_goes_on_and_may_not_bring_an_image():
    model, batch = adapted(), prompt()
    first = model.generate(**batch, **LONG, return_dict_in_generate=True)
    more = torch.randint(3, 26, (2, 5), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.ones_like(ids)
    kept = copy.deepcopy(first.past_key_values)
    tokens, steps = grown(model, input_ids=ids, attention_mask=mask, past_key_values=kept)
    # the image keeps the first turn's question: as in training, where the first answer ends the prompt
    labels = tokens.clone()
    labels[:, :11] = -100
    with torch.no_grad():
        forced = model(input_ids=tokens, pixel_values=batch["pixel_values"], labels=labels).logits
    assert torch.allclose(forced[:, -5:-1], steps, atol=2e-6 * float(steps.abs().max()))
    again = torch.cat([first.sequences, batch["input_ids"]], 1)
    with pytest.raises(RoutingError, match=r"come after 14 cached ones.*no reused cache"):
        model.generate(
            input_ids=again,
            attention_mask=torch.ones_like(again),
            pixel_values=batch["pixel_values"],
            past_key_values=first.past_key_values,
            **LONG,
        )


def test_ids_by_hand_with_a_cache_that_is_there():
    """The prompt of a second turn is given whole, or its new tokens alone."""
    model, (ids, kinds) = adapted(tiny_llama), text_with_images()
    with torch.no_grad():
        made = model(input_ids=ids[:, :8], modality_ids=kinds[:, :8], use_cache=True).past_key_values
    whole = grown(model, input_ids=ids, modality_ids=kinds, past_key_values=copy.deepcopy(made))
    new = grown(
        model,
        input_ids=ids[:, 8:],
        modality_ids=kinds[:, 8:],
        attention_mask=torch.ones_like(ids),
        past_key_values=copy.deepcopy(made),
    )
    same((whole[0][:, 8:], whole[1]), new)
