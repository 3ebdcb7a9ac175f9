"""Commands on MokA adapters as they are typed: fold, merge, prune, inspect, and the partial-modality probe.

The base is a tiny language model; the token ``#`` stands for what an image would be.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import loraloom as ll
import tiny_llava
import tiny_multimodal
from loraloom.cli import app
from loraloom.integrations.peft import attached, from_model
from loraloom.modalities import plan_of, restricted
from loraloom.recipe import read_task
from tiny import tiny_llama
from tiny_multimodal import lively

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SIGNS = ["<pad>", "<s>", "#", *string.ascii_lowercase, " ", "?"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, its tokenizer, a task, two MokA adapters (a, b) and a LoRA (lora)."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("moka")
    tokens = Tokenizer(models.BPE({sign: i for i, sign in enumerate(SIGNS)}, []))
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>").save_pretrained(
        folder / "base"
    )
    base().save_pretrained(folder / "base")
    rows = [
        {"text": f"{'##' * (i % 3)} what is {sign * 3}?", "label": i % 2} for i, sign in enumerate("abcdefghijkl" * 3)
    ]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"dataset": "data", "labels": ["yes", "no"], "prompt": "{content}"}
    (folder / "task.yaml").write_text(yaml.safe_dump(told))
    plan = ll.MokA({"image": 1}, rank=2, tokens={"image": SIGNS.index("#")})
    for seed, name in enumerate(("a", "b")):
        live = lively(plan.wrap(base(), ["q_proj", "up_proj"]), seed)
        ll.save(from_model(live), folder / name)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    ll.save(from_model(lively(get_peft_model(base(), lora))), folder / "lora")
    return folder


def base() -> Any:
    model = tiny_llama(vocab=len(SIGNS))
    for parameter in model.parameters():
        parameter.data.mul_(6)
    model.name_or_path = "base"
    return model


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words), prog_name="loraloom")


def test_fold_needs_text_only_and_says_so_in_the_record(run, place):
    done = run("fold", "a", "--base", "base", "-o", "folded")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot fold MokA adapters" in done.stderr
    assert "--text-only" in done.stderr
    assert not (place / "folded").exists()
    done = run("fold", "a", "b", "--base", "base", "-o", "folded", "--weights", "0.5,2", "--text-only")
    assert done.exit_code == 0, done.stderr
    record = json.loads((place / "folded" / "loraloom.json").read_text())
    assert record["arguments"]["text_only"] is True
    assert [one.get("operation") for one in record["inputs"]] == ["text only", "text only", None]

    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(place / "folded")
    both = ll.merge([ll.load("a"), ll.load("b")], weights=[0.5, 2.0])
    text, mixed = torch.arange(3, 13)[None], torch.tensor([[1, 2, 2, 5, 9, 4]])
    with attached(base(), both) as live, torch.no_grad():
        assert torch.allclose(read(text).logits, live(input_ids=text).logits, atol=1e-4)
        assert not torch.allclose(read(mixed).logits, live(input_ids=mixed).logits, atol=1e-2)


def test_text_only_of_another_kind_is_one_line(run, place):
    done = run("fold", "lora", "--base", "base", "-o", "no", "--text-only")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "for MokA adapters, which tell tokens apart; not for one of kind lora" in done.stderr
    assert not (place / "no").exists()


def test_merge_interpolate_scale_prune_and_inspect(run):
    for words, heads in (
        (["merge", "a", "b", "-o", "cat", "--method", "cat"], 2),
        (["merge", "a", "b", "-o", "mean", "--space", "factors"], 1),
        (["interpolate", "a", "b", "-o", "between", "--at", "0.3"], 2),
        (["subtract", "a", "b", "-o", "less"], 2),
        (["scale", "a", "-o", "twice", "--by", "2"], 1),
        (["prune", "a", "-o", "kept", "--keep", "every-other"], 1),
        (["export", "a", "-o", "plain", "--for", "vllm"], None),
        (["compress", "a", "-o", "small", "--rank", "1"], None),
        (["merge", "a", "b", "-o", "ties", "--method", "ties"], None),
    ):
        done = run(*words)
        out = words[words.index("-o") + 1]
        if heads is None:
            assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
            assert not Path(out).exists()
        else:
            assert done.exit_code == 0, done.stderr
            assert plan_of(ll.load(out).config).heads == heads
    (told,) = json.loads(run("inspect", "a", "--json").stdout)
    assert (told["kind"], told["modules"]) == ("moka", 8)
    assert told["parameters"] == 2 * (2 * 2 * 16 + 16 * 2) + 2 * (2 * 2 * 16 + 24 * 2)


def test_the_probe_asks_a_real_model_and_the_report_shows_it(run, place):
    done = run("probe", "partial-modality", "a", "--task", "task.yaml", "-o", "p.json", "--split", "train")
    assert done.exit_code == 0, done.stderr
    assert "text alone" in done.stdout
    (record,) = json.loads((place / "p.json").read_text())["records"]
    task = ll.load_task(f"hub:{place / 'data'}", labels=("yes", "no"), prompt="{content}")
    score = ll.score(str(place / "base"), task, split="train")
    a = ll.load(place / "a")
    assert record["values"] == [score(restricted(a, ["text"])), score(restricted(a, ["image"]))]
    assert (record["whole"], record["base"]) == (score(a), score(None))
    assert len({*record["values"], record["whole"], record["base"]}) > 2
    assert run("report", "p.json", "-o", "p.html").exit_code == 0
    assert "Partial modality" in (place / "p.html").read_text()


def test_wrong_probes_are_one_line(run, place):
    task = ["--task", "task.yaml", "-o", "x.json"]
    for words, said in (
        (["lora", *task], "does not tell its modalities; give them: a number by name, such as image=1"),
        (["lora", *task, "--modality", "image"], "--modality 'image': expected a name and a number"),
        (["lora", *task, "--modality", "image=2"], "modalities must number"),
        (["lora", *task, "--modality", "image=1"], "no placeholder id"),  # this base has no images
        (["a", *task, "--modality", "image=1"], "a MokA adapter tells its own"),
        (["a", *task, "--model", "nowhere"], "nowhere"),
        (["a", "--task", "task.yaml", "-o", "data"], "data exists"),
    ):
        done = run("probe", "partial-modality", *words)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), (words, done.output, done.exception)
        assert said in done.stderr
        assert not (place / "x.json").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LLaVA, questions about pictures, a MokA adapter and a LoRA."""
    import datasets
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("pictures")
    tiny_llava.folder(folder / "base")
    rows = [
        {
            "question": "what is it ?" if i % 3 else "is it a red",
            "answer": ("red", "dark blue", "yes", "no")[i % 4],
            "picture": made,
        }
        for i, made in enumerate(map(tiny_llava.picture, range(40)))
    ]
    told = {name: datasets.Value("string") for name in ("question", "answer")} | {"picture": datasets.Image()}
    columns = {name: [row[name] for row in rows] for name in told}
    datasets.Dataset.from_dict(columns, datasets.Features(told)).save_to_disk(str(folder / "data"))
    task = {
        "dataset": "data",
        "content": "question",
        "label": "answer",
        "image": "picture",
        "test": "",
        "validation": "",
    }
    (folder / "task.yaml").write_text(yaml.safe_dump({**task, "prompt": "{image} {content} Answer:"}))
    config = LoraConfig(r=2, lora_alpha=40, target_modules=r".*language.*(q|down)_proj")
    wraps = {
        "moka": lambda model: ll.MokA({"image": 1}, rank=2).wrap(model, ["q_proj", "down_proj"]),
        "lora": lambda model: get_peft_model(model, config),
    }
    for name, wrap in wraps.items():
        model = tiny_multimodal.tiny_llava()
        model.name_or_path = "base"
        ll.save(from_model(lively(wrap(model), seed=8)), folder / name)
    return folder


@pytest.mark.parametrize("words", [["moka"], ["lora", "--modality", "image=1"]])
def test_the_probe_on_pictures(pictures, monkeypatch, words):
    from typer.testing import CliRunner

    monkeypatch.chdir(pictures)
    more = ["--task", "task.yaml", "-o", "p.json", "--split", "train", "--json", "--overwrite"]
    done = CliRunner().invoke(app, ["probe", "partial-modality", *words, *more])
    assert done.exit_code == 0, (done.stderr, done.exception)
    record = json.loads(done.stdout)
    assert record["modalities"] == ["text", "image"]
    adapter = ll.load(words[0])
    score = ll.score("base", ll.bench("base", read_task("task.yaml")).task, split="train")
    assert (record["whole"], record["base"]) == (score(adapter), score(None))
    assert len({*record["values"], record["whole"], record["base"]}) > 1
