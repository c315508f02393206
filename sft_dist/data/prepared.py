"""Tokenised rows as they lie in the cache: written once, mapped read-only by every process that trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.files import read_json

if TYPE_CHECKING:
    from datasets import Dataset

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows (`input_ids`, `labels`: lists of ids) and what was counted on the way."""

    train: Dataset
    eval: Dataset | None
    ledger: dict[str, Any]


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
