"""What a training leaves behind while it goes: metrics.jsonl, status.json, complete checkpoints, trackers."""

from __future__ import annotations

import logging
import signal
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_dist.config.schema import Config
from sft_dist.files import PatientJsonl, read_jsonl, utc_now, write_jsonl
from sft_dist.rundir import RunDir
from sft_dist.train.energy import joules
from sft_dist.train.forecast import write_measurements
from sft_dist.train.progress import Progress
from sft_dist.train.ranks import Ranks
from sft_dist.train.saving import Saves
from sft_dist.train.shutdown import StopRequest
from sft_dist.train.step_facts import EvaluationLeft

log = logging.getLogger(__name__)
# status.json is a file on a shared filesystem: often enough to follow a run, rarely enough not to load it.
STATUS_EVERY_S = 5.0


class RunRecorder(TrainerCallback):  # type: ignore[misc]
    """Writes the run directory, shows progress, and turns a stop request into a save and an end.

    Every process has one: they agree on stopping and complete checkpoints together; only the main one writes.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        stop: StopRequest,
        progress: Progress,
        saves: Saves,
        ranks: Ranks | None = None,
        mfu_per_speed: float | None = None,
    ) -> None:
        self.run, self.config, self.stop, self.progress, self.saves = run, config, stop, progress, saves
        self.ranks = ranks or Ranks()
        self._rows, self._told = PatientJsonl(run.metrics), False
        self.metrics_lost = 0
        """Rows that metrics.jsonl lacks, since they could not be written."""
        self.mfu_per_speed = mfu_per_speed
        """Share of the GPU's peak for each token/s and GPU; None where it is not known."""
        self._step_seconds: list[float] = []
        self.first_step = 0
        self.stopped_by: str | None = None
        """Name of the signal that ended the training early."""
        self.energy: dict[str, float] = {}
        """`energy_kwh` that the GPUs of all processes have used, once the training has ended; {} where they do not count."""
        self._joules: float | None = None
        self._tokens_before = 0
        self._tokens, self._seconds, self._step_began, self._status_time = 0, 0.0, 0.0, 0.0
        self._step_ended: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; metrics that an earlier attempt wrote beyond the resumed checkpoint are taken back."""
        self.first_step = state.global_step
        self._joules = joules(use_cpu=args.use_cpu)
        if not self.ranks.is_main:
            return
        rows = read_jsonl(self.run.metrics)
        kept = [row for row in rows if row["step"] <= state.global_step]
        if len(kept) != len(rows):
            write_jsonl(self.run.metrics, kept)
        self._tokens_before = max((row.get("tokens", 0) for row in kept), default=0)
        self.run.write_status(state="running", step=state.global_step, max_steps=state.max_steps)
        self.progress.begin(state.global_step, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Only the time inside steps counts for tokens_per_s, not evaluation and saving."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Between two steps is where a stop request is honoured: one process's is everyone's, at the same step."""
        now = self._step_ended = time.monotonic()
        self._seconds += now - self._step_began
        self._step_seconds.append(now - self._step_began)
        self.progress.step(state.global_step)
        self.saves.poll()
        asked = self.ranks.largest(self.stop.number)
        if asked and not control.should_training_stop:
            self._agree(asked, state)
            self._leave_evaluation(state, control)
            control.should_save = control.should_log = control.should_training_stop = True
        if self.ranks.is_main and now - self._status_time >= STATUS_EVERY_S:
            self._status_time = now
            self._tell(state="running", step=state.global_step, max_steps=state.max_steps)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation is given up at the same batch on every process, unless the choice of a checkpoint depends on it."""
        if state.global_step >= state.max_steps or args.metric_for_best_model is not None:
            return
        asked = self.ranks.largest(self.stop.number)
        if asked:
            self._agree(asked, state)
            self._leave_evaluation(state)
            raise EvaluationLeft

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A stopping run has saved already; what is due at the end of an epoch would only cost its last minutes."""
        if self.stopped_by:
            self._leave_evaluation(state, control)
            control.should_save = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One row of metrics.jsonl; tokens_per_s counts non-padding tokens over the time inside steps since the last one,
        memory_gib is the peak so far: of the GPU's allocator, or of the process on a CPU; mfu as train/forecast.py says."""
        row = {"time": utc_now(), "step": state.global_step, **(logs or {})}
        if "loss" in row:
            self._count_wait()
        tokens = row.pop("num_tokens", None)
        if "train_runtime" in row:  # transformers' summary, averaged over saving too; tokens since the last row count
            self._tokens = tokens or self._tokens
            return
        if not self.ranks.is_main:
            return
        if "loss" in row and tokens is not None:
            row["tokens_per_s"] = round((tokens - self._tokens) / max(1e-9, self._seconds), 2)
            if self.mfu_per_speed is not None:
                row["mfu"] = round(row["tokens_per_s"] / self.ranks.size * self.mfu_per_speed, 4)
            row["tokens"] = self._tokens_before + int(tokens)
            row["memory_gib"] = round(_peak_memory_gib(), 3)
            self._tokens, self._seconds = tokens, 0.0
        self._rows.append(row)
        self.progress.metrics(row)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A row on how long the training stood still; the checkpoint counts once the rest of it is done."""
        if self.ranks.is_main:
            self._rows.append(
                {"time": utc_now(), "step": state.global_step, "save_stall_s": round(self.saves.stall_s, 3)}
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the last step on record; the last checkpoint counts before it.

        So is a stop, before any of several processes goes: however one of them ends after that, the run has stopped.
        """
        self.saves.close()
        self.progress.end()
        if self.ranks.is_main:
            stopped = self.stopped_by is not None and state.global_step < state.max_steps and self.ranks.size > 1
            end = (
                {"state": "stopped", "reason": self.stop_reason(state.global_step), "exit_status": 0} if stopped else {}
            )
            self._tell(**end, step=state.global_step, max_steps=state.max_steps)
        now = joules(use_cpu=args.use_cpu)
        used = None if now is None or self._joules is None else now - self._joules
        peaks, energies = zip(*self.ranks.everyones((_peak_memory_gib(), used)), strict=True)
        if None not in energies:
            self.energy = {"energy_kwh": round(sum(energies) / 3.6e6, 6)}
        if not self.ranks.is_main:
            return
        if missing := self._rows.flush():
            log.warning("%d rows of metrics.jsonl could not be written", missing)
            self.metrics_lost = missing
        write_measurements(
            self.run,
            peak_memory_gib=max(peaks),
            step_seconds=self._step_seconds,
            tokens=int(self._tokens),
            processes=self.ranks.size,
            mfu_per_speed=self.mfu_per_speed,
        )

    def _count_wait(self) -> None:
        """Who logs the loss has waited for it: a GPU may have been at work on the step until then."""
        if self._step_ended is not None:
            waited, self._step_ended = time.monotonic() - self._step_ended, None
            self._seconds += waited
            self._step_seconds[-1] += waited

    def stop_reason(self, step: int) -> str:
        """Why the training ended before its last step."""
        return f"stopped by {self.stopped_by} at step {step}, saved as checkpoint-{step}"

    def _agree(self, asked: int, state: TrainerState) -> None:
        self.stopped_by, self.stop.agreed = signal.Signals(asked).name, True
        if self.ranks.is_main:
            log.warning("%s at step %d: saving a checkpoint, then stopping", self.stopped_by, state.global_step)

    def _leave_evaluation(self, state: TrainerState, control: TrainerControl | None = None) -> None:
        """For the resume (train/after_resume.py): the time between a cluster's warning and its kill is for the save."""
        if (control is None or control.should_evaluate) and self.ranks.is_main:
            log.warning("the evaluation due at step %d comes after the resume", state.global_step)
        if control is not None:
            control.should_evaluate = False

    def _tell(self, **fields: Any) -> None:
        """status.json is for readers: if it cannot be written, the training goes on.

        Nor does a step wait until it is on a disk, which may just be taking in a checkpoint.
        """
        try:
            self.run.write_status(durable=False, **fields)
        except OSError as error:
            if not self._told:
                log.warning("status.json could not be written: %s", error.strerror)
            self._told = True


def _peak_memory_gib() -> float:
    import resource

    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux
