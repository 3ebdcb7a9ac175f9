"""Tasks with a free-text answer: rows, training batches, and completions against one prompt at a time."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loraloom as ll
from loraloom.adapter import Factors
from loraloom.integrations.generation import completions, judged
from loraloom.integrations.peft import attached
from loraloom.integrations.scoring import Bench, bench
from loraloom.recipe import parse
from loraloom.tasks import Example, Task, load_task
from loraloom.tasks.hub import HubTask
from loraloom.tasks.judges import JUDGES
from loraloom.tasks.splits import PARTS
from tiny import tiny_llama

LETTERS = string.ascii_lowercase + string.digits + " =+.?#\n"
PAD, BOS, EOS = range(3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a letter, with a beginning, an end and a padding of its own."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}
    made = Tokenizer(models.BPE(vocab, [], fuse_unk=False))
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def lively(seed: int = 0) -> nn.Module:
    """A random model that says different things after different prompts, and sometimes ends."""
    model = tiny_llama(seed, vocab=3 + len(LETTERS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12) if parameter.ndim > 1 else None
        model.lm_head.weight[EOS] *= 1.5
    return model


def oracle(model: nn.Module, tokenizer: Any, prompt: str, most: int) -> str:
    """Greedy, one prompt, no cache, no padding."""
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < most:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token == EOS:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def sums(count: int = 60) -> list[dict]:
    return [{"q": f"{i}+{i % 7}", "a": f"it is {i + i % 7}", "who": f"w{i // 6}"} for i in range(count)]


TOLD = {"content": "q", "answer": "a", "judge": "number", "prompt": "{content}=", "max_new_tokens": 8}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_and_their_answers(tmp_path: Path) -> None:
    folder = jsonl(tmp_path / "data/train.jsonl", sums())
    task = load_task(f"hub:{folder}", **TOLD)
    assert (task.modality, task.labels, task.judge, task.max_new_tokens) == ("text", (), "number", 8)
    examples = [example for part in PARTS for example in task.splits[part]]
    assert sorted((e.content, *e.choices, e.label) for e in examples) == sorted((r["q"], r["a"], 0) for r in sums())


@pytest.mark.parametrize("group", ["", "who"])
def test_a_question_with_several_answers_keeps_them_all_in_one_part(tmp_path: Path, group: str) -> None:
    rows = [{"q": f"q{i % 40}", "a": f"a{i}", "who": f"w{i % 60}"} for i in range(120)]
    task = load_task(f"hub:{jsonl(tmp_path / 'data/train.jsonl', rows)}", content="q", answer="a", group=group)
    where = [(part, str(e.content), e.choices[0]) for part in PARTS for e in task.splits[part]]
    assert sorted(answer for *_, answer in where) == sorted(row["a"] for row in rows)
    assert len({(part, question) for part, question, _ in where}) == 40
    if group:
        told = {row["a"]: row["who"] for row in rows}
        assert len({(part, told[answer]) for part, _, answer in where}) == 60


def test_one_question_about_many_pictures_does_not_bind_them(tmp_path: Path) -> None:
    """What is asked is text and picture; LLaVA's data ask thousands of pictures the same."""
    from io import BytesIO

    import datasets
    import numpy as np
    from PIL import Image

    def png(shade: int) -> bytes:
        Image.fromarray(np.full((2, 2, 3), shade, np.uint8)).save(stored := BytesIO(), "PNG")
        return stored.getvalue()

    features = {name: datasets.Value("string") for name in "qag"} | {"image": datasets.Image()}
    rows = [{"q": "What is it?", "a": f"a{i}", "g": f"g{i}", "image": {"bytes": png(i)}} for i in range(60)]
    rows += [{"q": "What is it?", "a": "b3", "g": "other", "image": {"bytes": png(3)}}]  # this one is asked twice
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "data")
    told = {"content": "q", "image": "image", "answer": "a", "group": "g", "prompt": "{image} {content}"}
    task = load_task(f"hub:{tmp_path / 'data'}", **told)
    parts = {part: {e.choices[0] for e in task.splits[part]} for part in PARTS}
    assert all(parts.values()) and sum(map(len, parts.values())) == 61
    assert len(parts["train"]) > 30 and sum({"a3", "b3"} <= answers for answers in parts.values()) == 1


