"""What all that watches over a training costs a step: one training, in which it is off in every other block of steps.

    python benchmarks/watch.py --shape Qwen3-0.6B                    # one GPU, and all of them under ddp
    python benchmarks/watch.py --shape tiny --blocks 8               # on a CPU, to try the script

Off are the heartbeat, the checks for non-finite losses and gradients, the straggler's clock and the agreement of all processes
on a stop at each step; on is everything, as in a run. Blocks alternate, so that both have the same machine and model. A block ends
with a log, which waits for the GPU; the first two blocks do not count. Reported is the median over the blocks of a
step's time, and of each pair of neighbours the difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=plans.SHAPES, default="Qwen3-0.6B")
    parser.add_argument("--plans", nargs="+", choices=plans.PLANS, default=["single", "ddp"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step and GPU, of 2,048 tokens each")
    parser.add_argument("--block", type=int, default=10, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--work", type=Path, default=Path("/tmp/plans"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=int, default=240, help="seconds for one launch")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        task = json.loads(options.worker.read_text())
        measure(task["arms"][0], Path(task["answer"]))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    plans.make_model(options.shape, options.work)
    plans.write_rows(options.work)
    plans.__file__ = __file__  # the worker is this script
    results = []
    for plan in options.plans:
        processes = 1 if plan == "single" else options.processes
        name = f"watch-{options.shape}-{plan}".replace(".", "_")
        arm = {
            "block": options.block,
            "run": str(options.work / "runs" / name),
            "overrides": [
                f"run.name={name}", f"run.dir={options.work / 'runs'}", f"model.name={options.work / options.shape}",
                "model.chat_template=chatml", f"parallel.plan={plan}", *([] if plan == "single" else [f"parallel.num_processes={processes}"]),
                f"data.train={options.work / 'full.jsonl'}", "data.max_length=2048", *plans.CUT, "evaluate.before=false", "evaluate.after=false",
                "train.learning_rate=1e-5", f"train.max_steps={options.block * options.blocks}", f"train.logging_steps={options.block}",
                f"train.global_batch_size={options.rows * processes}", f"train.per_device_train_batch_size={options.rows}",
                "train.gradient_checkpointing=false", "train.compile_layers=false", "train.eval_strategy=no", "checkpoint.save_strategy=no",
            ],
        }  # fmt: skip
        for found in plans.launch(plan, [arm], options):
            results.append({"plan": plan, "processes": processes, **found})
            print(json.dumps({key: value for key, value in results[-1].items() if key != "step_ms"}), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"shape": options.shape, "results": results}, indent=1) + "\n")


def measure(arm: dict[str, Any], answer: Path) -> None:
    """In a worker: train, with everything that watches switched off in every other block."""
    from sft_dist.config.loader import load_config, write_config
    from sft_dist.files import write_text
    from sft_dist.jobs.beats import BEATS, make_folder, remove_folder
    from sft_dist.parallel.world import this_world
    from sft_dist.rundir import RunDir
    from sft_dist.train import heartbeat, publish, worker
    from sft_dist.train.attempt import attempt, joined
    from sft_dist.train.ranks import join, leave
    from sft_dist.train.settle import resolve_here

    run, config = RunDir(Path(arm["run"])), load_config("smoke", arm["overrides"]).config
    world = this_world()
    folder = make_folder()
    os.environ[BEATS] = str(folder)
    heartbeat.begin(world.rank, run.path)
    resolved = resolve_here(config)
    ranks = join(world, use_cpu=resolved.use_cpu)
    if ranks.is_main:
        shutil.rmtree(run.path, ignore_errors=True)
        write_text(run.config, write_config(config))
    ranks.barrier()
    publish.publish_model = lambda *_, **__: None
    ends = switch(arm["block"])
    with attempt(run) if ranks.is_main else joined(run, reports=False) as current:
        worker.train(run, current, resolved, ranks)
    if ranks.is_main:
        each = [1000 * (now - then) / arm["block"] for then, now in itertools.pairwise(ends)][1:]
        on, off = each[0::2], each[1::2]  # the first block is before the list, the second, without, was its first one
        pairs = [with_it - without for with_it, without in zip(on, off, strict=False)]
        found = {
            "on_ms": round(statistics.median(on), 3),
            "off_ms": round(statistics.median(off), 3),
            "difference_ms": round(statistics.median(pairs), 3),
            "differences_ms": [round(min(pairs), 3), round(max(pairs), 3)],
            "share_percent": round(100 * statistics.median(pairs) / statistics.median(off), 2),
            "step_ms": {"off": [round(one, 3) for one in off], "on": [round(one, 3) for one in on]},
        }
        answer.write_text(json.dumps(found) + "\n")
    leave()
    heartbeat.end()
    remove_folder(folder)


def switch(block: int) -> list[float]:
    """From now on what watches does nothing in every other block of steps; when each block ended."""
    from transformers import TrainerCallback

    from sft_dist.train.callbacks import RunRecorder
    from sft_dist.train.health import Heartbeat
    from sft_dist.train.numbers import Numbers, SaveGuard
    from sft_dist.train.ranks import Ranks
    from sft_dist.train.stragglers import Stragglers

    ends: list[float] = []
    works = [True]

    def sometimes(owner: Any, name: str, instead: Any) -> None:
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (inner if works[0] else instead)(*args, **kwargs))

    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    for owner in (Heartbeat, Numbers, SaveGuard, Stragglers):
        for name in set(events) & set(vars(owner)) - {"on_train_begin", "on_train_end"}:
            sometimes(owner, name, lambda *_, **__: None)
    sometimes(Ranks, "largest", lambda self, number: number)
    log = RunRecorder.on_log

    def logged(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        done = log(self, args, state, control, logs=logs, **kwargs)
        if "loss" in (logs or {}):
            ends.append(time.monotonic())
            works[0] = (state.global_step // block) % 2 == 0
        return done

    RunRecorder.on_log = logged  # type: ignore[method-assign]
    return ends


if __name__ == "__main__":
    sys.exit(main())
