"""Documents put together into rows of at most a given length, so that little room is left."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Documents that are looked at for what a row has left; where none of their sums fill it, once so many times as many.
LOOKED_AT, AGAIN, AGAIN_AT_MOST = 64, 16, 200
# Of so many documents at once; more are dealt out to as many equal hands.
AT_ONCE = 10_000
# A row begins with the longest document left if that takes more than 1 / share of it: half, a third, never; or always.
SHARES = (2, 3, 1)
# Documents that a row is begun with take all its room but that of so many of the longest.
LEFT_TO_CHOICE = 8


def fullest_rows(lengths: Sequence[int] | Ints, size: int) -> list[Ints]:
    """Which documents stand in each row: by best fit decreasing, or by sums that fill rows where these are fewer.

    Each document is at most `size` long, and stands in one row; ValueError if one is longer. The same lengths give the same
    rows.
    """
    rows = best_fit_decreasing(lengths, size)
    measured = np.asarray(lengths, dtype=np.int64)
    if _is_enough(len(rows), measured, size):
        return rows
    order = np.argsort(measured, kind="stable")
    hands = [order[first :: -(-len(order) // AT_ONCE)] for first in range(-(-len(order) // AT_ONCE))]
    tried: dict[int, list[list[int]]] = {}
    for share in (*SHARES, size):
        tried[share] = _filled_rows(measured[hands[0]].tolist(), size, share)
        if _is_enough(len(tried[share]), measured[hands[0]], size):
            break
    best = min(tried, key=lambda share: len(tried[share]))
    filled = [hands[0][row] for row in tried[best]]
    filled += [hand[row] for hand in hands[1:] for row in _filled_rows(measured[hand].tolist(), size, best)]
    return filled if len(filled) < len(rows) else rows


def _is_enough(rows: int, lengths: Ints, size: int) -> bool:
    """Whether no order needs fewer rows, but for one in a thousand."""
    return rows - fewest_rows(lengths, size) <= rows // 1000


def fewest_rows(lengths: Sequence[int] | Ints, size: int) -> int:
    """A number of rows that no order needs fewer than (Martello and Toth's second bound for bins)."""
    found = np.sort(np.asarray(lengths, dtype=np.int64))
    if not len(found):
        return 0
    sums = np.concatenate([[0], np.cumsum(found)])
    half = int(np.searchsorted(found, size // 2, side="right"))
    # No document shorter than `least` is counted, so that none of those longer than size - least has room for another.
    least = np.unique(np.append(found[:half], 0))
    alone = np.searchsorted(found, size - least, side="right")
    shortest = np.searchsorted(found, least, side="left")
    room = (alone - half) * size - (sums[alone] - sums[half])
    more = -((room - (sums[half] - sums[shortest])) // size)
    return int((len(found) - half + np.maximum(more, 0)).max())


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


def _filled_rows(lengths: Sequence[int], size: int, share: int) -> list[list[int]]:
    """Rows of documents, by their numbers in the ascending `lengths`: the longest one left, and some that fill the rest.

    Those are taken from all lengths alike, so that what is left to the last rows is as mixed as what the first had; and so
    is the first one, if the longest takes no more than 1 / `share` of a row.
    """
    left = list(range(len(lengths)))
    rows: list[list[int]] = []
    again = AGAIN_AT_MOST
    while left:
        row = [left.pop()] if lengths[left[-1]] * share > size else []
        room = size - sum(lengths[document] for document in row)
        fitting = bisect.bisect_right(left, room, key=lengths.__getitem__)
        places, rest = _closest(lengths, left, room, _spread(fitting, LOOKED_AT, len(rows)))
        if rest and again and fitting > LOOKED_AT:
            again -= 1
            places, rest = _closest(lengths, left, room, _spread(fitting, LOOKED_AT * AGAIN, len(rows)))
        for place in sorted(places, reverse=True):
            row.append(left.pop(place))
        rows.append(row)
    return rows


def _spread(count: int, wanted: int, turn: int) -> list[int]:
    """So many of `count` places, from everywhere, in an order that jumps about; other ones at another turn."""
    if count <= wanted:
        return list(range(count - 1, -1, -1))
    # Steps of the golden ratio's share of a round fall into the widest gap each time.
    step = int(count * 0.6180339887) | 1
    return list(dict.fromkeys((turn * 7919 + index * step) % count for index in range(wanted)))


def _closest(lengths: Sequence[int], left: Sequence[int], room: int, places: Sequence[int]) -> tuple[list[int], int]:
    """Some of `places` in `left` whose documents fill `room` as far as any of them do, and what room remains."""
    sizes = [lengths[left[place]] for place in places]
    begun = 0
    while begun < len(sizes) and room > LEFT_TO_CHOICE * sizes[begun]:
        room -= sizes[begun]
        begun += 1
    # Bit n of `reached[i]` says whether the first i documents from `begun` on have a choice that leaves n of the room.
    reached = [1 << room]
    for size in sizes[begun:]:
        reached.append(reached[-1] | reached[-1] >> size)
        if reached[-1] & 1:
            break
    rest = remaining = (reached[-1] & -reached[-1]).bit_length() - 1
    chosen = list(places[:begun])
    for index in range(len(reached) - 2, -1, -1):
        if not reached[index] >> remaining & 1:
            chosen.append(places[begun + index])
            remaining += sizes[begun + index]
    return chosen, rest


def fill(lengths: Sequence[int] | Ints, rows: Sequence[Ints], size: int) -> float:
    """The share of the rows' room that tokens take."""
    return float(np.asarray(lengths, dtype=np.int64).sum() / (len(rows) * size)) if rows else 0.0