def test_a_training_row_with_a_question_of_the_test_is_dropped(tmp_path: Path) -> None:
    jsonl(tmp_path / "data/train.jsonl", [*sums(), {"q": "leaked", "a": "one", "who": ""}])
    jsonl(
        tmp_path / "data/test.jsonl", [{"q": "leaked", "a": "two", "who": ""}, {"q": "leaked", "a": "six", "who": ""}]
    )
    task = load_task(f"hub:{tmp_path / 'data'}", content="q", answer="a")
    assert sorted(e.choices for e in task.splits["test"]) == [("six",), ("two",)]
    assert not any(e.content == "leaked" for part in ("train", "validation") for e in task.splits[part])


def test_parts_of_a_template_in_double_brackets_go_with_their_columns(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "hint": "" if i % 2 else f"h{i}", "a": f"a{i}"} for i in range(40)]
    told = {"content": "[[A hint{hint:.0}. ]]{q}[[ ({hint})]] [[x]]", "answer": "{a}!"}
    task = load_task(f"hub:{jsonl(tmp_path / 'data/train.jsonl', rows)}", **told)
    found = {e.choices[0]: e.content for part in PARTS for e in task.splits[part]}
    assert found == {f"a{i}!": f"q{i} [[x]]" if i % 2 else f"A hint. q{i} (h{i}) [[x]]" for i in range(40)}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"answer": "a", "judge": "numbr"}, r"judge 'numbr' is not known \(did you mean 'number'\?\)"),
        ({"judge": "number"}, "judge 'number' needs the answer"),
        ({"answer": "a", "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_refusals(told: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HubTask("somewhere", **told)
    with pytest.raises(ValueError, match=f"^recipe: task: {message}"):
        parse({"model": "m", "output": "runs/a", "task": {"dataset": "somewhere", **told}})


def test_a_column_of_the_answer_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = jsonl(tmp_path / "data/train.jsonl", sums())
    with pytest.raises(ValueError, match="there is no column 'b'; columns: q, a, who"):
        load_task(f"hub:{folder}", content="q", answer="{a} {b}")


# --- training batches ------------------------------------------------------------------------------------------------


def made_task(pairs: list[tuple[str, str]], judge: str = "exact", most: int = 8) -> Task:
    rows = [Example(question, (answer,), 0) for question, answer in pairs]
    return Task("made-up", "text", (), "{content}=", {"train": rows, "test": rows}, "here", "none", judge, most)


def set_up(tokenizer: Any, task: Task, model: nn.Module | None = None, max_length: int = 24) -> Bench:
    return bench(model or lively(), task, family="causal", processor=tokenizer, max_length=max_length)


def test_the_answer_is_learned_with_its_end(tokenizer: Any) -> None:
    task = made_task([("1+1", "2"), ("10+10", "it is 20")])
    batch = set_up(tokenizer, task).collate(task.splits["train"])
    for row, mask, labels, example in zip(*batch.values(), task.splits["train"], strict=True):
        told = tokenizer(" " + example.choices[0], add_special_tokens=False)["input_ids"] + [EOS]
        assert labels[labels >= 0].tolist() == told
        assert row[mask > 0].tolist() == tokenizer(f"{example.content}=")["input_ids"] + told
        assert row[labels >= 0].tolist() == told


@pytest.mark.parametrize(("asked", "told"), [(3, 3), (3, 60), (60, 3), (60, 60), (11, 12), (12, 11), (0, 60)])
def test_what_is_too_long_is_cut(tokenizer: Any, asked: int, told: int) -> None:
    question, answer = (LETTERS[:36] * 2)[:asked], (LETTERS[:36] * 2)[:told]
    task = made_task([(question, answer)])
    batch = set_up(tokenizer, task, max_length=20).collate(task.splits["train"])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
    whole = [BOS, *tokenizer(f"{question}=", add_special_tokens=False)["input_ids"]]
    target = [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], EOS]
    assert len(ids) == min(20, len(whole) + len(target))
    learned = labels[labels >= 0].tolist()
    assert learned == target[: len(learned)] and len(learned) >= min(len(target), 10)
    prompt = ids[: len(ids) - len(learned)]
    assert prompt == [BOS, *whole[len(whole) - len(prompt) + 1 :]]  # its end says what is asked for
    assert len(learned) == len(target) or len(prompt) <= max(10, len(whole))


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any) -> None:
    class Endless:
        pad_token_id = PAD

        def __call__(self, *args: Any, **options: Any) -> Any:
            return tokenizer(*args, **options)

    task = made_task([("1+1", "2")])
    with pytest.raises(ValueError, match="end-of-sequence"):
        set_up(Endless(), task).collate(task.splits["train"])


