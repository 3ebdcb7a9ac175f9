"""The folder format without PEFT: bad input, atomic writes, streaming, provenance."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, UnsupportedKind
from loraloom.layout import from_state_dict, rank_of, scale_of, to_state_dict
from loraloom.store import UNFINISHED, WEIGHTS, fingerprint, load, save
from processes import clean, process, status_of

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "some/base",
}
KEY = "base_model.model.layers.{}.q_proj.lora_{}.weight"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tensors(layers: int = 2, out: int = 5, in_: int = 3, rank: int = 2) -> dict[str, torch.Tensor]:
    made = {}
    for layer in range(layers):
        made[KEY.format(layer, "A")] = numbers(rank, in_, seed=layer)
        made[KEY.format(layer, "B")] = numbers(out, rank, seed=layer + 100)
    return made


def folder(path: Path, config: Any = CONFIG, held: dict[str, torch.Tensor] | None = None) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors() if held is None else held, path / WEIGHTS, metadata={"format": "pt"})
    return path


def tree(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


# --- reading ----------------------------------------------------------------------------------------------------------
def test_load_is_lazy_and_read_only(tmp_path: Path) -> None:
    adapter = load(folder(tmp_path / "a"))
    assert list(adapter.modules) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert adapter.shape("layers.1.q_proj") == (5, 3, 2)
    name = "layers.0.q_proj"
    adapter.modules[name].B.zero_()  # whoever writes into what he was given spoils only his own copy
    assert torch.equal(adapter.modules[name].B, tensors()[KEY.format(0, "B")])
    assert adapter.modules[name].scale == 2.0
    with pytest.raises(KeyError):
        adapter.modules["layers.2.q_proj"]


def test_layers_are_in_order_of_number(tmp_path: Path) -> None:
    adapter = load(folder(tmp_path / "a", held=tensors(layers=12)))
    assert list(adapter.modules) == [f"layers.{i}.q_proj" for i in range(12)]


def test_an_open_adapter_outlives_its_folder(tmp_path: Path) -> None:
    adapter = load(folder(tmp_path / "a"))
    halved = {name: adapter.modules[name].scaled(0.5) for name in adapter.modules}
    save(replace(adapter, modules=halved), tmp_path / "a", overwrite=True)
    assert adapter.modules["layers.0.q_proj"].scale == 2.0
    assert torch.equal(adapter.modules["layers.0.q_proj"].A, tensors()[KEY.format(0, "A")])
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        fingerprint(adapter)


def test_symlinks_are_followed(tmp_path: Path) -> None:
    """The Hub's cache links every file to a blob of another name."""
    real = folder(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for file in real.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    (tmp_path / "whole").symlink_to(real)
    for path in ("linked", "whole"):
        assert torch.equal(load(tmp_path / path).modules["layers.0.q_proj"].A, tensors()[KEY.format(0, "A")])


def _without(which: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors().items() if key != which}


def _with(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors() | {key.replace("__", "."): value for key, value in more.items()}


def _set(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors() | {name: value}


def _nan(value: float) -> dict[str, torch.Tensor]:
    broken = tensors()
    broken[KEY.format(1, "B")][3, 1] = value
    return broken


def _truncate(path: Path, keep: float) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: int(len(data) * keep)])


A0, B0 = KEY.format(0, "A"), KEY.format(0, "B")
PLAIN = "base_model.model."
# name -> (configuration, tensors, exception, what the message must contain)
BAD: dict[str, tuple[Any, dict | None, type[Exception], str]] = {
    "another type": (
        {**CONFIG, "peft_type": "IA3"},
        None,
        UnsupportedKind,
        "peft_type 'IA3' is not supported; allowed: LORA, HIRA",
    ),
    "adalora": ({**CONFIG, "peft_type": "ADALORA"}, None, UnsupportedKind, "ADALORA"),
    "no type": ({"r": 2}, None, UnsupportedKind, "peft_type None"),
    "a list": ([1], None, ValueError, "expected a JSON object, got list"),
    **{
        key: ({**CONFIG, key: value}, None, UnsupportedKind, f"adapter_config.json: {key} is set")
        for key, value in {
            "alora_invocation_tokens": [1, 2],
            "arrow_config": {"top_k": 1},
            "ensure_weight_tying": True,
            "kasa_config": {"beta": 1},
            "layer_replication": [[0, 1]],
            "megatron_config": {"a": 1},
            "monteclora_config": {"a": 1},
            "trainable_token_indices": [3],
            "use_bdlora": {"nblocks": 2},
            "use_qalora": True,
            "velora_config": {"a": 1},
        }.items()
    },
    **{
        f"start {start}": (
            {**CONFIG, "init_lora_weights": start},
            None,
            UnsupportedKind,
            "path_initial_model_for_weight_conversion",
        )
        for start in ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga")
    },
    "rank 0": ({**CONFIG, "r": 0}, None, ValueError, "rank r must be a whole number of at least 1, got 0"),
    "rank a half": ({**CONFIG, "r": 2.5}, None, ValueError, "rank r must be a whole number"),
    "rank pattern 0": ({**CONFIG, "rank_pattern": {"q_proj": 0}}, None, ValueError, "rank q_proj must be"),
    "pattern a list": ({**CONFIG, "alpha_pattern": ["q_proj"]}, None, ValueError, "alpha_pattern must map"),
    "pattern no regex": ({**CONFIG, "rank_pattern": {"q(": 2}}, None, ValueError, "'q(' is not a regular expression"),
    "alpha text": ({**CONFIG, "lora_alpha": "4"}, None, ValueError, "lora_alpha must be a finite number, got '4'"),
    "alpha nan": ({**CONFIG, "lora_alpha": float("nan")}, None, ValueError, "lora_alpha must be a finite number"),
    "no factors": (CONFIG, {PLAIN + "norm.weight": torch.ones(2)}, ValueError, "holds no factors"),
    "no prefix": (CONFIG, {"layers.0.q_proj.lora_A.weight": torch.ones(2, 3)}, ValueError, "is not a name PEFT gives"),
    "dots": (CONFIG, _set(PLAIN + "layers...lora_A.weight", torch.ones(2, 3)), ValueError, "is not a name PEFT gives"),
    "absolute": (CONFIG, _set(PLAIN + "/etc.weight", torch.ones(2)), ValueError, "is not a name PEFT gives"),
    "backslash": (CONFIG, _set(PLAIN + "a\\b.weight", torch.ones(2)), ValueError, "is not a name PEFT gives"),
    "A alone": (CONFIG, _without(B0), ValueError, "module layers.0.q_proj has no B"),
    "B alone": (CONFIG, _without(A0), ValueError, "module layers.0.q_proj has no A"),
    "ranks apart": (
        CONFIG,
        _set(B0, torch.ones(5, 3)),
        ValueError,
        "module layers.0.q_proj: A (2, 3) and B (5, 3) do not have the same rank",
    ),
    "another rank": (
        CONFIG,
        _set(A0, torch.ones(3, 3)) | {B0: torch.ones(5, 3)},
        ValueError,
        "module layers.0.q_proj has rank 3 but the configuration says 2",
    ),
    "empty": (
        CONFIG,
        _set(A0, torch.ones(0, 3)) | {B0: torch.ones(5, 0)},
        ValueError,
        "module layers.0.q_proj: A (0, 3)",
    ),
    "a vector": (CONFIG, _set(A0, torch.ones(3)), ValueError, "module layers.0.q_proj: A (3,)"),
    "grouped": (
        CONFIG,
        _set(A0, torch.ones(2, 3, 3)) | {B0: torch.ones(5, 1, 1)},
        ValueError,
        "do not have the same rank",  # five rows are not those of two groups
    ),
    "nested": (
        CONFIG,
        _set(PLAIN + "a.base_layer.o.lora_A.weight", torch.ones(2, 3)),
        UnsupportedKind,
        "inside another adapted module",
    ),
    "twice": (
        CONFIG,
        _set(PLAIN + "layers.0.q_proj.lora_embedding_A", torch.ones(2, 3)),
        ValueError,
        "layers.0.q_proj has A twice",
    ),
    "bias twice": (
        CONFIG,
        _with(base_model__model__layers__0__q_proj__bias=torch.ones(5))
        | {PLAIN + "layers.0.q_proj.base_layer.bias": torch.ones(5)},
        ValueError,
        "parameter layers.0.q_proj.bias is there twice",
    ),
    "kasa's diagonal": (CONFIG, _set(PLAIN + "layers.0.q_proj.lora_diag", torch.ones(2)), UnsupportedKind, "lora_diag"),
    "an adapter's name": (
        CONFIG,
        _set(PLAIN + "layers.0.q_proj.lora_A.default.weight", torch.ones(2)),
        UnsupportedKind,
        "lora_A.default",
    ),
    "no magnitude": (
        {**CONFIG, "use_dora": True},
        None,
        ValueError,
        "module layers.0.q_proj has no magnitude but use_dora=True",
    ),
    "a magnitude": (
        CONFIG,
        _set(PLAIN + "layers.0.q_proj.lora_magnitude_vector", torch.ones(5)),
        ValueError,
        "has a magnitude but use_dora=None",
    ),
    "no bias": ({**CONFIG, "lora_bias": True}, None, ValueError, "has no bias but lora_bias=True"),
    "a long bias": (
        {**CONFIG, "lora_bias": True},
        _set(PLAIN + "layers.0.q_proj.lora_B.bias", torch.ones(6)),
        ValueError,
        "bias (6,) does not have 5 entries",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_by_name(case: str, tmp_path: Path) -> None:
    config, held, kind, message = BAD[case]
    path = folder(tmp_path / "a", config, held)
    with pytest.raises(kind) as caught:
        load(path)
    text = str(caught.value)
    assert message in text and str(path) in text and "\n" not in text and len(text) < 400
    assert type(caught.value) is kind


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_are_refused_when_read(value: float, tmp_path: Path) -> None:
    adapter = load(folder(tmp_path / "a", held=_nan(value) | {PLAIN + "norm.weight": torch.tensor([value])}))
    assert adapter.modules["layers.0.q_proj"].rank == 2
    with pytest.raises(
        ValueError, match=r"a/adapter_model.safetensors: layers\.1\.q_proj\.lora_B\.weight has NaN or inf"
    ):
        adapter.modules["layers.1.q_proj"]
    with pytest.raises(ValueError, match=r"norm\.weight has NaN"):
        adapter.extras["norm.weight"]


def test_whole_numbers_are_no_factors(tmp_path: Path) -> None:
    held = {key: value.to(torch.int8) for key, value in tensors().items()}
    with pytest.raises(UnsupportedKind, match=r"module layers\.0\.q_proj is stored as torch.int8"):
        load(folder(tmp_path / "a", held=held)).modules["layers.0.q_proj"]


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_a_torn_weight_file_is_refused(keep: float, tmp_path: Path) -> None:
    _truncate(folder(tmp_path / "a"), keep)
    with pytest.raises(ValueError, match=r"a/adapter_model.safetensors is not a whole safetensors file") as caught:
        load(tmp_path / "a")
    assert "\n" not in str(caught.value)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.binary(max_size=300))
def test_noise_is_refused_whatever_it_is(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = folder(tmp_path_factory.mktemp("noise") / "a")
    (path / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load(path)
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(ValueError, match=r"is not a whole safetensors file|holds no factors"):
        load(path)


def test_missing_and_strange_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder with an adapter"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a folder with an adapter"):
        load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is not there"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not valid JSON"):
        load(tmp_path / "empty")
    unfinished = folder(tmp_path / f".a.12ab{UNFINISHED}")
    with pytest.raises(ValueError, match="is an unfinished write"):
        load(unfinished)
    path = folder(tmp_path / "a")
    (path / "loraloom.json").write_text("[]")
    with pytest.raises(ValueError, match=r"loraloom.json: expected a JSON object"):
        load(path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    (path / WEIGHTS).unlink()

    class Trap:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save(Trap(), path / name)
    with pytest.raises(UnsupportedKind, match=f"{name} is a pickle, which can run code"):
        load(path)
    assert not (tmp_path / "sprung").exists()


# --- scales -----------------------------------------------------------------------------------------------------------
PIECES = st.sampled_from(
    ["q_proj", "layers.1", "0.q_proj", r"layers\.\d+\.v_proj", "^layers.1.q_proj", "layers", "proj", ".*"]
)
NAMES = st.sampled_from(["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj", "q_proj", "deep.layers.1.q_proj"])


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.dictionaries(PIECES, st.integers(1, 9)), st.dictionaries(PIECES, st.integers(1, 9)), NAMES, st.booleans())
def test_patterns_are_matched_as_peft_does(ranks: dict, alphas: dict, name: str, rslora: bool) -> None:
    from peft.utils.other import get_pattern_key

    config = {**CONFIG, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    rank = ranks.get(get_pattern_key(ranks.keys(), name), 2)
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), 4)
    assert rank_of(config, name) == rank
    assert scale_of(config, name) == (alpha / rank**0.5 if rslora else alpha / rank)


def test_patterns_keep_their_order(tmp_path: Path) -> None:
    """The first key that matches wins, so sorting them would change what they say."""
    keys = ["q_proj", r"layers\.0\.q_proj"]
    config = {**CONFIG, "rank_pattern": dict.fromkeys(keys, 2), "alpha_pattern": dict(zip(keys, (12, 1), strict=True))}
    adapter = load(save(load(folder(tmp_path / "a", config)), tmp_path / "b"))
    assert adapter.modules["layers.0.q_proj"].scale == 6.0
    assert list(adapter.config["alpha_pattern"]) == list(adapter.config["rank_pattern"]) == keys


# --- writing ----------------------------------------------------------------------------------------------------------
def plain_adapter(layers: int = 2, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Adapter:
    held = {key: value.to(dtype) for key, value in tensors(layers).items()}
    adapter = from_state_dict({**CONFIG, "lora_alpha": 2 * scale}, held)
    return replace(adapter, extras={"norm.weight": numbers(7), "steps": torch.tensor(3), "mask": torch.tensor([True])})


def test_the_file_holds_what_safetensors_would_write_and_is_the_same_each_time(tmp_path: Path) -> None:
    adapter = replace(plain_adapter(), extras={})
    for name in ("a", "b"):
        save(adapter, tmp_path / name)
    save_file(dict(to_state_dict(adapter, bake=False)), tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept_and_aligned(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = plain_adapter(dtype=dtype)
    save(adapter, tmp_path / "a")
    held = load_file(tmp_path / "a" / WEIGHTS)
    assert {key: (value.dtype, value.tolist()) for key, value in held.items()} == {
        key: (value.dtype, value.tolist()) for key, value in to_state_dict(adapter, bake=False)
    }
    data = (tmp_path / "a" / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    for key, piece in header.items():
        assert piece["data_offsets"][0] % held[key].dtype.itemsize == 0
    assert load(tmp_path / "a").modules["layers.1.q_proj"].dtype == dtype


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    adapter = plain_adapter()
    name = "layers.0.q_proj"
    good = adapter.modules[name]
    cases = {
        "no modules": (replace(adapter, modules={}), ValueError, "has no modules"),
        "NaN": (
            replace(adapter, modules={name: replace(good, B=good.B * float("nan"))}),
            ValueError,
            f"module {name}: B has NaN",
        ),
        "inf": (
            replace(adapter, modules={name: replace(good, A=good.A / 0)}),
            ValueError,
            f"module {name}: A has NaN or inf",
        ),
        "magnitude": (
            replace(adapter, modules={name: replace(good, magnitude=torch.ones(5))}),
            AdapterMismatch,
            "a magnitude but use_dora=None",
        ),
        "bias": (
            replace(adapter, modules={name: replace(good, bias=torch.ones(5))}),
            AdapterMismatch,
            "a bias but lora_bias=None",
        ),
        "complex": (
            replace(adapter, extras={"z": torch.ones(1, dtype=torch.complex64)}),
            ValueError,
            "z has type torch.complex64",
        ),
        "provenance": (replace(adapter, provenance={"seed": {1, 2}}), ValueError, "provenance must be plain JSON"),
        "kind": (replace(adapter, config={**CONFIG, "peft_type": "VERA"}), UnsupportedKind, "VERA"),
    }
    for _, (bad, kind, message) in cases.items():
        with pytest.raises(kind, match=message):
            save(bad, tmp_path / "a")
        assert list(tmp_path.iterdir()) == []


def test_a_scale_that_float16_does_not_hold_in_b_is_refused_before_anything_is_there(tmp_path: Path) -> None:
    """The first module is written as it is; only the second one's scale has all scales multiplied in."""
    half = {"dtype": torch.float16}
    large = Factors(torch.full((3, 1), 200.0, **half), torch.ones(1, 4, **half), scale=512.0)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 512, "target_modules": ["q", "k"]}
    adapter = Adapter(config, {"h.0.q": large, "h.0.k": replace(large, scale=3.0)})
    with pytest.raises(ValueError, match=r"h\.0\.q\.lora_B\.weight times 512 is not finite as F16"):
        save(adapter, tmp_path / "a")
    assert not list(tmp_path.iterdir())


SCALES = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 4), SCALES), min_size=1, max_size=5), st.booleans(), st.sampled_from([1, 2, 8])
)
def test_any_ranks_and_scales_come_back(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, float]], rslora: bool, alpha: int
) -> None:
    """Powers of two, so that baking is exact: the deltas that come back are the deltas that went in."""
    modules = {
        f"layers.{i}.q_proj": Factors(numbers(5, r, seed=i), numbers(r, 3, seed=i), s) for i, (r, s) in enumerate(made)
    }
    path = tmp_path_factory.mktemp("any") / "a"
    save(Adapter({**CONFIG, "use_rslora": rslora, "lora_alpha": alpha}, modules), path)
    again = load(path)
    assert list(again.modules) == list(modules)
    for name, factors in modules.items():
        assert again.modules[name].rank == factors.rank
        assert torch.equal(again.modules[name].delta(), factors.delta())
    if any(factors.scale != alpha / (2**0.5 if rslora else 2) or factors.rank != 2 for factors in modules.values()):
        config = again.config
        assert (config["lora_alpha"], config["use_rslora"]) == (config["r"], False)
        assert config["alpha_pattern"] == config["rank_pattern"]


