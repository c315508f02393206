"""A part of the rows, tokenised into a file of its own: what the processes of a preparation do, one chunk each.

A shard is whole once its notes are there: they are written last, each file under another name first. So a preparation that
was killed goes on where it was, and two at once can share what either has done. Nothing waits for the disk here: after a failure
of the machine, a shard's documents may be others than its notes say, so one that is found is held against them.
"""

from __future__ import annotations

import collections
import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema_data import DataConfig
from sft_dist.data.documents import Document, row_columns, temporary_beside, with_weights, write_documents
from sft_dist.data.encode import unknown_token
from sft_dist.data.example import Example, RowFormat
from sft_dist.data.json_rows import Row
from sft_dist.data.nothing import no_words
from sft_dist.data.sources import read_row
from sft_dist.data.special import SpecialTexts
from sft_dist.data.template import ChatTemplate
from sft_dist.data.tokenize import IGNORED, MaskedRow, Masks
from sft_dist.data.words import reasoning_left_out
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
    rows: NDArray[np.int32]
    """Of the usable rows: which of the chunk's rows each is, its tokens that were cut off, and its unknown ones."""
    weights: NDArray[np.float64] | None = None
    """The sum of the weights of each document's trained tokens; None where all of them count 1, and have no column."""


def shard_path(folder: Path, number: int) -> Path:
    """Where the documents of that shard are."""
    return folder / f"shard-{number:05d}.arrow"


