"""Whether the model is asked while it trains. Imports nothing heavy unless it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from sft_dist.parallel.resolve import Resolved
    from sft_dist.train.attempt import Attempt
    from sft_dist.train.ranks import Ranks


def asking(run: RunDir, resolved: Resolved, current: Attempt, ranks: Ranks) -> list[TrainerCallback]:
    """The callbacks that ask, for train.worker.train: those of `evaluate.during`."""
    if resolved.config.evaluate.during is None:
        return []
    from sft_dist.evaluate.during import AskDuring

    return [AskDuring(run, resolved.config, current.stop, ranks)]