def test_targets(tmp_path: Path) -> None:
    """Kept while they select just these modules; otherwise the modules are named, and nothing else may select."""
    config = {**CONFIG, "layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": ["x"]}
    adapter = load(folder(tmp_path / "a", config))
    save(replace(adapter, provenance={"operation": "merge", "inputs": [adapter.provenance]}), tmp_path / "same")
    assert {key: load(tmp_path / "same").config[key] for key in config} == config
    fewer = replace(adapter, modules={"layers.1.q_proj": adapter.modules["layers.1.q_proj"]})
    save(fewer, tmp_path / "fewer")
    assert load(tmp_path / "fewer").config["target_modules"] == ["layers.1.q_proj"]
    assert [
        load(tmp_path / "fewer").config[key] for key in ("layers_to_transform", "layers_pattern", "exclude_modules")
    ] == [None] * 3


# --- streaming --------------------------------------------------------------------------------------------------------
def test_save_holds_one_module_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def read(name: str) -> Factors:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        factors = Factors(torch.ones(64, 2), torch.ones(2, 64), 2.0)
        alive.extend(weakref.ref(tensor) for tensor in (factors.A, factors.B))
        return factors

    names = [f"layers.{i}.q_proj" for i in range(50)]
    save(Adapter(CONFIG, Modules(names, read)), tmp_path / "a")
    assert len(alive) == 100  # every module was made once
    assert most <= 6  # the module that is written and the two that are made meanwhile
    assert len(load(tmp_path / "a").modules) == 50


