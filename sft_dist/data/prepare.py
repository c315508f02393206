"""Rows -> a tokenised dataset on disk, made once and mapped read-only by every process that trains.

The folder's name is the rows' key (identity.py). It is published by one rename, so it is either whole or not there. On the
way to it each process tokenises chunks of rows into shards in a folder beside it, which a later or a second preparation
takes up; no file is locked.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist.config.schema import Config, SourceConfig
from sft_dist.data.assemble import link_shards, pack, write_rows
from sft_dist.data.identity import data_key
from sft_dist.data.ledger import hashes, overlap, split_ledger
from sft_dist.data.prepared import LEDGER, Prepared, check_limits, open_prepared, prepared_folder
from sft_dist.data.shards import Chunk, Shard, ShardMaker, read_shard, shard_path
from sft_dist.data.sources import bad_rows, opened
from sft_dist.data.template import ChatTemplate
from sft_dist.errors import DataError
from sft_dist.files import publish_dir, sync_path, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Rows in a chunk: small ones first, so that all processes have work with few rows, then large ones for fewer files.
FEW, MANY, SMALL_CHUNKS = 1000, 8000, 16

_maker: ShardMaker | None = None


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, cache: Path) -> Prepared:
    """Tokenise the config's rows below `cache`, or map what is there from an earlier time.

    Raises DataError for rows that cannot be used, and for a ledger beyond the limits that the config sets.
    """
    target = prepared_folder(cache, data_key(config, tokenizer, template, cache))
    found = open_prepared(target)
    if found is None:
        _build(config, tokenizer, template, target)
        found = open_prepared(target)
    if found is None:
        raise DataError(f"{target} was prepared, and is not there", hint="is somebody emptying the cache?")
    check_limits(config.data.limits, found.ledger)
    return found


def _build(config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, target: Path) -> None:
    # Shards of another version, which cut the rows into other chunks, are none of these.
    parts = target.with_name(f".{target.name}.{FEW}-{MANY}-{SMALL_CHUNKS}.parts")
    try:
        shards = {
            split: _shards(config, source, tokenizer, template, parts / split)
            for split, source in (("train", config.data.train), ("eval", config.data.eval))
            if source is not None
        }
        with publish_dir(target) as staged:
            ledger: dict[str, Any] = {"template": template.origin, **_assemble(config, shards, staged)}
            write_json(staged / LEDGER, ledger)
        sync_path(target.parent)
    except DataError:
        shutil.rmtree(parts, ignore_errors=True)
        raise
    except OSError:
        # Another preparation may have been faster, and have taken away what both worked in.
        if not (target / LEDGER).is_file():
            raise
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _shards(
    config: Config,
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    folder: Path,
) -> list[Shard]:
    """The shards of one split, made as far as they are not there. Raises DataError for rows that cannot be used."""
    folder.mkdir(parents=True, exist_ok=True)
    maker = ShardMaker(config.data, tokenizer, template, folder)
    chunks = _chunks(config, source)
    first = list(itertools.islice(chunks, 2))
    processes = len(os.sched_getaffinity(0)) if len(first) > 1 else 1
    count = 0
    with _progress(folder.name) as progress:
        for rows in _made(maker, itertools.chain(first, chunks), processes):
            count += 1
            progress.update(rows)
    shards = [shard for number in range(count) if (shard := read_shard(shard_path(folder, number))) is not None]
    if len(shards) != count:
        raise FileNotFoundError(str(folder))
    _refuse(config, source, shards)
    return shards


def _chunks(config: Config, source: SourceConfig) -> Iterator[Chunk]:
    number = 0
    for index, part in enumerate(source.parts):
        how, rows = opened(part, config.data.system)
        while chosen := list(itertools.islice(rows, FEW if number < SMALL_CHUNKS else MANY)):
            yield Chunk(number, index, how, chosen)
            number += 1


def _made(maker: ShardMaker, chunks: Iterator[Chunk], processes: int) -> Iterator[int]:
    """Have the shards written by so many processes; yields each one's rows. No more chunks are read than are worked on."""
    if processes == 1:
        yield from map(maker.make, chunks)
        return
    global _maker
    _maker = maker
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    # Each process is a fork with one thread: the tokenizer's own threads would wait for each other.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            waiting: list[Any] = []
            for chunk in chunks:
                waiting.append(pool.apply_async(_make, (chunk,)))
                if len(waiting) > 2 * processes:
                    yield waiting.pop(0).get()
            for result in waiting:
                yield result.get()
    finally:
        _maker = None
        del os.environ["TOKENIZERS_PARALLELISM"]
        os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}


def _make(chunk: Chunk) -> int:
    if _maker is None:
        raise RuntimeError("this process was not forked by a preparation")
    return _maker.make(chunk)


def _refuse(config: Config, source: SourceConfig, shards: Sequence[Shard]) -> None:
    counts = [shard.counts for shard in shards]
    rows, usable = sum(it["rows_in"] for it in counts), sum(it["usable"] for it in counts)
    bad = sum(sum(it["bad"].values()) for it in counts)
    dropped = config.data.on_bad_row == "drop"
    if bad and (not dropped or not usable):
        errors = [DataError(message, hint=hint) for it in counts for message, hint in it["errors"]]
        raise bad_rows(errors, total=rows, dropped=dropped, count=bad)
    first = next((it["first"] for it in counts if it["first"] is not None), None)
    if first is not None and not dropped:
        raise DataError(first, hint="mend the row, or leave such rows out with data.on_bad_row=drop")
    if not sum(len(shard.lengths) for shard in shards):
        raise DataError(
            f"none of the {usable} rows has an answer within data.max_length {config.data.max_length} tokens",
            hint="raise data.max_length; `sft-dist data preview` shows how long the rows are",
        )


def _assemble(config: Config, shards: dict[str, list[Shard]], staged: Path) -> dict[str, Any]:
    """Write the splits' rows below `staged`; returns the ledger of each."""
    train = shards["train"]
    documents = np.arange(sum(len(shard.lengths) for shard in train))
    held_out = _held_out(config, train)
    rest = documents if held_out is None else np.setdiff1d(documents, held_out)
    rows = pack(train, rest, config.data.max_length) if config.data.packing else None
    if held_out is None and rows is None:
        link_shards(train, staged / "train")
    else:
        chosen = rows if rows is not None else [rest[at : at + 1] for at in range(len(rest))]
        write_rows(train, chosen, staged / "train", packed=rows is not None)
    ledger = {"train": split_ledger(config, config.data.train, train, rest, rows)}
    if held_out is not None:
        write_rows(train, [held_out[at : at + 1] for at in range(len(held_out))], staged / "eval", packed=False)
        ledger["eval"] = split_ledger(config, config.data.train, train, held_out, None, part_of_train=True)
        ledger["eval"]["also_in_train"] = overlap(hashes(train, rest), hashes(train, held_out))
    elif config.data.eval is not None:
        link_shards(shards["eval"], staged / "eval")
        every = np.arange(sum(len(shard.lengths) for shard in shards["eval"]))
        ledger["eval"] = split_ledger(config, config.data.eval, shards["eval"], every, None)
        ledger["eval"]["also_in_train"] = overlap(hashes(train, rest), hashes(shards["eval"], every))
    return ledger


def _held_out(config: Config, shards: Sequence[Shard]) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Numbers of the documents that data.eval_size keeps for the evaluation; None if it keeps none."""
    size, usable = config.data.eval_size, sum(shard.counts["usable"] for shard in shards)
    if not size:
        return None
    count = round(size * usable) if size < 1 else int(size)
    if not 0 < count < usable:
        raise DataError(
            f"data.eval_size {size:g} would hold out {count} of {usable} rows",
            hint="hold out at least one row and leave at least one for training",
        )
    chosen = np.zeros(usable, dtype=bool)
    chosen[random.Random(config.run.seed).sample(range(usable), count)] = True
    firsts = np.cumsum([0, *(shard.counts["usable"] for shard in shards)])
    ordinals = np.concatenate([shard.ordinals + first for shard, first in zip(shards, firsts, strict=False)])
    found: np.ndarray[Any, np.dtype[np.int64]] = np.flatnonzero(chosen[ordinals])
    return found


@contextlib.contextmanager
def _progress(split: str) -> Iterator[Any]:
    from tqdm import tqdm

    # A dumb terminal or a log file gets no bar.
    with tqdm(desc=f"preparing {split}", unit=" rows", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        yield bar
