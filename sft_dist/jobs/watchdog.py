"""The launcher's watch over its workers: which of them has stopped moving, where, since when; and the end of that attempt.

It stands outside of the workers, since a blocked process can neither notice nor say that it is. What counts is the time
that this process saw pass: a job that was suspended with its launcher has not hung.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_dist.config.loader import load_run_config
from sft_dist.errors import SftDistError
from sft_dist.files import utc_now, write_text
from sft_dist.jobs.beats import BEATS, make_folder, read_beats, remove_folder
from sft_dist.jobs.board import board_of
from sft_dist.jobs.decision import reached
from sft_dist.jobs.hang import STOPPED, HangTimeout, Seen, Watch, culprits, never_came, overdue, reason, seen_from
from sft_dist.jobs.last_words import leave_kind
from sft_dist.jobs.place import Place
from sft_dist.jobs.stacks import ask_flight_recorder, dump_stacks, flight_recorder, report_text, state_of, waits
from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)
LOOK_S = 1.0
# How long the other nodes have to say what they see, NCCL to write, and workers to end by themselves.
OTHERS_S, NCCL_S, LEAVE_S = 6.0, 2.0, 5.0


class Watchdog:
    """Watches the processes of one launcher; without `train.hang_timeout`, or without a config, it does nothing."""

    def __init__(self, run: RunDir, expected: int, place: Place | None = None) -> None:
        self.run, self.place = run, place
        self.watch = Watch(expected, _timeout(run))
        self.node = socket.gethostname() if place is None else place.nodes[place.node]
        self.verdict: str | None = None
        """The reason on record once something has hung."""
        self.state = "failed"
        """Of the run, with this reason: `stopped` if it only took too long to stop."""
        self.culprit: Seen | None = None
        """The process that it is put down to, if one can be told."""
        self.folder: Path | None = None
        if self.watch.timeout is not None:
            with contextlib.suppress(OSError):
                self.folder = make_folder()
        self._next = time.monotonic() + LOOK_S

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """What the workers are started with beside `given`."""
        if self.folder is None:
            return {}
        with contextlib.suppress(OSError):
            self.run.logs.mkdir(parents=True, exist_ok=True)
        return {BEATS: str(self.folder), **flight_recorder(given, self.run.logs, self.folder)}

    def hung(self) -> bool:
        """Whether a process of the run has hung. Then it is on record with all that can be found out, and the workers here
        were asked to end if they can; whoever asks must kill them."""
        now = time.monotonic()
        if self.folder is None or self.verdict is not None or now < self._next:
            return False
        self._next = now + LOOK_S
        self.watch.see(read_beats(self.folder), now)
        if self.watch.late() or self.watch.missing() or self._elsewhere():
            self._settle()
            return True
        return False

    def close(self) -> None:
        """The workers have ended. The reason is written again: one that was killed has been put on record as such."""
        if self.verdict is not None:
            self._record()
        if self.folder is not None:
            remove_folder(self.folder)

    def _elsewhere(self) -> bool:
        """Whether another node has noticed a hang."""
        return self.place is not None and self.watch.quiet() and bool(board_of(self.place).said("hang"))

    def give_up(self, asked: str, seconds: float, workers: Sequence[int]) -> None:
        """Put on record that workers were told to stop by the signal `asked`, and have not ended after so many seconds.

        Whoever calls it must kill them.
        """
        if self.folder is not None:
            self.watch.see(read_beats(self.folder), time.monotonic())
        everyone, stacks, pids, name = self._examine("overdue", workers)
        saved = reached(self.run)["checkpoint"]
        kept = f"the run goes on from checkpoint-{saved}" if saved else "there is no checkpoint to go on from"
        self.state = "stopped"
        self.verdict = overdue(everyone, asked, seconds, f"{kept}; stacks in logs/{name}")
        self._publish(name, everyone, stacks, pids)

    def _settle(self) -> None:
        """Find out, say it, write it down, and ask the workers to end if that may help."""
        everyone, stacks, pids, name = self._examine("hang")
        if self.watch.missing() or not everyone:
            self.verdict = never_came(len(self.watch.beats), self.watch.expected, self.watch.waited)
        else:
            self.verdict = reason(everyone, f"stacks in logs/{name}")
            self.culprit = next(iter(culprits(everyone)[0]), None)
        self._publish(name, everyone, stacks, pids)
        # Without one that somebody has stopped the others cannot agree on a step to save.
        if self.culprit is None or self.culprit.state not in STOPPED:
            _ask_to_end(list(pids.values()))

    def _examine(
        self, word: str, workers: Sequence[int] = ()
    ) -> tuple[list[Seen], dict[int, str], dict[int, int], str]:
        """The processes of all nodes, those of this one with their stacks and numbers, and the name for a report.

        `workers` are the processes here, for those that do not beat.
        """
        mine = self.watch.seen(self.node)
        silent = [pid for pid in workers if pid not in {one.pid for one in mine}]
        unknown = [rank for rank in range(len(mine) + len(silent)) if rank not in self.watch.beats]
        for rank, pid in zip(unknown, silent, strict=False):
            mine.append(Seen(rank, self.node, pid, 0, "start", 0.0, float("inf"), state_of(pid)))
        pids = {one.rank: one.pid for one in mine if one.state not in "XZ" and one.phase != "ended"}
        if self.folder is not None and ask_flight_recorder(self.folder):
            time.sleep(NCCL_S)
        stacks = dump_stacks(self.run.logs, pids)
        mine = [dataclasses.replace(one, waits=waits(stacks.get(one.rank, ""))) for one in mine]
        task = f".{self.place.local_task}" if self.place is not None and self.place.tasks_per_node > 1 else ""
        return self._with_others(mine, word), stacks, pids, f"{word}-{self.node}{task}.txt"

    def _publish(self, name: str, everyone: list[Seen], stacks: dict[int, str], pids: dict[int, int]) -> None:
        title = f"{utc_now()} {self.verdict}"
        lines = [_line(one) for one in sorted(everyone, key=lambda one: one.rank)]
        with contextlib.suppress(OSError):
            write_text(self.run.logs / name, report_text(title, lines, stacks, pids))
        log.error("%s", self.verdict)
        self._record()

    def _with_others(self, mine: list[Seen], word: str) -> list[Seen]:
        """Those of all nodes, as far as they say so in time."""
        if self.place is None:
            return mine
        board = board_of(self.place)
        board.say(word, ranks=[one.facts() for one in mine])
        deadline = time.monotonic() + OTHERS_S
        said = board.said(word)
        while len({entry.get("task") for entry in said}) < self.place.tasks and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            said = board.said(word)
        found = {one.rank: one for one in mine}
        for entry in said:
            if entry.get("task") != self.place.task:
                found |= {int(facts["rank"]): seen_from(facts) for facts in entry.get("ranks", [])}
        return list(found.values())

    def _record(self) -> None:
        status = 0 if self.state == "stopped" else 1
        with contextlib.suppress(OSError):
            self.run.write_status(state=self.state, reason=self.verdict, exit_status=status)
        if self.state == "stopped":
            return
        named = self.culprit
        leave_kind(self.run, "hang", self.verdict or "", named.rank if named else None, named.host if named else None)


def _timeout(run: RunDir) -> HangTimeout:
    """`train.hang_timeout` of the run; None if its config cannot be read: whoever trains will say so."""
    try:
        return load_run_config(run.config).train.hang_timeout
    except (SftDistError, OSError):
        return None


def _line(one: Seen) -> str:
    """One process in the table of the report."""
    word = {True: "waits for others", False: "does not wait for others", None: ""}[one.waits]
    where = f"rank {one.rank:<5} {one.host}  process {one.pid}  step {one.step}  phase {one.phase:<9}"
    return f"{where}  silent for {one.seconds:.1f} s  state {one.state}  {word}".rstrip()


def _ask_to_end(pids: Sequence[int]) -> None:
    """SIGTERM, and a moment: one that was only slow saves and ends; for the others it changes nothing."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + LEAVE_S
    while time.monotonic() < deadline and any(state_of(pid) not in "XZ" for pid in pids):
        time.sleep(0.1)