def test_memory_of_a_large_save(tmp_path: Path) -> None:
    """Resident memory grows by a few modules (4 MiB each), not by the adapter (128 MiB)."""
    program = f"""
import resource, torch
from loraloom.adapter import Adapter, Factors, Modules
from loraloom.store import load, save
make = lambda name: Factors(torch.full((262144, 2), 0.5), torch.full((2, 262144), 0.5), 1.0)
names = [f"layers.{{i}}.q_proj" for i in range(32)]
save(Adapter({CONFIG!r}, Modules(names[:2], make)), {str(tmp_path / "warm")!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save(Adapter({CONFIG!r}, Modules(names, make)), {str(tmp_path / "a")!r})
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 24


# --- atomic -----------------------------------------------------------------------------------------------------------
def test_an_existing_path_is_refused(tmp_path: Path) -> None:
    adapter = plain_adapter()
    save(adapter, tmp_path / "a")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="exists; give another path or --overwrite"):
        save(adapter, tmp_path / "a")
    assert tree(tmp_path) == before
    save(plain_adapter(layers=3), tmp_path / "a", overwrite=True)
    assert len(load(tmp_path / "a").modules) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_overwriting_never_removes_more_than_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("all my work")
    (tmp_path / "file").write_text("text")
    run = folder(tmp_path / "run")
    (run / "checkpoint-100").mkdir()
    before = tree(tmp_path)
    for name in ("home", "file", "run"):
        with pytest.raises(FileExistsError, match="is not just an adapter folder"):
            save(plain_adapter(), tmp_path / name, overwrite=True)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    save(plain_adapter(), tmp_path / "empty", overwrite=True)
    save(plain_adapter(), tmp_path / "new" / "deep")
    assert load(tmp_path / "empty").modules and load(tmp_path / "new" / "deep").modules


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_save_leaves_nothing(error: type[BaseException], overwrite: bool, tmp_path: Path) -> None:
    def read(name: str) -> Factors:
        if name == "layers.3.q_proj":
            raise error("in the middle")
        return Factors(torch.ones(4, 2), torch.ones(2, 4))

    if overwrite:
        save(plain_adapter(), tmp_path / "a")
    before = tree(tmp_path)
    with pytest.raises(error, match="in the middle"):
        save(
            Adapter(CONFIG, Modules([f"layers.{i}.q_proj" for i in range(5)], read)),
            tmp_path / "a",
            overwrite=overwrite,
        )
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"] * overwrite


def test_the_old_folder_comes_back_if_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(plain_adapter(), tmp_path / "a")
    before = tree(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(UNFINISHED):
            raise PermissionError(13, "no")
        return rename(self, target)

    monkeypatch.setattr("loraloom.folders._exchanged", lambda one, other: False)  # as where the system cannot
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        save(plain_adapter(layers=3), tmp_path / "a", overwrite=True)
    assert tree(tmp_path) == before


def _saved_slowly(path: str, layers: int, overwrite: bool, seconds: float, answers: Any, begun: Any = None) -> None:
    if begun is not None:
        begun.set()

    def read(name: str) -> Factors:
        time.sleep(seconds / layers)
        return Factors(torch.full((512, 2), float(layers)), torch.ones(2, 512))

    try:
        save(Adapter(CONFIG, Modules([f"layers.{i}.q_proj" for i in range(layers)], read)), path, overwrite=overwrite)
        answer = "done"
    except FileExistsError as error:
        answer = str(error)
    if answers is not None:
        answers.put(answer)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_in_the_middle(overwrite: bool, tmp_path: Path) -> None:
    """SIGKILL at several moments of a save: the path is absent or whole, and what is left over is refused."""
    seen = []
    for moment in range(8):
        path = tmp_path / f"a{moment}"
        if overwrite:
            save(plain_adapter(layers=3), path)
        begun = clean.Event()
        saving = process(_saved_slowly, str(path), 8, overwrite, 0.1, None, begun)
        saving.start()
        assert begun.wait(60)
        time.sleep(0.02 * moment)
        saving.kill()
        saving.join()
        assert path.exists() or not overwrite
        if path.exists():
            adapter = load(path).loaded()
            assert len(adapter.modules) in (3, 8)
            seen.append(len(adapter.modules))
        else:
            seen.append(0)
        for left in tmp_path.glob(f".{path.name}.*{UNFINISHED}"):
            with pytest.raises(ValueError, match="unfinished"):
                load(left)
        save(plain_adapter(), path, overwrite=True)  # what is left over is in nobody's way, and goes
        assert not list(tmp_path.glob(f".{path.name}.*"))
    assert seen[0] != 8 and len(seen) == 8


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_at_once(overwrite: bool, tmp_path: Path) -> None:
    for attempt in range(3):
        path = tmp_path / f"a{attempt}"
        answers = clean.Queue()
        writers = [process(_saved_slowly, str(path), layers, overwrite, 0.05, answers) for layers in (4, 6)]
        for writer in writers:
            writer.start()
        said = [answers.get(timeout=60) for _ in writers]
        assert [status_of(writer) for writer in writers] == [0, 0]
        assert said.count("done") >= 1
        if not overwrite:
            assert sum("--overwrite" in answer for answer in said) == 1
        adapter = load(path).loaded()
        values = {float(factors.B.max()) for factors in adapter.modules.values()}
        assert values == {float(len(adapter.modules))}  # one writer's, whole
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a0", "a1", "a2"]


# --- provenance -------------------------------------------------------------------------------------------------------
def test_provenance_names_and_hashes_every_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "a")
    folder(tmp_path / "b", held=tensors(out=7))
    a, b = load("a"), load(tmp_path / "b")
    assert fingerprint(a) == fingerprint("a") == hashlib.sha256((tmp_path / "a" / WEIGHTS).read_bytes()).hexdigest()
    notes: dict[str, float] = {}

    def read(name: str) -> Factors:
        notes[name] = 0.5
        return a.modules[name].scaled(3.0)

    past = {
        "operation": "merge",
        "arguments": {"weights": (1, 2)},
        "seed": 7,
        "inputs": [a.provenance, b.provenance],
        "record": {"error": notes},
    }
    save(replace(a, modules=Modules(list(a.modules), read), provenance=past), "m", command="loraloom merge a b -o m")
    record = json.loads((tmp_path / "m" / "loraloom.json").read_text())
    assert record["operation"] == "merge" and record["seed"] == 7 and record["arguments"] == {"weights": [1, 2]}
    assert record["command"] == "loraloom merge a b -o m" and record["loraloom"]
    assert record["inputs"] == [{"name": "a", "sha256": fingerprint("a")}, {"name": "b", "sha256": fingerprint("b")}]
    assert record["record"]["error"] == {"layers.0.q_proj": 0.5, "layers.1.q_proj": 0.5}
    assert str(tmp_path) not in (tmp_path / "m" / "loraloom.json").read_text()
    # and one generation on
    save(load("m"), "n")
    copy = json.loads((tmp_path / "n" / "loraloom.json").read_text())
    assert copy["operation"] == "copy" and copy["inputs"][0]["inputs"] == record["inputs"]
    assert copy["inputs"][0]["sha256"] == fingerprint("m")


def test_an_input_that_is_gone_is_named_but_not_hashed(tmp_path: Path) -> None:
    adapter = load(folder(tmp_path / "a"))
    (tmp_path / "a" / WEIGHTS).unlink()
    save(adapter, tmp_path / "b")
    (given_,) = json.loads((tmp_path / "b" / "loraloom.json").read_text())["inputs"]
    assert given_ == {"name": "a", "sha256": None}


def test_fingerprint_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not loaded from a folder"):
        fingerprint(plain_adapter())
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path)


def test_model_card(tmp_path: Path) -> None:
    import yaml

    adapter = load(folder(tmp_path / "a", {**CONFIG, "task_type": "CAUSAL_LM"}))
    save(adapter, tmp_path / "b", command="loraloom prune a -o b")
    text = (tmp_path / "b" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "some/base",
        "library_name": "peft",
        "tags": ["base_model:adapter:some/base", "lora", "loraloom"],
    }
    for part in (
        "# b",
        "2 modules",
        "loraloom prune a -o b",
        fingerprint(tmp_path / "a"),
        "AutoModelForCausalLM",
        'PeftModel.from_pretrained(model, "b")',
    ):
        assert part in body
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["inference_mode"] is True
