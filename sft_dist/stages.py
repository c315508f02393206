"""A run on this machine, stage by stage: ask before, train, ask after, report. A stage that is done is not done again."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from typing import TYPE_CHECKING, Literal

from sft_dist.config.loader import LoadedConfig, load_run_config, write_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, RunStopped, failure
from sft_dist.files import write_json, write_text
from sft_dist.parallel.resolve import Resolved
from sft_dist.parallel.world import this_world
from sft_dist.process import libraries_are_in
from sft_dist.rundir import RunDir, create_run, runs_root

if TYPE_CHECKING:
    from sft_dist.data.example import Example
    from sft_dist.jobs.place import Place
    from sft_dist.train.attempt import Attempt

log = logging.getLogger(__name__)


def new_run(loaded: LoadedConfig, *, overwrite: bool = False, resolved: Resolved | None = None) -> RunDir:
    """Create the run directory of a loaded config, once it is known that it can be trained here, or as `resolved`.

    An existing run is refused unless `overwrite`, and then if it is at work or in a queue; neither a new directory nor a deleted one is left behind by a
    config that cannot run.
    """
    from sft_dist.jobs.admission import refuse_taken

    _refuse_launcher()
    config = loaded.config
    root, name = runs_root(config.run.dir), str(config.run.name)
    refuse_taken(RunDir(root / name), overwrite=overwrite)
    if config.data.train.task and loaded.provenance.get("data.train.task") == "default":
        raise ConfigError("data.train is not set", hint="set it to a JSONL file, a dataset's name or {task: tickets}")
    from sft_dist.evaluate.held_out import write_held_out

    planned = RunDir(root / name)
    held_out = prove(config, planned, resolved, for_job=True) if resolved else prove_here(config, planned)
    run = create_run(root, name, overwrite=overwrite)
    write_json(run.provenance, loaded.provenance)
    write_held_out(run, held_out)
    run.write_status(state="queued", step=0, attempt=0)
    write_text(run.config, write_config(config))
    return run


def _refuse_launcher() -> None:
    """ConfigError if a launcher started this process as one of several: each would make the run, and start workers."""
    world = this_world()
    if world.size > 1:
        raise ConfigError(
            f"a launcher started sft-dist {world.size} times, but it starts the processes of a run itself",
            hint="type it without the launcher, or launch the worker: torchrun --nproc-per-node N -m sft_dist.train CONFIG",
        )


def prove_here(config: Config, run: RunDir) -> dict[str, list[Example]]:
    """`prove` for this machine."""
    from sft_dist.train.settle import resolve_here

    return prove(config, run, resolve_here(config))


def prove(config: Config, run: RunDir, resolved: Resolved, *, for_job: bool = False) -> dict[str, list[Example]]:
    """Check TRL's arguments and the model's files, prepare the rows; returns the held-out ones by set.

    What check.proof.proving does and raises, without its words.
    """
    from sft_dist.check.proof import proving, refuse_place

    refuse_place(run)
    # DeepSpeed speaks on stdout while it loads, which is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        steps = proving(config, run, resolved, for_job=for_job)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]


def run_here(run: RunDir, place: Place | None = None) -> None:
    """Take `run` through the stages that it has not been through yet; in a job, through those that `place` names.

    Raises RunStopped when asked to stop, with what is done kept; any other failure is on record in status.json.
    """
    from sft_dist.jobs.last_words import leaving_words
    from sft_dist.jobs.requeue import Settler
    from sft_dist.jobs.walltime import log_outlook
    from sft_dist.train.attempt import attempt
    from sft_dist.train.disk import look_for_room
    from sft_dist.train.ranks import Ranks
    from sft_dist.train.settle import needs_packages, record_environment, resolve_here
    from sft_dist.train.shutdown import Interrupted, StopRequest

    _refuse_launcher()
    config = load_run_config(run.config)
    due = {
        "before": config.evaluate.before and not (run.eval / "before.jsonl").is_file(),
        "train": not (run.model / "DONE").is_file(),
        "after": config.evaluate.after and not (run.eval / "after.jsonl").is_file(),
    }
    parts = [part for part in due if due[part] and (place is None or part in place.parts)]
    # A stop that comes while the report is written has nothing left to stop. One that comes before the attempt can put it on
    # record waits until then.
    with StopRequest(started=place is not None) as late, late.deferred():
        with attempt(run, Settler(run, place), started=place is not None) as current, leaving_words(run):
            if late.heard:
                current.stop.heard += late.heard
                raise Interrupted(f"stopped by {current.stop.reason} outside of the training")
            current.complete = all(part in parts for part in due if due[part])
            resolved = resolve_here(config, nodes=len(place.nodes) if place else 1, run=run)
            needs_packages(config, resolved)
            record_environment(run, resolved)
            current.facts["gpus"] = resolved.gpus
            if place is not None:
                log_outlook(run)
            if "before" in parts:
                # The training asks as well, but by then the model has been asked for minutes.
                if "train" in parts and config.checkpoint.save_strategy != "no":
                    look_for_room(run, resolved, Ranks())
                _evaluate(config, run, resolved, "before")
            if "train" in parts:
                _train(run, current, resolved, place)
            if "after" in parts:
                _evaluate(config, run, resolved, "after")
        report_here(run)
        if parts != ["before"]:
            from sft_dist.evaluate.tracked import tell_trackers

            tell_trackers(config, run)


def _train(run: RunDir, current: Attempt, resolved: Resolved, place: Place | None) -> None:
    """Train in this process, or in those of the plan."""
    libraries_are_in()
    if resolved.layout.plan.engine == "none":
        from sft_dist.evaluate.asking import asking
        from sft_dist.train.ranks import Ranks
        from sft_dist.train.worker import train

        train(run, current, resolved, Ranks(), asking(run, resolved, current, Ranks()))
        return
    from sft_dist.jobs.launcher import run_workers
    from sft_dist.train.attempt import OUTCOME

    with current.stop.deferred():
        status = run_workers(run, resolved, current.stop.heard, place)
    ended = run.read_status()
    current.facts.update({name: ended[name] for name in OUTCOME[1:] if ended.get(name) is not None})
    if ended.get("state") == "stopped":
        raise RunStopped(str(ended["reason"]))
    if (run.model / "DONE").is_file():  # however a process ended after that
        if current.stop.heard:
            raise RunStopped("stopped after the last step; the model is complete")
        return
    if ended.get("state") == "failed":
        raise failure(str(ended["reason"]), ended.get("exit_status") or 1)
    if current.stop.heard:
        raise RunStopped(f"stopped by {current.stop.reason} before the first step")
    how = (
        f"were killed with torchrun ({signal.Signals(-status).name})"
        if status < 0
        else f"ended with exit status {status}"
    )
    raise failure(str(ended.get("reason") or f"the workers {how} and left no word"), 1)


def _evaluate(config: Config, run: RunDir, resolved: Resolved, when: Literal["before", "after"]) -> None:
    """Evaluate here, or in a process of its own where this one must leave the GPUs to the workers."""
    if resolved.layout.plan.engine == "none":
        evaluate_here(config, run, resolved, when)
        return
    from sft_dist.evaluate.compare import wants_evaluation
    from sft_dist.jobs.launcher import run_alone

    if wants_evaluation(config):
        status = run_alone(["-m", "sft_dist.evaluate", str(run.path), when])
        if status != 0:
            raise failure(f"asking the model {when} training ended with exit status {status}", status)


def evaluate_here(
    config: Config, run: RunDir, resolved: Resolved, when: Literal["before", "after"], *, again: bool = False
) -> None:
    """Ask and score the base model (`before`) or the tuned one (`after`), if the config asks for anything."""
    from sft_dist.evaluate.compare import evaluate_model, load_for, wants_evaluation
    from sft_dist.evaluate.sharing import devices_for

    if not wants_evaluation(config):
        return
    loaded = load_for(config, run, resolved, when)
    log.info("asking the %s model", "base" if when == "before" else "tuned")
    evaluate_model(config, run, loaded, when, again=again, devices=devices_for(config, resolved))


def report_here(run: RunDir) -> None:
    """Write loss.png and report.html from what the run directory holds."""
    from sft_dist.report.page import write_report
    from sft_dist.report.plot import plot_loss

    plot_loss(run)
    write_report(run)
