"""safetensors files, read byte by byte: types, shapes, hashes, and whether every value is finite. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft_dist.files import read_json

# How a type's bits are looked at, and which of them are all set in what is not finite; other types are always finite.
EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
PIECE = 2**24
THREADS = 8


@dataclass(frozen=True)
class Tensor:
    """One tensor as a file holds it."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    hash: str
    finite: bool
    zero: bool
    """Whether every value is 0, of either sign."""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of `folder`, by name.

    Raises ValueError for a file that is none, and for a tensor that two files hold: readers would take either.
    """
    with ThreadPoolExecutor(THREADS) as threads:  # hashing and comparing leave Python's lock
        found = [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in _read(path, threads)]
    tensors: dict[str, Tensor] = {}
    for tensor in found:
        first = tensors.setdefault(tensor.name, tensor)
        if first is not tensor:
            raise ValueError(f"{tensor.name} is in {first.file} and in {tensor.file}")
    return tensors


def strays(folder: Path, whole: str) -> list[str]:
    """Weight files of `folder` that are neither the one named `whole` nor, where there is an index, among its shards."""
    index = read_json(folder / f"{whole}.index.json")
    expected = set(index["weight_map"].values()) if index else {whole}
    return sorted(
        path.name
        for pattern in ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
        for path in folder.glob(pattern)
        if path.name not in expected
    )


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], Path]]:
    """Type, shape and file of each tensor in the safetensors files of `folder`, none of whose values are read."""
    found: dict[str, tuple[str, tuple[int, ...], Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        found |= {name: (entry["dtype"], tuple(entry["shape"]), path) for name, entry in header.items()}
    return found


def is_zero(name: str, path: Path) -> bool:
    """Whether every value of the tensor `name` in the file `path` is 0."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    whole = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    return _look(path.name, (name, entry), whole).zero


def _read(path: Path, threads: ThreadPoolExecutor) -> list[Tensor]:
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little") if size >= 8 else size
        if 8 + length > size:
            raise ValueError(f"{path.name} is no safetensors file, or cut off")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path.name} is no safetensors file: {error}") from None
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{path.name} has {size} bytes, and its header says {8 + length + end}")
    whole = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length) if end else np.empty(0, dtype=np.uint8)
    return list(threads.map(lambda item: _look(path.name, item, whole), header.items()))


def _look(file: str, item: tuple[str, dict[str, Any]], whole: NDArray[np.uint8]) -> Tensor:
    name, entry = item
    begin, end = entry["data_offsets"]
    kind, mask = EXPONENTS.get(entry["dtype"], (np.uint8, 0))
    unsigned = np.iinfo(kind).max >> 1 if mask else 0xFF  # all bits but a sign
    digest, finite, zero = xxhash.xxh3_128(), True, begin < end
    for piece in _pieces(whole[begin:end]):
        digest.update(piece.data)
        bits = piece.view(kind)
        if mask and finite:
            finite = not bool(np.any((bits & mask) == mask))
        zero = zero and not bool(np.any(bits & unsigned))
    return Tensor(name, file, entry["dtype"], tuple(entry["shape"]), digest.hexdigest(), finite, zero)


def _pieces(content: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]
