"""Tokenised rows as they lie in the cache: written once, mapped read-only by every process that trains."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema_data import LimitsConfig
from sft_dist.errors import DataError
from sft_dist.files import read_json

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

LEDGER = "ledger.json"
# Of so few rows no share says anything.
JUDGED_FROM = 20
# Limit -> the number of the ledger that it is held against, and what to do about it.
LIMITS = {
    "max_dropped": (
        "dropped_share",
        "of the rows cannot be used",
        "mend the rows: dropped_reasons in the ledger says what is wrong",
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
        "add what it lacks: model.new_tokens (unknown_texts in the ledger)",
    ),
}
OF_SETS = {
    "max_duplicates": ("duplicates_share", "of the training rows stand there more than once", "take the copies out"),
    "max_eval_overlap": (
        "overlap_share",
        "of the held-out rows also stand in the training rows",
        "take them out of one of the two",
    ),
}


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows (`input_ids`, `labels`: lists of ids) and what was counted on the way."""

    train: Dataset
    eval: Dataset | None
    ledger: dict[str, Any]


def check_limits(limits: LimitsConfig, ledger: dict[str, Any]) -> None:
    """Raises DataError if the training rows' numbers are beyond the limits. Warns of rows in both training and evaluation."""
    train, held_out = ledger["train"], ledger.get("eval") or {}
    duplicates, both = train.get("duplicates", 0) / max(1, train["rows"]), held_out.get("also_in_train", 0)
    shares = {**train, "duplicates_share": duplicates, "overlap_share": both / max(1, held_out.get("rows", 1))}
    beyond = []
    for name, (number, what, hint) in {**LIMITS, **OF_SETS}.items():
        share, limit = shares.get(number), getattr(limits, name)
        if share is None:  # a ledger of held-out rows only, or of an older version
            continue
        over = share < limit if name.startswith("min_") else share > limit
        if over and train["rows_in"] >= JUDGED_FROM:
            beyond.append((f"{100 * share:.1f} % {what}; data.limits.{name} is {limit:g}", hint))
    if beyond:
        raise DataError(
            "\n  ".join(["the data is beyond its limits:", *(text for text, _ in beyond)]), hint=beyond[0][1]
        )
    if both:
        log.warning("%d of the %d held-out rows also stand in the training rows", both, held_out["rows"])


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
