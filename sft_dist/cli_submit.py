"""The body of `sft-dist submit`: runs become jobs, proven here for the nodes that they will get."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sft_dist.cli_data import load
from sft_dist.cli_runs import existing, made_run, new_run, ready_again, swept
from sft_dist.errors import ConfigError, RunStopped, SftDistError

if TYPE_CHECKING:
    from sft_dist.config.schema import Config
    from sft_dist.jobs.submit import Part
    from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)
FOLLOW_S = 2.0
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
    from sft_dist.jobs.submit import dry_script, job_numbers, slurm_folder
    from sft_dist.jobs.submit import submit as hand_over

    sources = [word for word in configs if "=" not in word.partition("/")[0]]
    overrides = [word for word in configs if word not in sources]
    if array and (chain or len(sources) > 1):
        raise ConfigError("--array is for one config, and not together with --chain")
    if local and (chain or array or after):
        raise ConfigError("--local has no queue: no --array, --chain or --after")
    if not sources:
        raise ConfigError("no config to submit", hint="sft-dist submit my.yaml slurm.partition=gpu")
    numbers = [] if local else job_numbers(after or [])
    if dry_run:
        for part in _dry_parts(sources, overrides, array or [], chain=chain):
            typer.echo(dry_script(part, numbers))
        return
    submitted: list[tuple[RunDir, str]] = []
    if array:
        parts = _sweep(sources[0], overrides, array, overwrite=overwrite)
        name = str(load(sources[0], overrides).config.run.name)
        ids = hand_over(parts, folder=_array_folder(parts[0].run, name), after=numbers, name=name)
        submitted += [(part.run, number) for part, number in zip(parts, ids, strict=True)]
    for source in sources if not array else []:
        previous = numbers
        made = made_run(source, overrides, overwrite=overwrite, local=local, accept=accept)
        for part in _parts(made, chain=chain):
            previous = hand_over([part], folder=slurm_folder(part.run), after=previous, local=local)
            submitted.append((part.run, previous[0]))
    for run, number in submitted:
        typer.echo(f"{number} {run.path}")
    if wait:
        _follow(submitted, local=local)


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
) -> Iterator[Part]:
    from sft_dist.rundir import RunDir, runs_root

    for source in sources:
        stopped = existing(source)
        if stopped is not None:
            yield from _parts((stopped, ready_again(stopped, [])), chain=chain)
            continue
        for loaded in swept(source, overrides, array) if array else [load(source, list(overrides))]:
            run = RunDir(runs_root(loaded.config.run.dir) / str(loaded.config.run.name))
            yield from _parts((run, loaded.config), chain=chain)


def _array_folder(first: RunDir, name: str) -> Path:
    """One folder for the jobs of an array, beside its runs: submitit keeps one for each submission."""
    return first.path.absolute().parent / ".slurm" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _follow(submitted: Sequence[tuple[RunDir, str]], *, local: bool) -> None:
    """Say each change of state until all jobs have ended; raises the error of the first run that did not get done."""
    from sft_dist.jobs.queue import ask_queue

    last: dict[Path, str] = {}
    gone: float | None = None
    while True:
        for run, number in submitted:
            status = run.read_status()
            line = " ".join(str(status[name]) for name in ("state", "reason") if status.get(name))
            if status.get("step"):
                line += f", step {status['step']} of {status.get('max_steps')}"
            if last.get(run.path) != line:
                last[run.path] = line
                sys.stderr.write(f"{run.name} (job {number}): {line}\n")
        states = [run.read_status().get("state") for run, _ in submitted]
        if all(state in ("done", "failed", "stopped") for state in states):
            break
        if not local:
            queue = ask_queue([number for _, number in submitted])
            alive = [number for number, job in queue.jobs.items() if job.phase != "ended"]
            gone = (gone or time.monotonic()) if queue.known and not alive else None
            if gone is not None and time.monotonic() - gone > GONE_S:
                raise SftDistError("the jobs have left the queue without a word", hint="see slurm/*_log.err of the run")
        time.sleep(FOLLOW_S)
    for run, _ in submitted:
        status = run.read_status()
        if status.get("state") == "failed":
            error = SftDistError(str(status.get("reason")))
            error.exit_code = int(status.get("exit_status") or 1)
            raise error
        if status.get("state") == "stopped":
            raise RunStopped(str(status.get("reason")), hint=f"go on with: sft-dist submit {run.path}")
