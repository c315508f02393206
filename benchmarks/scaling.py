"""How the speed of one GPU changes as more GPUs of one host train together: weak scaling, one launch for each arm.

    python benchmarks/scaling.py --out scaling.json                          # all shapes and plans, on 1, 2, 4, ... GPUs
    python benchmarks/scaling.py --shapes Qwen3-4B --gpus 1 2 --plans single zero3
    python benchmarks/scaling.py --shapes tiny --gpus 1 2 --tokens 8192      # on a CPU, to try the script

Every GPU gets as many tokens a step, whatever their number: rows of exactly 2,048 tokens (what packing makes of any rows),
about 41 % of them trained; random weights. Micro batches and gradient checkpointing depend on the shape only, so that all
arms of a shape compute the same; layers are compiled. Speed is counted by the clock on the wall between the logs of two
steps. The last step runs under torch's profiler on one process and is not timed: communication that is exposed is GPU time
with a communication kernel and no other. MFU counts the model's own operations, as metrics.jsonl does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import plans

# Tokens of a micro batch, and whether layers are computed again in the backward pass: what fits one H200 with all states.
MICRO = {"tiny": (4096, False), "Qwen3-0.6B": (32768, False), "Qwen3-4B": (16384, True), "Qwen3-8B": (16384, True)}
ROW = 2048
# What holds all states of the 8B shape on each GPU does not fit.
SHARDED = ("zero1", "zero2", "zero3", "fsdp2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=MICRO, default=["Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B"])
    parser.add_argument("--gpus", nargs="+", type=int, help="default: 1, 2, 4, ... as far as there are any")
    parser.add_argument("--plans", nargs="+", choices=plans.PLANS, default=list(plans.PLANS))
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step of each GPU")
    parser.add_argument("--steps", type=int, default=7, help="the first two are not timed, the last is profiled")
    parser.add_argument("--save-at", type=int, default=0, help="save a checkpoint, and resume from it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides")
    parser.add_argument("--publish", action="store_true", help="write the final model")
    parser.add_argument("--work", type=Path, default=Path("/tmp/plans"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="seconds for one launch")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    plans.write_rows(options.work)
    results: list[dict[str, Any]] = []
    for shape in options.shapes:
        options.shape = shape
        plans.make_model(shape, options.work)
        for gpus in options.gpus or powers_of_two(visible_gpus()):
            options.processes = gpus
            for plan in options.plans:
                if (plan == "single") != (gpus == 1) or (shape == "Qwen3-8B" and plan not in SHARDED):
                    continue
                for found in plans.launch(plan, arms(shape, plan, gpus, options), options):
                    results.append({"shape": shape, "gpus": gpus, **found})
                    print(line(results), flush=True)
                    if options.out:
                        options.out.write_text(json.dumps({"results": results}, indent=1) + "\n")


def arms(shape: str, plan: str, gpus: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run, and the same from its checkpoint if one is saved."""
    tokens, checkpointing = MICRO[shape]
    rows, steps = tokens // ROW, options.tokens // tokens
    name = f"{shape}-{plan}-{gpus}".replace(".", "_")
    overrides = [
        f"run.name={name}", f"run.dir={options.work / 'runs'}", f"model.name={options.work / shape}", "model.chat_template=chatml",
        f"parallel.plan={plan}", *([] if plan == "single" else [f"parallel.num_processes={gpus}"]),
        f"data.train={options.work / 'full.jsonl'}", f"data.max_length={ROW}", *plans.CUT, "evaluate.before=false", "evaluate.after=false",
        "train.learning_rate=1e-5", f"train.max_steps={options.steps}", "train.logging_steps=1", "train.eval_strategy=no",
        f"train.global_batch_size={rows * steps * gpus}", f"train.per_device_train_batch_size={rows}",
        f"train.gradient_checkpointing={str(checkpointing).lower()}", "train.compile_layers=true",
        *(["checkpoint.save_strategy=steps", f"checkpoint.save_steps={options.save_at}"] if options.save_at else ["checkpoint.save_strategy=no"]),
        *options.set,
    ]  # fmt: skip
    run = {
        "kind": "ours", "plan": plan, "part": "speed", "name": name, "overrides": overrides, "warm_up": 2, "profile": True,
        "save_at": options.save_at, "publish": options.publish,
    }  # fmt: skip
    return [run, {**run, "part": "resume", "profile": False, "publish": False}] if options.save_at else [run]


def line(results: list[dict[str, Any]]) -> str:
    """The last result in one line, with its share of one GPU's speed where that was measured."""
    last = results[-1]
    speed = last.get("tokens_per_s_per_gpu")
    alone = [one.get("tokens_per_s_per_gpu") for one in results if one["shape"] == last["shape"] and one["gpus"] == 1]
    share = f" ({100 * speed / alone[0]:.1f} % of one)" if speed and alone and alone[0] else ""
    profile = {key: value for key, value in last.get("profile", {}).items() if key != "longest_s"}
    more = {
        key: last.get(key) for key in ("mfu", "peak_gib", "first_step_s", "save_s", "load_s", "publish_s", "total_s")
    }
    return (
        f"{last['shape']} x{last['gpus']} {last['plan']} {last['part']}: {speed} tokens/s/GPU{share} {more} {profile}"
    )


def visible_gpus() -> int:
    """GPUs of this machine, asked of its driver: a process that has used CUDA could not make the models of the next."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([part for part in shown.split(",") if part])
    if shutil.which("nvidia-smi") is None:
        return 0
    told = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(told.stdout.splitlines())


def powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


if __name__ == "__main__":
    sys.exit(main())
