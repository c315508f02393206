"""Hand runs to SLURM, or to a background process here, by way of submitit."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.config.rules_slurm import gpus_of, minutes
from sft_dist.config.schema import Config
from sft_dist.config.schema_slurm import SlurmConfig
from sft_dist.errors import ConfigError, PreflightError, SftDistError
from sft_dist.files import read_json, utc_now, write_json, write_text
from sft_dist.jobs.board import board_file
from sft_dist.jobs.container import JobContainer, job_container, spec_inside
from sft_dist.jobs.node import NodeJob
from sft_dist.jobs.offline import caches
from sft_dist.jobs.queue import call, local_cluster
from sft_dist.jobs.requeue import bury
from sft_dist.jobs.script import sbatch_options, script_text, setup_lines
from sft_dist.process import apart
from sft_dist.rundir import RunDir

EVERYTHING = ("before", "train", "after")
# The jobs of --chain: what each does, and whether it needs all nodes.
CHAIN = {"prepare": ("before",), "train": ("train",), "evaluate": ("after",)}
# Without a queue nothing brings back a run that reached a limit which nobody has set.
NO_LIMIT_MIN = 366 * 24 * 60
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Part:
    """One job to submit: the run, what of it, and how many tasks a node gets."""

    run: RunDir
    config: Config
    parts: tuple[str, ...] = EVERYTHING
    tasks_per_node: int = 1
    kind: str = "run"

    @property
    def nodes(self) -> int:
        """Only the training uses more than one."""
        return self.config.slurm.nodes if "train" in self.parts else 1


def slurm_folder(run: RunDir) -> Path:
    """Where submitit keeps scripts, pickles and logs of the run's jobs."""
    return run.path.absolute() / "slurm"


def needs_slurm(*, local: bool) -> None:
    """PreflightError without submitit or, unless `local`, without SLURM."""
    _submitit()
    if not local and shutil.which("sbatch") is None:
        raise PreflightError(
            "there is no SLURM on this host (no sbatch)", hint="add --local to run in the background here"
        )


def dry_script(
    parts: Sequence[Part], *, folder: Path | None = None, after: Sequence[str] = (), name: str | None = None
) -> str:
    """The script that `submit` would hand to sbatch for these parts."""
    _submitit()
    folder = folder or slurm_folder(parts[0].run)
    return script_text(_options(parts[0], folder, after, name), folder, _container(parts[0]).python, len(parts))


def submit(
    parts: Sequence[Part],
    *,
    folder: Path,
    after: Sequence[str] = (),
    local: bool = False,
    name: str | None = None,
    goes_on: bool = False,
) -> list[str]:
    """Submit alike jobs, several of them as one array called `name`; returns SLURM's number for each.

    With `goes_on` an earlier job of the same run may be at work already. Raises PreflightError without submitit or SLURM,
    SftDistError with sbatch's words if it refuses.
    """
    needs_slurm(local=local)
    submitit = _submitit()
    folder.mkdir(parents=True, exist_ok=True)
    options = _options(parts[0], folder, after, name)
    for part in parts:
        board = board_file(part.run.path.absolute())
        board.parent.mkdir(parents=True, exist_ok=True)
        board.touch()
        if not goes_on:
            part.run.cancelled.unlink(missing_ok=True)
            bury(part.run)  # before the new job's state stands where the last sign of life of the one before was
            part.run.write_status(state="queued", reason=None)
        if not local:
            text = script_text(options, folder, _container(parts[0]).python, len(parts))
            write_text(part.run.plan / "job.sbatch", text)
    jobs = [NodeJob(_spec(part, folder)) for part in parts]
    try:
        with _outside_of_jobs(submitit):
            if local:
                submitted = [_submit_here(submitit, parts[0], folder, jobs[0])]
            else:
                python = _container(parts[0]).python
                executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_python=python)
                executor.update_parameters(**{f"slurm_{option}": value for option, value in options.items()})
                with executor.batch() if len(jobs) > 1 else contextlib.nullcontext():
                    submitted = [executor.submit(job) for job in jobs]
    except Exception as error:
        said = f"sbatch refused the job: {_last_words(error)}"
        for part in parts:
            part.run.write_status(state="failed", reason=said)
        hint = f"correct it and go on with: sft-dist submit {parts[0].run.quoted} slurm.FIELD=VALUE"
        raise SftDistError(said, hint=hint) from error
    ids = [str(job.job_id) for job in submitted]
    for part, number in zip(parts, ids, strict=True):
        _record(part, number, folder, local=local)
    return ids


