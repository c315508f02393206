"""What a job that is asked to stop costs: from the signal to a place in the queue, and from the start to the next step.

    sudo .venv/bin/python benchmarks/requeue.py                 # 5 requeues of two nodes with two processes each, on slurm/lab
    sudo .venv/bin/python benchmarks/requeue.py --requeues 20 --out results.json

Needs what slurm/lab needs. The recipe is `smoke`, on CPUs: its save is short, so what is measured is everything around it.
The time that SLURM itself lets a requeued job wait is taken out: the job is started by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAB = Path(__file__).resolve().parents[1] / "slurm" / "lab"
WORDS = [
    *("smoke", "run.name=requeue", "train.max_steps=1000000", "train.logging_steps=100", "data.eval_size=0"),
    *("train.eval_strategy=no", "evaluate.before=false", "evaluate.after=false", "evaluate.data=null"),
    *("evaluate.labels=[]", "checkpoint.save_strategy=no", "parallel.plan=ddp", "parallel.num_processes=2"),
    *("slurm.nodes=2", "slurm.cpus_per_task=2", "slurm.time=60", "slurm.max_requeues=1000"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requeues", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="requeue-", dir="/tmp") as name, lab(Path(name) / "lab") as conf:
        os.environ |= {"SLURM_CONF": conf, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        os.environ["SFT_DIST_RUNS"] = f"{name}/runs"
        rows, submit_s = measure(Path(name) / "runs" / "requeue", options.requeues)
    found = {"cores": os.cpu_count(), "submit_s": submit_s, "requeues": rows, "median": medians(rows)}
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


@contextlib.contextmanager
def lab(folder: Path) -> Any:
    subprocess.run([LAB / "up", "--dir", folder, "--no-accounting"], check=True, stdout=sys.stderr)
    try:
        yield str(folder / "slurm.conf")
    finally:
        subprocess.run([LAB / "down", "--dir", folder], check=True, stdout=sys.stderr)


def measure(run: Path, requeues: int) -> tuple[list[dict[str, float]], float]:
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist", "submit", *WORDS], stdout=subprocess.PIPE, text=True, check=True
    )
    submit_s = round(time.time() - began, 2)
    job = done.stdout.split()[0]
    rows = []
    until(lambda: status(run).get("step", 0) > 0)
    for _ in range(requeues):
        asked = time.time()
        call("scancel", "--signal=USR2", job)
        until(lambda: field(job, "JobState") == "PENDING")
        pending = time.time()
        line = json.loads((run / "attempts.jsonl").read_text().splitlines()[-1])
        manifest = run / "checkpoints" / f"checkpoint-{line['last_step']}" / "MANIFEST.json"
        row = {"save_s": seconds(asked, manifest.stat().st_mtime), "pending_s": seconds(asked, pending)}
        row["save_to_pending_s"] = round(row["pending_s"] - row["save_s"], 2)
        time.sleep(1.1)  # in the same second slurmd takes the new start for the one that was revoked
        call("scontrol", "update", f"JobId={job}", "StartTime=now+1")
        until(lambda: field(job, "JobState") == "RUNNING")
        started = datetime.datetime.fromisoformat(field(job, "StartTime")).timestamp()
        until(lambda last=line["last_step"]: int(status(run).get("step") or 0) > last)
        row["start_to_step_s"] = seconds(started, time.time())
        rows.append(row)
        print(row, file=sys.stderr)
    call("scancel", job)
    return rows, submit_s


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}


def status(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run / "status.json").read_text()))
    return {}


def field(job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S*)", call("scontrol", "--oneliner", "show", "job", job))
    return found[1] if found else ""


def call(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def seconds(start: float, end: float) -> float:
    return round(end - start, 2)


def until(holds: Callable[[], bool], patience_s: float = 300.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            sys.exit(f"waited {patience_s:.0f} s in vain")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
