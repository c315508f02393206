"""When a process counts as hung, and which of several is the one that the others wait for. Numbers in, words out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sft_dist.jobs.beats import CYCLE, Beat
from sft_dist.jobs.stacks import state_of

HangTimeout = float | int | Literal["auto"] | None
# Seconds in the phases that nothing measured says anything of. While the main process prepares rows the others wait, and
# that takes hours for many; what a model on a slow disk takes, and torch.compile, is minutes.
LIMITS = {"start": 900.0, "prepare": 14400.0, "load": 1800.0, "save": 1800.0, "publish": 3600.0}
FIRST_STEPS_S = 900.0
# A step may take so many usual ones, but never less than FLOOR_S: file servers pause for minutes. torch's own collectives
# give up after 1800 s; CEILING_S is well before, unless a single step comes near it.
USUAL_STEPS, FLOOR_S, CEILING_S, ROOM = 20, 300.0, 1200.0, 3
USUAL_SAVES = 5
# A longer gap between two looks means that this process did not run either.
GAP_S = 5.0
# From here on without a beat it may be that another node has noticed a hang, and the board is read.
QUIET_S = 10.0
# The states of a process that a signal or a debugger has stopped (proc(5)).
STOPPED = ("T", "t")


def limit_s(beat: Beat, timeout: HangTimeout, *, stopped: bool = False) -> float:
    """Seconds without a beat after which a process that last said this counts as hung; `timeout` is train.hang_timeout.

    One that a signal has `stopped` has no more time than a step: it waits for no file server, whatever its phase.
    """
    if stopped and beat.phase in CYCLE:
        beat = dataclasses.replace(beat, phase="step")
    if timeout is None or beat.phase == "ended":
        return float("inf")
    asked = 0.0 if timeout == "auto" else float(timeout)
    if beat.phase == "save" and beat.save_s:
        return max(asked, FLOOR_S, USUAL_SAVES * beat.save_s)
    if beat.phase in LIMITS:
        return max(asked, LIMITS[beat.phase])
    if not beat.step_s:
        return max(asked, FIRST_STEPS_S)
    if asked:
        return max(asked, FLOOR_S) if beat.phase in ("evaluate", "ask") else asked
    return max(FLOOR_S, min(USUAL_STEPS * beat.step_s, CEILING_S), ROOM * beat.step_s)


@dataclass(frozen=True)
class Seen:
    """A process as its launcher saw it when something hung."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    seconds: float
    """Since its last beat, as far as the launcher watched."""
    limit_s: float
    state: str = "?"
    """The kernel's letter: R runs, S sleeps, D waits for a disk, T is stopped, Z has ended."""
    waits: bool | None = None
    """Whether its stack says that it waits for other processes; None without a stack."""

    @property
    def position(self) -> tuple[int, int, int]:
        return Beat(self.pid, self.rank, 0, self.step, self.phase).position

    def facts(self) -> dict[str, Any]:
        # JSON has no infinity.
        return {**dataclasses.asdict(self), "limit_s": min(self.limit_s, 1e9)}

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watch:
    """For how long each process has not beaten."""

    def __init__(self, expected: int, timeout: HangTimeout) -> None:
        self.expected, self.timeout = expected, timeout
        self.beats: dict[int, Beat] = {}
        self.seconds: dict[int, float] = {}
        self.waited = 0.0
        """For those that have not come yet."""
        self._last: float | None = None

    def see(self, beats: Sequence[Beat], now: float) -> None:
        """Take in what the processes last said, at this moment of the monotonic clock."""
        passed = 0.0 if self._last is None else min(max(0.0, now - self._last), GAP_S)
        self._last = now
        for beat in beats:
            before = self.beats.get(beat.rank)
            moved = before is None or (before.count, before.pid) != (beat.count, beat.pid)
            self.seconds[beat.rank] = 0.0 if moved else self.seconds[beat.rank] + passed
            self.beats[beat.rank] = beat
        self.waited = 0.0 if len(self.beats) >= self.expected else self.waited + passed

    def late(self, state: Callable[[int], str] = state_of) -> list[int]:
        """The ranks that have been silent for longer than their phase allows."""
        found = []
        for rank, beat in self.beats.items():
            silent = self.seconds[rank]
            if silent >= limit_s(beat, self.timeout) or (
                # /proc is asked only for those that would be late if they were stopped.
                silent >= limit_s(beat, self.timeout, stopped=True) and state(beat.pid) in STOPPED
            ):
                found.append(rank)
        return found

    def missing(self) -> bool:
        """Whether a process has had its time to start, and did not."""
        return self.timeout is not None and self.waited >= LIMITS["start"]

    def quiet(self) -> bool:
        """Whether any process was silent for long enough to ask what the other nodes see."""
        silent = (
            min(QUIET_S, limit_s(beat, self.timeout, stopped=True) / 2) <= self.seconds[rank]
            for rank, beat in self.beats.items()
            if beat.phase != "ended"
        )
        return any(silent)

    def seen(self, host: str, state: Callable[[int], str] = state_of) -> list[Seen]:
        """All processes of this node as they stand."""
        states = {rank: state(it.pid) for rank, it in self.beats.items()}
        return [
            Seen(
                rank, host, it.pid, it.step, it.phase, round(self.seconds[rank], 1),
                limit_s(it, self.timeout, stopped=states[rank] in STOPPED), states[rank],
            )
            for rank, it in self.beats.items()
        ]  # fmt: skip


