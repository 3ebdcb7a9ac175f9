"""MokA's routing: one a forward pass, from what the pass is given; nothing is guessed, nothing stays behind."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import loraloom as ll
from loraloom.integrations import routing as routing_module
from loraloom.integrations.modality import MokALinear
from loraloom.integrations.peft import attached
from loraloom.integrations.routing import current
from loraloom.strategies.rankspace import RoutingError, hidden
from tiny_multimodal import (
    IMAGE,
    PADDING,
    VIDEO,
    image_batch,
    lively,
    tiny_llama,
    tiny_llava,
    tiny_moe,
    tiny_qwen_audio,
    tiny_qwen_vl,
    without,
)

PLAN = {"modalities": {"image": 1}, "rank": 2, "dropout": 0.0}


def adapted(make=tiny_llava, **plan):
    return lively(ll.MokA(**{**PLAN, **plan}).wrap(make())).eval()


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, MokALinear)]


def routing_of(model, *args, **inputs):
    """What the first adapted layer meets."""
    met = []

    def seen(layer, args):
        met.append(current(args[0].shape[:-1]))

    handle = layers_of(model)[0].register_forward_pre_hook(seen)
    try:
        model(*args, **inputs)
    finally:
        handle.remove()
    return met[0]


def keys_of(routing, row=0):
    """Places that a row's other modalities look at."""
    (lookup,) = routing.lookups
    open_ = lookup.bias[row, 0].amax(0) == 0
    return sorted(lookup.index[row][open_].tolist())


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def close(one, other, tolerance=2e-6):
    return (one - other).abs().max() <= tolerance * float(other.abs().max())


def embedded(model, batch):
    """The batch as embeddings, with the image's features in their places."""
    base = model.get_base_model()
    caught = {}

    def catch(module, args, kwargs):
        caught["embeds"] = kwargs["inputs_embeds"]

    handle = base.model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    handle.remove()
    return caught["embeds"].detach()


# What tells the modalities --------------------------------------------------------------------------------------------


def test_explicit_ids_go_before_the_processors_types_before_placeholders():
    model = adapted()
    batch = without(image_batch(rows=1, text=3), "labels")
    kinds = torch.zeros_like(batch["input_ids"])
    kinds[:, 2:4] = 1
    explicit = kinds.roll(1, 1)
    assert routing_of(model, **batch).types[0].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert torch.equal(routing_of(model, **batch, mm_token_type_ids=kinds).types, kinds)
    assert torch.equal(routing_of(model, **batch, mm_token_type_ids=kinds, modality_ids=explicit).types, explicit)


def test_the_users_token_ids_count_beside_the_processors_types():
    model = adapted(modalities={"image": 1, "points": 2}, tokens={"points": 25})
    batch = without(image_batch(rows=1, text=3), "labels")
    batch["input_ids"][0, -3:] = torch.tensor([25, 7, 8])
    kinds = (batch["input_ids"] == IMAGE).long()
    assert routing_of(model, **batch, mm_token_type_ids=kinds).types[0].tolist() == [0, 1, 1, 1, 1, 2, 0, 0]


def test_question_mask_goes_before_labels():
    model, batch = adapted(), image_batch(rows=1, text=6)
    assert keys_of(routing_of(model, **batch)) == [0, 5, 6, 7, 8]
    question = torch.zeros_like(batch["input_ids"])
    question[:, 6:8] = 1
    assert keys_of(routing_of(model, **batch, question_mask=question)) == [6, 7]


