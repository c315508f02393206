"""What a training that goes on does between its load and its first step: mend what was cut anew, evaluate what a stop left out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.train import universal
from sft_dist.train.ranks import Ranks
from sft_dist.train.step_facts import EvaluationLeft

log = logging.getLogger(__name__)


class CutAnew(TrainerCallback):  # type: ignore[misc]
    """Once a universal copy of a checkpoint is loaded: mends the optimizer and removes the copy. Every process has one."""

    def __init__(self, checkpoint: Path, ranks: Ranks) -> None:
        self.checkpoint, self.ranks = checkpoint, ranks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first event after the load."""
        zero = kwargs["optimizer"].optimizer  # accelerate's wrapper of DeepSpeed's wrapper of AdamW
        universal.mend(zero.optimizer, self.checkpoint)
        self.ranks.barrier()
        if self.ranks.is_main:
            universal.discard(self.checkpoint)


class LateEvaluation(TrainerCallback):  # type: ignore[misc]
    """Evaluates at the step that a resume starts from, if that was due there and a stop left it out.

    At the beginning of the next step, where random numbers stand as they did at the save: an evaluation draws one, too.
    """

    def __init__(self, run: RunDir, ranks: Ranks) -> None:
        self.run, self.ranks = run, ranks
        self.trainer: Any = None
        """Set once there is one."""
        self._first = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        first, self._first = self._first, False
        if not first or not state.global_step or self.trainer is None:
            return
        if not self.ranks.by_main(lambda: is_due(args, state, read_jsonl(self.run.metrics))):
            return
        if self.ranks.is_main:
            log.info("evaluating at step %d: the stop had left it out", state.global_step)
        try:
            self.trainer.evaluate()
        except EvaluationLeft:  # stopped again: the step that has begun comes first
            if self.ranks.is_main:
                log.warning("there will be no evaluation of step %d", state.global_step)


def is_due(args: TrainingArguments, state: TrainerState, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether an evaluation belongs to the last step that is done, and none of these rows is of one."""
    strategy, step, epoch = (
        str(getattr(args.eval_strategy, "value", args.eval_strategy)),
        state.global_step,
        state.epoch,
    )
    due = {
        "steps": step % max(1, int(state.eval_steps or 1)) == 0 and step >= args.eval_delay,
        "epoch": epoch is not None and float(epoch).is_integer() and epoch >= args.eval_delay,
    }
    return due.get(strategy, False) and not any(row.get("step") == step and "eval_loss" in row for row in rows)
