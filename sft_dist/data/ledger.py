"""What became of the rows: numbers by which to trust them, or not."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import Config, SourceConfig
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
}


def split_ledger(
    config: Config,
    source: SourceConfig,
    shards: Sequence[Shard],
    chosen: NDArray[np.int64],
    rows: Sequence[NDArray[np.int64]] | None,
    *,
    part_of_train: bool = False,
) -> dict[str, Any]:
    """The numbers of one split: of its sources' rows, and of the documents and rows that came of them.

    What happened before the documents were chosen stands with the training rows, where those held out are `part_of_train`.
    """
    counts = [] if part_of_train else [shard.counts for shard in shards]
    every = np.concatenate([shard.lengths for shard in shards])
    documents = every[chosen].astype(np.int64)
    trained = np.concatenate([shard.trained for shard in shards])[chosen]
    lengths = documents if rows is None else np.array([int(every[row].sum()) for row in rows])
    found: dict[str, Any] = {
        "rows_in": len(chosen) if part_of_train else _total(counts, "rows_in"),
        "rows": len(lengths),
        "dropped_bad_rows": sum(_bad(counts).values()),
        **{name: _total(counts, counted) for name, counted in COUNTED.items()},
        "longest_row": int(lengths.max()),
        "spread": round(float(np.std(lengths)), 2),
        "tokens": int(lengths.sum()),
        "trained_tokens": int(trained.sum()),
        "length_percentiles": {
            str(share): int(value)
            for share, value in zip(PERCENTILES, np.percentile(documents, PERCENTILES, method="lower"), strict=True)
        },
        "duplicates": len(chosen) - len(np.unique(hashes(shards, chosen))),
    }
    if rows is not None:
        found |= {"documents": len(chosen), "packing_fill": round(fill(documents, rows, config.data.max_length), 4)}
    if not part_of_train:
        found |= _trust(counts, int(every.sum()))
        found["sources"] = [_source_ledger(source, shards, index) for index in range(len(source.parts))]
    return found


def hashes(shards: Sequence[Shard], chosen: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of each chosen document's tokens and labels."""
    found: NDArray[np.uint64] = np.concatenate([shard.hashes for shard in shards])[chosen]
    return found


def overlap(train: NDArray[np.uint64], held_out: NDArray[np.uint64]) -> int:
    """How many held-out documents also stand among the training documents."""
    return int(np.isin(held_out, train).sum())


def _trust(counts: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    usable, turns, unknown = (_total(counts, name) for name in ("usable", "turns", "unknown_tokens"))
    texts: collections.Counter[str] = collections.Counter()
    for one in counts:
        texts.update(one["unknown"])
    return {
        "dropped_reasons": dict(sorted(_bad(counts).items())),
        "dropped_share": _share(
            sum(_bad(counts).values()) + _total(counts, "refused") + _total(counts, "empty"), _total(counts, "rows_in")
        ),
        "answers_cut_or_lost": _total(counts, "answers_cut") + _total(counts, "cut_off"),
        "answers_cut_or_lost_share": _share(_total(counts, "answers_cut") + _total(counts, "cut_off"), usable),
        "turns": turns,
        "end_of_turn_trained_share": _share(_total(counts, "turns_ended"), turns, empty=1.0),
        "doubled_bos_removed": _total(counts, "doubled_bos"),
        "unknown_tokens": unknown,
        "unknown_share": _share(unknown, tokens + _total(counts, "truncated_tokens")),
        "unknown_texts": dict(texts.most_common(20)),
    }


def _source_ledger(source: SourceConfig, shards: Sequence[Shard], index: int) -> dict[str, Any]:
    part = source.parts[index]
    own = [shard for shard in shards if shard.counts["source"] == index]
    counts = [shard.counts for shard in own]
    return {
        "source": part.path or f"task {part.task}",
        "format": counts[0]["format"],
        "rows_in": _total(counts, "rows_in"),
        "documents": sum(len(shard.lengths) for shard in own),
        "dropped_reasons": dict(sorted(_bad(counts).items())),
        **{name: _total(counts, counted) for name, counted in COUNTED.items()},
        "tokens": sum(int(shard.lengths.sum()) for shard in own),
        "trained_tokens": sum(int(shard.trained.sum()) for shard in own),
    }


def _total(counts: Sequence[dict[str, Any]], name: str) -> int:
    return sum(int(one[name]) for one in counts)


def _bad(counts: Sequence[dict[str, Any]]) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for one in counts:
        found.update(one["bad"])
    return found


def _share(part: int, whole: int, empty: float = 0.0) -> float:
    return round(part / whole, 6) if whole else empty
