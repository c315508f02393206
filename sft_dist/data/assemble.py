"""The documents of all shards, as a folder that `datasets` maps: as they are, without those held out, or packed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.packing import best_fit_decreasing
from sft_dist.data.shards import Shard, write_documents
from sft_dist.files import write_json

if TYPE_CHECKING:
    import pyarrow

# Tokens in one file of rows that are written anew.
FILE_TOKENS = 50_000_000
BATCH_ROWS = 200


def link_shards(shards: Sequence[Shard], folder: Path) -> None:
    """Make a dataset of the shards' files, which stay one file on the disk under two names where the disk can."""
    folder.mkdir()
    names = []
    for shard in shards:
        if len(shard.lengths):
            _link(shard.path, folder / shard.path.name)
            names.append(shard.path.name)
    _describe(folder, names, packed=False)


def write_rows(shards: Sequence[Shard], rows: Sequence[NDArray[np.int64]], folder: Path, *, packed: bool) -> None:
    """Write the documents that each of `rows` lists, by their numbers over all shards, one after the other.

    Documents are read one by one from the disk, so that memory does not grow with them.
    """
    folder.mkdir()
    names = []
    with Documents(shards) as documents:
        for number, part in enumerate(_files(rows, documents.lengths)):
            path = folder / f"rows-{number:05d}.arrow"
            write_documents(path, documents.batches(part, packed), packed=packed)
            names.append(path.name)
    _describe(folder, names, packed=packed)


def pack(shards: Sequence[Shard], chosen: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """The rows that the chosen documents are packed into, by the documents' numbers over all shards."""
    lengths = np.concatenate([shard.lengths for shard in shards])[chosen]
    return [chosen[row] for row in best_fit_decreasing(lengths, size)]


class Documents:
    """Reads documents of shards by their numbers, with one read each and no mapped memory."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = [shard for shard in shards if len(shard.lengths)]
        self.lengths = np.concatenate([shard.lengths for shard in self.shards])
        self._first = np.cumsum([0, *(len(shard.lengths) for shard in self.shards)])
        self._places = [_places(shard.path) for shard in self.shards]
        self._files = [os.open(shard.path, os.O_RDONLY) for shard in self.shards]

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._files:
            os.close(handle)

    def read(self, number: int) -> list[NDArray[np.int32]]:
        """The tokens and the labels of a document."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        size = 4 * int(self.lengths[number])
        places = self._places[shard][:, number - self._first[shard]]
        return [np.frombuffer(os.pread(self._files[shard], size, int(place)), dtype=np.int32) for place in places]

    def batches(self, rows: Sequence[NDArray[np.int64]], packed: bool) -> Iterator[list[list[NDArray[np.int32]]]]:
        for start in range(0, len(rows), BATCH_ROWS):
            yield [self._row(row, packed) for row in rows[start : start + BATCH_ROWS]]

    def _row(self, row: NDArray[np.int64], packed: bool) -> list[NDArray[np.int32]]:
        parts = [self.read(int(number)) for number in row]
        joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        return [*joined, self.lengths[row]] if packed else joined


def _places(path: Path) -> NDArray[np.int64]:
    """Where in a file the tokens and the labels of each of its documents begin."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        base = source.read_buffer(1).address
        source.seek(0)
        found: list[list[NDArray[np.int64]]] = []
        for batch in pyarrow.ipc.open_stream(source):
            found.append([_starts(column, base) for column in batch.columns[:2]])
        return np.array([np.concatenate(column) for column in zip(*found, strict=True)])


def _starts(column: pyarrow.ListArray, base: int) -> NDArray[np.int64]:
    values = column.values
    offsets = column.offsets.to_numpy()[:-1].astype(np.int64)
    found: NDArray[np.int64] = offsets * 4 + (values.buffers()[1].address - base + 4 * values.offset)
    return found


def _files(rows: Sequence[NDArray[np.int64]], lengths: NDArray[np.int32]) -> Iterator[Sequence[NDArray[np.int64]]]:
    start = tokens = 0
    for index, row in enumerate(rows):
        tokens += int(lengths[row].sum())
        if tokens >= FILE_TOKENS:
            yield rows[start : index + 1]
            start, tokens = index + 1, 0
    if start < len(rows):
        yield rows[start:]


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        if not path.exists():
            raise
        target.write_bytes(path.read_bytes())


def _describe(folder: Path, names: Sequence[str], *, packed: bool) -> None:
    """The files beside the rows by which `datasets.load_from_disk` knows them."""
    from datasets import DatasetInfo, Features, List, Value

    columns = ["input_ids", "labels", *(["seq_lengths"] if packed else [])]
    DatasetInfo(features=Features({name: List(Value("int32")) for name in columns})).write_to_directory(str(folder))
    state: dict[str, Any] = {"_data_files": [{"filename": name} for name in names], "_fingerprint": folder.parent.name}
    state |= dict.fromkeys(("_format_columns", "_format_type", "_split"))
    write_json(folder / "state.json", {**state, "_format_kwargs": {}, "_output_all_columns": False})
