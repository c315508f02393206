"""The job as sbatch gets it: options, and the lines of shell before and after the run. Every value is quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_dist.config.rules_slurm import gpus_of, minutes
from sft_dist.config.schema import Config
from sft_dist.config.schema_slurm import SlurmConfig
from sft_dist.errors import ConfigError
from sft_dist.jobs.container import JobContainer

# Names and their short form, as in n[1-3],gpu7.
NODE_LIST = r"[A-Za-z0-9._,\[\]-]+"
# srun ends a step so long after its first task, if others are still there.
WAIT_S = 120


def sbatch_options(
    config: Config,
    folder: Path,
    *,
    tasks_per_node: int = 1,
    nodes: int | None = None,
    after: Sequence[str] = (),
    container: JobContainer | None = None,
) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor; `folder` is where it keeps the job's files.

    Raises ConfigError for a folder whose name sbatch would not take as it is.
    """
    check_folder(folder)
    slurm, container = config.slurm, container or JobContainer()
    options: dict[str, Any] = {
        "job_name": str(config.run.name),
        "time": minutes(slurm.time),
        "nodes": nodes or slurm.nodes,
        "ntasks_per_node": tasks_per_node,
        "signal_delay_s": slurm.signal_delay_s,
        "setup": [*container.before, *setup_lines(slurm), *container.after],
        "teardown": teardown_lines(folder, slurm.max_requeues),
        # A task that fails takes the others with it; one that has left does not keep them.
        "srun_args": ["--kill-on-bad-exit=1", f"--wait={WAIT_S}", *container.srun_args],
    }
    for name in ("partition", "account", "qos", "constraint", "exclude", "nodelist", "cpus_per_task"):
        if getattr(slurm, name) is not None:
            options[name] = getattr(slurm, name)
    more: dict[str, Any] = {name: getattr(slurm, name) for name in ("mem", "reservation") if getattr(slurm, name)}
    if slurm.gpus_per_node and gpus_of(slurm)[1]:
        more["gpus-per-node"] = str(slurm.gpus_per_node)
    # Without it some clusters do not requeue a job whose node was lost.
    more["requeue" if slurm.max_requeues else "no-requeue"] = True
    given = {name.strip("-").replace("_", "-"): value for name, value in slurm.extra.items()}
    more |= {option: value for option, value in given.items() if value is not False}  # which takes back a profile's
    if after:
        wanted = ["afterok:" + ":".join(after), *([str(more["dependency"])] if more.get("dependency") else [])]
        more |= {"kill-on-invalid-dep": "yes", "dependency": ",".join(wanted)}
    return {**options, "additional_parameters": more}


def check_folder(folder: Path) -> None:
    """ConfigError for a path in which sbatch sees patterns, or whose line it would break."""
    text = str(folder)
    if "%" in text or "\\" in text or "'" in text or not text.isprintable():
        hint = "choose another run.dir: no %, backslash, single quote or line break in the whole path"
        raise ConfigError(f"sbatch cannot write logs to {text!r}", hint=hint)


def setup_lines(slurm: SlurmConfig) -> list[str]:
    """What the batch script does before srun; sbatch's own environment is that of whoever submits."""
    lines = []
    if slurm.modules:
        lines.append("type module >/dev/null 2>&1 || . /etc/profile")
        lines += [f"module load {shlex.quote(name)} || exit 1" for name in slurm.modules]
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if slurm.socket_ifname else ()
    variables = {**dict.fromkeys(names, slurm.socket_ifname or ""), **slurm.env}
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    # srun of SLURM 22.05 to 23.02 forgets --cpus-per-task: a task would have one CPU.
    lines.append('[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"')
    # After sbatch --export=NONE, on some clusters the default, srun would give the tasks nothing of what is set here.
    lines.append("export SLURM_EXPORT_ENV=ALL")
    for line in slurm.setup:
        lines += [*line.splitlines(), '[ "$?" = 0 ] || exit 1']
    return lines


def teardown_lines(folder: Path, max_requeues: int) -> list[str]:
    """Requeue if the job's first task left the marker in `folder`, or was ended before it could hear a signal or decide."""
    marker = f'{shlex.quote(str(folder))}/requeue."$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"'
    return requeue_lines(marker, unheard=max_requeues)


def requeue_lines(marker: str, unheard: int = 0) -> list[str]:
    """Requeue on the host, where there is an scontrol, if there is a `marker` (a word of shell) and nobody cancelled.

    The marker is `marker_text`. Up to `unheard` times also if TERM or USR2 ended the step before the first task left
    MARKER.begun: Python loads for a while on a network file system, and a preempted job that ends is not requeued by SLURM.
    As often if a task was killed, for want of memory or by hand, while MARKER.begun names the run: nobody has decided then.

    Nodes can be excluded only once the job waits again, and until then SLURM is ending this script: it stays for the moment
    that takes.
    """
    again = '[ -z "$run" ] || [ -e "$run/.cancelled" ] || again=yes'
    late = f'[ "${{SLURM_RESTART_COUNT:-0}}" -ge {unheard} ]'
    killed = f'[ -n "$run" ] || [ ! -e "$marker.begun" ] || {late} || IFS= read -r run <"$marker.begun"'
    early = f'[ -e "$marker.begun" ] || {late} || again=yes'
    return [
        "rc=$?",
        f"marker={marker}",
        'run= exclude= again=; [ ! -e "$marker" ] || { IFS= read -r run; IFS= read -r exclude; } <"$marker"',
        *([f'case "$rc" in 9 | 137) {killed} ;; esac'] if unheard else []),
        again,
        *([f'case "$rc" in 12 | 15 | 140 | 143) {early} ;; esac'] if unheard else []),
        # The last task of an array has the array's number: requeued by that, all tasks would go, also those at work.
        'job=$SLURM_JOB_ID; [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID',
        'if [ -n "$again" ]; then',
        "  [ -z \"$exclude\" ] || trap '' TERM",
        # The controller may be restarting. Or SLURM has requeued the job by itself, and it may be at work again elsewhere:
        # this script is then what a node that went down has left.
        "  for pause in 5 15 40 0; do",
        '    scontrol requeue "$job" && break',
        '    sleep "$pause"',
        '    case "$(scontrol show job "$job" 2>/dev/null)" in',
        '    "" | *" Restarts=${SLURM_RESTART_COUNT:-0} "*) ;;',
        "    *) exclude=; break ;;",
        "    esac",
        "  done",
        '  [ -z "$exclude" ] || scontrol update JobId="$job" ExcNodeList="$exclude"',
        "fi",
        'exit "$rc"',
    ]


def marker_text(run: str, exclude: str = "") -> str:
    """The marker's lines: the run's folder, and the nodes that the job is to do without, as ExcNodeList takes them."""
    return f"{run}\n{exclude if re.fullmatch(NODE_LIST, exclude) else ''}\n"


def python_command(folder: Path, python: str) -> str:
    """What srun starts: submitit's loader of the pickled job, by a Python whose command is given as shell text."""
    return f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"


def script_text(options: Mapping[str, Any], folder: Path, python: str, count: int = 1) -> str:
    """The batch script of a job, or of an array of `count`, character by character as submitit writes it. Needs no SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    tasks = count if count > 1 else None
    return str(_make_sbatch_string(command=python_command(folder, python), folder=folder, map_count=tasks, **options))
