"""What a training leaves behind while it goes: metrics.jsonl, status.json, complete checkpoints, trackers."""

from __future__ import annotations

import logging
import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_dist.config.schema import Config
from sft_dist.files import append_jsonl, read_jsonl, utc_now, write_jsonl, write_text
from sft_dist.rundir import RunDir
from sft_dist.train import universal
from sft_dist.train.forecast import write_measurements
from sft_dist.train.progress import Progress
from sft_dist.train.ranks import Ranks
from sft_dist.train.saving import Saves
from sft_dist.train.shutdown import StopRequest

log = logging.getLogger(__name__)
# status.json is a file on a shared filesystem: often enough to follow a run, rarely enough not to load it.
STATUS_EVERY_S = 5.0


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
        self.mfu_per_speed = mfu_per_speed
        """Share of the GPU's peak for each token/s and GPU; None where it is not known."""
        self._step_seconds: list[float] = []
        self.first_step = 0
        self.stopped_by: str | None = None
        """Name of the signal that ended the training early."""
        self._tokens_before = 0
        self._tokens, self._seconds, self._step_began, self._status_time = 0, 0.0, 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; metrics that an earlier attempt wrote beyond the resumed checkpoint are taken back."""
        self.first_step = state.global_step
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
        now = time.monotonic()
        self._seconds += now - self._step_began
        self._step_seconds.append(now - self._step_began)
        self.progress.step(state.global_step)
        self.saves.poll()
        asked = self.ranks.largest(self.stop.number)
        if asked and not control.should_training_stop:
            self.stopped_by = signal.Signals(asked).name
            if self.ranks.is_main:
                log.warning("%s at step %d: saving a checkpoint, then stopping", self.stopped_by, state.global_step)
            control.should_save = control.should_log = control.should_training_stop = True
        if self.ranks.is_main and now - self._status_time >= STATUS_EVERY_S:
            self._status_time = now
            self.run.write_status(state="running", step=state.global_step, max_steps=state.max_steps)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A stopping run has saved already; what is due at the end of an epoch would only cost its last minutes."""
        if self.stopped_by:
            control.should_evaluate = control.should_save = False

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
        append_jsonl(self.run.metrics, row)
        self.progress.metrics(row)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A row on how long the training stood still; the checkpoint counts once the rest of it is done."""
        if self.ranks.is_main:
            row = {"time": utc_now(), "step": state.global_step, "save_stall_s": round(self.saves.stall_s, 3)}
            append_jsonl(self.run.metrics, row)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the last step on record; the last checkpoint counts before it."""
        self.saves.close()
        self.progress.end()
        peak = max(self.ranks.everyones(_peak_memory_gib()))
        if not self.ranks.is_main:
            return
        self.run.write_status(step=state.global_step, max_steps=state.max_steps)
        write_measurements(
            self.run,
            peak_memory_gib=peak,
            step_seconds=self._step_seconds,
            tokens=int(self._tokens),
            processes=self.ranks.size,
            mfu_per_speed=self.mfu_per_speed,
        )


def _peak_memory_gib() -> float:
    import resource

    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


class Guarded(TrainerCallback):  # type: ignore[misc]
    """A tracker's callback whose failures are reported once and never reach the training."""

    def __init__(self, name: str, callback: TrainerCallback) -> None:
        self.name, self.callback, self.failed = name, callback, False

    def __getattribute__(self, attribute: str) -> Any:
        if not attribute.startswith("on_"):
            return super().__getattribute__(attribute)
        handler: Callable[..., Any] | None = getattr(self.callback, attribute, None)

        def call(*args: Any, **kwargs: Any) -> None:
            if self.failed or handler is None:
                return
            try:
                handler(*args, **kwargs)
            except Exception as error:
                self.failed = True
                log.warning("%s failed and is off for the rest of this run; training goes on: %s", self.name, error)

        return call


def wandb_run_id(run: RunDir) -> str:
    """wandb's name of the run; kept in its folder, so that each further attempt goes on with the same curve."""
    path = run.logs / "wandb_run_id"
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


def trackers(config: Config, run: RunDir) -> list[TrainerCallback]:
    """transformers' own integrations for `tracking.report_to`, guarded; one that is not installed is named and left out.

    What they write lands in the run's folder, and each attempt at a run goes on with the same run of wandb.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    defaults = {
        "WANDB_PROJECT": config.tracking.project,
        "WANDB_NAME": run.name,
        "TENSORBOARD_LOGGING_DIR": str(run.logs / "tensorboard"),
        **({"WANDB_MODE": config.tracking.wandb_mode} if config.tracking.wandb_mode else {}),
    }
    if "wandb" in config.tracking.report_to:
        defaults |= {"WANDB_RUN_ID": wandb_run_id(run), "WANDB_RESUME": "allow"}
        os.environ["WANDB_DIR"] = str(run.logs)  # whatever the user's shell says: `sync` looks for it here
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    run.logs.mkdir(parents=True, exist_ok=True)
    guarded: list[TrainerCallback] = []
    for name in config.tracking.report_to:
        try:
            guarded += [Guarded(name, callback()) for callback in get_reporting_integration_callbacks([name])]
        except Exception as error:
            log.warning("tracking.report_to: %s is left out: %s", name, error)
    return guarded
