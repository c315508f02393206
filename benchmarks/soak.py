"""How much of its time a run trains when something happens to it every two minutes: a job on slurm/lab, and faults.

    sudo .venv/bin/python benchmarks/soak.py                                  # 30 minutes, a fault every 120 s
    sudo .venv/bin/python benchmarks/soak.py --minutes 5 --every 60 --nodes 1 --processes 1 --out soak.json

Effective training time is the time in steps that count, over wall time without what SLURM lets a requeued job wait. A step counts
if it stands in metrics.jsonl in the end: those that a fault took back, saves, starts and the time to notice a hang are loss. Its
time is that inside steps, by which metrics.jsonl has tokens_per_s. Loading and logging between steps count as loss as well, so that
the model must not be so small that they are what is measured: the default has 2.4 million parameters, random ones, and rows are
packed (64 short rows for each process took 12 ms of a step of 0.8 s to join).

Needs what slurm/lab needs. Beside each fault the result has the seconds until the attempt was on record, until the job waited (not
where the run began anew in the same job), in the queue, from there to the first step on record, and in all until a step that was not done before.
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

from sft_dist.files import utc_now

# `preempt`: SLURM does it for another job on all nodes; `usr2`: its word about the time limit; the others hit one process.
FAULTS = ("usr2", "kill", "preempt", "stop", "exception")
LOOK_S = 0.2


def words(options: argparse.Namespace) -> list[str]:
    many = options.nodes * options.processes > 1
    return [
        *(
            "smoke",
            f"model.name={options.model}",
            "train.learning_rate=1e-4",
            "run.name=soak",
            "train.max_steps=1000000",
            "train.logging_steps=5",
            "data.eval_size=0",
        ),
        *("data.train={task: mix, rows: 4000, seed: 1}", "data.max_length=512", "data.packing=true"),
        f"train.global_batch_size={options.batch}",
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
    parser.add_argument("--batch", type=int, default=16, help="rows of 512 tokens in a step: its length")
    parser.add_argument("--hidden", type=int, default=192, help="size of the model's hidden states")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--hang-timeout", type=float, default=3.0)
    parser.add_argument("--faults", default=",".join(FAULTS), help="those to choose from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as name, lab(Path(name) / "lab") as conf:
        os.environ |= {"SLURM_CONF": conf, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        os.environ["SFT_DIST_RUNS"] = f"{name}/runs"
        options.model = base(Path(name) / "base", options.hidden, options.layers)
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
        number = len(attempts(run))
        strike(what, job, run, options)
        until(lambda number=number: len(attempts(run)) > number)
        before, begin = attempts(run)[-1], time.monotonic()
        event |= {"on_record_s": round(begin - at, 1)} | {
            it: before.get(it) for it in ("ended", "decided", "last_step")
        }
        reached = step(run)
        if not str(before["decided"]).startswith("again"):
            queued_s = queue(job, event, at)
            waited, begin = waited + queued_s, time.monotonic()
        since = utc_now()
        until(lambda since=since: any(row["time"] > since for row in rows(run)))
        event["start_s"] = round(time.monotonic() - begin, 1)
        until(lambda number=number + 1, reached=reached: new_steps(run, number, reached))
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
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "model")},
        "wall_s": round(wall, 1),
        "queue_s": round(waited, 1),
        "steps": found[-1]["step"],
        "in_steps_s": round(seconds, 1),
        "effective": round(seconds / (wall - waited), 4),
        "faults": events,
    }


def base(folder: Path, hidden: int, layers: int) -> str:
    """The folder of a model of this size, with random weights and the embedded tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sft_dist.train.pretrained import resolve_model

    source = resolve_model("embedded:tiny")
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, head_dim=hidden // 4, **sizes)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def queue(job: str, event: dict[str, Any], at: float) -> float:
    """Wait until the job is in the queue and let it start; the seconds that it was there. Adds to what is known of `event`."""
    until(lambda: field(job, "JobState") == "PENDING")
    event["pending_s"], began = round(time.monotonic() - at, 1), time.monotonic()
    time.sleep(1.1)  # in the same second slurmd takes the new start for the one that was revoked
    call("scontrol", "update", f"JobId={job}", "StartTime=now+1")
    until(lambda: field(job, "JobState") == "RUNNING")
    event["queue_s"] = round(time.monotonic() - began, 1)
    return time.monotonic() - began


def faults(options: argparse.Namespace) -> Iterator[str]:
    """All of them in turn, in an order that follows from the seed."""
    draw, names = random.Random(options.seed), options.faults.split(",")
    while True:
        yield from draw.sample(names, len(names))


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
    path = run / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


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
