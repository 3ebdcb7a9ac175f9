"""Whole checkpoints on disk: what is refused, how weights are stored, which are tied."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.checkpoint import Checkpoint, as_matrix, base_weights
from loraloom.folders import UNFINISHED
from loraloom.ops.merge import effective, merge
from loraloom.safefile import SafeFile
from oracles.ops_dense import random_adapter

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]], config: dict | None = None) -> Path:
    folder.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    where = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def single(folder: Path, tensors: dict[str, Tensor], config: dict | None = None) -> Path:
    sharded(folder, {"model.safetensors": tensors}, config)
    (folder / INDEX).unlink()
    return folder


def adapter(name: str, out: int, in_: int, embedding: bool = False, **config) -> Adapter:
    return Adapter({"r": 1, **config}, {name: Factors(torch.ones(out, 1), torch.ones(1, in_), embedding=embedding)})


# --- what is refused --------------------------------------------------------------------------------------------------
def test_a_torn_shard_is_refused_whichever_it_is(tmp_path):
    base = sharded(tmp_path / "base", {"a.safetensors": {"x": torch.ones(64)}, "b.safetensors": {"y": torch.ones(64)}})
    whole = (base / "b.safetensors").read_bytes()
    for keep in (0, 5, 60, len(whole) - 1):
        (base / "b.safetensors").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"b\.safetensors is not a whole safetensors file"):
            Checkpoint(base)


def test_a_shard_cut_short_while_it_is_read(tmp_path):
    base = single(tmp_path / "base", {"x": torch.ones(4096), "y": torch.ones(4096)})
    held = Checkpoint(base)
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(20000)
    with pytest.raises(ValueError, match="cut short"):
        [held[key] for key in held]


def test_missing_shards_and_parameters(tmp_path):
    base = sharded(tmp_path / "base", {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.ones(2)}})
    shutil.copytree(base, tmp_path / "other")
    (base / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is not there"):
        Checkpoint(base)
    (tmp_path / "other" / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "z": "b.safetensors"}}))
    with pytest.raises(ValueError, match="z is in none of the shards"):
        Checkpoint(tmp_path / "other")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "."])
def test_an_index_that_leaves_the_folder(name, tmp_path):
    base = sharded(tmp_path / "base", {"a.safetensors": {"x": torch.ones(2)}})
    (base / "sub").mkdir()
    for where in (tmp_path, base / "sub"):
        shutil.copy(base / "a.safetensors", where)
    (base / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"is not a file of this folder|is not there"):
        Checkpoint(base)


def test_links_out_of_the_folder_but_those_of_the_hubs_cache(tmp_path):
    cache = tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    base = single(cache / "snapshots" / "rev", {"x": torch.ones(2)})
    (base / "model.safetensors").rename(cache / "blobs" / "0123")
    (base / "model.safetensors").symlink_to("../../blobs/0123")
    assert Checkpoint(base)["x"].sum() == 2
    (cache / "blobs" / "0123").rename(tmp_path / "secret")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is not a file of this folder"):
        Checkpoint(base)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', '{"weight_map": nul'])
def test_a_bad_index(index, tmp_path):
    base = sharded(tmp_path / "base", {"a.safetensors": {"x": torch.ones(2)}})
    (base / INDEX).write_text(index)
    with pytest.raises(ValueError, match=INDEX):
        Checkpoint(base)


def test_one_parameter_twice(tmp_path):
    base = sharded(tmp_path / "base", {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.ones(2)}})
    save_file({"x": torch.zeros(2), "y": torch.ones(2)}, base / "b.safetensors")
    with pytest.raises(ValueError, match=r"x is both in a\.safetensors and in b\.safetensors"):
        Checkpoint(base)
    save_file({"y": torch.ones(2)}, base / "b.safetensors")
    save_file({"x": torch.zeros(2)}, base / "model.safetensors")
    with pytest.raises(ValueError, match="holds both"):
        Checkpoint(base)


def test_other_folders_are_refused_with_the_reason(tmp_path):
    base = single(tmp_path / f".base.12{UNFINISHED}", {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="unfinished write"):
        Checkpoint(base)
    quantised = single(tmp_path / "q", {"x": torch.ones(2)}, {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(UnsupportedKind, match="quantised"):
        Checkpoint(quantised)
    (quantised / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        Checkpoint(quantised)
    pickled = tmp_path / "p"
    pickled.mkdir()
    (pickled / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UnsupportedKind, match="is a pickle, which can run code"):
        Checkpoint(pickled)


# --- reading ----------------------------------------------------------------------------------------------------------
def test_it_is_a_lazy_mapping_of_all_shards(tmp_path):
    shards = {"a.safetensors": {"x": torch.ones(2, 3)}, "b.safetensors": {"y": torch.zeros(4).bfloat16()}}
    held = Checkpoint(sharded(tmp_path / "base", shards))
    assert list(held) == ["x", "y"] and len(held) == 2 and "x" in held and "z" not in held
    assert held.shape("y") == (4,) and held.stored("y") == "BF16"
    held["x"].zero_()  # whoever writes into what he was given spoils only his own copy
    assert torch.equal(held["x"], torch.ones(2, 3))


def test_names_with_more_or_less_in_front(tmp_path):
    tensors = {name: torch.ones(2, 2) for name in ("layers.0.q.weight", "layers.1.q.weight", "head.weight")}
    held = Checkpoint(single(tmp_path / "base", tensors))
    assert held.parameter("layers.0.q.weight") == "layers.0.q.weight"
    assert held.parameter("model.layers.1.q.weight") == "layers.1.q.weight"
    assert held.parameter("0.q.weight") == "layers.0.q.weight"
    with pytest.raises(AdapterMismatch, match=r"several fit: layers\.0\.q\.weight, layers\.1\.q\.weight"):
        held.parameter("q.weight")
    with pytest.raises(AdapterMismatch, match=r"layers\.2\.q\.weight is not in the checkpoint"):
        held.parameter("layers.2.q.weight")
    with pytest.raises(AdapterMismatch, match="tied weight is stored once"):
        held.parameter("lm_head.weight")


# --- how weights are stored -------------------------------------------------------------------------------------------
GPT2 = {"model_type": "gpt2"}
# model, module, stored, (out, in), embedding, fan_in_fan_out -> whether stored in x out; None: refused
STORED = [
    ({}, "h.0.fc", (2, 3), (2, 3), False, False, False),
    ({}, "h.0.fc", (2, 3), (3, 2), False, True, True),
    ({}, "h.0.fc", (2, 3), (3, 2), False, False, None),  # the transpose of what it should be, and nobody says so
    ({}, "h.0.fc", (2, 3), (3, 3), False, True, None),
    ({}, "h.0.fc", (3, 3), (3, 3), False, False, False),
    ({}, "h.0.fc", (3, 3), (3, 3), False, True, True),
    ({}, "embed", (5, 3), (3, 5), True, False, True),
    ({}, "embed", (3, 3), (3, 3), True, False, True),
    ({}, "conv", (4, 2, 3), (4, 6), False, False, False),
    ({}, "conv", (4, 2, 2), (4, 4), False, True, False),
    ({}, "conv", (4, 2, 3), (6, 4), False, True, None),
    ({}, "norm", (4,), (4, 4), False, False, None),
    # PEFT stores one fan_in_fan_out for all modules, that of the last: the name tells
    (GPT2, "transformer.h.0.attn.c_proj", (3, 3), (3, 3), False, False, True),
    (GPT2, "transformer.h.0.attn.c_attn", (3, 9), (9, 3), False, False, True),
    (GPT2, "lm_head", (3, 3), (3, 3), False, True, False),
    (GPT2, "lm_head", (5, 3), (5, 3), False, True, False),
    (GPT2, "transformer.wte", (3, 3), (3, 3), True, False, True),
]


@pytest.mark.parametrize(("config", "name", "stored", "size", "embedding", "flag", "turned"), STORED)
def test_the_layout_is_that_of_the_layer(config, name, stored, size, embedding, flag, turned, tmp_path):
    key = f"{name}.weight"
    held = Checkpoint(single(tmp_path / "base", {key: torch.randn(stored)}, config))
    one = adapter(name, *size, embedding=embedding, fan_in_fan_out=flag)
    if turned is None:
        with pytest.raises(AdapterMismatch, match=f"the update of {name} is {size[0]} x {size[1]}"):
            held.turned(key, one, name)
        return
    assert held.turned(key, one, name) is turned
    assert as_matrix(held[key], turned).shape == size
    assert torch.equal(base_weights(held.folder, one)[name], held[key].T if turned else held[key].flatten(1))


def test_base_weights_are_a_mapping(tmp_path):
    base = single(tmp_path / "base", {"h.0.fc.weight": torch.ones(2, 3)})
    held = base_weights(base, adapter("h.0.fc", 2, 3))
    assert list(held) == ["h.0.fc"] and len(held) == 1 and "h.1.fc" not in held
    with pytest.raises(KeyError):
        held["h.1.fc"]


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"peft_type": "HIRA"}])
def test_base_weights_of_adapters_with_different_modules_are_each_read_once(tmp_path, kind, monkeypatch):
    held = {f"h.{at}.fc.weight": torch.randn(2, 3) for at in range(2)}
    adapters = [random_adapter(at, {f"h.{one}.fc": (2, 3, 1) for one in range(at + 1)}, **kind) for at in range(2)]
    for one in adapters if "use_dora" in kind else []:
        one.modules.update({name: replace(part, magnitude=torch.ones(2)) for name, part in one.modules.items()})
    base, read = base_weights(single(tmp_path / "base", held), *adapters), []
    monkeypatch.setattr(SafeFile, "read", lambda _, key: read.append(key) or held[key])
    merged = merge(adapters, base=base, rank=2)
    assert list(base) == list(merged.modules) == ["h.0.fc", "h.1.fc"]
    want = 0.5 * effective(held["h.1.fc.weight"], adapters[1].kind, adapters[1].modules["h.1.fc"])
    assert torch.allclose(merged.modules["h.1.fc"].delta(), want)
    assert read == ["h.1.fc.weight"]


# --- tied weights -----------------------------------------------------------------------------------------------------
LM = {"architectures": ["LlamaForCausalLM"], "vocab_size": 6}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = [
    (LM | {"tie_word_embeddings": True}, [EMBED], EMBED, True),
    (LM | {"tie_word_embeddings": False}, [EMBED], EMBED, False),
    (LM, [EMBED], EMBED, True),  # not said, and there is no head
    (LM, [EMBED, HEAD], EMBED, False),
    (LM, [EMBED, HEAD], HEAD, False),
    (LM | {"architectures": ["GPT2LMHeadModel"]}, [EMBED], EMBED, True),
    (LM | {"architectures": ["LlamaModel"], "tie_word_embeddings": True}, [EMBED], EMBED, False),
    (LM | {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True}, [EMBED], EMBED, False),
    (LM, [EMBED, "model.layers.0.q.weight"], "model.layers.0.q.weight", False),
    (LM | {"tie_word_embeddings": True}, [EMBED, "model.layers.0.q.weight"], "model.layers.0.q.weight", False),
    ({"vocab_size": 6}, [EMBED], EMBED, False),
    (
        {
            "architectures": ["XForConditionalGeneration"],
            "text_config": {"vocab_size": 6, "tie_word_embeddings": True},
        },
        [EMBED],
        EMBED,
        True,
    ),
    (LM | {"vocab_size": 7, "tie_word_embeddings": True}, [EMBED], EMBED, False),  # positions, say
]


@pytest.mark.parametrize(("config", "keys", "asked", "tied"), TIED)
def test_tied_embeddings_are_known(config, keys, asked, tied, tmp_path):
    held = Checkpoint(single(tmp_path / "base", {key: torch.ones(6, 2) for key in keys}, config))
    assert held.tied(asked) is tied
