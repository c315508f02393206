"""A part of the rows, tokenised into a file of its own: what the processes of a preparation do, one chunk each.

A shard is whole once its notes are there: they are written last, each file under another name first. So a preparation that
was killed goes on where it was, and two at once can share what either has done.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema_data import DataConfig
from sft_dist.data.example import Example, RowFormat
from sft_dist.data.json_rows import Row
from sft_dist.data.sources import read_row
from sft_dist.data.template import ChatTemplate
from sft_dist.data.tokenize import IGNORED, MaskedRow, Masks
from sft_dist.errors import DataError
from sft_dist.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 500
SHOWN = 5


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one source, and where their shard goes."""

    number: int
    source: int
    how: RowFormat
    rows: Sequence[Row]


@dataclass(frozen=True)
class Shard:
    """The notes of a shard."""

    path: Path
    counts: dict[str, Any]
    lengths: NDArray[np.int32]
    """Tokens of each document."""
    trained: NDArray[np.int32]
    """Trained tokens of each document."""
    ordinals: NDArray[np.int32]
    """Which of the chunk's usable rows each document is."""
    hashes: NDArray[np.uint64]
    """Of each document's tokens and labels."""


def shard_path(folder: Path, number: int) -> Path:
    """Where the documents of that shard are."""
    return folder / f"shard-{number:05d}.arrow"


def read_shard(path: Path) -> Shard | None:
    """The notes of a shard; None while it is not whole."""
    try:
        counts = read_json(path.with_suffix(".json"))
        if counts is None:
            return None
        with np.load(path.with_suffix(".npz")) as arrays:
            return Shard(path, counts, *(arrays[name] for name in ("lengths", "trained", "ordinals", "hashes")))
    except (OSError, ValueError, KeyError):
        return None


class ShardMaker:
    """Writes shards of one split; made once in each process."""

    def __init__(
        self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, folder: Path
    ) -> None:
        self.data, self.tokenizer, self.folder = data, tokenizer, folder
        self.masks = Masks(tokenizer, template, data.trained)

    def make(self, chunk: Chunk) -> int:
        """Write the shard of `chunk` unless it is there; returns its number of rows."""
        path = shard_path(self.folder, chunk.number)
        if read_shard(path) is None:
            self._write(path, chunk)
        return len(chunk.rows)

    def _write(self, path: Path, chunk: Chunk) -> None:
        counts: dict[str, Any] = {
            "source": chunk.source,
            "format": chunk.how.name,
            "rows_in": len(chunk.rows),
            "bad": {},
            "errors": [],
            "first": None,
        }
        counts |= dict.fromkeys(("usable", "refused", "empty", "cut_off", "truncated_rows", "truncated_tokens"), 0)
        counts |= dict.fromkeys(("answers_cut", "turns", "turns_ended", "doubled_bos", "unknown_tokens"), 0)
        unknown: collections.Counter[str] = collections.Counter()
        kept: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        trained: list[int] = []
        ordinals: list[int] = []
        for start in range(0, len(chunk.rows), BATCH):
            examples = []
            for row in chunk.rows[start : start + BATCH]:
                example = read_row(row, chunk.how)
                if isinstance(example, DataError):
                    counts["bad"][example.reason] = counts["bad"].get(example.reason, 0) + 1
                    if len(counts["errors"]) < SHOWN:
                        counts["errors"].append([example.message, example.hint])
                else:
                    examples.append(example)
            for example, masked in zip(examples, self.masks.rows(examples), strict=True):
                counts["usable"] += 1
                for ids, labels in self._documents(example, masked, counts, unknown):
                    kept.append((ids, labels))
                    trained.append(int((labels != IGNORED).sum()))
                    ordinals.append(counts["usable"] - 1)
        counts["unknown"] = dict(unknown.most_common(50))
        self._save(path, counts, kept, trained, ordinals)

    def _documents(
        self, example: Example, row: MaskedRow, counts: dict[str, Any], unknown: collections.Counter[str]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """What of one row is trained on: nothing, the row, or the pieces of one that is too long. Counts why."""
        limit, eos = self.data.max_length, self.tokenizer.eos_token_id
        words = int((row.trained & (row.ids != eos)).sum())
        if words == 0:
            counts["refused" if row.problem else "empty"] += 1
            if counts["first"] is None:
                problem = row.problem or "the answer tokenises to nothing, so there is nothing to train on"
                counts["first"] = f"{example.where}: {problem}"
            return []
        counts["doubled_bos"] += row.doubled_bos
        self._count_unknown(row, counts, unknown)
        split = self.data.packing and self.data.packing_overflow == "split"
        over = max(0, len(row.ids) - limit)
        if over and not split:
            counts["truncated_rows"] += 1
            counts["truncated_tokens"] += over
        kept = len(row.ids) if split else limit
        for begin, end in row.turns or ((0, len(row.ids)),):
            counts["turns"] += 1
            ended = (row.ids[begin:end] == eos) & row.trained[begin:end]
            counts["turns_ended"] += bool(end <= kept and ended.any())
        labels = np.where(row.trained, row.ids, IGNORED).astype(np.int32)
        ids = row.ids.astype(np.int32)
        pieces = [(ids[at : at + limit], labels[at : at + limit]) for at in range(0, kept, limit) if at < len(ids)]
        pieces = [(part, marks) for part, marks in pieces if (marks != IGNORED).any()]
        counts["cut_off"] += not pieces
        counts["answers_cut"] += bool(pieces and not split and row.trained[limit:].any())
        return pieces

    def _count_unknown(self, row: MaskedRow, counts: dict[str, Any], unknown: collections.Counter[str]) -> None:
        token = self.tokenizer.unk_token_id
        if token is None:
            return
        found = int((row.ids == token).sum())
        counts["unknown_tokens"] += found
        if found:
            unknown.update(self.masks.unknown_texts(row))

    def _save(
        self,
        path: Path,
        counts: dict[str, Any],
        documents: list[tuple[NDArray[np.int32], NDArray[np.int32]]],
        trained: list[int],
        ordinals: list[int],
    ) -> None:
        write_documents(path, [documents[at : at + 1000] for at in range(0, len(documents), 1000)])
        hashes = [
            hashlib.blake2b(ids.tobytes() + labels.tobytes(), digest_size=8).digest() for ids, labels in documents
        ]
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        with temporary.open("wb") as stream:
            np.savez(
                stream,
                lengths=np.array([len(ids) for ids, _ in documents], dtype=np.int32),
                trained=np.array(trained, dtype=np.int32),
                ordinals=np.array(ordinals, dtype=np.int32),
                hashes=np.frombuffer(b"".join(hashes), dtype=np.uint64),
            )
        temporary.replace(path.with_suffix(".npz"))
        write_json(path.with_suffix(".json"), json.loads(json.dumps(counts)))


def write_documents(
    path: Path,
    batches: Any,
    *,
    packed: bool = False,
) -> None:
    """Write batches of (input_ids, labels), or of (input_ids, labels, seq_lengths), as an Arrow stream to `path`."""
    import pyarrow

    names = ["input_ids", "labels", *(["seq_lengths"] if packed else [])]
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in names])
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.arrow")
    with temporary.open("wb") as stream:
        with pyarrow.ipc.new_stream(stream, schema) as writer:
            for batch in batches:
                columns = [_lists([row[index] for row in batch]) for index in range(len(names))]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _lists(rows: Sequence[NDArray[np.int32]]) -> Any:
    import pyarrow

    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate([*rows, np.zeros(0, dtype=np.int32)]).astype(np.int32, copy=False)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
