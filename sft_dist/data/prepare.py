"""Rows -> a tokenised dataset on disk, made once and mapped read-only by every process that trains.

The folder's name is a hash of all that went into it: rows, tokenizer, template, settings. It is published by one
rename, so it is either whole or not there.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import Config
from sft_dist.data.example import Example
from sft_dist.data.identity import data_key
from sft_dist.data.prepared import LEDGER, Prepared, open_prepared, prepared_folder
from sft_dist.data.sources import load_examples
from sft_dist.data.template import ChatTemplate
from sft_dist.data.tokenize import tokenize
from sft_dist.errors import DataError
from sft_dist.files import publish_dir, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_splits(config: Config) -> tuple[list[Example], list[Example], dict[str, list[str]]]:
    """Training and evaluation examples, and the dropped rows' messages by split. Raises DataError."""
    data = config.data
    train, dropped = load_examples(data.train, system=data.system, on_bad_row=data.on_bad_row)
    if data.eval is not None:
        held_out, dropped_eval = load_examples(data.eval, system=data.system, on_bad_row=data.on_bad_row)
        return train, held_out, {"train": dropped, "eval": dropped_eval}
    if not data.eval_size:
        return train, [], {"train": dropped}
    count = round(data.eval_size * len(train)) if data.eval_size < 1 else int(data.eval_size)
    if not 0 < count < len(train):
        raise DataError(
            f"data.eval_size {data.eval_size:g} would hold out {count} of {len(train)} rows",
            hint="hold out at least one row and leave at least one for training",
        )
    chosen = set(random.Random(config.run.seed).sample(range(len(train)), count))
    return (
        [row for index, row in enumerate(train) if index not in chosen],
        [train[index] for index in sorted(chosen)],
        {"train": dropped, "eval": []},
    )


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, cache: Path) -> Prepared:
    """Tokenise the config's rows below `cache`, or map what is there from an earlier time."""
    target = prepared_folder(cache, data_key(config, tokenizer, template, cache))
    found = open_prepared(target)
    if found is None:
        _build(config, tokenizer, template, target)
        found = open_prepared(target)
    if found is None:
        raise DataError(f"{target} was prepared, and is not there", hint="is somebody emptying the cache?")
    return found


def _build(config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, target: Path) -> None:
    train, held_out, dropped = load_splits(config)
    splits = {"train": train, **({"eval": held_out} if held_out else {})}
    with publish_dir(target) as staged:
        ledger: dict[str, Any] = {"template": template.origin}
        for name, examples in splits.items():
            dataset, counts = _tokenize_split(config, tokenizer, template, examples)
            dataset.save_to_disk(str(staged / name))
            bad = len(dropped[name])
            ledger[name] = {"rows_in": len(examples) + bad, "dropped_bad_rows": bad, **counts}
        write_json(staged / LEDGER, ledger)


def _tokenize_split(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    examples: Sequence[Example],
) -> tuple[Dataset, dict[str, Any]]:
    from datasets import Dataset, Features, List, Value, disable_progress_bars

    data = config.data
    disable_progress_bars()
    counts: dict[str, Any] = {
        "rows": 0,
        "dropped_refused_by_template": 0,
        "dropped_answer_empty": 0,
        "dropped_answer_cut_off": 0,
        "truncated_rows": 0,
        "truncated_tokens": 0,
        "longest_row": 0,
        "spread": 0.0,
        "tokens": 0,
        "trained_tokens": 0,
    }

    def rows() -> Iterator[dict[str, list[int]]]:
        tokenized = tokenize(examples, tokenizer, template, max_length=data.max_length, loss_on=data.trained)
        for example, row in zip(examples, tokenized, strict=True):
            problem = row.problem or "the answer tokenises to nothing, so there is nothing to train on"
            if row.answer == 0 and data.on_bad_row == "error":
                raise DataError(
                    f"{example.where}: {problem}", hint="mend the row, or leave such rows out with data.on_bad_row=drop"
                )
            counts["truncated_rows"] += row.cut > 0
            counts["truncated_tokens"] += row.cut
            if row.answer == 0 or row.trained == 0:
                reason = "refused_by_template" if row.problem else "answer_cut_off" if row.answer else "answer_empty"
                counts[f"dropped_{reason}"] += 1
                continue
            counts["rows"] += 1
            counts["tokens"] += len(row.input_ids)
            counts["longest_row"] = max(counts["longest_row"], len(row.input_ids))
            counts["trained_tokens"] += row.trained
            yield {"input_ids": row.input_ids, "labels": row.labels}

    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    usable = list(rows())
    if not usable:
        raise DataError(
            f"none of the {len(examples)} rows has an answer within data.max_length {data.max_length} tokens",
            hint="raise data.max_length; `sft-dist data preview` shows how long the rows are",
        )
    lengths = [len(row["input_ids"]) for row in usable]
    counts["spread"] = round(statistics.pstdev(lengths), 2)
    return Dataset.from_list(usable, features=features), counts
