"""Scores on tiny random models: the head is fixed, likelihoods are those of the slow way, the base stays as it was."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import loraloom as ll
from loraloom.integrations.scoring import Bench, Prototypes, bench, fit_prototypes
from loraloom.tasks import Example, Task
from tiny import tiny_llama
from tiny_text import VOCAB, Letters, text_task
from tiny_vision import make_model, tiny_model  # noqa: F401


@pytest.fixture
def causal() -> Bench:
    return bench(tiny_llama(vocab=VOCAB), text_task(()), family="causal", processor=Letters(), max_length=30)


def test_a_choice_is_the_one_of_highest_mean_log_likelihood(causal):
    examples = causal.task.splits["test"]
    expected = []
    for example in examples:
        means = []
        for choice in example.choices:
            prompt = Letters()(f"Q {example.content} A")["input_ids"]
            answer = Letters()(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = causal.model(input_ids=torch.tensor([prompt + answer])).logits[0]
            scores = [F.log_softmax(logits[len(prompt) - 1 + i], -1)[token].item() for i, token in enumerate(answer)]
            means.append(np.mean(scores))
        expected.append(int(np.argmax(means)))
    assert causal.choose(causal.model, examples).tolist() == expected
    assert 0 < sum(expected) < len(expected)  # both choices occur: the comparison says something


def test_the_training_loss_of_a_causal_model_is_on_the_answer_alone(causal):
    batch = causal.collate(causal.task.splits["train"][:3])
    for row, example in zip(batch["labels"], causal.task.splits["train"], strict=False):
        answer = Letters()(f" {example.choices[example.label]}", add_special_tokens=False)["input_ids"]
        assert row[row >= 0].tolist() == answer
    assert causal.loss is None


@pytest.mark.parametrize("answers", [("yes", "no way"), ("yes",)], ids=["choices", "free"])
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(answers):
    """Also with a tokenizer that sets a space before each text, such as LLaVA's."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = {
        token: i for i, token in enumerate(["</s>", "\u2581", *"abcdenosywt?:", "\u2581y", "\u2581n", "\u2581a"])
    }
    whole = Tokenizer(models.BPE(letters, [("\u2581", letter) for letter in "yna"]))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>", pad_token="</s>")
    example = Example("can test?", answers, 0)
    task = Task("made-up", "text", (), "{content} ans:", {"train": [example], "test": [example]}, "here", "none")
    made = bench(tiny_llama(vocab=VOCAB), task, family="causal", processor=tokenizer, max_length=30)
    ends = [tokenizer.eos_token_id] * (len(answers) == 1)
    assert made.collate([example])["input_ids"][0].tolist() == tokenizer("can test? ans: yes")["input_ids"] + ends
    for choice, mean in zip(answers, next(made.rows.likelihoods(made.model, [example])), strict=True):
        ids = torch.tensor([tokenizer(f"can test? ans: {choice}")["input_ids"]])
        asked = len(tokenizer("can test? ans:")["input_ids"])
        with torch.no_grad():
            logs = F.log_softmax(made.model(input_ids=ids).logits[0], -1)
        found = [logs[i - 1, ids[0, i]].item() for i in range(asked, ids.shape[1])]
        assert mean == pytest.approx(np.mean(found), abs=1e-5)


def test_a_long_content_loses_its_end_and_the_prompt_keeps_its_own(causal):
    """Cut at its end, "Article: ... Topic:" would no longer ask for the topic."""
    example = Example("text " + "x" * 60, ("ab", "abc"), 0)
    ids = causal.collate([example])["input_ids"][0].tolist()
    whole = Letters()(f"Q {example.content} A")["input_ids"]
    assert len(ids) == 30 and ids == whole[:25] + whole[-2:] + Letters()(" ab", add_special_tokens=False)["input_ids"]


def test_an_answer_that_fills_the_row_is_refused(causal):
    short = dataclasses.replace(causal, max_length=5)
    for asked in (lambda: short.choose(short.model, short.training), lambda: short.collate(short.training)):
        with pytest.raises(ValueError, match=r"5 tokens leaves no room for a prompt in data\.max_length 5"):
            asked()


def test_padding_does_not_change_an_encoders_choice():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=VOCAB, **size)).eval()
    made = bench(model, text_task(), family="encoder", processor=Letters())
    examples = made.task.splits["test"]
    together = made.choose(model, examples)
    alone = [made.choose(model, [example])[0] for example in examples]
    assert together.tolist() == alone
    batch = made.collate(examples)
    labels = batch.pop("labels")
    loss = made.loss(model(**batch), labels)
    features = made.head.features(model(**batch).last_hidden_state, batch["attention_mask"])
    torch.testing.assert_close(loss, F.cross_entropy(made.head.logits(features), labels))
    torch.testing.assert_close(made.loss(model(**batch), labels, num_items_in_batch=2 * len(labels)), loss / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_many_tokens_has_room_and_counts_exactly(dtype):
    """A float16 sum ends at 65504, and 16 bits of bfloat16 cannot count to 509."""
    hidden, mask = torch.full((1, 512, 2), 200.0, dtype=dtype), torch.ones(1, 512, dtype=torch.long)
    mask[:, 509:] = 0
    head = Prototypes(torch.zeros(2), torch.eye(2), "mean")
    assert head.features(hidden, mask).tolist() == head.features(hidden, None).tolist() == [[200.0, 200.0]]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (None, "no preprocessor_config.json beside the weights"),
        ({"image_mean": [0.5] * 3}, "preprocessor_config.json does not tell image_std"),
        ([], "preprocessor_config.json does not tell image_mean"),
    ],
)
def test_a_vision_folder_without_the_statistics_of_pixels_says_so(tmp_path, told, message):
    from loraloom.integrations.backbones import load_backbone

    file = make_model(tmp_path / "vit") / "preprocessor_config.json"
    file.unlink() if told is None else file.write_text(json.dumps(told))
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        load_backbone(str(tmp_path / "vit"))


