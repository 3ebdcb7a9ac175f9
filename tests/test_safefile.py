"""Safetensors files tensor by tensor, against the safetensors library."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom import safefile
from loraloom.safefile import SafeFile, Writer, sha256

MIXED = {
    "half": torch.arange(3, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6, dtype=torch.float32).view(2, 3).T,
}


def written(path, tensors, room=4096) -> None:
    with closing(Writer(path, room)) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        writer.finish({"format": "pt"})


@pytest.mark.parametrize("room", [8, 100, 4096, 100_000])
@pytest.mark.parametrize("chunk", [16, 1 << 24])
def test_what_is_written_is_read_by_the_library_and_by_us(tmp_path, room, chunk, monkeypatch):
    monkeypatch.setattr(safefile, "_CHUNK", chunk)
    path = tmp_path / "x.safetensors"
    written(path, MIXED, room)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    theirs, ours = load_file(path), SafeFile(path)
    assert set(theirs) == set(ours.shapes) == set(MIXED)
    for key, tensor in MIXED.items():
        assert torch.equal(theirs[key], tensor) and torch.equal(ours.read(key), tensor)
        assert ours.shapes[key] == tuple(tensor.shape) and ours.read(key).dtype == tensor.dtype
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for entry in (e for k, e in json.loads(raw[8 : 8 + size]).items() if k != "__metadata__"):
        assert entry["data_offsets"][0] % torch.empty(0, dtype=safefile._BY_NAME[entry["dtype"]]).element_size() == 0
    assert [item.name for item in tmp_path.iterdir()] == ["x.safetensors"]


def test_rescaling_in_place(tmp_path):
    with closing(Writer(tmp_path / "x", 1000)) as writer:
        for key in ("a", "b", "c"):
            writer.add(key, torch.arange(5, dtype=torch.bfloat16))
        writer.rescale("b", 3.0)
        writer.add("d", torch.ones(2))
        writer.finish({})
    held = load_file(tmp_path / "x")
    assert held["b"].tolist() == [0, 3, 6, 9, 12] and held["a"].tolist() == held["c"].tolist() == [0, 1, 2, 3, 4]
    assert held["d"].tolist() == [1, 1]


@pytest.mark.parametrize("fault", [None, OSError("the disk is gone")])
def test_what_is_written_goes_to_the_disk_meanwhile_and_faults_are_told(tmp_path, fault, monkeypatch):
    synced = []

    def sync(handle):
        synced.append(os.fstat(handle).st_size)
        if fault is not None:
            raise fault

    monkeypatch.setattr(safefile, "_SYNC", 64)
    monkeypatch.setattr(os, "fdatasync", sync)
    tensors = {
        str(n): torch.full((10,), float(n)) for n in range(5)
    }  # 40 bytes each: a multiple of 64 is passed thrice
    if fault is None:
        written(tmp_path / "x", tensors)
        assert load_file(tmp_path / "x")["4"].tolist() == [4.0] * 10
    else:
        with pytest.raises(OSError, match="disk is gone"):
            written(tmp_path / "x", tensors)
    assert len(synced) == 3 if fault is None else synced
    assert not [thread for thread in threading.enumerate() if "loraloom-sync" in thread.name]


def test_a_name_twice_and_a_strange_type_are_refused(tmp_path):
    with closing(Writer(tmp_path / "x", 100)) as writer:
        writer.add("a", torch.ones(1))
        with pytest.raises(ValueError, match="twice"):
            writer.add("a", torch.ones(1))
        with pytest.raises(ValueError, match="complex64"):
            writer.add("b", torch.ones(1, dtype=torch.complex64))


def test_reading_what_is_torn_or_strange(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100), "b": torch.ones(3).to(torch.float8_e4m3fn)}, path)
    opened = SafeFile(path)
    with pytest.raises(ValueError, match=r"b is stored as F8_E4M3; allowed"):
        opened.read("b")
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match="cut short"):
        opened.read("a")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SafeFile(path)


def test_it_stays_on_the_file_that_was_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    opened = SafeFile(path)
    path.unlink()
    save_file({"a": torch.zeros(2)}, path)
    assert opened.read("a").tolist() == [1, 1]
    first = opened.read("a")
    first.zero_()
    assert opened.read("a").tolist() == [1, 1]
