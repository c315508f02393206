"""The callbacks that watch over a training, in the order in which they must stand around the others."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.jobs.walltime import process_age_s, write_pace
from sft_dist.parallel.resolve import Resolved
from sft_dist.rundir import RunDir
from sft_dist.train.heartbeat import phase, pulse
from sft_dist.train.numbers import Numbers, SaveGuard
from sft_dist.train.ranks import Ranks
from sft_dist.train.step_facts import StepFacts, WatchedTrainer
from sft_dist.train.stragglers import Stragglers

SomeTrainer = TypeVar("SomeTrainer", bound=WatchedTrainer)


class Health:
    """What watches over one training."""

    def __init__(self, run: RunDir, config: Config, resolved: Resolved, ranks: Ranks) -> None:
        by_engine = resolved.layout.plan.engine == "deepspeed"
        if config.train.nonfinite == "skip" and resolved.plan in ("zero1", "zero2") and resolved.dtype == "bfloat16":
            raise ConfigError(
                f"train.nonfinite is skip, but with parallel.plan {resolved.plan} in bfloat16 DeepSpeed's optimizer takes every step",
                hint="set train.nonfinite=stop, or choose zero3, fsdp2 or ddp",
            )
        self.facts = StepFacts()
        self.numbers = Numbers(run, config.train, self.facts, ranks)
        # DeepSpeed's optimizer has stepped before a callback hears of the gradient, or has left the step out by itself.
        self.numbers.skip = self.numbers.skip and not by_engine
        self._first = [self.numbers, Stragglers(self.facts, ranks)]
        self._heartbeat = Heartbeat(run, ranks)
        self._last = [SaveGuard(self.numbers), self._heartbeat]

    def save_took(self, seconds: float) -> None:
        """A save, from its first byte to where it counts, took so long: what a stop must be able to wait for."""
        self._heartbeat.save_took(seconds)

    def around(self, callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
        """Those that add to a row of metrics before the one that writes it; those that see what is due after all others."""
        return [*self._first, *callbacks, *self._last]

    def attend(self, trainer: SomeTrainer) -> SomeTrainer:
        """`trainer`, which from now on notes its steps for these callbacks."""
        trainer.step_facts = self.facts
        return trainer


class Heartbeat(TrainerCallback):  # type: ignore[misc]
    """Beats where the training goes from one thing to the next, and measures how long steps and saves take."""

    def __init__(self, run: RunDir, ranks: Ranks) -> None:
        self.run, self.ranks = run, ranks
        self._began = self._saving = 0.0
        self._steps: list[float] = []
        self._start_s: float | None = None
        self._save_s = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phase("data", state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phase("step")
        self._began = time.monotonic()
        if self._start_s is None:
            self._start_s = process_age_s()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phase("step")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phase("optimizer")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What comes next is known here: this callback is the last one."""
        now = time.monotonic()
        self._note(now - self._began)
        self._saving = now
        due = "evaluate" if control.should_evaluate else "save" if control.should_save else "data"
        phase(due, state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phase("evaluate")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saving = time.monotonic()
        phase("save" if control.should_save else "data")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saving = time.monotonic()
        phase("evaluate" if control.should_evaluate else "save" if control.should_save else "data")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Alive, and in the same phase."""
        beating = pulse()
        if beating is not None:
            beating.beat()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The files are written; what is left of the save goes on beside the training."""
        phase("data")
        self.save_took(time.monotonic() - self._saving)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phase("publish")
        self._write()

    def save_took(self, seconds: float) -> None:
        """Put on record how long a save took, in part or whole; the longest counts."""
        self._save_s = max(self._save_s, seconds)
        beating = pulse()
        if beating is not None:
            beating.save_took(seconds)
        self._write()

    def _note(self, seconds: float) -> None:
        beating = pulse()
        if beating is not None:
            beating.step_took(seconds)
        self._steps.append(seconds)

    def _write(self) -> None:
        """What the next allocation will need to know."""
        if self.ranks.is_main:
            write_pace(self.run, self._steps, self._save_s or None, self._start_s)
