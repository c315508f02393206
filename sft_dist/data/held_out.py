"""Which rows are one and the same, taken several times by a weight, and which are held out of the training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import Config, SourceConfig
from sft_dist.data.shards import Shard
from sft_dist.data.sources import rows_behind
from sft_dist.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Chosen:
    """Documents by their numbers over all shards."""

    train: Ints
    held_out: Ints | None
    """Those that data.eval_size keeps for the evaluation, each once; None if it keeps none."""
    once: NDArray[np.bool_]
    """Of every document: whether it is none of the copies that a weight made."""


def choose(config: Config, source: SourceConfig, shards: Sequence[Shard]) -> Chosen:
    """The documents to train on and those held out. All copies that a weight makes of a row go the same way.

    Raises DataError if data.eval_size leaves one of the two empty.
    """
    return _chosen(config.data.eval_size, config.run.seed, source, shards)


def _chosen(size: float, seed: int, source: SourceConfig, shards: Sequence[Shard]) -> Chosen:
    origins = _origins(source, shards)
    rows, firsts, which = np.unique(origins, return_index=True, return_inverse=True)
    usable = np.cumsum([0, *(shard.counts["usable"] for shard in shards)])
    of = np.concatenate([shard.ordinals + first for shard, first in zip(shards, usable, strict=False)])
    first_copy = np.zeros(len(origins), dtype=bool)
    first_copy[firsts] = True
    every, once = np.arange(len(of)), first_copy[of]
    if not size:
        return Chosen(every, None, once)
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        raise DataError(
            f"data.eval_size {size:g} would hold out {count} of {len(rows)} rows",
            hint="hold out at least one row and leave at least one for training",
        )
    drawn = np.zeros(len(rows), dtype=bool)
    drawn[random.Random(seed).sample(range(len(rows)), count)] = True
    out = drawn[which][of]
    return Chosen(every[~out], every[out & once], once)


def every_document(source: SourceConfig, shards: Sequence[Shard]) -> Chosen:
    """All documents, of a source that nothing is held out of."""
    return _chosen(0, 0, source, shards)


def _origins(source: SourceConfig, shards: Sequence[Shard]) -> Ints:
    """Of each usable row: which row of all the sources it is. Copies have the same number."""
    found, begin = [np.zeros(0, dtype=np.int64)], 0
    for index, part in enumerate(source.parts):
        own = [shard for shard in shards if shard.counts["source"] == index]
        read = np.cumsum([0, *(shard.counts["rows_in"] for shard in own)])
        places = [shard.rows[0].astype(np.int64) + first for shard, first in zip(own, read, strict=False)]
        found.append(begin + rows_behind(np.concatenate([*places, found[0]]), part.weight))
        begin = max(begin, int(found[-1].max(initial=begin - 1)) + 1)
    return np.concatenate(found)