def test_a_head_needs_labels_and_examples_of_each(causal):
    with pytest.raises(ValueError, match=r"\[1\] have no training example"):
        fit_prototypes(torch.eye(2), torch.tensor([0, 0]), classes=2, pool="cls")
    made = bench(tiny_llama(vocab=VOCAB), text_task(()), family="encoder", processor=Letters())
    with pytest.raises(ValueError, match="no causal model"):
        made.evaluate(None)


def test_the_head_does_not_depend_on_how_much_is_trained_on(tiny_model):  # noqa: F811
    few, many = (bench(str(tiny_model), "digits", image_size=28, train_limit=limit) for limit in (5, None))
    assert (len(few.training), len(many.training)) == (5, len(many.task.splits["train"]))
    assert torch.equal(few.head.directions, many.head.directions)
    assert few.evaluate(None) == many.evaluate(None)


def test_the_head_is_made_of_frozen_features_whatever_is_asked_first(tiny_model):  # noqa: F811
    from loraloom.adapter import Factors

    first, second = (bench(str(tiny_model), "digits", image_size=28) for _ in range(2))
    square = [name for name, module in first.model.named_modules() if getattr(module, "out_features", 0) == 16]
    names = [name for name in square if first.model.get_submodule(name).in_features == 16]
    large = Factors(torch.ones(16, 1), torch.linspace(-2, 2, 16)[None], scale=5.0)
    adapter = ll.Adapter(
        {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": names}, dict.fromkeys(names, large)
    )
    second.evaluate(None)
    assert first.evaluate(adapter) == second.evaluate(adapter)
    assert torch.equal(first.head.directions, second.head.directions)


def test_a_rare_label_is_searched_for(tiny_model):  # noqa: F811
    task = ll.load_task("digits")
    train = [example for example in task.splits["train"] if example.label != 3]
    rare = next(example for example in task.splits["train"] if example.label == 3)
    late = Task(task.name, "image", task.labels, task.prompt, {"train": [*train[:400], rare]}, "here", "none")
    made = bench(str(tiny_model), late, image_size=28)
    assert made.head.directions.shape == (10, 16)
    assert len(train) > 400


def test_evaluating_an_adapter_leaves_the_base_as_it_was(causal):
    from loraloom.adapter import Factors

    before = {name: tensor.clone() for name, tensor in causal.model.state_dict().items()}
    name = "model.layers.0.mlp.up_proj"
    out, in_ = causal.model.get_submodule(name).weight.shape
    generator = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(out, 2, generator=generator), torch.randn(2, in_, generator=generator), 20.0)
    adapter = ll.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}, {name: factors})
    base, changed = causal.evaluate(None), causal.evaluate(adapter)
    assert causal.evaluate(None) == base
    assert changed.correct != base.correct
    assert causal.evaluate(adapter) == changed
    after = causal.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_score_is_a_function_of_an_adapter(causal):
    score = ll.score(causal.model, causal.task, family="causal", processor=Letters(), max_length=30, limit=5)
    assert score(None) == causal.evaluate(None, limit=5).value


def test_a_task_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"task digits is of image; .* takes text"):
        bench(tiny_llama(), "digits", family="causal", processor=Letters())


def test_points_of_a_path_are_swapped_in_place(causal):
    """Two shapes, that of the ends and that of the sums in between, are built once each; the scores are the same."""
    from loraloom.adapter import Adapter, Factors

    def drawn(seed):
        draw = torch.Generator().manual_seed(seed)
        parts = {f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in (0, 1)}
        modules = {
            name: Factors(B=4 * torch.randn(out, 2, generator=draw), A=torch.randn(2, in_, generator=draw))
            for name, (out, in_) in parts.items()
        }
        return Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}, modules)

    a, b = drawn(0), drawn(1)
    score = lambda one: causal.evaluate(one).value  # noqa: E731
    found = ll.connectivity(a, b, score, points=6)
    assert (causal.seat.injections, causal.seat.swaps) == (2, 4)
    fresh = []
    for t in found.at:
        alone = bench(tiny_llama(vocab=VOCAB), text_task(()), family="causal", processor=Letters(), max_length=30)
        fresh.append(alone.evaluate(ll.interpolate(a, b, t)).value)
    assert list(found.scores) == fresh and len(set(fresh)) > 1
