"""Rows -> a tokenised dataset on disk, made once and mapped read-only by every process that trains.

The folder's name is the rows' key (identity.py). It is published by one rename, so it is either whole or not there. On the
way to it each process tokenises chunks of rows into shards in a folder beside it, which a later or a second preparation
takes up; no file is locked.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import Config, SourceConfig
from sft_dist.data.assemble import link_shards, pack, write_rows
from sft_dist.data.held_out import choose, every_document
from sft_dist.data.identity import data_key
from sft_dist.data.json_rows import Row
from sft_dist.data.ledger import hashes, held_out_ledger, overlap, split_ledger
from sft_dist.data.notes import write_notes
from sft_dist.data.nothing import NothingTrained
from sft_dist.data.prepared import LEDGER, Prepared, check_limits, open_prepared, prepared_folder
from sft_dist.data.shards import Chunk, Shard, ShardMaker, read_shard, shard_path
from sft_dist.data.sources import bad_rows, opened
from sft_dist.data.template import ChatTemplate
from sft_dist.data.workers import made
from sft_dist.errors import DataError
from sft_dist.files import publish_dir, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Rows in a chunk: small ones first, so that all processes have work with few rows, then large ones for fewer files.
FEW, MANY, SMALL_CHUNKS = 1000, 8000, 16
# Characters, about, after which a chunk has no more rows: each process holds one chunk and what becomes of it.
MOST_CHARACTERS = 8_000_000
# How often a preparation is begun from which others take away what it works in.
TRIES = 3


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, cache: Path) -> Prepared:
    """Tokenise the config's rows below `cache`, or map what is there from an earlier time. Warns of rows in both splits.

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
    held_out = found.ledger.get("eval") or {}
    if both := held_out.get("also_in_train"):
        log.warning("%d of the %d held-out rows also stand in the training rows", both, held_out["rows"])
    return found


def _build(config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, target: Path) -> None:
    # Shards of another version, which cut the rows into other chunks, are none of these.
    parts = target.with_name(f".{target.name}.{FEW}-{MANY}-{SMALL_CHUNKS}-{MOST_CHARACTERS}.parts")
    for left in reversed(range(TRIES)):
        try:
            _make(config, tokenizer, template, target, parts)
            break
        except DataError:
            shutil.rmtree(parts, ignore_errors=True)
            raise
        except OSError as error:
            # Another preparation was faster, and has taken away what both worked in: it is done,
            if (target / LEDGER).is_file():
                break
            # or it has found rows that cannot be used, which are to be found here as well.
            if not left or not isinstance(error, FileNotFoundError):
                raise
    for leftover in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _make(
    config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, target: Path, parts: Path
) -> None:
    shards = {
        split: _shards(config, source, tokenizer, template, parts / split)
        for split, source in (("train", config.data.train), ("eval", config.data.eval))
        if source is not None
    }
    with publish_dir(target) as staged:
        ledger: dict[str, Any] = {"template": template.origin, **_assemble(config, shards, staged)}
        write_json(staged / LEDGER, ledger)


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
        for rows in made(maker.make, itertools.chain(first, chunks), processes):
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
        while chosen := _up_to(FEW if number < SMALL_CHUNKS else MANY, rows):
            yield Chunk(number, index, how, chosen)
            number += 1


def _up_to(count: int, rows: Iterator[Row]) -> list[Row]:
    """The next rows: so many, or fewer if they are long."""
    found: list[Row] = []
    characters = 0
    for row in itertools.islice(rows, count):
        found.append(row)
        characters += _characters(row.record)
        if characters > MOST_CHARACTERS:
            break
    return found


def _characters(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 8
    return 8 + sum(map(_characters, value))


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
        raise NothingTrained(
            "data.eval" if source is config.data.eval else "data.train", config.data.max_length, counts
        )


def _assemble(config: Config, shards: dict[str, list[Shard]], staged: Path) -> dict[str, Any]:
    """Write the splits' rows below `staged`; returns the ledger of each."""
    train = shards["train"]
    chosen = choose(config, config.data.train, train)
    rest, held_out = chosen.train, chosen.held_out
    rows = pack(train, rest, config.data.max_length) if config.data.packing else None
    if held_out is None and rows is None:
        link_shards(train, staged / "train")
    else:
        listed = rows if rows is not None else [rest[at : at + 1] for at in range(len(rest))]
        write_rows(train, listed, staged / "train", packed=rows is not None)
    write_notes(staged, train, rest, rows, held_out)
    ledger = {"train": split_ledger(config, config.data.train, train, chosen, rows)}
    if held_out is not None:
        write_rows(train, [held_out[at : at + 1] for at in range(len(held_out))], staged / "eval", packed=False)
        ledger["eval"] = held_out_ledger(train, chosen)
        ledger["eval"]["also_in_train"] = overlap(hashes(train, rest), hashes(train, held_out))
    elif config.data.eval is not None:
        link_shards(shards["eval"], staged / "eval")
        every = every_document(config.data.eval, shards["eval"])
        ledger["eval"] = split_ledger(config, config.data.eval, shards["eval"], every, None)
        ledger["eval"]["also_in_train"] = overlap(hashes(train, rest), hashes(shards["eval"], every.train))
    return ledger


@contextlib.contextmanager
def _progress(split: str) -> Iterator[Any]:
    from tqdm import tqdm

    # A dumb terminal or a log file gets no bar.
    with tqdm(desc=f"preparing {split}", unit=" rows", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        yield bar