def read_shard(path: Path) -> Shard | None:
    """The notes of a shard; None while it is not whole."""
    try:
        counts = read_json(path.with_suffix(".json"))
        if counts is None or "reasoning_left_out" not in counts:  # a version before this one counted less
            return None
        with np.load(path.with_suffix(".npz")) as arrays:
            own: dict[str, Any] = {name: arrays[name] for name in ("lengths", "trained", "ordinals", "hashes", "rows")}
            return Shard(path, counts, **own, weights=arrays.get("weights"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _holds_what_it_says(shard: Shard) -> bool:
    """Whether a shard's documents are those that its notes were written for."""
    import pyarrow

    found: list[bytes] = []
    try:
        with pyarrow.memory_map(str(shard.path)) as source:
            for batch in pyarrow.ipc.open_stream(source):
                columns = [[row.values.to_numpy() for row in column] for column in batch.columns[:2]]
                found += map(_hash, *columns)
    except (OSError, pyarrow.ArrowException):
        return False
    return np.array_equal(np.frombuffer(b"".join(found), dtype=np.uint64), shard.hashes)


def _hash(ids: NDArray[np.int32], labels: NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(ids.tobytes() + labels.tobytes(), digest_size=8).digest()


class ShardMaker:
    """Writes shards of one split; made once in each process."""

    def __init__(
        self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, folder: Path
    ) -> None:
        self.data, self.tokenizer, self.folder = data, tokenizer, folder
        self.masks = Masks(tokenizer, template, data.trained)
        self.unknown, self.special = unknown_token(tokenizer), SpecialTexts(tokenizer, template)

    def make(self, chunk: Chunk) -> int:
        """Write the shard of `chunk` unless it is there; returns its number of rows."""
        path = shard_path(self.folder, chunk.number)
        found = read_shard(path)
        if found is None or not _holds_what_it_says(found):
            self._write(path, chunk)
        return len(chunk.rows)

    def _write(self, path: Path, chunk: Chunk) -> None:
        counts: dict[str, Any] = {"source": chunk.source, "format": chunk.how.name, "rows_in": len(chunk.rows)}
        counts |= {"bad": {}, "errors": [], "first": None, "weighted_rows": 0}
        counts |= dict.fromkeys(("usable", "refused", "empty", "cut_off", "truncated_rows", "truncated_tokens"), 0)
        counts |= dict.fromkeys(("answers_cut", "turns", "turns_ended", "doubled_bos", "unknown_tokens"), 0)
        counts |= dict.fromkeys(("tokens_in", "lost_tokens", "special_token_rows", "reasoning_left_out"), 0)
        unknown: collections.Counter[str] = collections.Counter()
        special: collections.Counter[str] = collections.Counter()
        kept: list[Document] = []
        trained: list[int] = []
        ordinals: list[int] = []
        rows: list[tuple[int, int, int]] = []
        for start in range(0, len(chunk.rows), BATCH):
            examples, places = [], []
            for place, row in enumerate(chunk.rows[start : start + BATCH], start):
                example = read_row(row, chunk.how)
                if isinstance(example, DataError):
                    counts["bad"][example.reason] = counts["bad"].get(example.reason, 0) + 1
                    if len(counts["errors"]) < SHOWN:
                        counts["errors"].append([example.message, example.hint])
                else:
                    examples.append(example)
                    places.append(place)
            for place, example, masked in zip(places, examples, self.masks.rows(examples), strict=True):
                counts["usable"] += 1
                counts["tokens_in"] += len(masked.ids)
                spelled = self.special.of(example)
                counts["special_token_rows"] += bool(spelled)
                text = masked.encoded.text if masked.encoded is not None else None  # None: refused, and counted as such
                counts["reasoning_left_out"] += 0 if text is None else reasoning_left_out(text, example.messages)
                special.update(spelled)
                rows.append((place, self._over(masked), self._count_unknown(masked, counts, unknown)))
                for document in self._documents(example, masked, counts):
                    kept.append(document)
                    trained.append(int(np.count_nonzero(document[1] != IGNORED)))
                    ordinals.append(counts["usable"] - 1)
        counts |= {"unknown": dict(unknown.most_common(50)), "special": dict(special)}
        self._save(path, counts, kept, trained, ordinals, rows)

    def _documents(self, example: Example, row: MaskedRow, counts: dict[str, Any]) -> list[Document]:
        """What of one row is trained on: nothing, the row, or the pieces of one that is too long. Counts why."""
        limit, eos, over = self.data.max_length, self.tokenizer.eos_token_id, self._over(row)
        words = int(np.count_nonzero(row.trained & (row.ids != eos)))
        if words == 0:
            counts["refused" if row.problem else "empty"] += 1
            counts["lost_tokens"] += len(row.ids)
            if counts["first"] is None:
                problem = row.problem or f"{no_words(row)}, so there is nothing to train on"
                counts["first"] = f"{example.where}: {problem}"
            return []
        counts["doubled_bos"] += row.doubled_bos
        counts["truncated_rows"] += bool(over)
        counts["truncated_tokens"] += over
        kept = max(limit, len(row.ids) - over)
        for begin, end in row.turns or ((0, len(row.ids)),):
            counts["turns"] += 1
            ended = np.count_nonzero((row.ids[begin:end] == eos) & row.trained[begin:end])
            counts["turns_ended"] += bool(end <= kept and ended)
        labels = np.where(row.trained, row.ids, IGNORED).astype(np.int32)
        columns = [row.ids.astype(np.int32), labels, *([] if row.weights is None else [row.weights])]
        starts = range(0, min(kept, len(row.ids)), limit)
        pieces = [[column[at : at + limit] for column in columns] for at in starts]
        pieces = [piece for piece in pieces if np.count_nonzero(piece[1] != IGNORED)]
        counts["weighted_rows"] += bool(pieces and row.weights is not None)
        counts["lost_tokens"] += len(row.ids) - over - sum(len(piece[0]) for piece in pieces)
        counts["cut_off"] += not pieces
        counts["answers_cut"] += bool(pieces and over and row.trained[limit:].any())
        return pieces

    def _over(self, row: MaskedRow) -> int:
        """How many of a row's tokens are cut off."""
        split = self.data.packing and self.data.packing_overflow == "split"
        return 0 if split else max(0, len(row.ids) - self.data.max_length)

    def _count_unknown(self, row: MaskedRow, counts: dict[str, Any], unknown: collections.Counter[str]) -> int:
        if self.unknown is None:
            return 0
        found = int(np.count_nonzero(row.ids == self.unknown))
        counts["unknown_tokens"] += found
        if found:
            unknown.update(self.masks.unknown_texts(row))
        return found

    def _save(
        self,
        path: Path,
        counts: dict[str, Any],
        documents: list[Document],
        trained: list[int],
        ordinals: list[int],
        rows: list[tuple[int, int, int]],
    ) -> None:
        weighted = any(len(document) > 2 for document in documents)
        if weighted:
            documents = [with_weights(document) for document in documents]
        batches = [documents[at : at + 1000] for at in range(0, len(documents), 1000)]
        # The hashes know nothing of weights.
        write_documents(path, batches, row_columns(packed=False, weighted=weighted), durable=weighted)
        hashes = [_hash(ids, labels) for ids, labels, *_ in documents]
        more: dict[str, Any] = {}
        if weighted:
            more["weights"] = np.array([weights.sum(dtype=np.float64) for _, _, weights in documents])
        temporary = temporary_beside(path, ".npz")
        with temporary.open("wb") as stream:
            np.savez(
                stream,
                lengths=np.array([len(ids) for ids, *_ in documents], dtype=np.int32),
                trained=np.array(trained, dtype=np.int32),
                ordinals=np.array(ordinals, dtype=np.int32),
                hashes=np.frombuffer(b"".join(hashes), dtype=np.uint64),
                rows=np.array(rows, dtype=np.int32).reshape(-1, 3).T,
                **more,
            )
        temporary.replace(path.with_suffix(".npz"))
        write_json(path.with_suffix(".json"), json.loads(json.dumps(counts)), durable=False)
