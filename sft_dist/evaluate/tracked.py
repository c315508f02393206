"""A finished run's scores and report, for its trackers: beside the curves that the training has sent there."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.files import read_json
from sft_dist.rundir import RunDir
from sft_dist.train.trackers import config_as_text, config_for_trackers, name_for_trackers, tell_environment

log = logging.getLogger(__name__)
Scores = dict[str, float]


def tell_trackers(config: Config, run: RunDir) -> None:
    """Send the scores of both models and report.html to each of `tracking.report_to`; what fails is said and left out."""
    if not config.tracking.report_to:
        return
    ways: dict[str, Callable[[Config, RunDir, Scores, int], None]] = {
        "wandb": _wandb,
        "tensorboard": _tensorboard,
        "trackio": _trackio,
    }
    for name in config.tracking.report_to:
        try:
            tell_environment(config, run)
            scores, step = flat_scores(read_json(run.scores) or {}), int(run.read_status().get("step") or 0)
            with contextlib.redirect_stdout(sys.stderr):
                ways[name](config, run, scores, step)
        except (Exception, SystemExit) as error:  # a client library may also think that it is the program, and end it
            log.warning("tracking.report_to: %s did not get scores and report: %s", name, error)


def flat_scores(scores: dict[str, Any]) -> Scores:
    """scores.json as scores/SET/SCORE/before, .../after and .../change."""
    found: Scores = {}
    for name, part in (scores.get("sets") or {}).items():
        for score, values in (part.get("scores") or {}).items():
            for side in ("before", "after", "change"):
                if isinstance(value := values.get(side), (int, float)):
                    found[f"scores/{name}/{score}/{side}"] = float(value)
    return found


def _config(config: Config, run: RunDir) -> dict[str, Any]:
    """The config as it is now: `sft-dist evaluate` may have changed what is asked."""
    return config_for_trackers(config, (read_json(run.env) or {}).get("resolved") or {})


def _wandb(config: Config, run: RunDir, scores: Scores, step: int) -> None:
    """The same run of wandb as the training's, by the name that is kept in its folder."""
    import wandb

    mine = wandb.init(project=config.tracking.project, name=run.name, dir=str(run.logs), resume="allow")
    mine.config.update({"sft_dist": _config(config, run)}, allow_val_change=True)
    mine.summary.update(scores)
    if run.report.is_file():
        mine.log({"report": wandb.Html(run.report.read_text(encoding="utf-8"), inject=False)})
    mine.finish()


def _tensorboard(config: Config, run: RunDir, scores: Scores, step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
        writer.add_text("sft_dist", config_as_text(_config(config, run)), step)
        for name, value in scores.items():
            writer.add_scalar(name, value, step)


def _trackio(config: Config, run: RunDir, scores: Scores, step: int) -> None:
    import trackio

    trackio.init(project=config.tracking.project, name=name_for_trackers(config, run), resume="allow", embed=False)
    trackio.config.clear()  # a second one would replace the training's, which has the arguments and the model's as well
    trackio.log(scores, step=step)
    trackio.finish()
