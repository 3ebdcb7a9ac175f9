"""What damage has brought to light, each as it was found: refused in one line now, or read as it should be."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuzz.readers import READERS, adapter, moka
from loraloom.checkpoint import Checkpoint
from loraloom.integrations.checkpoints import SEAL, is_whole
from loraloom.masks import load_mask, save_mask, support
from loraloom.packages import Package, unpack
from loraloom.safefile import SafeFile
from loraloom.store import CONFIG, RECORD, WEIGHTS, load, save
from loraloom.untrusted import read_json

LARGE = 10**400


def with_header(file: Path, change: Callable[[str], str]) -> Path:
    """A safetensors file whose header is another text."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + size].decode().strip()).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return file


def entry(header: str, name: str, **values: Any) -> str:
    held = json.loads(header)
    held[name] = held.get(name, {}) | values
    return json.dumps(held)


CONFIGS = {
    "alpha beyond floats": ({"lora_alpha": LARGE}, "lora_alpha must be a finite number"),
    "rank beyond floats": ({"r": LARGE}, "r must be a finite number"),
    "targets of several kinds": ({"target_modules": ["q_proj", {"a": 1}]}, "target_modules must be a text"),
    "an expression that is none": ({"rank_pattern": {"[": 2}}, r"rank_pattern '\[' is not a regular expression"),
    "a name on two lines": ({"alpha_pattern": {"a\nb": "x"}}, r"'a\\nb' must be a finite number"),
}


@pytest.mark.parametrize(("change", "said"), CONFIGS.values(), ids=CONFIGS)
def test_configurations(tmp_path: Path, change: dict, said: str) -> None:
    file = save(adapter(), tmp_path / "a") / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path / "a")
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_and_texts_among_targets_are_read(tmp_path: Path) -> None:
    file = save(adapter(), tmp_path / "a") / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj", 3, "v_proj"]}))
    assert load(tmp_path / "a").modules


def test_a_moka_plan_beyond_floats(tmp_path: Path) -> None:
    file = save(moka(), tmp_path / "a") / CONFIG
    told = json.loads(file.read_text())
    told["moka"]["alpha"] = LARGE
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="moka: alpha must be finite"):
        load(tmp_path / "a")


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    file = save(adapter(), tmp_path / "a") / CONFIG
    file.write_text(file.read_text().rstrip()[:-1] + ', "r": 4}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: 'r' is there twice"):
        load(tmp_path / "a")


RECORDS = {
    "no object": ([], "expected a JSON object"),
    "inputs that are none": ({"inputs": {"a": 1}}, "inputs must be a list"),
    "an input that is none": ({"inputs": ["a"]}, "expected a JSON object"),
    "arguments that are none": ({"inputs": [{"arguments": 3}]}, "arguments must be an object"),
    "data that is none": ({"operation": "train", "arguments": {"data": 3}}, "arguments.data must be an object"),
    "a record that is none": ({"record": []}, "record must be an object"),
    "LoRI's part that is none": ({"operation": "train", "record": {"lori": 3}}, "record.lori must be an object"),
}


@pytest.mark.parametrize(("told", "said"), RECORDS.values(), ids=RECORDS)
def test_provenance(tmp_path: Path, told: Any, said: str) -> None:
    (save(adapter(), tmp_path / "a") / RECORD).write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"{RECORD}: {said}"):
        load(tmp_path / "a")


def test_a_folder_cannot_claim_where_its_inputs_came_from(tmp_path: Path) -> None:
    """Otherwise a copy would tell the sha256 of any file, and stumble over a stamp that is none."""
    other = save(adapter(1), tmp_path / "secret")
    claims = {"stamp": load(other).provenance["stamp"], "path": str(other), "name": "b"}
    told = {"operation": "merge", "inputs": [claims, {"stamp": 3, "path": []}]}
    (save(adapter(), tmp_path / "a") / RECORD).write_text(json.dumps(told))
    save(load(tmp_path / "a"), tmp_path / "copy")
    (first,) = json.loads((tmp_path / "copy" / RECORD).read_text())["inputs"]
    assert first["sha256"] and first["inputs"] == [{"name": "b"}, {}]


