"""Trackers: transformers' own integrations, guarded so that nothing that happens to them stops a training."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from sft_dist.config.schema import Config
from sft_dist.files import write_text
from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)
# wandb would wait for its server for hours before it lets the process end. What is not uploaded stays on disk for `sync`.
FINISH_S = "60"


class Guarded(TrainerCallback):  # type: ignore[misc]
    """A tracker's callback: its first failure is reported and is its last, and none reaches the training."""

    def __init__(self, name: str, callback: TrainerCallback) -> None:
        self.name, self.callback, self.failed = name, callback, False
        self.missed = 0
        """Rows of metrics that it did not get."""

    def __getattribute__(self, attribute: str) -> Any:
        if not attribute.startswith("on_"):
            return super().__getattribute__(attribute)
        handler: Callable[..., Any] | None = getattr(self.callback, attribute, None)

        def call(*args: Any, **kwargs: Any) -> None:
            if handler is None:
                return
            if not self.failed:
                try:
                    handler(*args, **kwargs)
                    return
                # A client library may also think that it is the program, and end it.
                except (Exception, SystemExit) as error:
                    self.failed = True
                    said = error
                log.warning("%s failed and is off for the rest of this run; training goes on: %s", self.name, said)
            self.missed += attribute == "on_log"

        return call


def wandb_run_id(run: RunDir) -> str:
    """wandb's name of the run; kept in its folder, so that each further attempt goes on with the same curve."""
    path = run.logs / "wandb_run_id"
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


def trackers(config: Config, run: RunDir) -> list[Guarded]:
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
        defaults |= {"WANDB_FINISH_TIMEOUT": FINISH_S, "WANDB_RUN_ID": wandb_run_id(run), "WANDB_RESUME": "allow"}
        os.environ["WANDB_DIR"] = str(run.logs)  # whatever the user's shell says: `sync` looks for it here
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    run.logs.mkdir(parents=True, exist_ok=True)
    guarded: list[TrainerCallback] = []
    for name in config.tracking.report_to:
        try:
            guarded += [Guarded(name, callback()) for callback in get_reporting_integration_callbacks([name])]
        except (Exception, SystemExit) as error:
            log.warning("tracking.report_to: %s is left out: %s", name, error)
    return guarded


def missed_rows(metrics: int, guarded: Sequence[Guarded]) -> dict[str, Any]:
    """For attempts.jsonl: how many rows of metrics did not arrive, by where; empty if all did."""
    lost = {**({"metrics.jsonl": metrics} if metrics else {}), **{it.name: it.missed for it in guarded if it.failed}}
    return {"metrics_missed": lost} if lost else {}
