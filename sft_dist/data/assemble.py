"""The documents of all shards, as a folder that `datasets` maps: as they are, without those held out, or packed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.documents import Document, row_columns, with_weights, write_documents
from sft_dist.data.packing import fullest_rows
from sft_dist.data.shards import Shard
from sft_dist.files import sync_path, write_json

if TYPE_CHECKING:
    import pyarrow

# Tokens in one file of rows that are written anew.
FILE_TOKENS = 50_000_000
BATCH_ROWS = 200


def link_shards(shards: Sequence[Shard], folder: Path) -> None:
    """Make a dataset of the shards' files, which stay one file on the disk under two names where the disk can.

    If only some of them hold weights, all are written anew: the files of a dataset have the same columns.
    """
    weighted = is_weighted(shards)
    if weighted and any(shard.weights is None for shard in shards if len(shard.lengths)):
        count = sum(len(shard.lengths) for shard in shards)
        write_rows(shards, list(np.arange(count).reshape(-1, 1)), folder, packed=False)
        return
    folder.mkdir()
    names = []
    for shard in shards:
        if len(shard.lengths):
            sync_path(shard.path)
            _link(shard.path, folder / shard.path.name)
            names.append(shard.path.name)
    _describe(folder, names, row_columns(packed=False, weighted=weighted))


def is_weighted(shards: Sequence[Shard]) -> bool:
    """Whether some trained token counts other than once."""
    return any(shard.weights is not None for shard in shards)


def write_rows(shards: Sequence[Shard], rows: Sequence[NDArray[np.int64]], folder: Path, *, packed: bool) -> None:
    """Write the documents that each of `rows` lists, by their numbers over all shards, one after the other.

    Documents are read one by one from the disk, so that memory does not grow with them.
    """
    folder.mkdir()
    names = []
    columns = row_columns(packed=packed, weighted=is_weighted(shards))
    with Documents(shards) as documents:
        for number, part in enumerate(_files(rows, documents.lengths)):
            path = folder / f"rows-{number:05d}.arrow"
            write_documents(path, documents.batches(part, packed), columns)
            names.append(path.name)
    _describe(folder, names, columns)


def pack(shards: Sequence[Shard], chosen: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """The rows that the chosen documents are packed into, by the documents' numbers over all shards."""
    lengths = np.concatenate([shard.lengths for shard in shards])[chosen]
    return [chosen[row] for row in fullest_rows(lengths, size)]


class Documents:
    """Reads documents of shards by their numbers, with one read each and no mapped memory."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = [shard for shard in shards if len(shard.lengths)]
        self.lengths = np.concatenate([shard.lengths for shard in self.shards])
        self.weighted = is_weighted(shards)
        self._first = np.cumsum([0, *(len(shard.lengths) for shard in self.shards)])
        self._places = [_places(shard.path) for shard in self.shards]
        self._files = [os.open(shard.path, os.O_RDONLY) for shard in self.shards]

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._files:
            os.close(handle)

    def read(self, number: int) -> Document:
        """The tokens and the labels of a document, and if any has them, the tokens' weights."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        size = 4 * int(self.lengths[number])
        places = self._places[shard][:, number - self._first[shard]]
        read = [os.pread(self._files[shard], size, int(place)) for place in places]
        kinds = (np.int32, np.int32, np.float32)
        found: Document = [np.frombuffer(raw, dtype=kind) for raw, kind in zip(read, kinds, strict=False)]
        return with_weights(found) if self.weighted else found

    def batches(self, rows: Sequence[NDArray[np.int64]], packed: bool) -> Iterator[list[Document]]:
        for start in range(0, len(rows), BATCH_ROWS):
            yield [self._row(row, packed) for row in rows[start : start + BATCH_ROWS]]

    def _row(self, row: NDArray[np.int64], packed: bool) -> Document:
        parts = [self.read(int(number)) for number in row]
        joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        return [*joined, self.lengths[row]] if packed else joined


def _places(path: Path) -> NDArray[np.int64]:
    """Where in a file the columns of each of its documents begin; each of their numbers takes 4 bytes."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        base = source.read_buffer(1).address
        source.seek(0)
        found: list[list[NDArray[np.int64]]] = []
        for batch in pyarrow.ipc.open_stream(source):
            found.append([_starts(column, base) for column in batch.columns])
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


def _describe(folder: Path, names: Sequence[str], columns: dict[str, str]) -> None:
    """The files beside the rows by which `datasets.load_from_disk` knows them."""
    from datasets import DatasetInfo, Features, List, Value

    features = Features({name: List(Value(kind)) for name, kind in columns.items()})
    DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {"_data_files": [{"filename": name} for name in names], "_fingerprint": folder.parent.name}
    state |= dict.fromkeys(("_format_columns", "_format_type", "_split"))
    write_json(folder / "state.json", {**state, "_format_kwargs": {}, "_output_all_columns": False})