def test_headers(tmp_path: Path) -> None:
    file = save(adapter(), tmp_path / "a") / WEIGHTS
    whole = file.read_bytes()
    with_header(file, lambda header: header[:-1] + "," + header[1:])
    with pytest.raises(ValueError, match=r"is there twice|is not a whole safetensors file"):
        load(tmp_path / "a")
    file.write_bytes(whole)
    empty = {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}
    with_header(file, lambda header: entry(header, "base_model.model.x.y", **empty))
    with pytest.raises(ValueError, match=r"x\.y is too large to be read: 0 bytes of 0x|not a whole safetensors file"):
        load(tmp_path / "a").extras["x.y"]
    file.write_bytes(whole)
    with_header(file, lambda header: json.dumps(json.loads(header) | {"__metadata__": None}))
    assert SafeFile(file).metadata == {} and load(tmp_path / "a").loaded().modules


@pytest.mark.parametrize("size", [float("inf"), 2.5, "2", None])
def test_sizes_of_a_mask(tmp_path: Path, size: object) -> None:
    file = save_mask(support(adapter()), tmp_path / "m.safetensors")

    def changed(header: str) -> str:
        held = json.loads(header)
        about = json.loads(held["__metadata__"]["loraloom_mask"])
        about["shapes"]["model.layers.0.q_proj"] = [size, 2]
        held["__metadata__"]["loraloom_mask"] = json.dumps(about)
        return json.dumps(held)

    with_header(file, changed)
    with pytest.raises(ValueError, match="is no mask"):
        load_mask(file)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"files": 3}', '{"files": {"a": []}}', "[]", '{"files": {"a": {}}}'])
def test_seals(tmp_path: Path, text: str) -> None:
    READERS["seal"].make(tmp_path)
    assert is_whole(tmp_path)
    (tmp_path / SEAL).write_text(text)
    assert not is_whole(tmp_path)


def test_seals_of_what_never_ends(tmp_path: Path) -> None:
    READERS["seal"].make(tmp_path)
    (tmp_path / "weights").unlink()
    (tmp_path / "weights").symlink_to("/dev/zero")
    (tmp_path / SEAL).write_text('{"files": {"weights": {"bytes": 0, "sha256": ""}}}')
    assert not is_whole(tmp_path)
    (tmp_path / SEAL).unlink()
    (tmp_path / SEAL).symlink_to("/dev/zero")
    assert not is_whole(tmp_path)
    with pytest.raises(ValueError, match=r"complete\.json is no file"):
        read_json(tmp_path / SEAL)


def test_shards_that_are_links_in_a_circle_or_have_strange_names(tmp_path: Path) -> None:
    READERS["base"].make(tmp_path)
    shard = tmp_path / "model-0.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(ValueError, match=r"'model-0\.safetensors' is not a file of this folder"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x\ny"}}))
    with pytest.raises(FileNotFoundError, match=r"'x\\ny' is not there"):
        Checkpoint(tmp_path)


PACKAGE = Package("thing==1.0", {"data/*": "0" * 64})


def test_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALOOM_PACKAGES", str(tmp_path))
    file = tmp_path / "thing-1.0-py3-none-any.whl"
    READERS["wheel"].make(tmp_path)
    data = file.read_bytes()
    for number, damaged in enumerate([b"", data[:-30], data[:40] + b"\0" + data[41:], data[:20], b"PK" * 30]):
        file.write_bytes(damaged)
        (tmp_path / "into" / str(number)).mkdir(parents=True)
        with pytest.raises(ValueError, match=r"package thing==1\.0") as caught:
            unpack(PACKAGE, tmp_path / "into" / str(number))
        assert len(str(caught.value).splitlines()) == 1
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data/../../out", "x")
    with pytest.raises(ValueError, match="unsafe member name"):
        unpack(PACKAGE, tmp_path / "into")


def test_what_is_no_file_is_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading /dev/zero to its end takes all memory."""
    monkeypatch.setenv("LORALOOM_PACKAGES", str(tmp_path))
    (tmp_path / "thing-1.0-py3-none-any.whl").symlink_to("/dev/zero")
    monkeypatch.setattr("loraloom.packages._download", lambda package, folder: (_ for _ in ()).throw(OSError("asked")))
    with pytest.raises(OSError, match="asked"):
        unpack(PACKAGE, tmp_path)


def test_a_tensor_larger_than_the_memory(tmp_path: Path) -> None:
    """A file with a hole takes no room on the disk, and its header does not lie."""
    size = 2**47
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    try:
        with file.open("r+b") as out:
            out.truncate(8 + len(text) + size)
    except OSError:  # a file system that has no files of that size: then nobody can make such a file
        return
    with pytest.raises(ValueError, match=r"a is too large to be read|not a whole safetensors file"):
        SafeFile(file).read("a")
