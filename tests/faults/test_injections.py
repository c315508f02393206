"""Signals at random moments, to random processes: no hang, no wrong resume, no step lost that need not be lost.

    pytest tests/faults/test_injections.py --injections 50 --seed 7

The seed is printed. The moment is any time between the start of the command and its end, or, for every other injection, a
moment after a step: a start takes longer than the training of a tiny model.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sft_dist.files import read_jsonl, write_json
from sft_dist.jobs.launcher import children
from sft_dist.jobs.stacks import catches, state_of
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import damage

if TYPE_CHECKING:
    from tests.faults.conftest import MakeRun, Server

STEPS, SAVE_STEPS = 24, 3
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# To whom. `all` has skew: each worker gets it up to a second after the first.
WHO = ("command", "one rank", "all", "kill one rank", "kill command")
TWO = ("parallel.plan=ddp", "parallel.num_processes=2")


def rows(run: RunDir) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "grad_norm", "eval_loss")
    trained = [row for row in read_jsonl(run.metrics) if "save_stall_s" not in row]
    return [tuple(row.get(name) for name in names) for row in trained]


def newest(run: RunDir) -> int:
    return next((step for step, path in list_checkpoints(run) if damage(path) is None), 0)


def plan(draw: random.Random, longest_s: float) -> dict[str, Any]:
    """What to do, when and to whom."""
    who = WHO[draw.randrange(len(WHO))]
    after_step = draw.randrange(1, STEPS) if draw.random() < 0.5 else None
    return {
        "who": who,
        "after_step": after_step,
        "after_s": round(draw.uniform(0.0, 0.05 if after_step else longest_s), 3),
        "skew_s": round(draw.uniform(0.0, 1.0), 3),
        "rank": draw.randrange(2),
        "signal": draw.choice(CAUGHT).name,
    }


def attack(run: RunDir, fault: dict[str, Any], done: dict[str, Any]) -> Callable[[int], None]:
    """Do it to the command with the process id that is handed over. `done` says whether somebody was there to catch it."""

    def carry_out(command: int) -> None:
        while max((row["step"] for row in read_jsonl(run.metrics)), default=0) < (fault["after_step"] or 0):
            if state_of(command) in "XZ":
                break
            time.sleep(0.002)
        time.sleep(fault["after_s"])
        number = signal.SIGKILL if fault["who"].startswith("kill") else signal.Signals[fault["signal"]]
        agents = children(command)
        workers = sorted(pid for agent in agents for pid in children(agent))
        whom = {
            "command": [command],
            "kill command": [command],
            "one rank": workers[fault["rank"] : fault["rank"] + 1],
            "kill one rank": workers[fault["rank"] : fault["rank"] + 1],
            "all": workers,
        }[fault["who"]]
        done["sent"] = 0
        for index, pid in enumerate(whom):
            if index:
                time.sleep(fault["skew_s"])
            try:
                # Before Python has its handlers a signal is nobody's, and does what it does.
                if number != signal.SIGKILL and not catches(pid, number):
                    continue
                os.kill(pid, number)
                done["sent"] += 1
            except (ProcessLookupError, FileNotFoundError):
                continue  # it has ended

    return carry_out


def test_signals_at_random_moments(
    server: Server, make_run: MakeRun, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count, seed = request.config.getoption("--injections"), request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"--injections {count} --seed {seed}")
    draw = random.Random(seed)
    straight = make_run(tmp_path, "straight", *TWO)
    longest = server.live(straight)
    assert longest.code == 0, longest.said
    record: list[dict[str, Any]] = []
    for number in range(count):
        run = make_run(tmp_path, f"run-{number}", *TWO)
        fault = plan(draw, longest.seconds)
        print(number, fault, flush=True)
        record.append(injected(server, run, fault, rows(straight)))
    out = request.config.getoption("--injections-out")
    if out:
        write_json(Path(out), {"seed": seed, "injections": record})


def injected(server: Server, run: RunDir, fault: dict[str, Any], wanted: list[tuple[Any, ...]]) -> dict[str, Any]:
    """One injection and the resume after it; what it cost. Server.live fails where something hangs or is left behind."""
    done: dict[str, Any] = {}
    life = server.live(run, meanwhile=attack(run, fault, done))
    trained = max((row["step"] for row in read_jsonl(run.metrics)), default=0)
    saved = newest(run)
    lost = 0 if (run.model / "DONE").is_file() else trained - saved
    killed = fault["who"].startswith("kill")
    # A step that was logged counts as done; the worst moment is the one before a save is complete.
    assert lost <= (SAVE_STEPS if killed else 0), (fault, done, life.said)
    if done["sent"] and not killed:
        assert life.status["state"] in ("stopped", "done"), (fault, done, life.status)
        # Once the run is done a signal only keeps the command from writing the report.
        assert life.code in (75, 0) or life.status["state"] == "done", (fault, done, life.said)
    if done["sent"] and fault["who"] == "kill one rank":
        assert life.status["state"] in ("failed", "done"), (fault, done, life.status)
    if life.status["state"] != "done" and not (run.model / "DONE").is_file():
        again = server.live(run)
        assert again.code == 0, (fault, done, again.said)
        assert run.read_status()["state"] == "done"
    assert rows(run) == wanted, (fault, done, life.said)
    return {**fault, **done, "code": life.code, "trained": trained, "lost_steps": lost, "end_s": round(life.seconds, 2)}
