"""A run that a signal stops and that goes on, on as many GPUs or on others, to a final model that is proven.

    python benchmarks/resume.py --shape Qwen3-8B --plans zero3 fsdp2 --out resume.json       # on all GPUs
    python benchmarks/resume.py --shape Qwen3-0.6B --plans ddp zero3 --to 1 --whole          # goes on with one
    python benchmarks/resume.py --shape tiny --plans zero3 --gpus 2 --tokens 8192 --whole    # on a CPU, to try the script

The runs are those of benchmarks/scaling.py, started as a user does: `sft-dist train`, SIGINT once the log of a step is there,
`sft-dist resume` with fewer or more GPUs to see, `sft-dist verify`. Of the parts of a start and an end, seconds by the clock
on the wall: from the signal until the command has ended; from a command to the log of its first step; from the log of
the last step until the command has ended, which is the final model, written, read back and compared. `--whole`
trains the same run without a stop, and compares the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import plans
import scaling

from sft_dist.config.loader import load_run_config, write_config
from sft_dist.files import read_json, read_jsonl
from sft_dist.parallel.adopt import with_values
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import MANIFEST, size_of

SFT_DIST = (sys.executable, "-m", "sft_dist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=scaling.MICRO, default="Qwen3-8B")
    parser.add_argument("--plans", nargs="+", choices=plans.PLANS, default=["zero3", "fsdp2"])
    parser.add_argument("--gpus", type=int, help="default: all; on a CPU, processes")
    parser.add_argument("--to", type=int, help="GPUs of the resumed run; default: as many")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step of each GPU")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--stop-at", type=int, default=4, help="the signal comes once this step is logged")
    parser.add_argument("--whole", action="store_true", help="also the run without a stop")
    parser.add_argument("--keep", action="store_true", help="keep the run directories")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides")
    parser.add_argument("--work", type=Path, default=Path("/tmp/plans"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.gpus = options.gpus or scaling.visible_gpus()
    options.to = options.to or options.gpus
    options.save_at, options.publish = 0, True
    options.work.mkdir(parents=True, exist_ok=True)
    # In a process of its own, which leaves no memory of a GPU behind.
    subprocess.run([sys.executable, plans.__file__, "--shape", options.shape, "--work", options.work, "--plans"], check=True)  # fmt: skip
    results = []
    for plan in options.plans:
        overrides = scaling.arms(options.shape, plan, options.gpus, options)[0]["overrides"]
        results.append({"shape": options.shape, "plan": plan, "gpus": options.gpus, "to": options.to})
        results[-1] |= stopped_and_resumed(plan, overrides, options)
        print(json.dumps(results[-1], indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps({"results": results}, indent=1) + "\n")


def stopped_and_resumed(plan: str, overrides: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What was measured of one plan's run, or how far it came."""
    on_gpus = bool(scaling.visible_gpus())
    if on_gpus:  # `auto` follows what the command sees, as it does for a user
        overrides = [one for one in overrides if not one.startswith("parallel.num_processes=")]
    found: dict[str, Any] = {}
    name = f"{options.shape}-{plan}-{options.gpus}-to-{options.to}".replace(".", "_")
    run, whole = (RunDir(options.work / "runs" / it) for it in (name, f"{name}-whole"))
    for one in (run, whole):
        shutil.rmtree(one.path, ignore_errors=True)
    overrides = [one for one in overrides if not one.startswith("run.name=")] + ["checkpoint.verify_export=full"]
    first = command(["train", "smoke", *overrides, f"run.name={name}"], run, options.gpus, stop_at=options.stop_at)
    found["stopped"] = first
    checkpoints = list_checkpoints(run)
    if first["exit_status"] != 75 or not checkpoints:
        return found | {"failed": "was not stopped with a checkpoint"}
    found["checkpoint_gib"] = round(size_of(read_json(checkpoints[0][1] / MANIFEST))[0] / 2**30, 2)
    if not on_gpus and options.to != options.gpus:
        run.config.write_text(
            write_config(with_values(load_run_config(run.config), {"parallel.num_processes": options.to}))
        )
    found["resumed"] = command(["resume", str(run.path)], run, options.to)
    found["verify_exit_status"] = subprocess.run([*SFT_DIST, "verify", str(run.path)], stdout=subprocess.DEVNULL).returncode  # fmt: skip
    proof = read_json(run.model / "PROOF.json") or {}
    found["proof"] = {key: proof.get(key) for key in ("level", "tensor_count", "logits_apart", "tolerance", "checked")}
    found["attempts"] = [(one.get("ended"), one.get("last_step")) for one in read_jsonl(run.attempts)]
    if options.whole:
        found["whole"] = command(["train", "smoke", *overrides, f"run.name={whole.path.name}"], whole, options.gpus)
        mine, other = losses(run), losses(whole)
        found["losses_differ_by"] = max(abs(mine[step] - other[step]) for step in other) if mine.keys() == other.keys() else None  # fmt: skip
    found["losses"] = losses(run)
    if not options.keep:
        for one in (run, whole):
            shutil.rmtree(one.path, ignore_errors=True)
    return found


def command(words: list[str], run: RunDir, gpus: int, *, stop_at: int = 0) -> dict[str, Any]:
    """Run one command with `gpus` GPUs to see, stop it by SIGINT once step `stop_at` is logged, and say when what came."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    earlier = max(losses(run), default=0)
    began = time.monotonic()
    signalled = seen = newest = 0.0
    log = run.path.parent / f"{run.path.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        running = subprocess.Popen(
            [*SFT_DIST, *words], stdout=stream, stderr=stream, env=dict(os.environ, CUDA_VISIBLE_DEVICES=",".join(shown), NCCL_NVLS_ENABLE="0"),
            start_new_session=True,
        )  # fmt: skip
        step = earlier
        while running.poll() is None:
            time.sleep(0.05)
            reached = max(losses(run), default=0)
            if reached > step:
                step, newest = reached, time.monotonic()
                seen = seen or newest
            if stop_at and step >= stop_at and not signalled:
                running.send_signal(signal.SIGINT)
                signalled = time.monotonic()
    ended = time.monotonic()
    rows = [row for row in read_jsonl(run.metrics) if row.get("step", 0) > earlier]
    told = {
        "exit_status": running.returncode,
        "total_s": round(ended - began, 1),
        "first_step_s": round(seen - began, 1) if seen else None,
        "last_step": step,
        "save_stall_s": next((row["save_stall_s"] for row in reversed(rows) if "save_stall_s" in row), None),
        "peak_gib": max((row.get("memory_gib", 0) for row in rows), default=None),
    }
    key, since = ("signal_to_end_s", signalled) if signalled else ("last_step_to_end_s", newest)
    if running.returncode not in (0, 75):
        told["said"] = log.read_text(errors="replace")[-3000:]
    return {**told, key: round(ended - since, 1) if since else None}


def losses(run: RunDir) -> dict[int, float]:
    """The logged loss of each step so far."""
    return {row["step"]: row["loss"] for row in read_jsonl(run.metrics) if "loss" in row}


if __name__ == "__main__":
    sys.exit(main())
