"""The commands about runs that were started: `status`, `logs`, `cancel`, `verify`, `sync`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from sft_dist.rundir import RunDir

# Characters that the whole table takes where nothing says how wide the lines may be.
WIDE = 180
# How often new lines are looked for, and how often whether the run has ended.
LINES_EVERY_S, STATE_EVERY_S = 0.5, 10.0

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or directory.")]
RunsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN]...", help="Names or directories of runs, or folders of runs; all if not given."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def status(
    runs: RunsArgument = None,
    as_json: JsonFlag = False,
) -> None:
    """State, step, loss, time left and attempts of runs. Example: sft-dist status"""
    from sft_dist.jobs.status import look
    from sft_dist.rundir import runs_root

    chosen = _chosen(runs)
    statuses, notes = look(chosen)
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    if as_json:
        typer.echo(json.dumps({"runs": [it.facts() for it in statuses], "notes": list(notes)}, indent=2))
        return
    if not statuses:
        sys.stderr.write(
            f"there are no runs in {runs_root()} (run.dir=... or SFT_DIST_RUNS=... names another folder)\n"
        )
        return
    from sft_dist.report.status_table import details, status_table

    console = _console()
    console.print(status_table(statuses, console.width))
    if len(statuses) == 1 and runs:
        typer.echo("\n" + "\n".join(details(statuses[0])))


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Only the node or rank with this number.")] = None,
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last lines of each node or rank.")] = None,
) -> None:
    """Show a run's logs, all nodes and ranks together. Example: sft-dist logs -f demo"""
    from sft_dist.jobs.logs import Follower, sources
    from sft_dist.rundir import find_run

    found = find_run(run)
    if not sources(found, rank):
        of = "" if rank is None else f" of node or rank {rank}"
        why = "what `train` shows is not kept in a file"
        if rank is not None and sources(found):
            why = "there are logs of others"
        elif (found.path / "slurm" / "job.json").is_file():
            why = "its job has not started, or the nodes do not see this folder"
        sys.stderr.write(f"no log files{of} in {found.path} yet; {why}\n")
        if not follow:
            return
    follower = Follower(found, rank=rank, tail=tail)
    with contextlib.suppress(KeyboardInterrupt):
        _show(follower.news())
        while follow and not _ended(found):
            until = time.monotonic() + (STATE_EVERY_S if (found.path / "slurm").exists() else LINES_EVERY_S)
            told = _state(found)
            while time.monotonic() < until and _state(found) == told:
                time.sleep(LINES_EVERY_S)
                _show(follower.news())
        _show(follower.news())
        _show(follower.rest())


def cancel(
    run: RunArgument,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that the run has to save and end.")] = 120.0,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a save.")] = False,
) -> None:
    """Stop a run; it can be resumed. Example: sft-dist cancel demo"""
    from sft_dist.jobs.cancel import cancel as cancel_run
    from sft_dist.report.status_table import details
    from sft_dist.rundir import find_run

    after = cancel_run(find_run(run), wait_s=wait, now=now)
    typer.echo(f"run {after.name}: {after.state}")
    typer.echo("\n".join(details(after)))


def verify(
    run: RunArgument,
    as_json: JsonFlag = False,
) -> None:
    """Compare a run's checkpoints and its final model with what was saved; changes nothing. Example: sft-dist verify demo"""
    from sft_dist.errors import CheckpointError
    from sft_dist.evaluate.prove import verdict
    from sft_dist.rundir import find_run
    from sft_dist.train.verify import survey

    chosen = find_run(run)
    found, model = survey(chosen), verdict(chosen)
    if as_json:
        typer.echo(json.dumps({**found.facts(), **({"model": model} if model else {})}, indent=2))
    else:
        typer.echo("\n".join(found.lines(over=model is not None)))
    problem = model and model["problem"]
    if model and not as_json and not problem:
        apart = f", logits {model['logits_apart']:.2g} of their spread apart" if "logits_apart" in model else ""
        trained = f"what was trained, {model.get('tensor_count')} tensors{apart}"
        typer.echo(f"model: {model.get('unproven') or trained}")
        if "stops" in model:
            typer.echo(f"model: {model['stops']}")
    found.refuse_damage()
    if problem:
        raise CheckpointError(
            f"the final model of run {found.run}: {problem}",
            hint="resume publishes it again if model/ is removed and a checkpoint of the last step is whole",
        )


def sync(
    runs: RunsArgument = None,
    as_json: JsonFlag = False,
) -> None:
    """Upload what wandb wrote on nodes without a network. Example: sft-dist sync demo"""
    from sft_dist.errors import ConfigError, SftDistError
    from sft_dist.jobs.status import look
    from sft_dist.jobs.sync import recordings
    from sft_dist.jobs.sync import sync as upload

    chosen = _chosen(runs)
    without = [run.name for run in chosen if not recordings(run)]
    if runs and len(without) == len(chosen):
        raise ConfigError(
            f"nothing to sync in {', '.join(without) or ' '.join(runs)}: no logs/wandb/offline-run-*",
            hint="runs write them with tracking.report_to=[wandb], in jobs, or with tracking.wandb_mode=offline",
        )
    live = [it.record.run.path for it in look(chosen)[0] if it.state == "running"]
    results, complaint = upload(chosen, at_work=live)
    if as_json:
        typer.echo(json.dumps({"runs": [it.facts() for it in results], "error": complaint}, indent=2))
    elif not results:
        sys.stderr.write("nothing to sync: no run has offline files of wandb\n")
    for it in () if as_json else results:
        counts = {"uploaded": len(it.uploaded), "in use": len(it.in_use), "refused": len(it.refused)}
        said = [f"{number} {what}" for what, number in counts.items() if number] or ["nothing new"]
        typer.echo(" ".join([f"{it.run.name}: {', '.join(said)}", *([it.url] if it.url else [])]))
    if complaint:
        raise SftDistError(f"wandb did not upload everything: {complaint}", hint="what is missing is tried next time")


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command in (status, logs, cancel, verify, sync):
        app.command()(command)


def _chosen(names: list[str] | None) -> list[RunDir]:
    """The runs that were named; all of the runs root if none was."""
    from sft_dist.jobs.records import find_runs
    from sft_dist.rundir import find_run, runs_root

    if not names:
        return find_runs(runs_root())
    chosen: dict[Path, RunDir] = {}
    for name in names:
        folder = Path(name).expanduser()
        runs = find_runs(folder) if folder.is_dir() and not (folder / "config.yaml").is_file() else []
        for run in runs or [find_run(name)]:
            chosen[run.path.absolute()] = run
    return list(chosen.values())


def _console() -> Console:
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else WIDE)


def _show(lines: Iterator[tuple[str, str]]) -> None:
    """Lines with their labels on stdout, whatever characters it can take."""
    encoding = sys.stdout.encoding or "utf-8"
    for label, line in lines:
        typer.echo(f"{label}| {line}".encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _state(run: RunDir) -> Any:
    """What the run says of itself, and whether a process holds it: unlike the queue, they can be asked twice a second."""
    try:
        return run.read_status().get("state"), run.held()
    except OSError:  # a file server that restarts
        return None


def _ended(run: RunDir) -> bool:
    """Whether nothing more will be logged: no process is left, and no job that may start one."""
    from sft_dist.jobs.status import look

    found = look([run])[0][0]
    over = found.state in ("stopped", "failed", "done", "lost") and not found.verdict.live and not found.unanswered
    return over and not found.record.held  # by a process that is done, and has its last words still to say
