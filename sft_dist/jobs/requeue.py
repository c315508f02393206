"""What follows when an attempt has ended: done, requeue, or over; and the record of it, with the failure's class."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
from dataclasses import dataclass, field
from typing import Any

from sft_dist.config.loader import load_run_config
from sft_dist.errors import SftDistError
from sft_dist.files import append_jsonl, read_jsonl
from sft_dist.jobs.decision import ASKED, FRUITLESS_IF_ASKED, decide, excluded, reached, without_progress
from sft_dist.jobs.evidence import Mark, ask_past, explain, mark
from sft_dist.jobs.failures import Failure, classify
from sft_dist.jobs.last_words import read_words
from sft_dist.jobs.place import Place
from sft_dist.jobs.words import Evidence
from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """How an attempt goes on record."""

    state: str
    """Of the run, in status.json."""
    reason: str | None
    decided: str
    """In attempts.jsonl: `done`, `next job`, `requeue 1 of 10: hang`, `again in this job: hang`, or why it is over."""
    requeue: bool = False
    without: str | None = None
    """The node that the next attempt is not to get."""


@dataclass
class Settler:
    """What an attempt asks when it begins and when it has ended (train.attempt.Settle)."""

    run: RunDir
    place: Place | None = None
    since: Mark = field(default_factory=Mark)
    parent: int = field(default_factory=os.getppid)
    """In a job its task, whose end is a signal, too."""

    def begin(self) -> None:
        """Before the attempt is on record, with the run locked: an earlier one that left no line gets one.

        Raises SftDistError if SLURM brings the job back after attempts that got nowhere; that is then the state of the run.
        """
        with contextlib.suppress(OSError):  # a record that cannot be kept is no reason not to train
            bury(self.run, self.place)
            if (why := spent(self.run, self.place)) is not None:
                self.run.write_status(state="failed", reason=why)
                raise SftDistError(
                    why,
                    hint=f"see logs and nodes: sft-dist status {self.run.quoted}; once more: sft-dist submit {self.run.quoted}",
                )
            # Whoever finds this attempt without a line in the record cannot know from elsewhere which job it was.
            self.run.write_status(job=job_facts(self.place) if self.place is not None and self.place.marker else None)
        self.since = mark(self.run, self.place)

    def __call__(
        self, state: str, reason: str | None, number: int, complete: bool
    ) -> tuple[str, str | None, dict[str, Any]]:
        """State and reason for status.json, and what is added to the line in attempts.jsonl."""
        facts: dict[str, Any] = {} if self.place is None else job_facts(self.place)
        facts["reached"] = reached(self.run)
        if state == "done":
            verdict = judge_done(complete=complete)
            return verdict.state, verdict.reason, facts if self.place is None else {**facts, "decided": verdict.decided}
        attempt = int(self.run.read_status().get("attempt") or 0)
        try:
            failure = explain(self.run, attempt, state, reason, number, self.place, self.since)
        except (OSError, ValueError, RecursionError) as error:  # a disk that is gone, a file that is damaged
            log.warning("why the attempt ended was not found out: %s", error)
            failure = Failure("unknown", reason or "it ended without a word")
        if failure.kind in ASKED and os.getppid() != self.parent:
            failure = Failure("unknown", f"{failure.sentence}, since the job's task was killed", failure.evidence)
        # Who was asked to stop leaves, whatever else has happened.
        verdict = judge(self.run, self.place, state, failure, facts, stays=state == "failed" and not number)
        facts |= {"failure": failure.facts(), "decided": verdict.decided}
        if verdict.without:
            facts["without"] = verdict.without
        return verdict.state, verdict.reason, facts


def job_facts(place: Place) -> dict[str, Any]:
    """What the record of an attempt says about its job; an array's task has SLURM's number for it, too."""
    facts: dict[str, Any] = {"job_id": place.job, "restart": place.restart, "nodes": list(place.nodes)}
    number = os.environ.get("SLURM_JOB_ID")
    return {**facts, "slurm_job_id": number} if "_" in place.job and number else facts


def judge_done(*, complete: bool) -> Verdict:
    """`complete` is whether nothing of the run is left to do."""
    return Verdict("done", None, "done") if complete else Verdict("queued", "waits for the next job", "next job")


def judge(
    run: RunDir, place: Place | None, state: str, failure: Failure, line: dict[str, Any], *, stays: bool = False
) -> Verdict:
    """What follows from an attempt that did not end well; `line` is what its line in attempts.jsonl will hold.

    With `stays` the run may begin anew in this job.
    """
    if place is None or not place.marker:
        over = "over: it was stopped" if state == "stopped" else "over: it failed, and nothing requeues it here"
        return Verdict(state, failure.sentence, over)
    if run.cancelled.exists():
        return Verdict(state, failure.sentence, "over: it was cancelled")
    history = [*read_jsonl(run.attempts), line]
    # A job whose user named its nodes would wait for ever without one of them.
    spare = failure.kind == "node" and not load_run_config(run.config).slurm.nodelist
    decision = decide(failure, history, place.requeues, place.restart + place.again, spare=spare, stays=stays)
    reason = "; ".join(part for part in (failure.sentence, decision.why) if part)
    if decision.requeue or decision.here:
        return Verdict("queued", reason, decision.text, decision.requeue, decision.without)
    return Verdict(state, reason, decision.text)


def spent(run: RunDir, place: Place | None) -> str | None:
    """Why a job that was requeued must not begin once more; None if it may.

    An attempt that ends by itself decides what follows. Of one whose node was lost SLURM decides, and it does not count.
    """
    if place is None or not place.restart:
        return None
    rows = read_jsonl(run.attempts)
    fruitless = without_progress(rows) if rows and rows[-1].get("job_id") == place.job else 0
    if fruitless < FRUITLESS_IF_ASKED:
        return None
    return f"{rows[-1].get('reason') or 'it ended without a word'}; {fruitless} attempts in a row without progress"


def exclude_list(run: RunDir, job_id: str | None) -> str:
    """What the job's ExcNodeList is to be, from the config and from earlier attempts; empty if nothing is new."""
    found = excluded(read_jsonl(run.attempts), job_id)
    if not found:
        return ""
    named = load_run_config(run.config).slurm.exclude
    return ",".join([*([named] if named else []), *found])


