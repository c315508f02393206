"""What a trainer notes of each step for the callbacks that watch over it: its loss, the gradient's norm, its own time.

Nothing here makes a device wait. A callback cannot know any of it: transformers hands it neither the gradient's norm nor
the loss of a step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from trl import SFTTrainer

# Forward passes whose time is taken between two logs on a GPU; an average does not need more.
TIMED = 64


class Stopwatch:
    """Time that this process spends on its own, without what it waits for others in collectives."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes = 0
        self._events: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """Count the time inside this block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    @contextlib.contextmanager
    def forward(self, device: torch.device) -> Iterator[None]:
        """Count a forward pass: on a GPU the device's time, which events on its stream take without waiting."""
        if device.type != "cuda":
            self.passes += 1
            with self.host():
                yield
            return
        if len(self._events) >= TIMED:
            yield
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        try:
            yield
        finally:
            last.record()
            self.passes += 1
            self._events.append((first, last))

    def take(self) -> float | None:
        """Mean seconds of a forward pass and the loading of its batch since the last call; None if there was none."""
        if self._events:
            self._events[-1][1].synchronize()
            self.seconds += sum(first.elapsed_time(last) for first, last in self._events) / 1000
        mean = self.seconds / self.passes if self.passes else None
        self.seconds, self.passes, self._events = 0.0, 0, []
        return mean


class StepFacts:
    """Of the step that is under way, or was the last one."""

    def __init__(self) -> None:
        self.gradient_norm: torch.Tensor | float | None = None
        """Over all processes, before clipping; the same value on each."""
        self.loss: torch.Tensor | None = None
        """The sum of this process's micro batches."""
        self.own = Stopwatch()


class EvaluationLeft(Exception):
    """Raised out of an evaluation, at the same batch on every process: the run is to save and stop instead."""


class WatchedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that notes `step_facts`."""

    step_facts: StepFacts
    _counts: dict[str, torch.Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step_facts = StepFacts()
        super().__init__(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, if no step is left: transformers 5.23 looks after a step only, and a resume would train one too many."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As transformers'; a new step begins, and its loading counts as this process's own time."""
        self.step_facts.loss = None
        return super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.step_facts.own.host():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    @contextlib.contextmanager
    def compute_loss_context_manager(self) -> Iterator[None]:
        """As transformers', around the forward pass."""
        timed = self.step_facts.own.forward(self.args.device) if self.model.training else contextlib.nullcontext()
        with super().compute_loss_context_manager(), timed:
            yield

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As transformers': the loss of one micro batch."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.step_facts.loss = loss if self.step_facts.loss is None else self.step_facts.loss + loss
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.step_facts.gradient_norm = norm
        return norm

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', unless a stop ends it early: then the checkpoint of this step is next, and the end."""
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationLeft:
            self._counts.pop("eval", None)
            self._metrics["eval"].clear()
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """As transformers', but one loss that is not finite does not make all later ones so in the log.

        transformers 5.23 empties the sum that it has logged by `tr_loss -= tr_loss`, which leaves a NaN where one was;
        can go when it sets it to zero.
        """
        logged_before = self._globalstep_last_logged
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if self._globalstep_last_logged != logged_before:
            tr_loss.zero_()
