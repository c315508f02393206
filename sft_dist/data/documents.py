"""Documents as columns of numbers, and files of them: what is prepared, and what a training reads."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.tokenize import IGNORED

# The columns of a document's tokens: ids, labels and, where they have any, weights.
Document = list[NDArray[Any]]


def row_columns(*, packed: bool, weighted: bool) -> dict[str, str]:
    """The columns of rows, and the type of the numbers in each: those of their tokens, then the documents' lengths."""
    weights = {"loss_weights": "float32"} if weighted else {}
    return {"input_ids": "int32", "labels": "int32", **weights, **({"seq_lengths": "int32"} if packed else {})}


def with_weights(document: Document) -> Document:
    """The document with its tokens' weights as third column: where it has none, 1 for those that are trained."""
    return document if len(document) > 2 else [*document, (document[1] != IGNORED).astype(np.float32)]


def temporary_beside(path: Path, ending: str) -> Path:
    """A name in the same folder that no other process takes, on whatever host: several may write the same file at once."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(8)}{ending}")


def write_documents(path: Path, batches: Any, columns: dict[str, str], *, durable: bool = True) -> None:
    """Write batches of rows, each a list with an array for each of `columns`, as an Arrow stream to `path`.

    Without `durable` nothing waits for the disk.
    """
    import pyarrow

    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.type_for_alias(kind))) for name, kind in columns.items()])
    temporary = temporary_beside(path, ".arrow")
    with temporary.open("wb") as stream:
        with pyarrow.ipc.new_stream(stream, schema) as writer:
            for batch in batches:
                lists = [_lists([row[index] for row in batch], kind) for index, kind in enumerate(columns.values())]
                writer.write_batch(pyarrow.record_batch(lists, schema=schema))
        stream.flush()
        if durable:
            os.fsync(stream.fileno())
    temporary.replace(path)


def _lists(rows: Sequence[NDArray[Any]], kind: str) -> Any:
    import pyarrow

    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate([*rows, np.zeros(0, dtype=kind)]).astype(kind, copy=False)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