def submit_in_turn(parts: Sequence[Part], *, after: Sequence[str] = (), local: bool = False) -> list[str]:
    """Submit the jobs of one run, each to start when the one before is done; if one is refused, none stays in the queue."""
    ids: list[str] = []
    for part in parts:
        waits_for = ids[-1:] or after
        try:
            ids += submit([part], folder=slurm_folder(part.run), after=waits_for, local=local, goes_on=bool(ids))
        except SftDistError:
            if ids:
                call(["scancel", *ids])
            raise
    return ids


def _options(part: Part, folder: Path, after: Sequence[str], name: str | None = None) -> dict[str, Any]:
    options = sbatch_options(
        part.config,
        folder,
        tasks_per_node=part.tasks_per_node,
        nodes=part.nodes,
        after=after,
        container=_container(part),
    )
    if part.kind != "run":
        options["job_name"] += f"-{part.kind}"
    return {**options, "job_name": name or options["job_name"]}


def _container(part: Part) -> JobContainer:
    return job_container(part.config, part.run.path.absolute().parent)


def local_gpus(slurm: SlurmConfig) -> str:
    """CUDA_VISIBLE_DEVICES of a job on this machine: the first of those that this shell may use. Raises ConfigError."""
    count = gpus_of(slurm)[1]
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if named and count > len(named):
        raise ConfigError(
            f"slurm.gpus_per_node is {count}, but CUDA_VISIBLE_DEVICES names {len(named)}: {','.join(named)}"
        )
    return ",".join((named or [str(number) for number in range(count)])[:count])


def _submit_here(submitit: Any, part: Part, folder: Path, job: NodeJob) -> Any:
    """Start the job in the background of this machine, in bash as on a node, out of reach of this terminal's Ctrl-C."""
    slurm = part.config.slurm
    start = folder / "start.sh"
    lines = [*setup_lines(slurm), f"export CUDA_VISIBLE_DEVICES={shlex.quote(local_gpus(slurm))}"]
    write_text(start, "\n".join([*lines, f'exec setsid {shlex.quote(sys.executable)} "$@"']) + "\n")
    executor = submitit.LocalExecutor(folder=folder, python=f"bash {shlex.quote(str(start))}")
    executor.update_parameters(
        timeout_min=NO_LIMIT_MIN if slurm.time is None else minutes(slurm.time),
        signal_delay_s=slurm.signal_delay_s,
        tasks_per_node=part.tasks_per_node,
        gpus_per_node=gpus_of(slurm)[1],
    )
    with apart(folder / "controller.log"):
        return executor.submit(job)


def _spec(part: Part, folder: Path) -> dict[str, Any]:
    """What the node needs to know beyond the run directory: plain values, no secrets."""
    config, slurm = part.config, part.config.slurm
    env = {**dict.fromkeys(OFFLINE, "1"), **caches()}
    if "wandb" in config.tracking.report_to and config.tracking.wandb_mode is None:
        env["WANDB_MODE"] = "offline"
    return {
        **spec_inside(config),
        "run": str(part.run.path.absolute()),
        "folder": str(folder),
        "parts": list(part.parts),
        "max_requeues": slurm.max_requeues,
        "master_addr": slurm.master_addr,
        "local_scratch": slurm.local_scratch,
        "env": env,
    }


def _record(part: Part, number: str, folder: Path, *, local: bool) -> None:
    """Add the job to slurm/job.json, which status, logs and cancel read."""
    path = slurm_folder(part.run) / "job.json"
    jobs = (read_json(path) or {}).get("jobs") or []
    entry = {
        "job_id": number,
        "run": str(part.run.path.absolute()),
        "kind": part.kind,
        "cluster": "local" if local else local_cluster(),
        "submitted": utc_now(),
        "nodes": part.nodes,
        "gpus_per_node": gpus_of(part.config.slurm)[1],
        "stdout": str(folder / f"{number}_0_log.out"),
        "stderr": str(folder / f"{number}_0_log.err"),
    }
    write_json(path, {"jobs": [*jobs, entry]})


@contextlib.contextmanager
def _outside_of_jobs(submitit: Any) -> Iterator[None]:
    """From inside a job sbatch would take over its settings; which cluster it is stays."""
    cluster = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    with submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext():
        os.environ.update(cluster)
        yield


def _last_words(error: Exception) -> str:
    lines = [re.sub(r"^sbatch: (error: )?", "", line).strip() for line in str(error).splitlines()]
    said = [line for line in lines if line]
    return "; ".join(said[-2:]) if said else type(error).__name__


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise PreflightError("the package submitit is not installed", hint="pip install 'sft-dist[slurm]'") from None
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "WARNING")
    return submitit
