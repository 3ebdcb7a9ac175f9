"""Statistics and their file: lazy, whole or not at all, never a pickle."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from loraloom.adapter import UnsupportedKind
from loraloom.measured import Statistics, load_statistics, save_statistics


def some() -> Statistics:
    tensors = {"layers.0.q": torch.eye(3), "layers.1.fc": torch.arange(4.0), "é": torch.ones(2, dtype=torch.float64)}
    return Statistics("gram", tensors, {"task": "digits", "examples": "7"})


def test_round_trip(tmp_path):
    path = save_statistics(some(), tmp_path / "deep" / "a.safetensors")
    read = load_statistics(path)
    assert (read.kind, dict(read.about), set(read), len(read)) == ("gram", some().about, set(some()), 3)
    for name, tensor in some().items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
    assert "layers.0.q" in read and "layers.0" not in read
    with pytest.raises(KeyError):
        read["layers.0"]
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]
    assert repr(read) == "Statistics(kind='gram', modules=3, task='digits', examples='7')"


def test_an_existing_file_is_refused_or_replaced_whole(tmp_path):
    path = save_statistics(some(), tmp_path / "a.safetensors")
    other = Statistics("fisher", {"fc": torch.zeros(2)})
    with pytest.raises(FileExistsError, match="exists; give another path or --overwrite"):
        save_statistics(other, path)
    held = load_statistics(path)
    save_statistics(other, path, overwrite=True)
    assert load_statistics(path).kind == "fisher"
    assert torch.equal(held["layers.0.q"], torch.eye(3))  # it stays the file that was opened
    with pytest.raises(FileExistsError):
        save_statistics(other, tmp_path, overwrite=True)


def test_a_failed_write_leaves_nothing_and_the_old_file(tmp_path):
    path = save_statistics(some(), tmp_path / "a.safetensors")
    bad = Statistics("gram", {"fc": torch.eye(2), "fc2": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ValueError, match="fc2 has NaN or infinite entries"):
        save_statistics(bad, path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_statistics(path).kind == "gram"


def test_only_what_says_its_kind_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"that say their kind are saved \(Statistics\), got dict"):
        save_statistics({"fc": torch.eye(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="kind of statistics must be one of gram, fisher, got 'covariance'"):
        Statistics("covariance", {})


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"fc": torch.eye(2)}, path)
    with pytest.raises(ValueError, match="holds no statistics of `loraloom measure`"):
        load_statistics(path)
    save_statistics(some(), path, overwrite=True)
    whole = path.read_bytes()
    for torn in (whole[:-1], whole[:40], b"", b"PK\x03\x04 no"):
        path.write_bytes(torn)
        with pytest.raises(ValueError, match="is not a whole safetensors file") as caught:
            load_statistics(path)
        assert "\n" not in str(caught.value)
    for name in ("a.pt", "a.bin", "a.pkl"):
        with pytest.raises(UnsupportedKind, match="is a pickle, which can run code"):
            load_statistics(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_statistics(tmp_path)


def test_infinite_entries_are_found_when_they_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"fc": torch.tensor([float("inf")]), "q": torch.ones(1)}
    save_file(tensors, path, metadata={"format": "pt", "loraloom_statistics": "gram"})
    read = load_statistics(path)
    assert torch.equal(read["q"], torch.ones(1))
    with pytest.raises(ValueError, match="fc has NaN or infinite entries"):
        read["fc"]
