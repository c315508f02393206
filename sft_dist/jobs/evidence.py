"""Where the evidence of a failure is found: what processes left, the logs' new lines, the kernel, and SLURM."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sft_dist.jobs.failures import Failure, classify
from sft_dist.jobs.host_signs import kernel_lines, now, oom_kills
from sft_dist.jobs.last_words import read_words
from sft_dist.jobs.loglines import TAIL_BYTES
from sft_dist.jobs.place import Place
from sft_dist.jobs.queue import call
from sft_dist.jobs.words import Evidence, JobWord
from sft_dist.rundir import RunDir

# Failures that may be the trace of one that only SLURM knows of: a node that is gone says nothing.
ASK_SLURM = {"network", "hang", "unknown"}
DOWN = re.compile(r"down|fail|no_respond|not_responding|powered_down|reboot", re.IGNORECASE)
MAX_LOGS = 64
# Other processes may be about to write theirs: the one that noticed first keeps the record.
WORDS_S = 0.5
# Those of other nodes come when their launcher has ended, by way of a shared filesystem: a process that was killed there is
# the cause of connections lost here.
OTHERS_S = 10.0
FOLLOWS = {"network", "hang"}


@dataclass(frozen=True)
class Mark:
    """How things stood when an attempt began; what was there before is not evidence."""

    sizes: dict[Path, int] = field(default_factory=dict)
    oom_kills: int = 0
    time: float = 0.0


def mark(run: RunDir, place: Place | None = None) -> Mark:
    """How things stand now."""
    return Mark({path: _size(path) for path in log_files(run, place)}, oom_kills(), now())


def log_files(run: RunDir, place: Place | None = None) -> list[Path]:
    """The files that this job, or this process, writes what it says to."""
    found: Iterable[Path] = run.logs.glob("*.log")
    if place is not None and place.marker:
        folder = Path(place.marker).parent
        found = [*found, *folder.glob(f"{place.job}_*_log.err"), *folder.glob(f"{place.job}_*_log.out")]
    return sorted(found)[:MAX_LOGS]


def explain(
    run: RunDir, attempt: int, state: str, reason: str | None, number: int, place: Place | None, since: Mark
) -> Failure:
    """Why the attempt ended, from all that can be found out here. SLURM is asked only if nothing else says it."""
    failed = state == "failed"
    if failed:
        time.sleep(WORDS_S)
    evidence = Evidence(
        words=read_words(run, attempt),
        logs={str(path): text for path in log_files(run, place) if (text := _tail(path, since.sizes.get(path, 0)))},
        oom_kills=max(0, oom_kills() - since.oom_kills),
        kernel=kernel_lines(since.time),
        no_inodes=_no_inodes(run.path),
        nodes=() if place is None else place.nodes,
        state=state,
        reason=reason or "",
        number=number,
        in_job=place is not None,
        cancelled=run.cancelled.exists(),
    )
    failure = classify(evidence)
    deadline = time.monotonic() + (OTHERS_S if failed and len(evidence.nodes) > 1 else 0.0)
    while failure.kind in FOLLOWS and not _is_told(evidence) and time.monotonic() < deadline:
        time.sleep(WORDS_S)
        evidence = dataclasses.replace(evidence, words=read_words(run, attempt))
        failure = classify(evidence)
    if not failed or failure.kind not in ASK_SLURM or place is None or not place.marker:
        return failure
    return classify(dataclasses.replace(evidence, job=ask_job(place)))


def _is_told(evidence: Evidence) -> bool:
    """Whether somebody who watches has said the class."""
    return any(word.kind is not None for word in evidence.words)


def ask_job(place: Place) -> JobWord:
    """What SLURM says of the running job and its nodes; nothing in an image without its commands."""
    said = call(["scontrol", "--oneliner", "show", "job", place.job])
    fields = dict(re.findall(r"(JobState|Reason|ExitCode)=(\S+)", said.text))
    down = []
    if not said.missing:
        listed = call(["sinfo", "--noheader", "--Node", f"--nodes={','.join(place.nodes)}", "--format=%N|%T"])
        pairs = [line.strip().split("|") for line in listed.text.splitlines() if line.count("|") == 1]
        # A star stands for a node that does not answer.
        down = [name for name, state in pairs if name in place.nodes and (state.endswith("*") or DOWN.match(state))]
    reason = fields.get("Reason", "")
    return JobWord(
        state=fields.get("JobState", ""),
        reason="" if reason == "None" else reason,
        exit_code=fields.get("ExitCode", ""),
        down=tuple(dict.fromkeys(down)),
    )


def ask_past(job: str) -> JobWord | None:
    """How the start of the job before this one ended, from accounting; None where nothing says."""
    fields = "State,ExitCode,Reason"
    # Without --duplicates only the newest start of a requeued job is listed.
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--format={fields}"]
    rows = [line.split("|") for line in call([*command, f"--jobs={job}"]).text.splitlines() if line.count("|") == 2]
    past = [row for row in rows if row[0].split()[:1] not in ([], ["RUNNING"], ["PENDING"])]
    if not past:
        return None
    state, exit_code, reason = past[-1]
    by = re.fullmatch(r"CANCELLED by (\d+)", state)
    reason = "" if reason in ("None", "Unknown") else reason
    return JobWord(state.split()[0], reason, exit_code, by[1] if by else "")


def _tail(path: Path, offset: int) -> str:
    """What was written after `offset`; the last part if it is long."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            start = max(offset if offset <= size else 0, size - TAIL_BYTES)
            stream.seek(start)
            return stream.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _no_inodes(path: Path) -> bool:
    try:
        found = os.statvfs(path)
    except OSError:
        return False
    return found.f_files > 0 and found.f_favail == 0 and found.f_bavail > 0
