"""Trackers: transformers' own integrations, guarded so that nothing that happens to them stops a training."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from sft_dist.config.schema import Config
from sft_dist.config.yaml12 import dump_yaml
from sft_dist.files import write_text
from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)
# wandb would wait for its server for hours before it lets the process end. What is not uploaded stays on disk for `sync`.
FINISH_S = "60"
# Variables that this process has set.
_ours: dict[str, str] = {}


class Guarded(TrainerCallback):  # type: ignore[misc]
    """A tracker's callback: its first failure is reported and is its last, and none reaches the training."""

    def __init__(
        self, name: str, callback: TrainerCallback, begun: Callable[[TrainerCallback], None] = lambda _: None
    ) -> None:
        self.name, self.callback, self.begun, self.failed = name, callback, begun, False
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
                    # stdout is for results, and trackio greets there.
                    with contextlib.redirect_stdout(sys.stderr):
                        handler(*args, **kwargs)
                        if attribute == "on_train_begin":
                            self.begun(self.callback)
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


def name_for_trackers(config: Config, run: RunDir) -> str:
    """The run's name; for trackio with what tells it from an earlier run of this name, which it would go on with."""
    # A config that is only being proven has no folder in which the id could be kept.
    if "trackio" in config.tracking.report_to and run.config.is_file():
        return f"{run.name}-{wandb_run_id(run)[:6]}"
    return run.name


def tell_environment(config: Config, run: RunDir) -> None:
    """Set the variables by which the trackers know run and folder; those that the user has set stay.

    A notebook may train several runs in one process: what was set for the one before is not the user's.
    """
    wanted = {
        "WANDB_PROJECT": config.tracking.project,
        "WANDB_NAME": run.name,
        "TENSORBOARD_LOGGING_DIR": str(run.logs / "tensorboard"),
        **({"WANDB_MODE": config.tracking.wandb_mode} if config.tracking.wandb_mode else {}),
    }
    if "wandb" in config.tracking.report_to:
        wanted |= {"WANDB_FINISH_TIMEOUT": FINISH_S, "WANDB_RUN_ID": wandb_run_id(run), "WANDB_RESUME": "allow"}
        os.environ["WANDB_DIR"] = str(run.logs)  # whatever the user's shell says: `sync` looks for it here
    for name, value in wanted.items():
        if os.environ.get(name) in (None, _ours.get(name)):
            os.environ[name] = _ours[name] = value


def config_for_trackers(config: Config, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The run's config and what its `auto` came to, without what jobs set in their environment: a server elsewhere has no use for it."""
    tree = config.model_dump(mode="json", exclude={"slurm": {"env", "setup"}, "container": {"env"}})
    return {**tree, "resolved": dict(resolved)}


def config_as_text(told: Mapping[str, Any]) -> str:
    """As TensorBoard shows text: Markdown."""
    return f"```\n{dump_yaml(dict(told))}```"


def _tell_config(name: str, told: Mapping[str, Any], callback: Any) -> None:
    """Give the config to a tracker that has begun; transformers' own callbacks know only its arguments and the model's config."""
    if name == "tensorboard" and callback.tb_writer is not None:
        callback.tb_writer.add_text("sft_dist", config_as_text(told))
    client = getattr(callback, f"_{name}", None)
    if name != "tensorboard" and client is not None and getattr(client, "config", None) is not None:
        # That of trackio is a plain dict.
        client.config.update({"sft_dist": dict(told)}, **({"allow_val_change": True} if name == "wandb" else {}))


def trackers(config: Config, run: RunDir, resolved: Mapping[str, Any] | None = None) -> list[Guarded]:
    """transformers' own integrations for `tracking.report_to`, guarded; one that is not installed is named and left out.

    What they write lands in the run's folder, and each attempt at a run goes on with the same run of wandb. Each is told the
    run's config with what `auto` came to, `resolved`.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    tell_environment(config, run)
    run.logs.mkdir(parents=True, exist_ok=True)
    told = config_for_trackers(config, resolved or {})
    guarded: list[TrainerCallback] = []
    for name in config.tracking.report_to:
        try:
            begun = functools.partial(_tell_config, name, told)
            guarded += [Guarded(name, callback(), begun) for callback in get_reporting_integration_callbacks([name])]
        except (Exception, SystemExit) as error:
            log.warning("tracking.report_to: %s is left out: %s", name, error)
    return guarded


def missed_rows(metrics: int, guarded: Sequence[Guarded]) -> dict[str, Any]:
    """For attempts.jsonl: how many rows of metrics did not arrive, by where; empty if all did."""
    lost = {**({"metrics.jsonl": metrics} if metrics else {}), **{it.name: it.missed for it in guarded if it.failed}}
    return {"metrics_missed": lost} if lost else {}
