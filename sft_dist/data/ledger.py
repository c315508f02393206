"""What became of the rows: numbers by which to trust them, or not."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import Config, SourceConfig
from sft_dist.data.held_out import Chosen
from sft_dist.data.packing import fill
from sft_dist.data.shards import Shard

PERCENTILES = (5, 25, 50, 75, 95, 99)
# What shards count for each row, and under which name it stands in the ledger.
COUNTED = {
    "dropped_refused_by_template": "refused",
    "dropped_answer_empty": "empty",
    "dropped_answer_cut_off": "cut_off",
    "truncated_rows": "truncated_rows",
    "truncated_tokens": "truncated_tokens",
    "weighted_rows": "weighted_rows",
}
Ints = NDArray[np.int64]


def split_ledger(
    config: Config, source: SourceConfig, shards: Sequence[Shard], chosen: Chosen, rows: Sequence[Ints] | None
) -> dict[str, Any]:
    """The numbers of the rows of `source`, and of the documents and rows that came of them: in all, then by source.

    tokens_in = tokens + truncated_tokens + lost_tokens + held_out_tokens.
    """
    documents = np.concatenate([shard.lengths for shard in shards]).astype(np.int64)
    lengths = documents[chosen.train] if rows is None else np.array([int(documents[row].sum()) for row in rows])
    found: dict[str, Any] = {
        **_rows_in([shard.counts for shard in shards]),
        "rows": len(lengths),
        "longest_row": int(lengths.max()),
        "spread": round(float(np.std(lengths)), 2),
        **_documents(shards, chosen, np.ones(len(documents), dtype=bool)),
    }
    if rows is not None:
        filled = round(fill(documents[chosen.train], rows, config.data.max_length), 4)
        found |= {"documents": len(chosen.train), "packing_fill": filled}
    of = np.repeat([shard.counts["source"] for shard in shards], [len(shard.lengths) for shard in shards])
    found["sources"] = [
        _source_ledger(source, shards, chosen, of == index, index) for index in range(len(source.parts))
    ]
    return found


def held_out_ledger(shards: Sequence[Shard], chosen: Chosen) -> dict[str, Any]:
    """The numbers of the documents that are held out. What happened before they were drawn stands with the training rows."""
    drawn = chosen.held_out if chosen.held_out is not None else np.zeros(0, dtype=np.int64)
    lengths = np.concatenate([shard.lengths for shard in shards])[drawn].astype(np.int64)
    return {
        "rows_in": len(drawn),
        "rows": len(drawn),
        "longest_row": int(lengths.max()),
        "spread": round(float(np.std(lengths)), 2),
        **_documents(shards, Chosen(drawn, None, chosen.once), np.ones(len(chosen.once), dtype=bool)),
    }


def hashes(shards: Sequence[Shard], chosen: Ints) -> NDArray[np.uint64]:
    """A hash of each chosen document's tokens and labels."""
    found: NDArray[np.uint64] = np.concatenate([shard.hashes for shard in shards])[chosen]
    return found


def overlap(train: NDArray[np.uint64], held_out: NDArray[np.uint64]) -> int:
    """How many held-out documents also stand among the training documents."""
    return int(np.isin(held_out, train).sum())


def _rows_in(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was counted row by row, before any was held out."""
    bad = _sums(counts, "bad")
    usable, turns, unknown, tokens = (_total(counts, it) for it in ("usable", "turns", "unknown_tokens", "tokens_in"))
    lost = _total(counts, "answers_cut") + _total(counts, "cut_off")
    dropped = sum(bad.values()) + _total(counts, "refused") + _total(counts, "empty")
    return {
        "rows_in": _total(counts, "rows_in"),
        "dropped_bad_rows": sum(bad.values()),
        "dropped_reasons": dict(sorted(bad.items())),
        "dropped_share": _share(dropped, _total(counts, "rows_in")),
        **{name: _total(counts, counted) for name, counted in COUNTED.items()},
        "answers_cut_or_lost": lost,
        "answers_cut_or_lost_share": _share(lost, usable),
        "turns": turns,
        "end_of_turn_trained_share": _share(_total(counts, "turns_ended"), turns, empty=1.0),
        "doubled_bos_removed": _total(counts, "doubled_bos"),
        "unknown_tokens": unknown,
        "unknown_share": _share(unknown, tokens),
        "unknown_texts": dict(_sums(counts, "unknown").most_common(20)),
        "special_token_rows": _total(counts, "special_token_rows"),
        "special_texts": dict(_sums(counts, "special").most_common()),
        "reasoning_left_out": _total(counts, "reasoning_left_out"),
        "tokens_in": tokens,
        "lost_tokens": _total(counts, "lost_tokens"),
    }


def _documents(shards: Sequence[Shard], chosen: Chosen, mine: NDArray[np.bool_]) -> dict[str, Any]:
    """The numbers of those of `mine` that are chosen."""
    train = chosen.train[mine[chosen.train]]
    lengths = np.concatenate([shard.lengths for shard in shards]).astype(np.int64)
    trained = np.concatenate([shard.trained for shard in shards])
    # Copies that a weight makes are wanted.
    once = train[chosen.once[train]]
    duplicates = len(once) - len(np.unique(hashes(shards, once)))
    percentiles = np.percentile(lengths[train], PERCENTILES, method="lower") if len(train) else ()
    found = {
        "tokens": int(lengths[train].sum()),
        "trained_tokens": int(trained[train].sum()),
        "length_percentiles": {str(share): int(it) for share, it in zip(PERCENTILES, percentiles, strict=False)},
        "duplicates": duplicates,
        "duplicates_share": _share(duplicates, len(once)),
    }
    if any(shard.weights is not None for shard in shards):
        weights = np.concatenate([shard.trained if shard.weights is None else shard.weights for shard in shards])
        found["trained_weight"] = round(float(weights[train].sum()), 3)
    if chosen.held_out is not None:
        out = mine.copy()
        out[chosen.train] = False
        found |= {"held_out_documents": int(out.sum()), "held_out_tokens": int(lengths[out].sum())}
    return found


def _source_ledger(
    source: SourceConfig, shards: Sequence[Shard], chosen: Chosen, mine: NDArray[np.bool_], index: int
) -> dict[str, Any]:
    part = source.parts[index]
    counts = [shard.counts for shard in shards if shard.counts["source"] == index]
    return {
        "source": part.path or f"task {part.task}",
        "format": counts[0]["format"],
        **_rows_in(counts),
        "documents": int(mine[chosen.train].sum()),
        **_documents(shards, chosen, mine),
    }


def _total(counts: Sequence[dict[str, Any]], name: str) -> int:
    return sum(int(one[name]) for one in counts)


def _sums(counts: Sequence[dict[str, Any]], name: str) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for one in counts:
        found.update(one[name])
    return found


def _share(part: int, whole: int, empty: float = 0.0) -> float:
    return round(part / whole, 6) if whole else empty
