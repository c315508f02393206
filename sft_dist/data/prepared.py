"""Tokenised rows as they lie in the cache: written once, mapped read-only by every process that trains."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema_data import LimitsConfig
from sft_dist.errors import DataError
from sft_dist.files import read_json

if TYPE_CHECKING:
    from datasets import Dataset

LEDGER = "ledger.json"
# Of so few rows no share says anything.
JUDGED_FROM = 20
# Texts or reasons that a message names.
SHOWN = 5
# Limit -> the number of the ledger that it is held against, and what to do about it.
LIMITS = {
    "max_dropped": (
        "dropped_share",
        "of the rows cannot be used",
        "mend the rows; all numbers: sft-dist data prepare CONFIG",
    ),
    "max_answers_cut": (
        "answers_cut_or_lost_share",
        "of the rows lose their answer or its end to data.max_length",
        "raise data.max_length",
    ),
    "min_end_of_turn_trained": (
        "end_of_turn_trained_share",
        "of the answers train the token that ends them",
        "raise data.max_length, or set another model.chat_template",
    ),
    "max_unknown": (
        "unknown_share",
        "of the tokens are unknown to the vocabulary",
        "add what it lacks to model.new_tokens; all of unknown_texts: sft-dist data prepare CONFIG",
    ),
}
OF_TRAIN = {
    "max_duplicates": ("duplicates_share", "of the training rows stand there more than once", "take the copies out"),
}
OF_BOTH = {
    "max_eval_overlap": (
        "overlap_share",
        "of the held-out rows also stand in the training rows",
        "take them out of one of the two; if they are wanted in both, set data.limits.max_eval_overlap=1",
    ),
}


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows (`input_ids`, `labels`: lists of ids) and what was counted on the way."""

    train: Dataset
    eval: Dataset | None
    ledger: dict[str, Any]


class BeyondLimits(DataError):
    """Rows that were prepared, with the ledger whose numbers data.limits does not allow."""

    def __init__(self, message: str, *, hint: str | None = None, ledger: dict[str, Any] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.ledger = ledger or {}


def check_limits(limits: LimitsConfig, ledger: dict[str, Any]) -> None:
    """Raises BeyondLimits if the numbers of the training rows, or of rows of data.eval, are beyond the limits.

    Rows that are held out of the training rows have been counted with these.
    """
    train, held_out = ledger["train"], ledger.get("eval") or {}
    # Ledgers of older versions have no such share.
    share = train.get("duplicates_share", train.get("duplicates", 0) / max(1, train.get("documents", train["rows"])))
    both = {"rows_in": held_out.get("rows", 0), "overlap_share": _overlap(held_out)}
    beyond = [
        *_beyond(limits, {**train, "duplicates_share": share}, {**LIMITS, **OF_TRAIN}),
        *_beyond(limits, held_out, LIMITS, "data.eval: "),
        *_beyond(limits, both, OF_BOTH),
    ]
    if beyond:
        lines = ["the data is beyond its limits:", *(text for text, _ in beyond)]
        raise BeyondLimits("\n  ".join(lines), hint=beyond[0][1], ledger=ledger)


def _beyond(
    limits: LimitsConfig, numbers: dict[str, Any], known: dict[str, tuple[str, str, str]], of: str = ""
) -> Iterator[tuple[str, str]]:
    """What is beyond which limit, and what to do about it."""
    for name, (number, what, hint) in known.items():
        share, limit = numbers.get(number), getattr(limits, name)
        if share is None or numbers["rows_in"] < JUDGED_FROM:  # held-out rows, or a ledger of an older version
            continue
        if share < limit if name.startswith("min_") else share > limit:
            told = [f"{key} {count}" for key, count in _details(name, numbers).most_common(SHOWN) if count]
            more = f" ({', '.join(told)})" if told else ""
            yield f"{of}{100 * share:.1f} % {what}; data.limits.{name} is {limit:g}{more}", hint


def _details(limit: str, numbers: dict[str, Any]) -> collections.Counter[str]:
    """What stands behind a number, and how often."""
    if limit == "max_unknown":
        # As Python spells them: what cannot be seen, or moves the cursor, is escaped.
        return collections.Counter({repr(text): count for text, count in numbers.get("unknown_texts", {}).items()})
    if limit != "max_dropped":
        return collections.Counter()
    refused = {
        "refused_by_template": numbers.get("dropped_refused_by_template", 0),
        "answer_without_tokens": numbers.get("dropped_answer_empty", 0),
    }
    return collections.Counter({**numbers.get("dropped_reasons", {}), **refused})


def _overlap(held_out: dict[str, Any]) -> float | None:
    return held_out["also_in_train"] / max(1, held_out["rows"]) if "also_in_train" in held_out else None


def prepared_folder(cache: Path, key: str) -> Path:
    """Where the rows with that key are, or will be, below `cache`."""
    return cache / "data" / key


def open_prepared(folder: Path) -> Prepared | None:
    """The rows in `folder`, mapped; None if they are not there. What is there is whole: it came by one rename."""
    if not (folder / LEDGER).is_file():
        return None
    from datasets import load_from_disk

    ledger = read_json(folder / LEDGER)
    held_out = load_from_disk(str(folder / "eval")) if (folder / "eval").is_dir() else None
    return Prepared(load_from_disk(str(folder / "train")), held_out, {"key": folder.name, **ledger})