@pytest.mark.parametrize("how", ["peft", "tuner", "base"])
def test_one_routing_a_forward_pass_whoever_is_called(how, monkeypatch):
    model, made = adapted(), []
    real = routing_module.route
    monkeypatch.setattr(routing_module, "route", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    called = {"peft": model, "tuner": model.base_model, "base": model.get_base_model()}[how]
    batch = image_batch()
    explicit = (batch["input_ids"] == IMAGE).long()
    called(**batch, modality_ids=explicit)
    assert len(made) == 1
    called.generate(**without(batch, "labels"), modality_ids=explicit, max_new_tokens=3, min_new_tokens=3)
    assert len(made) == 2  # the prompt's; what is generated is text without looking


def test_arguments_by_position():
    model, batch = adapted(tiny_llama, tokens={"image": IMAGE}), image_batch(rows=1)
    batch["attention_mask"][:, 0] = 0
    positional = routing_of(model, batch["input_ids"], batch["attention_mask"])
    named = routing_of(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert keys_of(positional) == keys_of(named) == [5, 6, 7, 8, 9, 10]
    base = routing_of(model.get_base_model(), batch["input_ids"], batch["attention_mask"])
    assert keys_of(base) == keys_of(named)


def test_the_host_waits_once_a_forward_pass():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waiting = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
            self.count += function.overloadpacket.__name__ in waiting
            return function(*args, **(kwargs or {}))

    def waits(model, batch, monkeypatched=torch.Tensor.tolist):
        lists = []

        def tolist(tensor):
            lists.append(1)
            return monkeypatched(tensor)

        torch.Tensor.tolist = tolist
        try:
            with Waits() as mode:
                model.moka_router.before(model.get_base_model(), (), batch)
        finally:
            torch.Tensor.tolist = monkeypatched
            model.moka_router.after(model.get_base_model(), (), {}, None)
        return len(lists) + mode.count

    for plan in ({}, {"active": ("image",)}, {"rank": {"text": 2, "image": 3}}, {"attention": "text-as-query"}):
        model, batch = adapted(tiny_qwen_vl, **plan), image_batch()
        assert waits(model, batch) == 1  # a placeholder of which the plan has no modality is looked for, too
        assert waits(model, {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE).long()}) == 1
        assert waits(model, {**batch, "modality_ids": (batch["input_ids"] == IMAGE).long()}) == 1


# Padding, packing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["2d", "4d bool", "4d float"])
def test_padding_changes_nothing(side, kind):
    model, batch = adapted(), without(image_batch(rows=1), "labels")
    alone = logits(model, **batch)
    length, pads = alone.shape[1], 3
    sides = (pads, 0) if side == "left" else (0, pads)
    ids = nn.functional.pad(batch["input_ids"], sides, value=PADDING)
    mask = nn.functional.pad(batch["attention_mask"], sides)
    real = slice(pads, None) if side == "left" else slice(0, length)
    if kind != "2d":
        causal = torch.ones(length + pads, length + pads).tril().bool()
        mask = (causal & mask[:, None].bool())[:, None]
        mask[:, :, range(length + pads), range(length + pads)] |= side == "left"  # as Transformers: no empty row
        mask = mask if kind == "4d bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        if side == "left":  # then a pad is seen by itself, and only explicit ids tell it
            explicit = torch.where(ids == PADDING, -1, (ids == IMAGE).long())
            padded = logits(
                model, input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"], modality_ids=explicit
            )
            assert close(padded[:, real], alone)
            return
    padded = logits(model, input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"])
    assert close(padded[:, real], alone)


def packed(rows):
    """Rows one behind the other, in one."""
    return {
        "input_ids": rows["input_ids"].reshape(1, -1),
        "pixel_values": rows["pixel_values"],
        "labels": rows["labels"].reshape(1, -1),
        "use_cache": False,
    }


def test_a_packed_row_gives_what_its_samples_give():
    model, batch = adapted(), without(image_batch(), "attention_mask")
    length = batch["input_ids"].shape[1]
    separate = logits(model, **batch, use_cache=False)
    positions = torch.arange(length).repeat(2)[None]
    told = packed(batch)
    together = logits(model, **told, position_ids=positions)
    assert close(together.view(separate.shape), separate)
    alone, one = routing_of(model, **batch), routing_of(model, **told, position_ids=positions)
    stacked = torch.randn(2, length, 4, generator=torch.Generator().manual_seed(3))
    plan = model.moka_router.plan
    expected = hidden(plan, stacked, alone)
    assert torch.allclose(hidden(plan, stacked.view(1, -1, 4), one).view(expected.shape), expected, atol=1e-6)
    bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    segments = torch.tensor([0, 1]).repeat_interleave(length)[None]
    for how in ({"segment_ids": segments}, {"seq_idx": segments.int()}, {"cu_seq_lens_q": bounds}):
        routing = routing_of(model, **told, **how)
        assert torch.allclose(hidden(plan, stacked.view(1, -1, 4), routing).view(expected.shape), expected, atol=1e-6)
    # without segments the second sample would be looked at by the first
    assert not torch.allclose(
        hidden(plan, stacked.view(1, -1, 4), routing_of(model, **told)).view(expected.shape), expected
    )


def test_packing_that_only_a_mask_tells_is_refused():
    model, batch = adapted(), image_batch()
    told, length = packed(batch), batch["input_ids"].shape[1]
    causal = torch.ones(2 * length, 2 * length).tril().bool()
    block = torch.block_diag(*[torch.ones(length, length)] * 2).bool() & causal
    for mask in (block, torch.zeros(block.shape).masked_fill(~block, torch.finfo(torch.float32).min)):
        with pytest.raises(RoutingError, match=r"packing.*position_ids that begin again.*segment_ids"):
            model(**told, attention_mask=mask[None, None])
    positions = torch.arange(length).repeat(2)[None]
    model(**told, attention_mask=block[None, None], position_ids=positions)
    model(**told, attention_mask=causal[None, None])


# Text alone, adapters off ---------------------------------------------------------------------------------------------


def test_text_alone_is_plain_lora():
    model = adapted(tokens={"image": IMAGE})
    base = tiny_llava()
    targets = [path for path, m in base.named_modules() if isinstance(m, nn.Linear) and "language_model" in path]
    lora = get_peft_model(base, LoraConfig(r=2, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")).eval()
    values = dict(model.named_parameters())
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(values[name][: parameter.shape[0], : parameter.shape[1]])
    ids = image_batch()["input_ids"][:, 5:]
    assert close(logits(model, input_ids=ids), logits(lora, input_ids=ids))
    model.train()
    model(input_ids=ids)  # no labels needed: nothing looks at the answer


@pytest.mark.parametrize("plan", [{"keys": "explicit"}, {"keys": "span", "span": (3, 4)}])
def test_text_alone_needs_no_keys(plan):
    model = adapted(**plan)
    ids = image_batch()["input_ids"][:, 5:]
    assert routing_of(model, input_ids=ids).plain
    model.generate(input_ids=ids, max_new_tokens=2)


def test_switched_off_adapters_need_no_routing():
    model, batch = adapted(), image_batch()
    embeds = embedded(model, batch)
    with pytest.raises(RoutingError, match=r"cannot be told: .*modality_ids"):
        model(inputs_embeds=embeds)
    with model.disable_adapter():
        off = logits(model, inputs_embeds=embeds, modality_ids=torch.ones(1))  # ours, and not the model's
    assert close(off, logits(tiny_llava(), **batch))


# What a pass leaves behind --------------------------------------------------------------------------------------------


class Trouble(Exception):
    pass


@pytest.mark.parametrize("trouble", [Trouble, KeyboardInterrupt])
def test_an_interrupted_pass_leaves_no_routing(trouble):
    model, batch = adapted(), image_batch()
    base = model.get_base_model()

    def interrupt(*_):
        raise trouble

    handle = layers_of(model)[3].register_forward_pre_hook(interrupt)
    with pytest.raises(trouble):
        model(**batch)
    handle.remove()
    assert routing_module._here.passes == () or trouble is KeyboardInterrupt
    shuffled = (batch["input_ids"] == IMAGE).long().flip(1)
    assert torch.equal(routing_of(model, **batch, modality_ids=shuffled).types, shuffled)
    assert routing_module._here.passes == ()
    with pytest.raises(RoutingError, match="no routing in this forward pass: call the whole model"):
        base.model(**without(batch, "labels"))


def test_a_pass_that_cannot_be_routed_takes_nothing_from_the_one_around_it():
    outer, inner, batch = adapted(), adapted(), image_batch()
    done = []

    def fail_inside(*_):
        if not done:
            done.append(1)
            with pytest.raises(RoutingError):
                inner(**batch, modality_ids=torch.full_like(batch["input_ids"], 9))

    layers_of(outer)[3].register_forward_pre_hook(fail_inside)
    expected = logits(adapted(), **batch)
    assert torch.equal(logits(outer, **batch), expected) and done


def test_a_model_inside_of_another_has_its_own_routing():
    outer, inner, batch = adapted(), adapted(), image_batch()
    other = {**image_batch(seed=5), "modality_ids": (batch["input_ids"] == IMAGE).long().flip(1)}
    met = []
    layers_of(outer)[3].register_forward_pre_hook(lambda *_: met.append(logits(inner, **other)) and None)
    expected, expected_inside = logits(adapted(), **batch), logits(adapted(), **other)
    assert torch.equal(logits(outer, **batch), expected)
    assert torch.equal(met[0], expected_inside)


def test_threads_share_a_model():
    """As nn.DataParallel does: both threads are inside of forward at once."""
    model = adapted()
    batches = [image_batch(seed=1), {**image_batch(seed=2), "modality_ids": image_batch()["labels"].clamp(-1, 1)}]
    expected = [logits(model, **batch) for batch in batches]
    assert not torch.equal(logits(model, **without(batches[1], "modality_ids")), expected[1])
    barrier, got = threading.Barrier(2, timeout=20), {}

    def meet(*_):
        barrier.wait()

    for layer in layers_of(model)[::3]:
        layer.register_forward_pre_hook(meet)
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, logits(model, **batches[i]))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_a_copy_of_the_model_is_routed_by_itself():
    model, batch = adapted(), image_batch()
    other = copy.deepcopy(model)
    assert other.moka_router is not model.moka_router
    assert torch.equal(logits(other, **batch), logits(model, **batch))
    with model.disable_adapter():
        assert not torch.equal(logits(other, **batch), logits(model, **batch))
    prompt = without(batch, "labels")
    with torch.no_grad():
        layers_of(other)[0].lora_B["default"].weight += 1
    ours, theirs = (
        one.generate(**prompt, max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0]
        for one in (model, other)
    )
    assert close(ours, logits(model, **prompt)[:, -1])
    assert close(theirs, logits(other, **prompt)[:, -1])


def test_the_next_adapter_of_a_model_has_the_routing_to_itself():
    model, batch = adapted(), image_batch()
    base = model.unload()
    assert torch.equal(logits(base, **batch), logits(tiny_llava(), **batch))
    second = lively(ll.MokA(**PLAN).wrap(base), seed=3).eval()
    expected = lively(ll.MokA(**PLAN).wrap(tiny_llava()), seed=3).eval()
    told = {**batch, "modality_ids": (batch["input_ids"] == IMAGE).long().flip(1)}
    assert torch.equal(logits(second, **told), logits(expected, **told))
    assert not torch.equal(logits(second, **batch), logits(second, **told))
    prompt = without(told, "labels")
    assert torch.equal(second.generate(**prompt, max_new_tokens=3), expected.generate(**prompt, max_new_tokens=3))


def test_a_model_that_an_adapter_was_attached_to_keeps_no_hook(tmp_path):
    adapted().save_pretrained(tmp_path)
    base, batch = tiny_llava(), image_batch()
    before = set(vars(base))
    with attached(base, ll.load(tmp_path)) as model:
        assert torch.equal(logits(model, **batch), logits(adapted(), **batch))
    assert set(vars(base)) == before
    assert not base._forward_pre_hooks
    assert not base._forward_hooks


# Recomputation --------------------------------------------------------------------------------------------------------


def gradients(model, batches, in_thread=False):
    model.zero_grad()
    loss = sum(model(**batch).loss for batch in batches)
    if in_thread:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("in_thread", [True, False])
def test_checkpointed_layers_are_recomputed_with_their_own_routing(reentrant, in_thread):
    """Two passes before one backward, as in preference training."""
    model = adapted().train()
    batches = [image_batch(seed=1), {**image_batch(seed=2), "modality_ids": image_batch()["labels"].clamp(-1, 1)}]
    expected = gradients(model, batches)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        found = gradients(model, batches, in_thread)
        assert len(found) == len(expected)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_a_replica_of_nn_data_parallel_is_recomputed_with_its_own_routing():
    model, batches = adapted().train(), [image_batch(seed=1), image_batch(seed=2, text=8)]
    expected = gradients(model, batches)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        replica._parameters = dict(module._parameters)
        for name, child in module._modules.items():
            replica._modules[name] = copies[child]
            replica.__dict__.pop(name, None)
    replica = copies[model]
    assert replica._is_replica
    found = gradients_of(model, replica, batches)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def gradients_of(model, called, batches):
    model.zero_grad()
    sum(called(**batch).loss for batch in batches).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_layers_in_a_checkpoint_wrapper_of_torch():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, batches = adapted().train(), [image_batch(seed=1), image_batch(seed=2, text=8)]
    expected = gradients(model, batches)
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "LlamaDecoderLayer")
    found = gradients(model, batches)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_a_layer_that_is_compiled():
    model, batch = adapted(), image_batch()
    model.get_base_model().model.language_model.layers[0].compile(backend="eager", fullgraph=True)
    explicit = {**image_batch(seed=4), "modality_ids": (batch["input_ids"] == IMAGE).long().flip(1)}
    for inputs in (batch, explicit, {"input_ids": batch["input_ids"][:, 5:]}):
        assert close(logits(model, **inputs), logits(adapted(), **inputs))


def test_a_model_that_is_compiled_whole():
    model = lively(ll.MokA(**PLAN, tokens={"image": IMAGE}).wrap(tiny_llama(), ["v_proj"])).eval()
    compiled, ids = torch.compile(model, backend="eager"), image_batch()["input_ids"]
    for inputs in ({}, {"modality_ids": (ids == IMAGE).long().flip(1)}):
        assert close(logits(compiled, input_ids=ids, **inputs), logits(model, input_ids=ids, **inputs))
    assert routing_module._here.passes == ()


# Refused --------------------------------------------------------------------------------------------------------------


def test_a_modality_that_the_adapter_has_not():
    model, batch = adapted(tiny_qwen_vl), image_batch(rows=1)
    batch["input_ids"][0, 2] = VIDEO
    with pytest.raises(RoutingError, match=r"video tokens in the input, but the adapter has text, image; .*'video'"):
        model(**without(batch, "pixel_values"))
    batch["input_ids"][0, 2] = 5
    kinds = torch.zeros_like(batch["input_ids"])
    kinds[0, 2] = 3
    with pytest.raises(RoutingError, match="audio tokens in the input"):
        model(**without(batch, "pixel_values"), mm_token_type_ids=kinds)
    kinds[0, 2] = 4
    with pytest.raises(RoutingError, match="mm_token_type_ids from 0 to 3"):
        model(**without(batch, "pixel_values"), mm_token_type_ids=kinds)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((2, 11), 2), r"modality_ids go from -1 \(padding\) to 1, of text, image"),
        (torch.full((2, 11), -2), "modality_ids go from -1"),
        (torch.zeros(2, 10, dtype=torch.long), r"modality_ids is \(2, 10\), the tokens are \(2, 11\)"),
        (torch.zeros(1, 11, dtype=torch.long), r"modality_ids is \(1, 11\), the tokens are \(2, 11\)"),
        (torch.zeros(2, 11), "modality_ids must be a tensor of whole numbers, batch x tokens, got torch.float32"),
        (torch.zeros(11, dtype=torch.long), "got torch.int64 of 1 dimensions"),
        ([[0] * 11] * 2, "got list"),
    ],
)
def test_wrong_modality_ids(ids, message):
    model, batch = adapted(), image_batch()
    with pytest.raises(RoutingError, match=message):
        model(**batch, modality_ids=ids)
    if "the tokens" not in message or ids.shape[1] != 11:
        with pytest.raises(RoutingError, match=message.split(", the tokens")[0]):
            model.generate(**without(batch, "labels"), modality_ids=ids, max_new_tokens=2)


