"""Numbers that go wrong: steps whose loss or gradient is not finite, weights that must not be saved, and loss spikes.

Everything is decided by the norm of the gradient over all processes, which is the same number on each of them, so that
they decide the same without asking each other: one process's NaN is in everyone's gradient.
"""

from __future__ import annotations

import collections
import logging
import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_dist.config.schema import TrainConfig
from sft_dist.errors import NumbersError
from sft_dist.rundir import RunDir
from sft_dist.train.ranks import MainFailed, Ranks
from sft_dist.train.step_facts import StepFacts

log = logging.getLogger(__name__)
# A loss is a spike if it is above the median of the last WINDOW by SPIKE robust standard deviations; those are never taken
# for less than a share of the median, since a flat curve's noise is next to nothing.
WINDOW, ENOUGH, SPIKE, LEAST_SPREAD = 50, 10, 6.0, 0.02
MAD_TO_DEVIATION = 1.4826  # of a normal distribution


class Spikes:
    """Tells a loss that jumps from one that wanders."""

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss`, the next one, stands out upwards. It counts among the others from now on."""
        seen = list(self._losses)
        if math.isfinite(loss):
            self._losses.append(loss)
        if len(seen) < ENOUGH or not math.isfinite(loss):
            return False
        middle = statistics.median(seen)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(value - middle) for value in seen)
        return loss > middle + SPIKE * max(deviation, LEAST_SPREAD * abs(middle))


class Row:
    """Counts steps that are not finite, in a row and since the last log."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.in_a_row, self.since_log, self.first = 0, 0, 0

    def count(self, step: int, *, good: bool) -> bool:
        """Take in one step; whether there are now too many in a row. `first` is the step at which the row began."""
        if good:
            self.in_a_row = 0
            return False
        self.first = step if self.in_a_row == 0 else self.first
        self.in_a_row += 1
        self.since_log += 1
        return self.in_a_row >= self.most

    def logged(self) -> int:
        """How many there were since the last call."""
        count, self.since_log = self.since_log, 0
        return count


def is_finite(norm: torch.Tensor | float | None) -> torch.Tensor:
    """Whether a gradient norm is a number, as a bool on its device; DeepSpeed says -1 for one that is not."""
    if norm is None:
        return torch.tensor(True)
    # FSDP2's norm is in parts, one on each process.
    value = torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach()
    return torch.isfinite(value) & (value >= 0)


def all_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether this process's share of the parameters holds finite numbers only; makes no copy of them."""
    norms: list[torch.Tensor] = []
    for parameter in parameters:
        # ZeRO-3 keeps this process's share beside an empty parameter, FSDP2 inside a DTensor.
        share = getattr(parameter, "ds_tensor", parameter).detach()
        share = share.to_local() if hasattr(share, "to_local") else share
        if share.is_floating_point() and share.numel():
            norms.append(torch.linalg.vector_norm(share.flatten(), ord=math.inf, dtype=torch.float32).cpu())
    return not norms or bool(torch.isfinite(torch.stack(norms)).all())


class Numbers(TrainerCallback):  # type: ignore[misc]
    """Counts what is not finite, fails the run after too much of it, and keeps such weights from being saved.

    On a GPU a step's numbers are looked at one step later, when they have arrived: asking at once would stop the device.
    """

    def __init__(self, run: RunDir, train: TrainConfig, facts: StepFacts, ranks: Ranks) -> None:
        self.run, self.facts, self.ranks = run, facts, ranks
        self.skip = train.nonfinite == "skip"
        self.row, self.spikes = Row(train.max_nonfinite_steps), Spikes()
        self.losses = Row(train.max_nonfinite_steps)
        """Logs whose loss is not finite though no gradient of theirs was so: where the engine tells no norm."""
        self.tainted: int | None = None
        """The first step that has changed the weights with a gradient that was not finite, as far as is known."""
        self._skipped = False
        self._pending: collections.deque[tuple[int, bool, torch.Tensor, Any]] = collections.deque()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With `skip` the optimizer finds no gradients: it then leaves weights, states and its own count as they are."""
        self._skipped = self.skip and not bool(is_finite(self.facts.gradient_norm))
        if self._skipped:
            for parameter in kwargs["model"].parameters():
                parameter.grad = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note this step's numbers, and judge those that have arrived."""
        norm, loss = is_finite(self.facts.gradient_norm), self.facts.loss
        by_engine = bool(
            getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        )  # DeepSpeed's, in zero3 and float32
        mine = torch.tensor(True) if loss is None else torch.isfinite(loss)
        both, arrived = torch.stack([norm.to(mine.device), mine]), None
        if both.device.type == "cuda":
            there = torch.empty(2, dtype=torch.bool, pin_memory=True)
            there.copy_(both, non_blocking=True)
            both, arrived = there, torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending.append((state.global_step, self._skipped or by_engine, both, arrived))
        self._judge(leave=0 if arrived is None else 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put on record what was counted; `logs` becomes the row in metrics.jsonl."""
        if logs is None or "loss" not in logs:
            return
        self._judge()
        loss, count = float(logs["loss"]), self.row.logged()
        if count or math.isfinite(loss):
            self.losses.count(state.global_step, good=True)
        else:  # the same number on every process
            count = 1
            self._bad(self.losses, state.global_step, "the loss is not finite")
        if count:
            logs["nonfinite_steps"] = count
        if self.spikes.is_spike(loss):
            logs["loss_spike"] = True
            if self.ranks.is_main:
                log.warning(
                    "step %d: the loss jumped to %.4g; see loss_spike in metrics.jsonl", state.global_step, loss
                )

    def before_save(self, step: int, model: torch.nn.Module) -> None:
        """Raise NumbersError on every process if the weights are not finite; looks only if a step gives reason to."""
        self._judge()
        if self.tainted is None:
            return
        if self.ranks.largest(int(not all_finite(model.parameters()))):
            kept = sorted(self.run.checkpoints.glob("checkpoint-*/MANIFEST.json"), key=lambda it: it.stat().st_mtime)
            last = f"{kept[-1].parent.name} is the last good checkpoint" if kept else "there is no checkpoint before"
            self._fail(
                f"the weights are not finite since step {self.tainted} and were not saved at step {step}; {last}"
            )
        self.tainted = None

    def _judge(self, leave: int = 0) -> None:
        """Look at the noted steps, but for the last `leave` of them; every process at the same point."""
        while len(self._pending) > leave:
            step, skipped, flags, arrived = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            good, mine = flags.tolist()
            if good:
                self.row.count(step, good=True)
                continue
            if not skipped and self.tainted is None:
                self.tainted = step
            bad = [rank for rank, fine in enumerate(self.ranks.everyones(mine)) if not fine]
            where = f", nor is the loss on {_ranks(bad)} of {self.ranks.size}" if bad and self.ranks.size > 1 else ""
            what = f"the gradient is not finite{where}"
            self._bad(self.row, step, f"{what}; skipped" if skipped else what)

    def _bad(self, row: Row, step: int, what: str) -> None:
        too_many = row.count(step, good=False)
        if self.ranks.is_main:
            log.warning("step %d: %s", step, what)
        if too_many:
            span = f"steps {row.first} to {step}" if step > row.first else f"step {step}"
            self._fail(f"{what}, {span}: train.max_nonfinite_steps is {row.most}")

    def _fail(self, message: str) -> None:
        """NumbersError on the main process; the others end with it, without saying the same again."""
        if not self.ranks.is_main:
            raise MainFailed("the main process failed")
        hint = "lower train.learning_rate, look at the rows of that step, or leave such steps out: train.nonfinite=skip"
        raise NumbersError(message, hint=hint)


class SaveGuard(TrainerCallback):  # type: ignore[misc]
    """Stands between a save that is due and the weights; behind all callbacks that may ask for one."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self.numbers.before_save(state.global_step, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self.numbers.before_save(state.global_step, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nor is a model published from weights that are not finite."""
        self.numbers.before_save(state.global_step, kwargs["model"])


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
