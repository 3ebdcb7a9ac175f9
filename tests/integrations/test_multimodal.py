"""Tasks with pictures or sound beside the text: rows, likelihoods and training, on tiny random models."""

from __future__ import annotations

import json
import wave
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from typer.testing import CliRunner

import tiny_llava
from loraloom.cli import app
from loraloom.integrations.likelihood import Continuation
from loraloom.integrations.peft import attached
from loraloom.integrations.scoring import bench
from loraloom.recipe import parse
from loraloom.registry import edge
from loraloom.run import _fit_options, train
from loraloom.strategies.modality import MokA
from loraloom.tasks import Example, load_task
from loraloom.tasks.hub import HubTask
from loraloom.tasks.media import audio, resampled
from tiny_multimodal import IMAGE, lively


@pytest.fixture(scope="module")
def made():
    return bench(tiny_llava.tiny_llava(), tiny_llava.task(), processor=tiny_llava.processor(), max_length=40)


@pytest.fixture(scope="module")
def adapter(made):
    with edge("adapting").training(made.model, kind="moka", moka=MokA({"image": 1}, rank=2)) as live:
        return edge("peft").from_model(lively(live))


def slowly(model, rows, example):
    """Mean log-likelihood of each choice, one forward pass a choice, the prompt marked as what is looked at."""
    found = []
    for choice in example.choices:
        asked, beside = rows._asked(example, 8)
        told = rows._tokens(choice)
        ids = torch.tensor([asked + told])
        question = torch.tensor([[1] * len(asked) + [0] * len(told)]) * (ids != IMAGE)
        more = {"question_mask": question} if hasattr(model, "peft_config") else {}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **beside, **more).logits[0]
        logs = F.log_softmax(logits, -1)
        found.append(np.mean([logs[len(asked) - 1 + i, token].item() for i, token in enumerate(told)]))
    return found


def test_choices_that_begin_alike_score_as_each_alone(made, adapter):
    examples = made.task.splits["test"]
    for one in (None, adapter):
        with attached(made.model, one) as model:
            expected = [slowly(model, made.rows, example) for example in examples]
            found = list(made.rows.likelihoods(model, examples, batch=3))
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert made.evaluate(one).correct == tuple(
            int(np.argmax(e)) == x.label for e, x in zip(expected, examples, strict=True)
        )
    assert np.abs(np.array(found) - [slowly(made.model, made.rows, e) for e in examples]).max() > 1e-3


def test_choices_that_begin_alike_share_a_row(made, monkeypatch):
    seen = []
    stacked = Continuation._stacked
    monkeypatch.setattr(Continuation, "_stacked", lambda self, rows: seen.append(rows) or stacked(self, rows))
    made.rows.choose(made.model, made.task.splits["test"][:2])
    # "red", "no" and "dark" are one token; "dark blue" holds their beginning, "very dark blue" begins otherwise
    assert [len(rows) for rows in seen] == [4]
    assert sorted({tuple(row.told) for row in seen[0]}) == [(8,), (13, 8)]


def test_a_training_batch_has_labels_on_the_answer_alone_and_a_place_for_each_image_token(made):
    examples = made.task.splits["train"][:3]
    batch = made.collate(examples)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    for i, example in enumerate(examples):
        answer = made.rows._tokens(example.choices[example.label])
        assert batch["labels"][i][batch["labels"][i] >= 0].tolist() == answer
        assert int((batch["input_ids"][i] == IMAGE).sum()) == 4
        assert int(batch["attention_mask"][i].sum()) == len(made.rows._asked(example, 0)[0]) + len(answer)
    torch.testing.assert_close(batch["pixel_values"][1:2], made.rows._asked(examples[1], 0)[1]["pixel_values"])


def test_several_images_and_free_answers(made):
    frames = Example(
        "what is it ?", ("a very red",), 0, media={"image": [tiny_llava.picture(1), tiny_llava.picture(2)]}
    )
    rows = replace(made.rows, task=replace(made.task, labels=()))
    batch = rows.collate([frames])
    assert batch["pixel_values"].shape[0] == 2 and int((batch["input_ids"] == IMAGE).sum()) == 8
    assert batch["labels"][batch["labels"] >= 0].tolist() == [12, 13, 7, 2]  # with the end of the sequence
    assert torch.isfinite(made.model(**batch).loss)