@pytest.mark.parametrize("name", ["question_mask", "segment_ids"])
def test_wrong_masks(name):
    model, batch = adapted(), image_batch()
    with pytest.raises(RoutingError, match=rf"{name} is \(2, 4\), the tokens are \(2, 11\)"):
        model(**batch, **{name: torch.ones(2, 4, dtype=torch.long)})


def test_labels_of_other_tokens():
    model, batch = adapted(), image_batch()
    with pytest.raises(RoutingError, match=r"labels is \(2, 9\), the tokens are \(2, 11\)"):
        model(**{**batch, "labels": batch["labels"][:, 2:]})


def test_training_without_labels():
    model, batch = adapted().train(), without(image_batch(), "labels")
    with pytest.raises(RoutingError, match=r"training mode without labels.*pass labels, or question_mask"):
        model(**batch)
    model(**batch, question_mask=torch.ones_like(batch["input_ids"]))
    model.generate(**batch, max_new_tokens=2)  # its prompt is known
    adapted(attention="none").train()(**batch)


def test_the_answer_is_looked_at_only_where_nothing_tells_it():
    """In evaluation mode a forward pass without labels may be the prompt of what is generated then."""
    model, given = adapted().eval(), without(image_batch(rows=1), "labels")
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][0, -1] += 1
    question = torch.ones_like(given["input_ids"])
    question[0, -1] = 0

    def alike(**more):
        logits = [model(**batch, **more).logits[0, :-1] for batch in (given, other)]
        return torch.equal(*logits)

    assert alike(question_mask=question) and alike(labels=torch.where(question == 1, -100, given["input_ids"]))
    assert not alike()  # a limit, told in docs/moka.md


