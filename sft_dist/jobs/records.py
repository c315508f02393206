"""What a run directory says about its run, read without trusting it: files may be missing, torn, foreign or not ours."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sft_dist.files import moment, read_json, read_jsonl
from sft_dist.jobs.queue import is_job_id
from sft_dist.rundir import RunDir

# metrics.jsonl grows for days; its last rows are within the first of these many bytes from its end, or the second.
TAIL_BYTES = (1 << 16, 1 << 20)
MAX_ROWS = 200

Row = Mapping[str, Any]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Submitted:
    """One job that was submitted for a run: an entry of slurm/job.json."""

    id: str
    """123, or 123_4 for a task of an array."""
    cluster: str | None = None
    submitted: datetime.datetime | None = None
    nodes: int | None = None
    gpus: int | None = None
    """On all nodes together."""
    folder: Path | None = None
    """Where its log files are: the run's own, or one that the runs of an array share."""
    run: Path | None = None
    """The run directory that it works on, as it was when it was submitted."""

    def of_another(self, run: RunDir) -> bool:
        """Whether it works on another directory than `run`, which is then a copy; a run that was moved is not there any more."""
        try:
            return self.run is not None and self.run.is_dir() and not self.run.samefile(run.path)
        except OSError:
            return False


@dataclass(frozen=True)
class Lock:
    """Who holds the run, or held it last."""

    pid: int
    host: str
    since: datetime.datetime


@dataclass(frozen=True)
class Record:
    """What the run directory says. Nothing here was checked against processes or the queue."""

    run: RunDir
    status: Row
    attempts: tuple[Row, ...] = ()
    jobs: tuple[Submitted, ...] = ()
    """Oldest first."""
    rows: tuple[Row, ...] = ()
    """The last ones of metrics.jsonl."""
    gpus: int | None = None
    """GPUs of the latest attempt; 0 on CPUs, None where nothing says."""
    lock: Lock | None = None
    held: bool = False
    cancelled: bool = False
    problems: tuple[str, ...] = ()

    @property
    def heard(self) -> datetime.datetime | None:
        """The last sign of life."""
        return moment(self.status.get("updated"))

    @property
    def step(self) -> int | None:
        """Of status.json, which is some seconds late, also where the process was killed; the last log event may know more."""
        said = whole(self.status.get("step"))
        logged = whole(self.rows[-1].get("step")) if self.rows else None
        return max(said, logged) if said is not None and logged is not None else said


def find_runs(root: Path) -> list[RunDir]:
    """The folders in `root` that are runs, and those that cannot be looked into; [] if there is no `root`."""
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [RunDir(root / name) for name in names if _is_run(root / name)]


def read_record(run: RunDir) -> Record:
    """Read what there is; what cannot be read is named in `problems` and left out."""
    problems: list[str] = []

    def tried(read: Callable[[], Value], path: Path, otherwise: Value) -> Value:
        try:
            return read()
        except (OSError, ValueError, RecursionError) as error:
            what = error.strerror if isinstance(error, OSError) else "damaged"
            problems.append(f"{path.relative_to(run.path)} cannot be read ({what})")
            return otherwise

    status = tried(lambda: read_json(run.status), run.status, None)
    if not isinstance(status, dict):
        problems += [] if problems else [f"status.json is {'missing' if status is None else 'damaged'}"]
        status = {}
    nothing: list[Row] = []
    attempts = tried(lambda: list[Row](read_jsonl(run.attempts)), run.attempts, nothing)
    job_file = run.path / "slurm" / "job.json"
    return Record(
        run=run,
        status=status,
        attempts=tuple(row for row in attempts if isinstance(row, dict)),
        jobs=tried(lambda: submitted_jobs(read_json(job_file)), job_file, ()),
        rows=tried(lambda: last_rows(run.metrics), run.metrics, ()),
        gpus=tried(lambda: _gpus(read_json(run.env)), run.env, None),
        lock=tried(lambda: _lock(run.lock), run.lock, None),
        held=run.held(),
        cancelled=tried(run.cancelled.exists, run.cancelled, False),
        problems=tuple(problems),
    )


def submitted_jobs(content: Any) -> tuple[Submitted, ...]:
    """The jobs of slurm/job.json: one object, or {"jobs": [...]} with one for each submission, oldest first."""
    entries = content if isinstance(content, list) else [content]
    if isinstance(content, dict) and isinstance(content.get("jobs"), list):
        entries = content["jobs"]
    return tuple(job for entry in entries if (job := _submitted(entry)) is not None)


def last_rows(path: Path) -> tuple[Row, ...]:
    """The last rows of a JSON Lines file, among them one with a loss if there is one near; it is not read whole."""
    rows: list[Row] = []
    for block in TAIL_BYTES:
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - block))
                lines = stream.read(block).split(b"\n")
        except FileNotFoundError:
            return ()
        rows = [row for row in map(_parsed, lines[size > block :][-MAX_ROWS:]) if row is not None]
        if size <= block or any("loss" in row for row in rows):
            break
    return tuple(rows)


def whole(value: Any) -> int | None:
    """`value` as a count, None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15 else None


def _is_run(path: Path) -> bool:
    try:
        os.scandir(path).close()
        return any((path / name).exists() for name in ("config.yaml", "status.json"))
    except OSError:
        return True


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _submitted(entry: Any) -> Submitted | None:
    if not isinstance(entry, dict):
        return None
    number, task = str(entry.get("job_id")), whole(entry.get("array_task"))
    number = number if task is None or "_" in number else f"{number}_{task}"
    if not is_job_id(number):
        return None
    stdout, where = entry.get("stdout"), entry.get("run")
    folder = Path(stdout).parent if isinstance(stdout, str) and "\0" not in stdout else None
    run = Path(where) if isinstance(where, str) and "\0" not in where else None
    cluster, nodes, each = entry.get("cluster"), whole(entry.get("nodes")), whole(entry.get("gpus_per_node"))
    return Submitted(
        id=number,
        cluster=cluster if isinstance(cluster, str) and cluster else None,
        submitted=moment(entry.get("submitted")),
        nodes=nodes,
        gpus=None if nodes is None or each is None else nodes * each,
        folder=folder,
        run=folder.parent if run is None and folder is not None and folder.name == "slurm" else run,
    )


def _gpus(environment: Any) -> int | None:
    resolved = environment.get("resolved") if isinstance(environment, dict) else None
    if not isinstance(resolved, dict):
        return None
    return 0 if resolved.get("use_cpu") else whole(resolved.get("world_size"))


def _lock(path: Path) -> Lock | None:
    """The process that wrote its name into the lock file; it does so when it takes the lock."""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            said, since = stream.read(1000), os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None
    found = re.match(r"process (\d{1,9}) on (\S+)", said, re.ASCII)
    return Lock(int(found[1]), found[2], datetime.datetime.fromtimestamp(since, datetime.UTC)) if found else None


def gpus_of_attempt(row: Row, jobs: Sequence[Submitted], otherwise: int | None) -> int | None:
    """GPUs of all nodes of an attempt on record: its own number, else that of its job, else `otherwise` (of env.json)."""
    gpus = whole(row.get("gpus"))
    if gpus is None:
        gpus = {it.id: it.gpus for it in jobs}.get(str(row.get("job_id")))
    return otherwise if gpus is None else gpus