def seen_from(facts: Mapping[str, Any]) -> Seen:
    """The inverse of `facts`."""
    names = [field.name for field in dataclasses.fields(Seen)]
    return Seen(**{name: facts[name] for name in names if name in facts})


def culprits(everyone: Sequence[Seen]) -> tuple[list[Seen], str]:
    """Those that the others wait for, and the sign they are known by; ([], "") if nothing tells them apart.

    The signs, strongest first: it is stopped; it is behind the others; it hangs in the kernel, at a disk; its stack is
    not in a collective while others' are.
    """
    alive = [one for one in everyone if one.phase != "ended" and one.state not in "ZX"]
    stopped = [one for one in alive if one.state in STOPPED]
    if stopped:
        return stopped, "stopped, by SIGSTOP or a debugger"
    positions = sorted({one.position for one in alive})
    if len(positions) > 1:
        return [one for one in alive if one.position == positions[0]], "behind the others"
    disk = [one for one in alive if one.state == "D"]
    if disk and len(disk) < len(alive):
        return disk, "waiting for a disk or a network file system"
    busy = [one for one in alive if one.waits is False]
    if busy and any(one.waits for one in alive):
        return busy, "not in a collective, where the others wait"
    return ([alive[0]], "") if len(alive) == 1 else ([], "")


def reason(everyone: Sequence[Seen], report: str) -> str:
    """One line for status.json: which rank, where, in which phase, for how long, and the file with all stacks."""
    late = [one for one in everyone if one.seconds >= one.limit_s] or list(everyone)
    worst = max(late, key=lambda one: one.seconds)
    found, sign = culprits(everyone)
    if not found:
        where = f"all {len(everyone)} ranks, none behind the others, longest {worst},"
        return f"hang: {where} are {_since(worst)} ({_allowed(worst)}); {report}"
    first = found[0]
    others = f", as are ranks {_listed([one.rank for one in found[1:]])}" if len(found) > 1 else ""
    limit = first if first.seconds >= first.limit_s else worst
    text = f"hang: {first} is {_since(first)}" + (f", {sign}{others}" if sign else "")
    return f"{text} ({_allowed(limit)}); {report}"


def overdue(everyone: Sequence[Seen], asked: str, seconds: float, report: str) -> str:
    """The line for processes that were told to stop by the signal `asked` and did not within so many seconds."""
    there = [one for one in everyone if one.phase != "ended" and one.state not in "ZX"]
    ranks = f"ranks {_listed([one.rank for one in there])}" if len(there) != 1 else f"rank {there[0].rank}"
    found, sign = culprits(everyone)
    who = f"; {found[0]} is {_since(found[0])}" + (f", {sign}" if sign else "") if found else ""
    return f"{ranks} of {len(everyone)} had not ended {seconds:.0f} s after {asked}{who}; {report}"


def never_came(count: int, expected: int, seconds: float) -> str:
    """The line for processes that have not started to beat."""
    return f"hang: {expected - count} of {expected} processes have not started after {seconds:.0f} s"


def _since(one: Seen) -> str:
    after = f"in phase {one.phase} after step {one.step}" if one.phase in CYCLE else f"in phase {one.phase}"
    return f"{after} for {one.seconds:.0f} s"


def _allowed(one: Seen) -> str:
    return f"limit {one.limit_s:.0f} s" if one.limit_s < 1e9 else "no limit"


def _listed(ranks: Sequence[int]) -> str:
    """At most eight of them."""
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
