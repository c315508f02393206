"""Why an attempt failed: from what processes, logs, the kernel and SLURM say, the one cause that the others followed from."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sft_dist.jobs.loglines import Spoken, of_kernel, spoken
from sft_dist.jobs.signs import CASES, KERNEL_KILLED, KINDS, Case, case_of_exception
from sft_dist.jobs.words import Evidence, Word

MAX_EVIDENCE = 300
# Signals that end a process from outside; SIGABRT is what torch and NCCL do to their own when a peer is gone.
ASKED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# By the exit status that our commands have; for a process that left no other word.
BY_EXIT = {2: "config", 3: "config", 4: "data", 5: "checkpoint"}


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    kind: str
    """One of signs.KINDS."""
    sentence: str
    """For the user: what happened, where, and what to do."""
    evidence: str = ""
    """The line that says so, as it was said."""
    node: str | None = None
    rank: int | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON, for attempts.jsonl."""
        return {name: getattr(self, name) for name in ("kind", "sentence", "evidence", "node", "rank")}


@dataclass(frozen=True)
class _Finding:
    rank_of: int
    """0 for a cause, 1 for an unexplained end, 2 for what follows from another's, 3 for an abort."""
    time: float
    failure: Failure


def classify(evidence: Evidence) -> Failure:
    """The first cause; a process that lost its peer is the cause only if no other has one."""
    if evidence.state == "stopped":
        return _stopped(evidence)
    found = [*_of_job(evidence), *_of_words(evidence), *_of_memory(evidence), *_of_lines(evidence)]
    if found:
        return min(enumerate(found), key=lambda item: (item[1].rank_of, item[1].time, item[0]))[1].failure
    # A full disk takes no words: what status.json says of the error is all that is left of it.
    name, colon, message = evidence.reason.partition(": ")
    case = case_of_exception(name, message, None) if colon else None
    if case is not None:
        return _failure(CASES[case], evidence.reason, None, None)
    kind = next((BY_EXIT[word.exit] for word in evidence.words if word.exit in BY_EXIT), "unknown")
    return Failure(kind, evidence.reason or "it ended without a word", evidence.reason[:MAX_EVIDENCE])


def sentence_of_state(state: str) -> str | None:
    """What a job's end means by SLURM's word for it, None if the word itself says enough."""
    case = _STATES.get(state)
    return CASES[case].what if case in ("job_memory", "node_down") else None


def _stopped(evidence: Evidence) -> Failure:
    """An orderly end: who asked for it."""
    kinds = {signal.SIGUSR2: "time_limit", signal.SIGTERM: "preemption"}
    kind = kinds.get(signal.Signals(evidence.number), "cancelled") if evidence.number else "cancelled"
    if evidence.cancelled or not evidence.in_job:
        kind = "cancelled"
    said = signal.Signals(evidence.number).name if evidence.number else ""
    return Failure(kind, evidence.reason or "it was stopped", said)


_STATES = {
    "OUT_OF_MEMORY": "job_memory",
    "NODE_FAIL": "node_down",
    "BOOT_FAIL": "node_down",
    "PREEMPTED": "preempted",
    "TIMEOUT": "out_of_time",
    "DEADLINE": "out_of_time",
    "CANCELLED": "cancelled",
}


def _of_job(evidence: Evidence) -> Iterator[_Finding]:
    job = evidence.job
    if job is None:
        return
    if job.down:
        said = f"SLURM: {', '.join(job.down)} down"
        yield _Finding(0, 0.0, _failure(CASES["node_down"], said, None, job.down[0]))
    case = _STATES.get(job.state)
    if case is not None:
        by = f" by uid {job.by}" if job.by else ""
        more = "".join(f", {part}" for part in (job.exit_code, job.reason) if part)
        yield _Finding(0, 0.0, _failure(CASES[case], f"SLURM: {job.state}{by}{more}", None, None))


def _of_words(evidence: Evidence) -> Iterator[_Finding]:
    for word in sorted(evidence.words, key=lambda it: it.time):
        if word.echo:
            continue
        if word.signal:
            yield from _of_signal(word, evidence)
        elif word.kind in KINDS:
            text = _first_line(word.message) or word.type
            yield _Finding(0, word.time, Failure(word.kind, text, _line(word), word.node, word.rank))
        else:
            yield _of_error(word, evidence)
        yield from _spoken(of_kernel(word.kernel, [word.pid] if word.pid else []), evidence, word.node)


