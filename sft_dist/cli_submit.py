"""The body of `sft-dist submit`: runs become jobs, proven here for the nodes that they will get."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sft_dist.cli_data import load
from sft_dist.cli_runs import config_again, existing, made_run, new_run, swept
from sft_dist.errors import ConfigError, RunStopped, SftDistError
from sft_dist.files import read_jsonl

if TYPE_CHECKING:
    from sft_dist.config.loader import LoadedConfig
    from sft_dist.config.schema import Config
    from sft_dist.jobs.submit import Part
    from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)
FOLLOW_S = 2.0
# The queue is asked less often: the controller has other users, and jobs last for days.
QUEUE_EVERY_S = 15.0
ENDED = ("done", "failed", "stopped")
# A job that the queue no longer knows may still be writing its last words to a slow file system.
GONE_S = 20.0

AcceptFlag = Annotated[
    bool,
    typer.Option("--accept-change", help="Go on although data, template, packing or global batch are others now."),
]


def submit(
    configs: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|RUN... [KEY=VALUE]...", help="Configs, recipes or stopped runs; config fields."),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job's script and submit nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the jobs to their end.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Run in the background here, without SLURM.")] = False,
    after: Annotated[list[str] | None, typer.Option(help="Start when this job (or run's job) is done.")] = None,
    array: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="A run for each value, NAME-KEY-VALUE, as an array.")
    ] = None,
    chain: Annotated[
        bool, typer.Option("--chain", help="Three jobs: ask before on one node, train, ask after on one node.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete existing runs of these names first.")] = False,
    accept: AcceptFlag = False,
) -> None:
    """Run on SLURM through submitit, or go on with a stopped run. Example: sft-dist submit my.yaml slurm.nodes=2"""
    from sft_dist.jobs.admission import job_numbers
    from sft_dist.jobs.submit import dry_script, needs_slurm

    sources = [word for word in configs if "=" not in word.partition("/")[0]]
    overrides = [word for word in configs if word not in sources]
    if array and (chain or len(sources) > 1):
        raise ConfigError("--array is for one config, and not together with --chain")
    if local and (chain or array or after):
        raise ConfigError("--local has no queue: no --array, --chain or --after")
    if not sources:
        raise ConfigError("no config to submit", hint="sft-dist submit my.yaml slurm.partition=gpu")
    if not dry_run:
        needs_slurm(local=local)
    numbers = job_numbers(after or [])
    if dry_run:
        for parts, options in _dry_parts(sources, overrides, array or [], chain=chain):
            typer.echo(dry_script(parts, after=numbers, **options))
        return
    submitted: list[tuple[RunDir, str]] = []
    if array:
        submitted += _submit_array(sources[0], overrides, array, numbers, overwrite=overwrite)
    for source in sources if not array else []:
        made = functools.partial(made_run, source, overrides, overwrite=overwrite, local=local, accept=accept)
        submitted += _submit_run(existing(source), made, numbers, local=local, chain=chain)
    if wait:
        try:
            _follow(submitted, local=local)
        except KeyboardInterrupt:
            runs = " ".join(dict.fromkeys(run.quoted for run, _ in submitted))
            sys.stderr.write(f"the jobs go on: sft-dist status {runs}; sft-dist cancel RUN stops one\n")
            raise


def _submit_run(
    before: RunDir | None,
    make: Callable[[], tuple[RunDir, Config]],
    numbers: Sequence[str],
    *,
    local: bool,
    chain: bool,
) -> list[tuple[RunDir, str]]:
    """Submit what `make` makes, of a config or of the run of `before`; returns and prints what became of it."""
    from sft_dist.jobs.admission import submitting
    from sft_dist.jobs.submit import submit_in_turn

    with contextlib.ExitStack() as stack:
        if before is not None:
            stack.enter_context(submitting(before))
        made = make()
        if before is None:
            stack.enter_context(submitting(made[0]))
        ids = submit_in_turn(list(_parts(made, chain=chain)), after=numbers, local=local)
    return _told([(made[0], number) for number in ids])


def _submit_array(
    source: str, overrides: Sequence[str], array: Sequence[str], numbers: Sequence[str], *, overwrite: bool
) -> list[tuple[RunDir, str]]:
    from sft_dist.jobs.submit import submit as hand_over

    parts = _sweep(source, overrides, array, overwrite=overwrite)
    name = str(load(source, list(overrides)).config.run.name)
    ids = hand_over(parts, folder=_array_folder(parts[0].run, name), after=numbers, name=name)
    return _told([(part.run, number) for part, number in zip(parts, ids, strict=True)])


def _told(submitted: list[tuple[RunDir, str]]) -> list[tuple[RunDir, str]]:
    """Print them at once: what comes after may fail."""
    for run, number in submitted:
        typer.echo(f"{number} {run.path}")
    return submitted


def _sweep(source: str, overrides: Sequence[str], array: Sequence[str], *, overwrite: bool) -> list[Part]:
    """A run for each combination of the values; none is left behind if one of them cannot run."""
    made: list[tuple[RunDir, Config]] = []
    try:
        for loaded in swept(source, overrides, array):
            made.append(new_run(loaded, overwrite=overwrite))
    except BaseException:
        for run, _ in made:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    return [part for one in made for part in _parts(one, chain=False)]


def _parts(made: tuple[RunDir, Config], *, chain: bool) -> Iterator[Part]:
    """The jobs of a run, in their order."""
    from sft_dist.jobs.resources import resolve_for_job
    from sft_dist.jobs.submit import CHAIN, Part

    run, config = made
    per_gpu = config.slurm.tasks_per_node == "gpu"
    tasks = resolve_for_job(config).layout.processes_per_node if per_gpu else 1
    if not chain:
        yield Part(run, config, tasks_per_node=tasks)
        return
    for kind, stages in CHAIN.items():
        if kind == "train" or getattr(config.evaluate, stages[0]):
            yield Part(run, config, stages, tasks if kind == "train" else 1, kind)


def _dry_parts(
    sources: Sequence[str], overrides: Sequence[str], array: Sequence[str], *, chain: bool
) -> Iterator[tuple[list[Part], dict[str, Any]]]:
    """The parts of each script that would be handed over, and the name and folder of an array."""
    from sft_dist.rundir import RunDir, runs_root

    def planned(loaded: LoadedConfig) -> tuple[RunDir, Config]:
        return RunDir(runs_root(loaded.config.run.dir) / str(loaded.config.run.name)), loaded.config

    if array:
        made = [planned(loaded) for loaded in swept(sources[0], overrides, array)]
        name = str(load(sources[0], list(overrides)).config.run.name)
        options = {"name": name, "folder": _array_folder(made[0][0], name)}
        yield [part for one in made for part in _parts(one, chain=False)], options
        return
    for source in sources:
        stopped = existing(source)
        one = planned(load(source, list(overrides))) if stopped is None else (stopped, config_again(stopped, overrides))
        for part in _parts(one, chain=chain):
            yield [part], {}


def _array_folder(first: RunDir, name: str) -> Path:
    """One folder for the jobs of an array, beside its runs: submitit keeps one for each submission."""
    return first.path.absolute().parent / ".slurm" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _follow(submitted: Sequence[tuple[RunDir, str]], *, local: bool) -> None:
    """Say each change of state until all jobs have ended; raises the error of the first run that did not get done."""
    last: dict[Path, str] = {}
    asked, gone = -QUEUE_EVERY_S, None
    while not _all_told(submitted, last):
        if time.monotonic() - asked >= QUEUE_EVERY_S:
            asked = time.monotonic()
            ended = _none_left([number for _, number in submitted], local=local)
            gone = (gone or asked) if ended else None
        if gone is not None and time.monotonic() - gone > GONE_S:
            _all_told(submitted, last)  # its last words may have come just now
            if all(run.read_status().get("state") in ENDED for run, _ in submitted):
                break
            hint = f"they may have said why: sft-dist logs {submitted[0][0].quoted}"
            raise SftDistError("the jobs have ended without a word of the run's", hint=hint)
        time.sleep(FOLLOW_S)
    for run, _ in submitted:
        status = run.read_status()
        if status.get("state") == "failed":
            error = SftDistError(str(status.get("reason")))
            error.exit_code = int(status.get("exit_status") or 1)
            raise error
        if status.get("state") == "stopped":
            raise RunStopped(str(status.get("reason")), hint=f"go on with: sft-dist submit {run.quoted}")


def _all_told(submitted: Sequence[tuple[RunDir, str]], last: dict[Path, str]) -> bool:
    """Say what is new since `last`; whether all runs have ended."""
    ended = True
    for run, number in submitted:
        recorded, status = len(read_jsonl(run.attempts)), run.read_status()
        # Workers say that they have stopped or failed; until that is on record, it may be decided that the run goes on.
        ended &= status.get("state") in ENDED and recorded >= (status.get("attempt") or 0)
        line = " ".join(str(status[name]) for name in ("state", "reason") if status.get(name))
        if status.get("step"):
            line += f", step {status['step']} of {status.get('max_steps')}"
        if last.get(run.path) != line:
            last[run.path] = line
            sys.stderr.write(f"{run.name} (job {number}): {line}\n")
    return ended


def _none_left(numbers: Sequence[str], *, local: bool) -> bool:
    """Whether no job is left; False while that cannot be told."""
    from sft_dist.jobs.queue import ask_queue

    if local:
        return not any(_runs_here(int(number)) for number in numbers)
    queue = ask_queue(numbers)
    return queue.known and all(job.phase == "ended" for job in queue.jobs.values())


def _runs_here(pid: int) -> bool:
    """Whether the job that this process has started is still there."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    return False
