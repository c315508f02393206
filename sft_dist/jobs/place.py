"""Where a task stands in its job: which node, which task, and where the processes of all nodes meet."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_dist.errors import PreflightError

# How a task tells the processes that it starts; JSON.
PLACE = "SFT_DIST_PLACE"
# Below Linux' ephemeral ports (32768 and up), which other programs of the node may hold at any moment.
FIRST_PORT, LAST_PORT = 20000, 32767


@dataclass(frozen=True)
class Place:
    """One task of a job."""

    job: str
    """SLURM's number of the job, ARRAY_TASK in an array, or that of submitit's local one."""
    restart: int
    """How often the job was requeued before."""
    nodes: tuple[str, ...]
    node: int
    task: int
    """Among all tasks of the job; task 0 keeps the record of the attempt."""
    tasks: int
    address: str
    port: int
    run: str
    requeues: int = 0
    """How often the job may be requeued; 0 without SLURM."""
    marker: str = ""
    """The file whose presence lets the batch script requeue the job."""
    parts: tuple[str, ...] = ("before", "train", "after")
    """What of the run this job does."""
    again: int = 0
    """How often the run began anew within this start of the job."""

    @property
    def key(self) -> str:
        """The name of this start of the job, and of this beginning in it."""
        return f"{self.job}.{self.restart}" + (f".{self.again}" if self.again else "")

    @property
    def tasks_per_node(self) -> int:
        return self.tasks // len(self.nodes)

    @property
    def local_task(self) -> int:
        return self.task % self.tasks_per_node

    def anew(self) -> Place:
        """The same place, for the run's next beginning in it: with a board and a port of its own."""
        again = self.again + 1
        return dataclasses.replace(self, again=again, port=port(self.job, self.restart, again))

    def to_text(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def handed_place() -> Place | None:
    """The place that the task which started this process has handed on; None outside of a job of ours."""
    text = os.environ.get(PLACE)
    if not text:
        return None
    values = json.loads(text)
    return Place(**{**values, "nodes": tuple(values["nodes"]), "parts": tuple(values["parts"])})


def find_place(spec: Mapping[str, Any], env: Mapping[str, str]) -> Place:
    """The place that SLURM (or, without it, submitit's local executor) gives this task."""
    run, parts = str(spec["run"]), tuple(spec["parts"])
    if "SLURM_JOB_ID" not in env or env.get("SUBMITIT_EXECUTOR") == "local":
        job = env.get("SUBMITIT_LOCAL_JOB_ID", "0")
        task, tasks = int(env.get("SUBMITIT_LOCAL_GLOBALID", "0")), int(env.get("SUBMITIT_LOCAL_NTASKS", "1"))
        return Place(job, 0, ("localhost",), 0, task, tasks, "127.0.0.1", port(job, 0), run, parts=parts)
    number, restart = env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT", "0"))
    # The number of an array's last task is that of the whole array: asked by that, SLURM would speak of all tasks.
    array, of_array = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{of_array}" if array and of_array else number
    nodes = expand_nodes(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env["SLURM_NODELIST"])
    return Place(
        job=job,
        restart=restart,
        nodes=nodes,
        node=int(env["SLURM_NODEID"]),
        task=int(env["SLURM_PROCID"]),
        tasks=int(env["SLURM_NTASKS"]),
        address=str(spec.get("master_addr") or "{host}").replace("{host}", nodes[0]),
        port=port(job, restart),
        run=run,
        requeues=int(spec.get("max_requeues", 0)),
        marker=f"{spec['folder']}/requeue.{number}.{restart}",
        parts=parts,
    )


def port(job: str, restart: int, again: int = 0) -> int:
    """Where the processes meet; another one for each beginning, since the last one may still be held."""
    return FIRST_PORT + (zlib.crc32(f"{job}.{restart}".encode()) + again) % (LAST_PORT + 1 - FIRST_PORT)


def expand_nodes(text: str) -> tuple[str, ...]:
    """The names in SLURM's short form, as in `n[1-3,05],gpu7`; here, since images hold no scontrol."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        found += _expand(part.strip())
    if not found:
        raise PreflightError(f"SLURM names no nodes: {text!r}")
    return tuple(found)


def _expand(part: str) -> list[str]:
    match = re.search(r"\[([^\[\]]*)\]", part)
    if match is None:
        return [part]
    names = []
    for piece in match[1].split(","):
        first, dash, last = piece.partition("-")
        numbers = range(int(first), int(last) + 1) if dash else [int(first)]
        names += [f"{part[: match.start()]}{number:0{len(first)}d}" for number in numbers]
    return [name for head in names for name in _expand(head + part[match.end() :])]