def test_what_does_not_fit_is_refused_and_not_cut(made):
    short = replace(made.rows, max_length=6)
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens .* do not fit into data.max_length 6"):
        short.collate(made.task.splits["train"][:1])
    sound = Example("", ("no",), 0, media={"audio": np.zeros(10, np.float32)})
    with pytest.raises(ValueError, match="LlavaProcessor takes no audio"):
        made.rows.collate([sound])


def recipe(tmp_path, **more):
    told = {
        "model": str(tmp_path / "base"),
        "task": {
            "dataset": str(tmp_path / "data"),
            "content": "question",
            "label": "answer",
            "image": "picture",
            "prompt": "{image} {content} Answer:",
            "test": "",
            "validation": "",
        },
        "output": str(tmp_path / "out"),
        "train": {"steps": 4, "batch_size": 4, "save_every": 2, "learning_rate": 1e-2},
    }
    return parse({**told, **more})


@pytest.fixture
def files(tmp_path):
    import datasets

    tiny_llava.folder(tmp_path / "base")
    rows = {"question": [], "answer": [], "picture": []}
    for i in range(40):
        rows["question"].append("what is it ?" if i % 3 else "is it a red")
        rows["answer"].append(("red", "dark blue")[i % 2])
        rows["picture"].append(tiny_llava.picture(i))
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "picture": datasets.Image()}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "data"))
    return tmp_path


