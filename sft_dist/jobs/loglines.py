"""Lines of a run's log files that say why it failed: of SLURM, torch, NCCL, the driver, the shell, and tracebacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sft_dist.jobs.signs import RULES, XID, XIDS, case_of_exception

# From each file: a rank's traceback and what NCCL says after it.
TAIL_BYTES = 1 << 18
MAX_LINE = 2000

_LABEL = re.compile(r"\[(?:rank|default)(\d+)\]: ?")
_TORCH = re.compile(
    r"\[(?:rank\d+\]:\[)?[EF]\d* ?[\d:. ]*(?:ProcessGroup\w+|TCPStore|socket|Module|CUDA\w+|logger)\.(?:cpp|hpp)"
)
_SPOKEN = (
    _TORCH,
    re.compile(r"\S+:\d+:\d+ \[-?\d+\] .*NCCL WARN "),
    re.compile(r"  what\(\):  "),
    re.compile(r"(?:nvidia-smi: )?(?:Failed to initialize NVML: |Unable to determine the device handle for )"),
    re.compile(r"(?:rank \d+: )?error: (?:/\S+: )?(?=No space left on device$|Disk quota exceeded$|Read-only file system$)"),
)  # fmt: skip
_KERNEL = re.compile(r"(?:\[[^\]]{1,30}\] |\w{3} +\d+ [\d:]+ \S+ kernel: (?:\[ *[\d.]+\] )?)?(?=NVRM: Xid )")
_SLURM = re.compile(r"(?:slurmstepd(?:-\S+)?|srun|slurmd|sbatch): (?:error: )?")
_SLURM_RULES = (
    (re.compile(r"[Dd]etected \d+ oom[-_]kill event|Exceeded (job|step) memory limit|task[ \d,-]+: Out Of Memory"), "job_memory"),
    (re.compile(r"\*\*\* JOB \d\S* ON \S+ CANCELLED AT \S+ DUE TO TIME LIMIT"), "out_of_time"),
    (re.compile(r"\*\*\* JOB \d\S* ON \S+ CANCELLED AT \S+ DUE TO PREEMPTION"), "preempted"),
    (re.compile(r"DUE TO NODE FAILURE|Node failure on \S+|launch failed|due to node failure"), "node_down"),
    (re.compile(r"\*\*\* JOB \d\S* ON \S+ CANCELLED AT \S+ \*\*\*"), "cancelled"),
)  # fmt: skip
_SRUN_NODE = re.compile(
    r"(?:Node failure on |srun: error: (?!Node failure)|\*\*\* (?:JOB|STEP) \S+ ON )(?P<node>[A-Za-z0-9][\w.-]*)"
)
_SHELL = re.compile(r"(?:/\S+|bash|sh): line \d+: +\d+ (Killed|Bus error|Segmentation fault)\b")
_RAISED = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Timeout|Enabled|gaierror))(?:: (.*))?$")
_ERRNO = re.compile(r"\[Errno (\d{1,3})\]")


@dataclass(frozen=True)
class Spoken:
    """A line that says why."""

    case: str
    """A key of signs.CASES, or `signal` for a process that was killed."""
    line: str
    rank: int | None = None
    node: str | None = None


def spoken(text: str) -> Iterator[Spoken]:
    """What the lines of one log file say, oldest first."""
    lines = [piece for line in text.split("\n") for piece in line.rstrip("\r").split("\r")[-1:]]
    trace = False
    before = ""
    for whole in lines:
        label = _LABEL.match(whole)
        rank = int(label[1]) if label else None
        line = (whole[label.end() :] if label else whole)[:MAX_LINE]
        if line.startswith("Traceback (most recent call last):"):
            trace = True
        found = _of_line(whole[:MAX_LINE], line, in_trace=trace and before.startswith("  "))
        if found is not None:
            number = rank if rank is not None else _rank(line)
            yield Spoken(found, line.strip(), number, _node(line))
        if trace and line and not line.startswith((" ", "Traceback")):
            trace = False
        before = line


def of_kernel(lines: Sequence[str], pids: Sequence[int]) -> Iterator[Spoken]:
    """What the kernel said about GPUs, and about these processes of ours."""
    for line in lines:
        if found := XID.search(line):
            ours = found[2] is None or not found[2].isdigit() or int(found[2]) in pids
            if ours and int(found[1]) in XIDS:
                yield Spoken(_xid_case(line), line.strip())


def _of_line(whole: str, line: str, *, in_trace: bool) -> str | None:
    if slurm := _SLURM.match(line):
        said = line[slurm.end() :]
        return next((case for pattern, case in _SLURM_RULES if pattern.search(said)), None)
    if _KERNEL.match(line) and (found := XID.search(line)):
        return _xid_case(line) if int(found[1]) in XIDS else None
    if any(pattern.match(text) for pattern in _SPOKEN for text in (whole, line)):
        return next((case for pattern, case in RULES if pattern.search(line)), None)
    if _SHELL.match(line):
        return "signal"
    if in_trace and (raised := _RAISED.match(line)):
        number = _ERRNO.search(raised[2] or "")
        return case_of_exception(raised[1], raised[2] or "", int(number[1]) if number else None)
    return None


def _xid_case(line: str) -> str:
    return next((case for pattern, case in RULES if case in ("ecc", "gpu_lost") and pattern.search(line)), "xid")


def _rank(line: str) -> int | None:
    found = re.search(r"\[(?:PG [^\]]*)?Rank (\d+)\]|^\[rank(\d+)\]", line)
    return int(found[1] or found[2]) if found else None


def _node(line: str) -> str | None:
    found = _SRUN_NODE.search(line)
    return found["node"] if found else None
