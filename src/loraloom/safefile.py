"""Safetensors files read and written tensor by tensor: memory holds one tensor at a time, not a mapped file."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraloom.untrusted import parse_json

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # which can run code
FLOATS = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of options
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_CHUNK = 1 << 20  # bytes at a time: what was read is still in the cache when it is used
_SYNC = 1 << 26  # bytes that are brought to the disk together


class SafeFile:
    """An open safetensors file; it stays the one that was opened, whatever happens to its path.

    The header is checked by the safetensors library. Tensors are read into memory of their own, from any thread.

    Raises:
        ValueError: the file is not a whole safetensors file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as folder:
        ...     save_file({"w": torch.ones(2, 3)}, f"{folder}/x.safetensors")
        ...     file = SafeFile(Path(folder) / "x.safetensors")
        ...     file.shapes, file.read("w").sum()
        ({'w': (2, 3)}, tensor(6.))
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {str(error).splitlines()[0]}") from error
        size = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        header = parse_json(os.pread(self._handle, size, 8), path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._header: dict[str, dict[str, Any]] = header
        self._start = 8 + size
        self.shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
        self.types = {key: entry["dtype"] for key, entry in header.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, a copy of its own.

        Raises:
            ValueError: a type that is not known here (float8 and the like), or the file has been cut short meanwhile.
        """
        entry = self._header[key]
        if entry["dtype"] not in _BY_NAME:
            raise ValueError(f"{self.path}: {key} is stored as {entry['dtype']}; allowed: {', '.join(_BY_NAME)}")
        begin, end = entry["data_offsets"]
        dtype = _BY_NAME[entry["dtype"]]
        try:
            data = torch.empty(end - begin, dtype=torch.uint8)
            shaped = data.view(dtype).view(entry["shape"])
        except (RuntimeError, TypeError):  # torch's words for too much memory and for sizes past its whole numbers
            told = f"{end - begin} bytes of {'x'.join(map(str, entry['shape']))}"
            raise ValueError(f"{self.path}: {key} is too large to be read: {told}") from None
        buffer, done = data.numpy(), 0
        while done < end - begin:  # a read may be cut at 2 GiB
            got = os.preadv(self._handle, [buffer[done:].data], self._start + begin + done)
            if got == 0:
                raise ValueError(f"{self.path} has been cut short since it was opened")
            done += got
        return shaped


class Writer:
    """A safetensors file, written tensor by tensor as they come; the header goes into room left for it in front.

    The format allows spaces behind the header, so the room need not be filled. A thread brings what was written to the
    disk meanwhile, so that little is left to wait for at the end.

    Args:
        path: the new file.
        room: bytes for the header; more than are needed is fine.
    """

    def __init__(self, path: Path, room: int) -> None:
        self._file = path.open("w+b", buffering=0)
        self.path = path
        self._room = room + -room % 8
        self._header: dict[str, dict[str, Any]] = {}
        self._end = 0
        self._syncing = ThreadPoolExecutor(1, "loraloom-sync")
        self._synced: list[Future[None]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: its type is not one of those of the format, or its name is taken.
        """
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{key} has type {tensor.dtype}; allowed: {', '.join(map(str, DTYPES))}")
        if key in self._header:
            raise ValueError(f"{key} is there twice")
        data = _bytes(tensor)
        self._file.seek(8 + self._room + self._end)
        self._write(data)
        span = [self._end, self._end + len(data)]
        self._header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        self._end = span[1]
        if span[0] // _SYNC < span[1] // _SYNC:
            self._synced.append(self._syncing.submit(os.fdatasync, self._file.fileno()))

    def rescale(self, key: str, by: float) -> None:
        """Multiply a tensor that is already written.

        Raises:
            ValueError: its type does not hold the result.
        """
        entry = self._header[key]
        begin, end = entry["data_offsets"]
        start = 8 + self._room + begin
        held = torch.frombuffer(bytearray(os.pread(self._file.fileno(), end - begin, start)), dtype=torch.uint8)
        result = held.view(_BY_NAME[entry["dtype"]]) * by
        if not result.isfinite().all():
            raise ValueError(f"{key} times {by:g} is not finite as {entry['dtype']}")
        self._file.seek(start)
        self._write(_bytes(result))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and bring all to the disk."""
        for part in self._synced:
            part.result()  # the system tells of an error once only
        if any(entry["data_offsets"][0] % _BY_NAME[entry["dtype"]].itemsize for entry in self._header.values()):
            self._sort()
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        text = json.dumps(header | self._header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > self._room:
            self._make_room(len(text))
        self._file.seek(0)
        self._write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Let go of the file, whatever is in it."""
        self._syncing.shutdown(cancel_futures=True)
        self._file.close()

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        while view:  # an unbuffered write may be cut at 2 GiB
            view = view[self._file.write(view) :]

    def _sort(self) -> None:
        """Write all once more, wide types first, so that every tensor is aligned; only for files of mixed types."""
        beside = self.path.with_name(self.path.name + ".sorted")
        order = sorted(self._header, key=lambda key: -_BY_NAME[self._header[key]["dtype"]].itemsize)
        end, header = 0, {}
        with beside.open("w+b", buffering=0) as file:
            file.seek(8 + self._room)
            for key in order:
                entry = self._header[key]
                begin, stop = entry["data_offsets"]
                for at in range(begin, stop, _CHUNK):
                    file.write(os.pread(self._file.fileno(), min(_CHUNK, stop - at), 8 + self._room + at))
                header[key] = {**entry, "data_offsets": [end, end := end + stop - begin]}
        self._file.close()
        beside.replace(self.path)
        self._file, self._header = self.path.open("r+b", buffering=0), header

    def _make_room(self, room: int) -> None:
        """Move the data back; only for names that are longer than was thought."""
        room += -room % 8
        for at in range(self._end - self._end % _CHUNK, -1, -_CHUNK):
            data = os.pread(self._file.fileno(), min(_CHUNK, self._end - at), 8 + self._room + at)
            self._file.seek(8 + room + at)
            self._write(data)
        self._room = room


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        while got := file.readinto(buffer):
            digest.update(view[:got])
    return digest.hexdigest()
