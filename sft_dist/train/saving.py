"""Saving a checkpoint: all processes write, agree that they did, and finish a large one while the training goes on.

Room is looked for first. What a process cannot write it notes, and goes on to where the others wait for it; only then do
all of them fail, together. Syncing and hashing need no model: threads do it. If all are through within `QUICK_S` the save
ends with the manifest, which makes the checkpoint count. Else that follows at the end of the first step at which they are.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config as serialization
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sft_dist.config.schema import CheckpointConfig
from sft_dist.errors import SftDistError
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import rotate
from sft_dist.train.disk import Need, agree_on_room, agree_on_writing, note_in_engine, shortage
from sft_dist.train.heartbeat import phase
from sft_dist.train.manifest import MANIFEST, Share, gathered, seal, settled
from sft_dist.train.ranks import Ranks
from sft_dist.train.step_facts import WatchedTrainer

log = logging.getLogger(__name__)
# The folders that each process makes for a plan's engine: the main one makes them before, so that none fails alone.
FOLDERS = {"fsdp2": ("pytorch_model_fsdp_0", "optimizer_0")}
# How long a save waits for syncing and hashing. What ends the run meanwhile costs the checkpoint: until it counts, the steps since
# the one before are not safe. Two seconds are 1 % of the time between saves that are 200 s apart, and hash some gigabytes.
QUICK_S = 2.0
# torch.save takes as long for the CRC-32 of what it writes as for writing it. torch.load looks at none of them; the manifest has a
# hash of each file.
WITHOUT_CRC = {"save.compute_crc32": False}


@dataclass
class _Pending:
    """A checkpoint whose files are written."""

    folder: Path
    step: int
    written_s: float
    share: Share = field(default_factory=lambda: Share({}, ()))
    error: Exception | None = None
    settled_s: float = 0.0


class Saves:
    """The saves of one training; every process has one and calls each method at the same point."""

    def __init__(
        self,
        run: RunDir,
        config: CheckpointConfig,
        facts: dict[str, Any],
        ranks: Ranks,
        need: Need | None = None,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.run, self.config, self.facts, self.ranks, self.need = run, config, facts, ranks, need
        self.took = took
        """Hears how long a save was from its first byte to where it counts, in seconds."""
        self.saving = False
        self.stall_s = 0.0
        """How long the last save kept the training waiting, with what was left of the one before."""
        self._last_settled_s = 0.0
        self._failed: Exception | None = None
        self._pending: tuple[_Pending, threading.Thread] | None = None
        self._sweeper: threading.Thread | None = None

    @contextlib.contextmanager
    def save(self, step: int) -> Iterator[None]:
        """Around the writing of checkpoint-`step`. DiskError on every process if one cannot write, or there is no room."""
        called = time.monotonic()
        self.close()
        began = time.monotonic()
        folder = self.run.checkpoints / f"checkpoint-{step}"
        self._prepare(folder)
        self.saving = True
        try:
            with self.noting():
                yield
        finally:
            self.saving = False
        failed, self._failed = self._failed, None
        agree_on_writing(self.run, folder, failed, self.ranks)
        pending = _Pending(folder, step, time.monotonic() - began)
        thread = threading.Thread(target=self._settle, args=(pending,), name="checkpoint", daemon=True)
        self._pending = pending, thread
        thread.start()
        # A run whose last one took longer waits in vain for this one, too. The number is the same on every process.
        if self._last_settled_s <= QUICK_S:
            thread.join(QUICK_S)
            self.poll()
        self.stall_s = time.monotonic() - called

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """What cannot be written in this block is noted, and the process goes on to where the others wait for it."""
        try:
            yield
        except SftDistError:
            raise
        except Exception as error:
            self._failed = self._failed or error
        except BaseException as error:
            # torch.distributed.checkpoint.CheckpointException, no Exception: on all processes what some of them met.
            failures = getattr(error, "failures", None)
            if not isinstance(failures, dict):
                raise
            mine = failures.get(self.ranks.rank, (None,))[0]
            self._failed = self._failed or (mine if isinstance(mine, Exception) else None)

    def poll(self) -> None:
        """At the end of a save and of each step after it: the checkpoint counts once every process has finished its share."""
        if self._pending is not None and not self.ranks.largest(int(self._pending[1].is_alive())):
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint before counts. DiskError on every process if one could not finish it."""
        if self._pending is None:
            return
        (pending, thread), self._pending = self._pending, None
        if thread.is_alive():
            phase("save")
        thread.join()
        agree_on_writing(self.run, pending.folder, pending.error, self.ranks)
        settled_s = self._last_settled_s = max(self.ranks.everyones(pending.settled_s))
        timed = {"written_s": round(pending.written_s, 3), "settled_s": round(settled_s, 3)}
        failed: OSError | None = None
        try:
            shares = gathered(pending.folder, pending.share, self.ranks)
            if self.ranks.is_main:
                samples = pending.step * int(self.facts.get("global_batch_size", 0))
                facts = {"samples": samples, **self.facts, "timed": timed}
                self.need = Need.after(seal(pending.folder, pending.step, facts, shares))
        except OSError as error:
            failed = error
        agree_on_writing(self.run, pending.folder, failed, self.ranks)
        self.need = self.ranks.by_main(lambda: self.need)
        self.took(pending.written_s + settled_s)
        if self.ranks.is_main:
            with contextlib.suppress(OSError):  # a full disk; what has counted is in the folder
                self.run.write_status(durable=False, checkpoint=pending.folder.name)
            self._sweeper = threading.Thread(target=self._rotate, name="rotation", daemon=True)
            self._sweeper.start()

    def close(self) -> None:
        """Wait until nothing is left in the background."""
        self.finish()
        if self._sweeper is not None:
            self._sweeper.join()
            self._sweeper = None

    def leave(self) -> None:
        """The training is over, perhaps by an error. A process that is alone can still finish what it has written."""
        if self.ranks.size == 1:
            with contextlib.suppress(Exception):
                self.close()

    def _prepare(self, folder: Path) -> None:
        """Look for room, as every host sees it, and make the folders."""
        why: str | None = None
        failed: OSError | None = None
        try:
            if self.need is not None:
                why = shortage(folder.parent, self.need, quotas=self.ranks.is_main)
            if self.ranks.is_main and why is None:
                (folder / MANIFEST).unlink(missing_ok=True)  # what is written over does not count meanwhile
                for name in ("", *FOLDERS.get(str(self.facts.get("plan")), ())):
                    (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            failed = error
        agree_on_room(self.run, folder.name, why, self.ranks)
        agree_on_writing(self.run, folder, failed, self.ranks)

    def _settle(self, pending: _Pending) -> None:
        """In a thread: this process's share of syncing and hashing."""
        began = time.monotonic()
        alone, told = self.ranks.size == 1, os.environ.get
        node_share = (0, 1) if alone else (int(told("LOCAL_RANK", 0)), int(told("LOCAL_WORLD_SIZE", 1)))
        try:
            pending.share = settled(pending.folder, self.ranks, node_share)
        except Exception as error:
            pending.error = error
        pending.settled_s = time.monotonic() - began

    def _rotate(self) -> None:
        """In a thread: removing a large checkpoint takes its time."""
        try:
            rotate(self.run, self.config.keep, self.config.milestone_steps)
        except OSError as error:
            log.warning("an old checkpoint could not be removed: %s", error)


def noted(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of a trainer, part of a save: what it cannot write is noted."""

    @functools.wraps(method)
    def part(self: SavingTrainer, *args: Any, **kwargs: Any) -> Any:
        with self.saves.noting() if self.saves is not None and self.saves.saving else contextlib.nullcontext():
            return method(self, *args, **kwargs)

    return part


class SavingTrainer(WatchedTrainer):
    """A trainer whose saves go through `saves`, and that takes what they hold without a second copy on the GPU."""

    saves: Saves | None = None
    _save_scaler = noted(WatchedTrainer._save_scaler)
    _save_rng_state = noted(WatchedTrainer._save_rng_state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        saving = self.saves.save(self.state.global_step) if self.saves is not None else contextlib.nullcontext()
        with saving, serialization.patch(WITHOUT_CRC):  # type: ignore[attr-defined]
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers', but replicated states come through host memory, mapped from the file: one copy for a node.

        transformers 5.23 loads them onto each GPU before the optimizer copies them there: 106 GiB to resume a run that
        trains in 75 (Qwen3-4B, ddp).
        """
        states = Path(str(checkpoint)) / OPTIMIZER_NAME
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if checkpoint is None or sharded or self.args.device.type == "cpu" or not states.is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.optimizer.load_state_dict(torch.load(states, map_location="cpu", mmap=True, weights_only=True))
        schedule = torch.load(states.with_name(SCHEDULER_NAME), map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    @noted
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self.saves is not None:
            note_in_engine(self.model_wrapped, self.saves.noting, is_main=self.saves.ranks.is_main)
        super()._save_optimizer_and_scheduler(output_dir)
