"""Which process is slower than the others: told by the time that each spends on its own, gathered when metrics are logged.

The time of a whole step is the same everywhere, since all wait for the slowest; what differs is the forward pass and the
loading of its batch. Where the forward pass itself waits for others (zero3, fsdp2) they even out and tell little.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_dist.train.ranks import Ranks
from sft_dist.train.step_facts import StepFacts

log = logging.getLogger(__name__)
# A process this much slower than the median in so many logs in a row is worth a word.
SLOW, LOGS = 1.5, 3


def slowest(seconds: Sequence[float | None]) -> tuple[int, float] | None:
    """The slowest rank and how many times the (lower) median it takes; None if not all have a time."""
    known = [value for value in seconds if value is not None]
    if len(known) < max(2, len(seconds)):
        return None
    middle = statistics.median_low(known)
    if middle <= 0:
        return None
    rank = max(range(len(known)), key=known.__getitem__)
    return rank, known[rank] / middle


class Slow:
    """Decides when the same process has been slow for long enough to say so."""

    def __init__(self) -> None:
        self.rank, self.logs = -1, 0

    def see(self, rank: int, ratio: float) -> bool:
        """Take in one log; True once in a row of slow ones."""
        if ratio <= SLOW:
            self.rank, self.logs = -1, 0
            return False
        self.logs = self.logs + 1 if rank == self.rank else 1
        self.rank = rank
        return self.logs == LOGS


class Stragglers(TrainerCallback):  # type: ignore[misc]
    """Adds `slowest_rank` and `slowest_over_median` to the rows of metrics.jsonl where there are several processes."""

    def __init__(self, facts: StepFacts, ranks: Ranks) -> None:
        self.facts, self.ranks, self.slow = facts, ranks, Slow()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """`logs` becomes the row; every process is here at the same step."""
        if logs is None or "loss" not in logs or self.ranks.size == 1:
            return
        found = slowest(self.ranks.everyones(self.facts.own.take()))
        if found is None:
            return
        rank, ratio = found
        logs["slowest_rank"], logs["slowest_over_median"] = rank, round(ratio, 3)
        if self.slow.see(rank, ratio) and self.ranks.is_main:
            log.warning("rank %d takes %.1f times as long as the median for its share of a step", rank, ratio)