def test_two_stages_by_recipe(files):
    first = recipe(
        files,
        output=str(files / "stage-one"),
        adapter={"kind": "none", "modules_to_save": ["multi_modal_projector"]},
    )
    done = train(first)
    assert done.adapter is None
    assert done.path == files / "stage-one"
    before, after = (bench(str(files / name), first.task).model.state_dict() for name in ("base", "stage-one"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("multi_modal_projector" in key for key in changed)
    told = json.loads((files / "stage-one" / "loraloom.json").read_text())
    assert told["operation"] == "train" and told["arguments"]["adapter"]["kind"] == "none"
    with pytest.raises(FileExistsError):
        train(first)
    second = {
        "model": str(files / "stage-one"),
        "adapter": {"kind": "moka", "rank": 2, "modules_to_save": ["multi_modal_projector"]},
        "moka": {"modalities": {"image": 1}},
        "strategy": {"name": "coto"},
    }
    made = train(recipe(files, **second)).adapter
    assert made.kind == "moka" and made.base == str(files / "stage-one")
    assert sorted(made.extras) == sorted(f"model.{key.removeprefix('model.')}" for key in changed)
    assert all(name.startswith("model.language_model.") for name in made.modules)
    run = recipe(files, **second)
    (files / "task.yaml").write_text(yaml.safe_dump({"dataset": run.task.dataset, **task_keys(run.task)}))
    asked = ["evaluate", str(files / "out"), "--task", str(files / "task.yaml"), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["value"] == bench(str(files / "stage-one"), run.task).evaluate(made).value


def task_keys(task):
    return {
        "content": task.content,
        "label": task.label,
        "image": task.image,
        "prompt": task.prompt,
        "test": "",
        "validation": "",
    }


@pytest.mark.parametrize("kind", ["lora", "moka"])
def test_training_leaves_the_base_as_it_was(files, kind):
    run = recipe(files, adapter={"kind": kind}, **({"moka": {"modalities": {"image": 1}}} if kind == "moka" else {}))
    made = bench(str(files / "base"), run.task)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    batch = made.collate(made.training[:2])
    moka = None if run.moka is None else run.moka.plan(run.adapter)
    with edge("adapting").training(made.model, kind=kind, moka=moka) as live:
        live.train()
        live(**batch).loss.backward()
        adapted = {name for name, _ in live.named_parameters() if "lora_" in name}
    assert adapted and all(".language_model." in name for name in adapted)
    after = made.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert not made.model._forward_pre_hooks and "generate" not in vars(made.model)
    assert not hasattr(made.model, "peft_config") and not made.model.training
    made.model(input_ids=batch["input_ids"][:, 5:])  # no routing is asked for


def test_a_killed_projector_run_goes_on(files):
    first = recipe(files, adapter={"kind": "none", "modules_to_save": ["multi_modal_projector"]})
    whole = train(first)
    work = files / "out.training"
    made = edge("scoring").bench(first.model, first.task, **first.data.model_dump())
    fit = edge("fit")
    told = _fit_options(first.train, first.seed, work, resume=False, progress=False)
    with edge("adapting").whole(made.model, ["multi_modal_projector"]) as model:
        fit.fit(model, made.training, collate=made.collate, options=told)
    (work / "checkpoint-4").rename(files / "lost")
    made = edge("scoring").bench(first.model, first.task, **first.data.model_dump())
    with edge("adapting").whole(made.model, ["multi_modal_projector"]) as model:
        again = fit.fit(model, made.training, collate=made.collate, options=replace(told, resume=True))
        resumed = {key: value.clone() for key, value in model.state_dict().items()}
    assert again.resumed_from == 2
    with edge("adapting").whole(made.model, ["multi_modal_projector"]) as model:  # nothing is left to do
        fit.fit(model, made.training, collate=made.collate, options=replace(told, resume=True))
        finished = {key: value.clone() for key, value in model.state_dict().items()}
    expected = bench(str(whole.path), first.task).model.state_dict()
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert all(torch.equal(finished[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"adapter": {"kind": "moka"}}, "adapter.kind moka and a section moka"),
        ({"moka": {"modalities": {"image": 1}}}, "adapter.kind moka and a section moka"),
        ({"adapter": {"kind": "moka"}, "moka": {"modalities": {"image": 2}}}, "number the A's"),
        (
            {"adapter": {"kind": "moka"}, "moka": {"modalities": {"image": 1}, "attention": "cros"}},
            "did you mean 'cross'",
        ),
        (
            {"adapter": {"kind": "moka"}, "moka": {"modalities": {"image": 1}, "modality": {}}},
            "moka.modality is not known",
        ),
        ({"adapter": {"kind": "none"}}, "needs adapter.modules_to_save"),
        ({"adapter": {"kind": "none", "modules_to_save": ["x"]}, "strategy": {"name": "coto"}}, "no adapter"),
        ({"adapter": {"kind": "moka"}, "moka": {"modalities": {"image": 1}}, "lori": {}}, "not moka"),
    ],
)
def test_wrong_recipes_are_one_line(told, message):
    with pytest.raises(ValueError, match=message) as error:
        parse({"model": "m", "task": "digits", "output": "o", **told})
    assert "\n" not in str(error.value)


def test_a_projector_that_is_not_there(files):
    with pytest.raises(ValueError, match="has no module 'projector'"):
        train(recipe(files, adapter={"kind": "none", "modules_to_save": ["projector"]}))
    assert not (files / "out").exists() and not (files / "out.training").exists()


# --- sounds -----------------------------------------------------------------------------------------------------------
def wav(path, samples, rate=8000):
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())


def test_sounds_of_a_folder(tmp_path):
    import datasets

    tone = np.sin(np.arange(800) * 2 * np.pi * 440 / 8000) * 0.5
    for i in range(30):
        wav(tmp_path / f"{i}.wav", tone * (i + 1) / 30)
    rows = {"clip": [str(tmp_path / f"{i}.wav") for i in range(30)], "said": [f"word {i}" for i in range(30)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data"))
    one = HubTask(str(tmp_path / "data"), content="", audio="clip", answer="said", prompt="{audio} Say:")
    found = load_task(replace(one, test="", validation=""))
    assert found.modality == "audio+text"
    example = found.splits["train"][0]
    assert example.content == "" and example.media["audio"].dtype == np.float32 and len(example.media["audio"]) == 1600
    loud = float(np.abs(example.media["audio"]).max())
    number = int(example.choices[0].split()[1])
    assert loud == pytest.approx(0.5 * (number + 1) / 30, rel=0.05)


def test_samples_of_any_rate_and_channels():
    at = np.arange(4410) / 44100
    tone = np.sin(2 * np.pi * 200 * at).astype(np.float32)
    made = audio({"array": np.stack([tone, tone], 1), "sampling_rate": 44100})
    expected = np.sin(2 * np.pi * 200 * np.arange(1600) / 16000)
    assert made.shape == (1600,)
    np.testing.assert_allclose(made[100:-100], expected[100:-100], atol=0.01)
    assert resampled(np.ones(5, np.float32), 16000).tolist() == [1] * 5


def test_a_file_that_is_no_sound(tmp_path):
    (tmp_path / "x.mp3").write_bytes(b"ID3 nothing")
    with pytest.raises(ValueError, match="soundfile"):
        audio({"path": str(tmp_path / "x.mp3"), "bytes": None})
