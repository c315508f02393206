"""How many rows a run sees and how long they are, as far as that can be known without reading them all."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.config.schema import Config, SourcePart
from sft_dist.files import read_json
from sft_dist.rundir import RunDir, runs_root

LINE_SUFFIXES = (".jsonl", ".ndjson")
# Larger files are counted this far, and the rest by their size: under a second, and close where rows are alike.
COUNTED_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Rows:
    """The rows of a run."""

    count: int | None
    """Rows in one epoch; None if only reading the source would tell."""
    longest: int
    """Tokens of the longest row: what memory has to hold."""
    mean: float
    """Tokens of a row on average: what takes time."""
    origin: str
    """Where the numbers are from, in words."""
    trained: float = 1.0
    """Share of the tokens that are trained: the head sees no others."""
    spread: float = 0.0
    """Standard deviation of the rows' tokens; 0 where it is not known, or all rows are equally long."""

    @property
    def weighted_mean(self) -> float:
        """Mean length weighted by tokens: what attention takes."""
        return self.mean + self.spread**2 / self.mean

    def fullest(self, rows: int, batches: int) -> float:
        """Tokens to be expected in the fullest of so many micro batches of `rows` rows, if rows come in any order."""
        # The largest of n normal numbers (Blom, 1958).
        largest = statistics.NormalDist().inv_cdf((batches - 0.375) / (batches + 0.25))
        return min(rows * self.mean + self.spread * math.sqrt(rows) * largest, float(rows * self.longest))


def rows_of(config: Config) -> Rows:
    """The rows of `config`: from the ledger of a run of this name, else counted in its file or taken from its task.

    Without a ledger every row is taken to be data.max_length long, which is right for memory and the most for time.
    """
    longest = config.data.max_length
    found = _ledger(config)
    if found is not None:
        return found
    count, origin = _count(config)
    if count is not None and config.data.eval is None and config.data.eval_size:
        size = config.data.eval_size
        count -= round(size * count) if size < 1 else int(size)
    return Rows(None if count is None else max(1, count), longest, float(longest), f"{origin}, each of data.max_length")


def steps_of(config: Config, rows: int | None) -> int | None:
    """Optimizer steps of the run; None if the rows are not known and train.max_steps is not set."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    if rows is None:
        return None
    a_pass = -(-rows // config.train.global_batch_size)
    return max(1, math.ceil(a_pass * config.train.num_train_epochs))


def _ledger(config: Config) -> Rows | None:
    if config.run.name is None:
        return None
    path = RunDir(runs_root(config.run.dir) / config.run.name).ledger
    try:
        counts: dict[str, Any] = (read_json(path) or {}).get("train", {})
        rows, tokens, longest = int(counts["rows"]), int(counts["tokens"]), int(counts["longest_row"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not rows or not tokens or not longest or longest > config.data.max_length:  # of a run with other settings
        return None
    trained = int(counts.get("trained_tokens") or tokens) / tokens
    spread = float(counts.get("spread") or 0.0)
    return Rows(rows, longest, tokens / rows, f"{rows} rows by the ledger of run {config.run.name}", trained, spread)


def _count(config: Config) -> tuple[int | None, str]:
    counted = [_count_part(part) for part in config.data.train.parts]
    rows = [count for count, _ in counted]
    total = None if None in rows else sum(count or 0 for count in rows)
    return total, " and ".join(text for _, text in counted)


def _count_part(source: SourcePart) -> tuple[int | None, str]:
    if source.task is not None:
        rows = int(min(source.rows, source.sample or source.rows) * source.weight)
        return rows, f"{rows} rows of the task {source.task}"
    path = Path(source.path or "").expanduser()
    counted = _lines(path) if path.suffix in LINE_SUFFIXES and path.is_file() else None
    if counted is None:
        asked = None if source.sample is None else int(source.sample * source.weight)
        return asked, f"{asked or 'an unknown number of'} rows of {source.path}"
    rows = int(min(counted, source.sample or counted) * source.weight)
    return rows, f"{rows} rows of {path.name}"


def _lines(path: Path) -> int | None:
    try:
        size = path.stat().st_size
        seen = lines = 0
        last = b"\n"
        with path.open("rb") as stream:
            while seen < COUNTED_BYTES and (piece := stream.read(2**20)):
                seen, lines, last = seen + len(piece), lines + piece.count(b"\n"), piece[-1:]
    except OSError:
        return None
    if seen < size:
        return round(lines * size / seen)
    return lines + (last != b"\n")
