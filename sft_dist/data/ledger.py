"""What became of the rows: numbers by which to trust them, or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import Config, SourceConfig
from sft_dist.data.packing import fill
from sft_dist.data.shards import Shard


def split_ledger(
    config: Config,
    source: SourceConfig,
    shards: Sequence[Shard],
    chosen: NDArray[np.int64],
    rows: Sequence[NDArray[np.int64]] | None,
    *,
    part_of_train: bool = False,
) -> dict[str, Any]:
    """The numbers of one split: of its sources' rows, and of the documents and rows that came of them."""
    counts = [shard.counts for shard in shards]

    def total(name: str) -> int:
        return 0 if part_of_train else sum(int(it[name]) for it in counts)

    bad = 0 if part_of_train else sum(sum(it["bad"].values()) for it in counts)
    documents = np.concatenate([shard.lengths for shard in shards])[chosen].astype(np.int64)
    trained = np.concatenate([shard.trained for shard in shards])[chosen]
    lengths = (
        documents
        if rows is None
        else np.array([int(np.concatenate([shard.lengths for shard in shards])[row].sum()) for row in rows])
    )
    found: dict[str, Any] = {
        "rows_in": len(chosen) if part_of_train else total("rows_in"),
        "rows": len(lengths),
        "dropped_bad_rows": bad,
        "dropped_refused_by_template": total("refused"),
        "dropped_answer_empty": total("empty"),
        "dropped_answer_cut_off": total("cut_off"),
        "truncated_rows": total("truncated_rows"),
        "truncated_tokens": total("truncated_tokens"),
        "longest_row": int(lengths.max()),
        "spread": round(float(np.std(lengths)), 2),
        "tokens": int(lengths.sum()),
        "trained_tokens": int(trained.sum()),
    }
    if rows is not None:
        found |= {"documents": len(chosen), "packing_fill": round(fill(documents, rows, config.data.max_length), 4)}
    return found