def bury(run: RunDir, place: Place | None = None, *, now: bool = False, asked: int = 0) -> dict[str, Any] | None:
    """Put the attempt on record that ended without doing so itself, if there is one; returns its line.

    With `now` it is the attempt of this very start of the job, and what follows is decided, too. `asked` is the signal that it
    did not obey in time.
    """
    status = run.read_status()
    attempt = status.get("attempt") or 0
    if attempt <= len(read_jsonl(run.attempts)) or status.get("state") == "done":
        return None
    line: dict[str, Any] = {"attempt": attempt, "start": status.get("started"), "end": status.get("updated")}
    job = status.get("job")
    line |= job if isinstance(job, dict) else {}
    line["reached"] = reached(run)
    past = ask_past(str(line["job_id"])) if "job_id" in line and not now else None
    reason = str(status.get("reason") or "it ended without a word")
    state = "stopped" if asked else "failed"
    if asked:
        reason = f"it had not ended in time after {signal.Signals(asked).name}, and was killed without a save"
    evidence = Evidence(words=read_words(run, attempt), job=past, reason=reason)
    if asked:
        evidence = dataclasses.replace(
            evidence, state=state, number=asked, in_job=True, cancelled=run.cancelled.exists()
        )
    failure = classify(evidence)
    verdict = judge(run, place, state, failure, line) if now else Verdict("", failure.sentence, "lost")
    line |= {"ended": state, "reason": verdict.reason, "failure": failure.facts(), "decided": verdict.decided}
    if verdict.without:
        line["without"] = verdict.without
    append_jsonl(run.attempts, line)
    if now:
        run.write_status(state=verdict.state, reason=verdict.reason)
    return line
