"""What is known of each training row beside its tokens: where it stands in its source, what was cut off, what is unknown.

A few numbers a row, written with the tokens, so that the rows to look at are found without reading all of them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.shards import Shard

FILE = "rows.npz"

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Notes:
    """Of the usable rows of the sources, and of the documents that came of them."""

    place: Ints
    """Which row of the sources each usable row is, counted from 0 over all of them, as often as their weights say."""
    cut: Ints
    """Tokens of each usable row that were cut off."""
    unknown: Ints
    """Tokens of each usable row that the vocabulary does not know."""
    left_out: Ints
    """The usable rows of which nothing is trained."""
    documents: Ints
    """Which usable row each document is of, in the order in which the prepared rows hold them."""
    length: Ints
    """Tokens of each document."""
    trained: Ints
    """Trained tokens of each document."""
    sizes: Ints
    """How many documents each prepared row holds: of the training rows, then of those held out of them."""

    def leading(self, count: int, padding: Ints | None = None) -> list[int]:
        """Numbers of at most `count` rows: of each order in turn the one that leads, is next to lead, and so on.

        The orders are those of the page: the worst, most truncated, least trained, longest, most unknown and, with the
        `padding` of each row, most padded. Numbers beyond the prepared rows are of those left out.
        """
        starts = np.cumsum(self.sizes) - self.sizes
        out = self.left_out
        columns = {
            "length": (self.length, 0 * out),
            "trained": (self.trained, 0 * out),
            "cut": (self.cut[self.documents], self.cut[out]),
            "unknown": (self.unknown[self.documents], self.unknown[out]),
        }
        of = {name: np.concatenate([np.add.reduceat(it, starts), more]) for name, (it, more) in columns.items()}
        whole = np.maximum(1, of["length"] + of["cut"])
        share = of["trained"] / np.maximum(1, of["length"])
        bad = of["cut"] / whole + of["unknown"] / whole + (of["trained"] == 0) + 0.1 * (1 - share)
        orders = [-bad, -of["cut"], share, -of["length"], -of["unknown"]]
        if padding is not None:
            rest = np.zeros(len(bad) - len(padding), dtype=np.int64)
            orders.append(-np.concatenate([padding, rest]))
        ranked = (np.argsort(order, kind="stable")[:count].tolist() for order in orders)
        return list(dict.fromkeys(itertools.chain.from_iterable(zip(*ranked, strict=True))))[:count]


def write_notes(
    folder: Path, shards: Sequence[Shard], chosen: Ints, rows: Sequence[Ints] | None, held_out: Ints | None
) -> None:
    """Write the notes of the prepared rows into `folder`.

    Each training row holds one of the `chosen` documents, or those that `rows` lists, by their numbers over all shards.
    """
    read = np.cumsum([0, *(shard.counts["rows_in"] for shard in shards)])
    usable = np.cumsum([0, *(shard.counts["usable"] for shard in shards)])
    numbered = [shard.rows + np.array([[first], [0], [0]]) for shard, first in zip(shards, read, strict=False)]
    place, cut, unknown = np.concatenate(numbered, axis=1)
    documents = np.concatenate([shard.ordinals + first for shard, first in zip(shards, usable, strict=False)])
    kept = np.zeros(0, dtype=np.int64) if held_out is None else held_out
    order = np.concatenate([*([chosen] if rows is None else rows), kept])
    sizes = np.ones(len(chosen)) if rows is None else np.array([len(row) for row in rows])
    notes = Notes(
        place,
        cut,
        unknown,
        np.setdiff1d(np.arange(len(place)), documents),
        documents[order],
        np.concatenate([shard.lengths for shard in shards])[order],
        np.concatenate([shard.trained for shard in shards])[order],
        np.concatenate([sizes, np.ones(len(kept))]),
    )
    arrays: dict[str, Any] = {one.name: _small(getattr(notes, one.name)) for one in fields(notes)}
    with (folder / FILE).open("wb") as stream:
        np.savez(stream, **arrays)


def read_notes(folder: Path) -> Notes:
    """The notes in the folder of prepared rows."""
    with np.load(folder / FILE) as arrays:
        return Notes(*(arrays[one.name].astype(np.int64) for one in fields(Notes)))


def _small(values: Ints) -> NDArray[np.integer]:
    return values.astype(np.int32) if not len(values) or int(values.max()) < 2**31 else values