# --- completions -----------------------------------------------------------------------------------------------------

PROMPTS = [f"{'why is it so'[: i % 11]} {i * 7 % 23}=" for i in range(21)] + ["1+1="] * 3


@pytest.mark.parametrize("batch", [1, 5, 16, 64])
def test_completions_are_those_of_one_prompt_at_a_time(tokenizer: Any, batch: int) -> None:
    model = lively()
    expected = [oracle(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    side = tokenizer.padding_side, tokenizer.truncation_side
    found = completions(model, tokenizer, PROMPTS, max_new_tokens=8, max_length=24, batch=batch)
    assert found == expected  # all of them, copies too, in the order given
    assert side == (tokenizer.padding_side, tokenizer.truncation_side)
    lengths = {len(text) for text in expected}
    assert len(set(expected)) > 5 and max(lengths) == 8 and min(lengths) < 8  # the comparison says something


def adapter_of(model: nn.Module) -> ll.Adapter:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj"
    out, in_ = model.get_submodule(name).weight.shape
    factors = Factors(torch.randn(out, 2, generator=generator), torch.randn(2, in_, generator=generator), 2.0)
    return ll.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}, {name: factors})


@pytest.mark.parametrize("kind", ["", "CAUSAL_LM"])
def test_completions_of_a_peft_model(tokenizer: Any, kind: str) -> None:
    model = lively()
    base = completions(model, tokenizer, PROMPTS, max_new_tokens=8, max_length=24)
    adapter = adapter_of(model)
    adapter = dataclasses.replace(adapter, config={**adapter.config, **({"task_type": kind} if kind else {})})
    with attached(model, adapter) as peft_model:
        found = completions(peft_model, tokenizer, PROMPTS, max_new_tokens=8, max_length=24)
        assert found == [oracle(peft_model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert found != base
    assert completions(model, tokenizer, PROMPTS, max_new_tokens=8, max_length=24) == base


def test_settings_that_come_with_a_model_are_not_used_but_for_its_ends(tokenizer: Any) -> None:
    from transformers import GenerationConfig

    model = lively()
    plain = completions(model, tokenizer, PROMPTS, max_new_tokens=8, max_length=24)
    own = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=4
    )
    model.generation_config = own
    assert completions(model, tokenizer, PROMPTS, max_new_tokens=8, max_length=24) == plain
    assert model.generation_config is own
    letter = next(text[1] for text in plain if len(text) > 2)
    own.eos_token_id = [tokenizer.convert_tokens_to_ids(letter)]
    ended = completions(model, tokenizer, PROMPTS, max_new_tokens=8, max_length=24)
    assert ended == [text.split(letter)[0] for text in plain] != plain


def test_a_long_prompt_keeps_its_end_and_leaves_room(tokenizer: Any) -> None:
    model = lively()  # of 32 positions
    long = "abc" * 30 + "1+1="
    found = completions(model, tokenizer, [long], max_new_tokens=8, max_length=100)
    assert found == completions(model, tokenizer, [long[-23:]], max_new_tokens=8, max_length=24)
    with pytest.raises(ValueError, match="max_new_tokens = 32 leaves no room: the model has 32 positions"):
        completions(model, tokenizer, [long], max_new_tokens=32, max_length=100)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        completions(model, tokenizer, [long], max_new_tokens=8, max_length=100, batch=0)
    assert completions(model, tokenizer, [], max_new_tokens=8, max_length=100) == []


def test_a_prompt_without_a_beginning_keeps_only_its_end(tokenizer: Any) -> None:
    class Bare:
        pad_token_id, eos_token_id, bos_token_id, decode = PAD, EOS, None, tokenizer.decode

        def __call__(self, text: str, **ignored: Any) -> Any:
            return tokenizer(text, add_special_tokens=False)

    model = lively()
    options = {"max_new_tokens": 8, "max_length": 6}
    assert completions(model, Bare(), ["abc12+34="], **options) == completions(model, Bare(), ["12+34="], **options)
    made = set_up(Bare(), made_task([("abc12+34", "46")]), max_length=10)
    batch = made.collate(made.training)
    assert batch["input_ids"][0].tolist() == Bare()("12+34= 46")["input_ids"] + [EOS]


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_an_answer_that_the_judge_cannot_read_is_told_before_anything_is_written(tokenizer: Any) -> None:
    class Silent(nn.Module):
        def generate(self, **given: Any) -> Any:
            raise AssertionError("nothing is to be generated")

    task = made_task([("1+1", "it is 2"), ("1+2", "it is three")], judge="number")
    with pytest.raises(ValueError, match="the answer 'it is three' of an example has no number"):
        judged(Silent(), tokenizer, task, task.splits["test"], max_length=24)


def test_every_example_is_scored_by_the_judge_on_its_completion(tokenizer: Any, tmp_path: Path) -> None:
    folder = jsonl(tmp_path / "data/train.jsonl", sums(30))
    model = lively()
    rows = [  # 67: no multiple of any batch; copies of a question, each with an answer of its own
        {"q": question, "a": oracle(model, tokenizer, f"{question}=", 8) if k % 3 else f"none {k}", "who": ""}
        for k, question in enumerate(f"{i % 40}+{i % 5}" for i in range(67))
    ]
    jsonl(folder / "test.jsonl", rows)
    task = load_task(f"hub:{folder}", **{**TOLD, "judge": "exact"})
    made = set_up(tokenizer, task, model)
    expected = tuple(JUDGES["exact"](oracle(model, tokenizer, f"{e.content}=", 8), e) for e in task.splits["test"])
    assert len(expected) == len({(row["q"], row["a"]) for row in rows})  # questions with two answers stay two
    found = made.evaluate(None)
    assert found.correct == expected and 0 < sum(expected) < len(expected)
    assert found.value == pytest.approx(sum(expected) / len(expected))
    assert made.evaluate(None, limit=5).correct == expected[:5]
    assert made.evaluate(adapter_of(model)).correct != expected
    assert made.evaluate(None) == found


def test_what_is_learned_is_written_and_ended(tokenizer: Any) -> None:
    pairs = [(f"{i}+{i}", f"{2 * i}") for i in range(6)]
    task = made_task(pairs)
    made = set_up(tokenizer, task, tiny_llama(vocab=3 + len(LETTERS)))
    batch = made.collate(made.training)
    assert made.evaluate(None).value == 0
    optimizer = torch.optim.Adam(made.model.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(150):
            loss = made.model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert made.evaluate(None).correct == (True,) * 6  # exact: nothing follows the answer


def test_a_free_text_task_without_a_judge_trains_but_is_not_evaluated(tokenizer: Any) -> None:
    made = set_up(tokenizer, made_task([("1+1", "2")], judge=""))
    assert made.collate(made.training)["labels"].max() > 0
    with pytest.raises(ValueError, match="task made-up: a free-text answer is evaluated by a judge; name one: exact"):
        made.evaluate(None)


def test_an_encoder_is_refused(tokenizer: Any) -> None:
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    made = bench(BertModel(BertConfig(**size)), made_task([("1+1", "2")]), family="encoder", processor=tokenizer)
    with pytest.raises(ValueError, match=r"answers are generated, and BertModel \(encoder\) is no causal model"):
        made.evaluate(None)


def test_fisher_information_of_free_answers_is_refused_not_zero(tokenizer: Any) -> None:
    model = tiny_llama(vocab=3 + len(LETTERS))
    made = set_up(tokenizer, made_task([("1+1", "2")]), model)
    with pytest.raises(ValueError, match="Fisher information needs choices"):
        ll.measure(adapter_of(model), made, kind="fisher")