def test_a_model_that_tells_no_placeholder():
    model, ids = adapted(tiny_llama), image_batch(rows=1)["input_ids"]
    with pytest.raises(RoutingError, match=r"no placeholder id of image: tell it with MokA\(tokens=\{name: id\}\)"):
        model(input_ids=ids)
    with pytest.raises(RoutingError, match="no placeholder id of points"):
        adapted(modalities={"image": 1, "points": 2})(**image_batch())
    model(input_ids=ids, modality_ids=(ids == IMAGE).long())


def test_placeholders_that_the_model_expands():
    """As Qwen2-Audio once did with its single placeholder: the decoder sees more tokens than there are ids."""
    model = adapted(tiny_qwen_audio, modalities={"audio": 1})

    def expand(module, args, kwargs):
        longer = nn.functional.pad(kwargs["inputs_embeds"], (0, 0, 0, 3))
        return args, {**kwargs, "inputs_embeds": longer, "attention_mask": None, "position_ids": None}

    model.get_base_model().model.language_model.register_forward_pre_hook(expand, with_kwargs=True)
    with pytest.raises(RoutingError, match=r"sees \(1, 14\) tokens, the routing is of \(1, 11\).*expand the placehold"):
        model(input_ids=torch.full((1, 11), 5))


def test_experts_whose_tokens_are_flattened():
    model = lively(ll.MokA(**PLAN, tokens={"image": IMAGE}).wrap(tiny_moe(), ["shared_expert.up_proj"])).eval()
    with pytest.raises(RoutingError, match=r"a layer sees \(22,\) tokens.*MoE experts cannot be adapted"):
        model(input_ids=image_batch()["input_ids"])
    attention = lively(ll.MokA(**PLAN, tokens={"image": IMAGE}).wrap(tiny_moe(), ["q_proj", "v_proj"])).eval()
    assert not routing_of(attention, input_ids=image_batch()["input_ids"]).plain


