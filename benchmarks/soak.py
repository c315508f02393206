"""How much of its time a run trains when something happens to it every two minutes: a job on slurm/lab, and faults.

    sudo .venv/bin/python benchmarks/soak.py                                  # 30 minutes, a fault every 120 s
    sudo .venv/bin/python benchmarks/soak.py --minutes 5 --every 60 --nodes 1 --processes 1 --out soak.json

Effective training time is the time in steps that count, over wall time without what SLURM lets a requeued job wait. A step counts
if it stands in metrics.jsonl in the end: those that a fault took back, saves, starts and the time to notice a hang are loss. Its
time is that inside steps, by which metrics.jsonl has tokens_per_s.

Needs what slurm/lab needs. Beside each fault the result has the time until the job waits again, and until a step is done that was not done before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from requeue import call, field, lab, status, until

# `preempt`: SLURM does it for another job on all nodes; `usr2`: its word about the time limit; the others hit one process.
FAULTS = ("usr2", "kill", "preempt", "stop", "exception")
LOOK_S = 0.2


def words(options: argparse.Namespace) -> list[str]:
    many = options.nodes * options.processes > 1
    return [
        *("smoke", "run.name=soak", "train.max_steps=1000000", "train.logging_steps=5", "data.eval_size=0"),
        *("data.train={task: mix, rows: 4000, seed: 1}", f"train.global_batch_size={options.batch}"),
        *("train.eval_strategy=no", "evaluate.before=false", "evaluate.after=false", "evaluate.data=null"),
        *("evaluate.labels=[]", "checkpoint.save_strategy=steps", f"checkpoint.save_steps={options.save_steps}"),
        *(
            f"parallel.plan={'ddp' if many else 'cpu'}",
            f"parallel.num_processes={options.processes if many else 'null'}",
        ),
        *(f"slurm.nodes={options.nodes}", f"slurm.cpus_per_task={options.processes}", "slurm.time=120"),
        *("slurm.max_requeues=1000", f"train.hang_timeout={options.hang_timeout}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=120.0, help="seconds between two faults")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="of each node")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step: its length")
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--hang-timeout", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as name, lab(Path(name) / "lab") as conf:
        os.environ |= {"SLURM_CONF": conf, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        os.environ["SFT_DIST_RUNS"] = f"{name}/runs"
        found = soak(Path(name) / "runs" / "soak", options)
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def soak(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist", "submit", *words(options)], stdout=subprocess.PIPE, text=True, check=True
    )
    job = done.stdout.split()[0]
    until(lambda: field(job, "JobState") == "RUNNING")
    began, waited, events = time.monotonic(), 0.0, []
    until(lambda: (status(run).get("step") or 0) > 0)
    for what in faults(options):
        if time.monotonic() - began + options.every > options.minutes * 60:
            break
        time.sleep(options.every)
        event: dict[str, Any] = {"fault": what, "step": step(run), "at_s": round(time.monotonic() - began)}
        at = time.monotonic()
        strike(what, job, run, options)
        until(lambda: field(job, "JobState") == "PENDING")
        event["pending_s"], reached = round(time.monotonic() - at, 1), step(run)
        queue = time.monotonic()
        time.sleep(1.1)  # in the same second slurmd takes the new start for the one that was revoked
        call("scontrol", "update", f"JobId={job}", "StartTime=now+1")
        until(lambda: field(job, "JobState") == "RUNNING")
        waited += time.monotonic() - queue
        event["queue_s"] = round(time.monotonic() - queue, 1)
        before = attempts(run)[-1]
        event |= {name: before.get(name) for name in ("ended", "decided", "last_step")}
        until(lambda number=before["attempt"], reached=reached: new_steps(run, number, reached))
        event["to_new_step_s"] = round(time.monotonic() - at, 1)
        events.append(event)
        print(event, file=sys.stderr)
    rest = options.minutes * 60 - (time.monotonic() - began)
    time.sleep(max(0.0, rest))
    wall = time.monotonic() - began
    found = rows(run)
    call("scancel", job)
    seconds = in_steps_s(found)
    return {
        "cores": os.cpu_count(),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "wall_s": round(wall, 1),
        "queue_s": round(waited, 1),
        "steps": found[-1]["step"],
        "in_steps_s": round(seconds, 1),
        "effective": round(seconds / (wall - waited), 4),
        "faults": events,
    }


def faults(options: argparse.Namespace) -> Iterator[str]:
    """All of them in turn, in an order that follows from the seed."""
    draw = random.Random(options.seed)
    while True:
        yield from draw.sample(FAULTS, len(FAULTS))


def strike(what: str, job: str, run: Path, options: argparse.Namespace) -> None:
    if what == "usr2":
        call("scancel", "--signal=USR2", job)
    elif what == "preempt":
        call("sbatch", "--parsable", "--partition=high", f"--nodes={options.nodes}", "--exclusive", "--wrap=true")
    else:
        # SIGSEGV stands for an exception that nobody catches: a crash in a library.
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "exception": signal.SIGSEGV}[what]
        many = options.nodes * options.processes > 1
        pattern = f"sft_dist.train {run}$" if many else f"sft_dist.supervise {run}$"
        if not many and what == "stop":
            number = signal.SIGKILL  # one process alone is not watched
        os.kill(int(call("pgrep", "-n", "-f", pattern)), number)


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def step(run: Path) -> int:
    return max((row["step"] for row in rows(run)), default=0)


def in_steps_s(found: list[dict[str, Any]]) -> float:
    """Seconds inside the steps of these rows of metrics.jsonl."""
    before, seconds = 0, 0.0
    for row in found:
        if row.get("tokens_per_s"):
            seconds += (row["tokens"] - before) / row["tokens_per_s"]
            before = row["tokens"]
    return seconds


def new_steps(run: Path, ended: int, reached: int) -> bool:
    """Whether an attempt after number `ended` has come further than step `reached`."""
    found = status(run)
    return found.get("state") == "running" and (found.get("attempt") or 0) > ended and step(run) > reached


if __name__ == "__main__":
    main()
