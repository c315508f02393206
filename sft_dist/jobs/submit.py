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
from sft_dist.errors import ConfigError, PreflightError, SftDistError
from sft_dist.files import read_json, utc_now, write_json, write_text
from sft_dist.jobs.board import board_file
from sft_dist.jobs.node import NodeJob
from sft_dist.jobs.offline import caches
from sft_dist.jobs.queue import is_job_id, local_cluster
from sft_dist.jobs.script import sbatch_options, script_text, setup_lines
from sft_dist.rundir import RunDir, find_run

EVERYTHING = ("before", "train", "after")
# The jobs of --chain: what each does, and whether it needs all nodes.
CHAIN = {"prepare": ("before",), "train": ("train",), "evaluate": ("after",)}
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


def dry_script(part: Part, after: Sequence[str] = ()) -> str:
    """The script that `submit` would hand to sbatch."""
    _submitit()
    return script_text(_options(part, slurm_folder(part.run), after), slurm_folder(part.run), sys.executable)


def submit(
    parts: Sequence[Part], *, folder: Path, after: Sequence[str] = (), local: bool = False, name: str | None = None
) -> list[str]:
    """Submit alike jobs, several of them as one array called `name`; returns SLURM's number for each.

    Raises PreflightError without submitit or SLURM, SftDistError with sbatch's words if it refuses.
    """
    submitit = _submitit()
    if not local and shutil.which("sbatch") is None:
        raise PreflightError(
            "there is no SLURM on this host (no sbatch)", hint="add --local to run in the background here"
        )
    folder.mkdir(parents=True, exist_ok=True)
    options = _options(parts[0], folder, after)
    options["job_name"] = name or options["job_name"]
    for part in parts:
        board = board_file(part.run.path.absolute())
        board.parent.mkdir(parents=True, exist_ok=True)
        board.touch()
        part.run.cancelled.unlink(missing_ok=True)
        part.run.write_status(state="queued", reason=None)
        if not local:
            write_text(part.run.plan / "job.sbatch", script_text(options, folder, sys.executable))
    executor = submitit.AutoExecutor(folder=folder, cluster="local" if local else "slurm")
    executor.update_parameters(**(_local_options(parts[0], folder) if local else _slurm_names(options)))
    jobs = [NodeJob(_spec(part, folder)) for part in parts]
    try:
        with _outside_of_jobs(submitit):
            if len(jobs) == 1:
                submitted = [executor.submit(jobs[0])]
            else:
                with executor.batch():
                    submitted = [executor.submit(job) for job in jobs]
    except Exception as error:
        for part in parts:
            part.run.write_status(state="failed", reason="sbatch refused the job")
        raise SftDistError(f"sbatch refused the job: {_last_words(error)}", hint="look at the section slurm") from error
    ids = [str(job.job_id) for job in submitted]
    for part, number in zip(parts, ids, strict=True):
        _record(part, number, folder, local=local)
    return ids


def last_job(run: RunDir) -> str | None:
    """The number of the job that was submitted last for the run."""
    jobs = (read_json(run.path / "slurm" / "job.json") or {}).get("jobs") or [{}]
    number = jobs[-1].get("job_id")
    return None if number is None else str(number)


def job_numbers(names: Sequence[str]) -> list[str]:
    """What `--after` names: numbers of jobs, or runs, whose last job is meant. Raises ConfigError."""
    found = []
    for name in names:
        number = name if is_job_id(name) else last_job(find_run(name))
        if number is None:
            raise ConfigError(f"--after {name}: that run was never submitted")
        found.append(number)
    return found


def _options(part: Part, folder: Path, after: Sequence[str]) -> dict[str, Any]:
    options = sbatch_options(part.config, folder, tasks_per_node=part.tasks_per_node, nodes=part.nodes, after=after)
    if part.kind != "run":
        options["job_name"] += f"-{part.kind}"
    return options


def _slurm_names(options: dict[str, Any]) -> dict[str, Any]:
    return {f"slurm_{name}": value for name, value in options.items()}


def _local_options(part: Part, folder: Path) -> dict[str, Any]:
    slurm = part.config.slurm
    setup = folder / "setup.sh"
    # submitit joins its lines to one: a comment or an unfinished line would swallow the rest.
    write_text(setup, "\n".join([*setup_lines(slurm), ":"]) + "\n")
    return {
        "timeout_min": minutes(slurm.time),
        "tasks_per_node": part.tasks_per_node,
        "gpus_per_node": gpus_of(slurm)[1],
        "local_setup": [f". {shlex.quote(str(setup))}"],
    }


def _spec(part: Part, folder: Path) -> dict[str, Any]:
    """What the node needs to know beyond the run directory: plain values, no secrets."""
    config, slurm = part.config, part.config.slurm
    env = {**dict.fromkeys(OFFLINE, "1"), **caches()}
    if "wandb" in config.tracking.report_to and config.tracking.wandb_mode is None:
        env["WANDB_MODE"] = "offline"
    return {
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
