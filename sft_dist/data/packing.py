"""Documents put together into rows of at most a given length: the order that leaves least room."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def best_fit_decreasing(lengths: Sequence[int] | Ints, size: int) -> list[Ints]:
    """Which documents stand in each row: the longest first, each in the fullest row that has room for it.

    Over the whole set at once, not batch by batch. Each document is at most `size` long, and stands in one row; ValueError
    if one is longer. The same lengths give the same rows.
    """
    measured = np.asarray(lengths, dtype=np.int64)
    if not len(measured):
        return []
    if int(measured.max()) > size:
        raise ValueError(f"a document of {int(measured.max())} tokens in rows of {size}")
    order = np.argsort(-measured, kind="stable")
    sorted_lengths = measured[order]
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> rows that have just that
    rooms: list[int] = []  # the keys of `with_room`, ascending
    starts = np.flatnonzero(np.diff(sorted_lengths, prepend=size + 1))
    ends = [*starts[1:].tolist(), len(order)]
    for start, end in zip(starts.tolist(), ends, strict=True):
        length = int(sorted_lengths[start])
        for document in order[start:end].tolist():
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                row, room = len(rows), size
                rows.append([])
            else:
                room = rooms[at]
                row = with_room[room].pop()
                if not with_room[room]:
                    del with_room[room], rooms[at]
            rows[row].append(document)
            left = room - length
            if left:
                if left not in with_room:
                    with_room[left] = []
                    bisect.insort(rooms, left)
                with_room[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


def fill(lengths: Sequence[int] | Ints, rows: Sequence[Ints], size: int) -> float:
    """The share of the rows' room that tokens take."""
    return float(np.asarray(lengths, dtype=np.int64).sum() / (len(rows) * size)) if rows else 0.0