def test_keys_that_are_not_there():
    batch = image_batch()
    with pytest.raises(RoutingError, match=r"no text between the markers \(28, 27\)"):
        adapted(keys="span", span=(28, 27))(**batch)
    model = adapted(keys="span", span=(28, 27), tokens={"image": IMAGE})
    embeds = embedded(model, batch)
    kinds = (batch["input_ids"] == IMAGE).long()
    with pytest.raises(RoutingError, match="finds its markers in input_ids"):
        model(inputs_embeds=embeds, modality_ids=kinds)
    with pytest.raises(RoutingError, match="keys='explicit' needs question_mask"):
        adapted(keys="explicit")(**batch)
    batch["input_ids"][:, [5, 8]] = torch.tensor([28, 27])
    assert keys_of(routing_of(model, **batch)) == [6, 7]


def test_a_mask_that_does_not_tell_the_padding():
    model, batch = adapted(), image_batch()

    class BlockMask:
        pass

    with pytest.raises(RoutingError, match="attention_mask is a BlockMask, which does not tell the padding"):
        model(**{**batch, "attention_mask": BlockMask()})


# The Trainer ----------------------------------------------------------------------------------------------------------


def test_the_trainer_drops_columns_of_ours_and_routing_goes_on(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = ll.MokA(**PLAN).wrap(tiny_llava())
    batch = image_batch(rows=4)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    for row in rows:
        row["question_mask"] = torch.zeros(3)  # of a wrong shape: would be refused if it came through
    met = []
    layers_of(model)[0].register_forward_pre_hook(lambda _, args: met.append(current(args[0].shape[:-1])) and None)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    before = layers_of(model)[0].lora_B["default"].weight.clone()
    Trainer(
        model,
        TrainingArguments(tmp_path, **options, use_cpu=True, disable_tqdm=True, gradient_checkpointing=True),
        train_dataset=rows,
    ).train()
    assert len(met) >= 2
    assert all(
        torch.equal(keys_routing.types.bool(), torch.tensor([[0] + [1] * 4 + [0] * 6] * 2).bool())
        for keys_routing in met
    )
    assert keys_of(met[0]) == [0, 5, 6, 7, 8]
    assert not torch.equal(layers_of(model)[0].lora_B["default"].weight, before)


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_that_takes_the_labels_out_needs_question_masks(tmp_path, how):
    from transformers import Trainer, TrainingArguments

    batch = image_batch(rows=4)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]

    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def collate(examples, masks):
        given = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        return {**given, "question_mask": (given["labels"] == -100).long()} if masks else given

    def train(masks):
        options = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
        smooth = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
        trainer = Trainer(
            ll.MokA(**PLAN).wrap(tiny_llava()),
            TrainingArguments(tmp_path, **options, **smooth, use_cpu=True, disable_tqdm=True),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=lambda examples: collate(examples, masks),
            compute_loss_func=None if smooth else loss,
        )
        trainer.train()
        return trainer.evaluate()["eval_loss"]

    with pytest.raises(RoutingError, match=rf"{how}.*takes the labels out.*data collator give question_mask"):
        train(masks=False)
    assert train(masks=True) > 0