def _of_signal(word: Word, evidence: Evidence) -> Iterator[_Finding]:
    name = signal.Signals(word.signal).name
    killed = any(int(it[1]) == word.pid for line in word.kernel if (it := KERNEL_KILLED.search(line)))
    if word.signal == signal.SIGKILL and (word.oom_kills or killed):
        said = next(iter(word.kernel), f"{name}; the cgroup counts {word.oom_kills} kills for memory")
        yield _Finding(0, word.time, _failure(CASES["host_memory"], said, word.rank, word.node))
    if word.signal in ASKED:
        return
    who = f"rank {word.rank}" if word.rank is not None else "the process of the run"
    text = f"{who} (process {word.pid}) was killed by {name}" if word.pid else f"{who} was killed by {name}"
    place = 3 if word.signal == signal.SIGABRT and _aborts_itself(evidence) else 1
    yield _Finding(place, word.time, Failure("unknown", text, name, word.node, word.rank))


def _aborts_itself(evidence: Evidence) -> bool:
    """Whether a log says that torch ended processes because a collective did not."""
    return any(CASES[it.case].follows for text in evidence.logs.values() for it in spoken(text) if it.case in CASES)


def _of_error(word: Word, evidence: Evidence) -> _Finding:
    errors = [(word.type, word.message, word.errno), *word.chain]
    case = next((found for error in errors if (found := case_of_exception(*error)) is not None), None)
    if case is None:
        return _Finding(1, word.time, Failure("unknown", _line(word), _line(word), word.node, word.rank))
    if case == "disk_full" and evidence.no_inodes:
        case = "inodes"
    place = 2 if CASES[case].follows else 0
    return _Finding(place, word.time, _failure(CASES[case], _line(word), word.rank, word.node))


def _of_memory(evidence: Evidence) -> Iterator[_Finding]:
    """The kernel's kills in the cgroup of the process that keeps the record."""
    killed_one = any(word.signal == signal.SIGKILL or "signal: Killed" in word.message for word in evidence.words)
    if evidence.oom_kills and (killed_one or not evidence.words):
        said = f"the cgroup counts {evidence.oom_kills} kills for memory"
        yield _Finding(0, float("inf"), _failure(CASES["host_memory"], said, None, None))


def _of_lines(evidence: Evidence) -> Iterator[_Finding]:
    pids = [word.pid for word in evidence.words if word.pid]
    yield from _spoken(of_kernel(evidence.kernel, pids), evidence, None)
    for text in evidence.logs.values():
        yield from _spoken(spoken(text), evidence, None)


def _spoken(lines: Iterator[Spoken], evidence: Evidence, node: str | None) -> Iterator[_Finding]:
    """Lines have no times: they come after what processes said themselves, in the order of the file."""
    for it in lines:
        where = it.node if it.node in evidence.nodes else node
        if it.case == "signal":
            text = "a process of the run was killed"
            yield _Finding(1, float("inf"), Failure("unknown", text, it.line[:MAX_EVIDENCE], where, it.rank))
            continue
        case = CASES["inodes" if it.case == "disk_full" and evidence.no_inodes else it.case]
        yield _Finding(2 if case.follows else 0, float("inf"), _failure(case, it.line, it.rank, where))


def _failure(case: Case, said: str, rank: int | None, node: str | None) -> Failure:
    ranks = f"rank {rank}" if rank is not None else ""
    where = f"{ranks} ({node})" if ranks and node else ranks or node or ""
    text = f"{case.what}, on {where}" if where else case.what
    text = f"{text}: {case.advice}" if case.advice else text
    return Failure(case.kind, text, said[:MAX_EVIDENCE], node, rank)


def _line(word: Word) -> str:
    """The error as its traceback's last line names it."""
    name = word.type.rpartition(".")[2]
    return f"{name}: {_first_line(word.message)}"[:MAX_EVIDENCE] if name else _first_line(word.message)


def _first_line(message: str) -> str:
    """The first line, and the second if the first one only announces it."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:MAX_EVIDENCE]
