"""Every parallelism plan on the GPUs of this machine, beside one GPU and beside plain TRL with the same plan.

    python benchmarks/plans.py --shape Qwen3-0.6B                   # all plans: speed, memory, save, resume, export
    python benchmarks/plans.py --shape Qwen3-4B --plans zero3 fsdp2 --trl none
    python benchmarks/plans.py --shape tiny --plans ddp zero3 --processes 2       # on a CPU, to try the script

The model has random weights of the named shape, the rows are random words whose lengths are spread like chats (lognormal,
median 460 tokens, up to 2048); half of each row is trained. Per plan one launch of torchrun takes, one after the other:

  equal    20 steps of few short rows, with accumulation and without, with and without checkpointing: the losses
  speed    some steps of many tokens, one checkpoint on the way, and the final model as safetensors
  resume   the same run from its checkpoint; its losses must be those of the uninterrupted one
  trl      SFTTrainer with the engine's settings at accelerate's and DeepSpeed's defaults, the same rows, the same varlen
           attention and gradient checkpointing, no padding either: what a good user of plain TRL has

Counted are tokens (no padding) per second and GPU by the clock on the wall, from log to log of each step after the warm-up
that no save lies in; peak memory is torch.cuda.max_memory_allocated of the process with the most, less what was held when
the arm began. `timed` holds what the counted steps computed, for the planner (sft_dist/parallel/calibration.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "intermediate_size": 128, "tie_word_embeddings": True, "vocab_size": 1024},
    "Qwen3-0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
                   "head_dim": 128, "intermediate_size": 3072, "tie_word_embeddings": True, "vocab_size": 151936},
    "Qwen3-4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "head_dim": 128, "intermediate_size": 9728, "tie_word_embeddings": True, "vocab_size": 151936},
    "Qwen3-8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "head_dim": 128, "intermediate_size": 12288, "tie_word_embeddings": False, "vocab_size": 151936},
}  # fmt: skip
PLANS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
WARM_UP = 4
# Rows that are all cut, to be equally long, are meant to be.
CUT = ("data.limits.max_answers_cut=1", "data.limits.min_end_of_turn_trained=0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen3-0.6B")
    parser.add_argument("--plans", nargs="*", choices=PLANS, default=list(PLANS), help="none: only make model and rows")
    parser.add_argument(
        "--parts", nargs="+", choices=["equal", "speed", "resume"], default=["equal", "speed", "resume"]
    )
    parser.add_argument("--trl", nargs="*", choices=PLANS, default=["single", "ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32, help="rows of a micro batch in the speed part")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--save-at", type=int, default=10, help="0 saves no checkpoint")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in the speed part")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers in the speed part")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides for our runs")
    parser.add_argument("--publish", action="store_true", help="write the final model in the speed part")
    parser.add_argument("--work", type=Path, default=Path("/tmp/plans"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=int, default=240, help="seconds for one launch")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work_through(json.loads(options.worker.read_text()))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    make_model(options.shape, options.work)
    long, short = write_rows(options.work)
    if not options.plans:
        return
    results: list[dict[str, Any]] = []
    for plan in options.plans:
        arms = arms_of(plan, options, long, short)
        results += launch(plan, arms, options)
        print(table(results[-len(arms) :]), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"shape": options.shape, "results": results}, indent=1) + "\n")
    print(table(results))


def arms_of(plan: str, options: argparse.Namespace, long: Path, short: Path) -> list[dict[str, Any]]:
    """What one launch does: our runs as overrides of a config, then TRL's."""
    processes = 1 if plan == "single" else options.processes
    model = str(options.work / options.shape)
    base = [f"model.name={model}", f"parallel.plan={plan}", "model.chat_template=chatml"]
    base += [] if plan == "single" else [f"parallel.num_processes={processes}"]
    base += [
        "train.learning_rate=1e-5",
        "evaluate.before=false",
        "evaluate.after=false",
        f"run.dir={options.work / 'runs'}",
    ]
    arms: list[dict[str, Any]] = []

    def ours(part: str, *overrides: str) -> None:
        name = f"{options.shape}-{plan}-{part}".replace(".", "_")
        arms.append(
            {
                "kind": "ours",
                "plan": plan,
                "part": part,
                "name": name,
                "overrides": [*base, f"run.name={name}", *overrides],
            }
        )

    if "equal" in options.parts:
        for micro, checkpointing in ((1, False), (4, False), (4, True)):
            ours(
                f"equal-{4 // micro}x{micro}{'-ck' * checkpointing}",
                f"data.train={short}", "data.max_length=512", f"train.global_batch_size={4 * options.processes}",
                f"train.per_device_train_batch_size={micro}", "train.max_steps=20", "train.logging_steps=1",
                f"train.gradient_checkpointing={str(checkpointing).lower()}", "checkpoint.save_strategy=no",
            )  # fmt: skip
    speed = [
        f"data.train={long}", "data.max_length=2048", f"train.max_steps={options.steps}", "train.logging_steps=1",
        f"train.global_batch_size={options.rows * options.accumulation * processes}",
        f"train.per_device_train_batch_size={options.rows}",
        f"train.gradient_checkpointing={str(options.checkpointing).lower()}", f"train.compile_layers={str(options.compile).lower()}",
        *(["checkpoint.save_strategy=steps", f"checkpoint.save_steps={options.save_at}"] if options.save_at else ["checkpoint.save_strategy=no"]),
    ]  # fmt: skip
    if "speed" in options.parts:
        ours("speed", *speed, *options.set)
        arms[-1] |= {"publish": options.publish, "save_at": options.save_at}
        if "resume" in options.parts and options.save_at:
            arms.append({**arms[-1], "part": "resume", "publish": False})
    if plan in options.trl:
        settings = {
            "rows": options.rows,
            "accumulation": options.accumulation,
            "steps": options.steps,
            "checkpointing": options.checkpointing,
        }
        arms.append(
            {
                "kind": "trl",
                "plan": plan,
                "part": "trl",
                "model": model,
                "rows_file": str(long),
                "base": [*base, *speed],
                **settings,
            }
        )
    return arms


def launch(plan: str, arms: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the arms in one launch; each arm with what was measured, or with what went wrong."""
    name = f"{options.shape}-{plan}-{options.processes}"
    task, answer = options.work / f"{name}.json", options.work / f"{name}.results.jsonl"
    answer.unlink(missing_ok=True)
    task.write_text(json.dumps({"arms": arms, "answer": str(answer)}))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(options.processes),
    ]
    environment = dict(os.environ, NCCL_NVLS_ENABLE="0", TOKENIZERS_PARALLELISM="false")
    if plan == "single":
        command = [sys.executable]
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    log = options.work / f"{name}.log"
    began = time.monotonic()
    with log.open("w") as stream:
        try:
            status = subprocess.run(
                [*command, __file__, "--worker", str(task)],
                env=environment,
                stdout=stream,
                stderr=stream,
                timeout=options.limit,
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    print(f"{options.shape} {plan}: {time.monotonic() - began:.0f} s, exit status {status}", flush=True)
    found = [json.loads(line) for line in answer.read_text().splitlines()] if answer.exists() else []
    if status != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
        shutil.copy(log, (options.out.parent if options.out else options.work) / f"{name}.failed.log")
    return found or [{"plan": plan, "part": "failed"}]


def work_through(task: dict[str, Any]) -> None:
    """In a worker: the arms one after the other, each with what was measured appended to the answer."""
    for arm in task["arms"]:
        forget()
        measured = train_ours(arm) if arm["kind"] == "ours" else train_trl(arm)
        if int(os.environ.get("RANK", "0")) == 0:
            with Path(task["answer"]).open("a") as stream:
                stream.write(json.dumps({"plan": arm["plan"], "part": arm["part"], **measured}) + "\n")
    from sft_dist.train.ranks import leave

    leave()


def forget() -> None:
    """Put back what the arm before left in modules and in the environment."""
    import gc

    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        os.environ.pop(name)
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # or the layers of one arm count as recompilations of another's
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    if "transformers" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    gc.collect()


def train_ours(arm: dict[str, Any]) -> dict[str, Any]:
    """One run of sft-dist through its worker."""
    from sft_dist.config.loader import load_config, write_config
    from sft_dist.files import read_json, read_jsonl, write_text
    from sft_dist.parallel.world import this_world
    from sft_dist.rundir import RunDir
    from sft_dist.train.attempt import attempt, joined
    from sft_dist.train.ranks import join

    loaded = load_config("smoke", arm["overrides"])
    run = RunDir(Path(str(loaded.config.run.dir)) / arm["name"])
    world = this_world()
    from sft_dist.train import publish, worker
    from sft_dist.train.settle import resolve_here

    resolved = resolve_here(loaded.config)
    ranks = join(world, use_cpu=resolved.use_cpu)
    before: list[dict[str, Any]] = []
    if ranks.is_main:
        if arm["part"] == "resume":
            before = read_jsonl(run.metrics)
            for path in run.checkpoints.iterdir():
                if path.name != f"checkpoint-{arm['save_at']}":
                    shutil.rmtree(path)
        else:
            shutil.rmtree(run.path, ignore_errors=True)
        write_text(run.config, write_config(loaded.config))
    ranks.barrier()
    clock = Stopwatch()
    clock.watch(publish, "publish_model", "publish_s", skip=not arm.get("publish"))
    clock.watch_trainer()
    batches = watch_batches(clock)
    steps = watch_steps(clock, profiled=arm.get("profile") and ranks.is_main)
    held = reset_peak()
    began = time.monotonic()
    with attempt(run) if ranks.is_main else joined(run, reports=False) as current:
        worker.train(run, current, resolved, ranks)
    measured = {
        **clock.seconds,
        "first_step_s": round(steps.ends[0] - began, 1),
        "total_s": round(time.monotonic() - began, 1),
        "peak_gib": round(peak(ranks) - held, 2),
        **steps.profile(),
    }
    clock.undo()
    counted = steps.counted(arm.get("warm_up", WARM_UP), arm.get("save_at", 0))
    measured |= computed(ranks.everyones([batch_facts(batch) for batch in batches]), len(steps.ends), counted)
    if not ranks.is_main:
        return measured
    rows = [row for row in read_jsonl(run.metrics) if "loss" in row]
    measured |= {"losses": [row["loss"] for row in rows], "grad_norms": [row.get("grad_norm") for row in rows]}
    measured |= rate([row["tokens"] for row in rows], steps.ends, counted, ranks.size)
    measured["told_tokens_per_s_per_gpu"] = round(statistics.median(row["tokens_per_s"] for row in rows) / ranks.size)
    measured["mfu"] = rows[-1].get("mfu")
    checkpoints = sorted(run.checkpoints.glob("checkpoint-*/MANIFEST.json"))
    if checkpoints:
        files = (read_json(checkpoints[0]) or {})["files"]
        measured["checkpoint_gib"] = round(sum(entry["bytes"] for entry in files.values()) / 2**30, 2)
    if before:
        earlier = {row["step"]: row["loss"] for row in before if "loss" in row}
        later = {row["step"]: row["loss"] for row in rows if row["step"] > arm["save_at"]}
        measured["resumed_losses_differ_by"] = max(abs(earlier[step] - loss) for step, loss in later.items())
    if not arm.get("publish"):
        shutil.rmtree(run.model, ignore_errors=True)
    return measured


def train_trl(arm: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer by itself, on the same tokenised rows in the same order."""
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from sft_dist.config.loader import load_config
    from sft_dist.data.prepare import prepare
    from sft_dist.parallel.world import this_world
    from sft_dist.train.attention import NAME, register
    from sft_dist.train.pretrained import cache_root
    from sft_dist.train.ranks import join
    from sft_dist.train.settle import resolve_here
    from sft_dist.train.tokenizer import load_tokenizer

    plan = arm["plan"]
    config = load_config("smoke", [*arm["base"], "run.name=trl"]).config
    world = this_world()
    resolved = resolve_here(config)
    ranks = join(world, use_cpu=resolved.use_cpu)
    if plan == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    register()
    tokens = load_tokenizer(config.model)
    prepared = prepare(config, tokens.tokenizer, tokens.template, cache_root())
    bf16 = resolved.dtype == "bfloat16"
    settings: dict[str, Any] = {}
    if plan.startswith("zero"):
        auto = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping"),
            "auto",
        )
        zero = {
            "stage": int(plan[-1]),
            **({"stage3_gather_16bit_weights_on_model_save": True} if plan == "zero3" else {}),
        }
        settings["deepspeed"] = {**auto, "bf16": {"enabled": bf16}, "zero_optimization": zero}
    if plan == "fsdp2":
        settings |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "activation_checkpointing": arm["checkpointing"],
                "cpu_ram_efficient_loading": True,
            },
        }
    arguments = SFTConfig(
        output_dir="/tmp/plans/trl", max_steps=arm["steps"], learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to="none",
        per_device_train_batch_size=arm["rows"], gradient_accumulation_steps=arm["accumulation"], padding_free=True, max_length=None,
        bf16=bf16, gradient_checkpointing=arm["checkpointing"] and plan != "fsdp2", optim="adamw_torch_fused", disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=resolved.use_cpu,
        ddp_backend="gloo" if resolved.use_cpu and ranks.size > 1 else None, **settings,
    )  # fmt: skip
    dtype = torch.bfloat16 if bf16 and plan != "fsdp2" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arm["model"], dtype=dtype, attn_implementation=NAME)
    steps: list[tuple[float, int]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                losses.append(float((logs or {})["loss"]))
                steps.append((time.monotonic(), int((logs or {}).get("num_tokens", 0))))

    losses: list[float] = []
    held = reset_peak()
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        processing_class=tokens.tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    measured = {"peak_gib": round(peak(ranks) - held, 2), "losses": losses}
    if len(steps) > WARM_UP + 1:
        seconds = steps[-1][0] - steps[WARM_UP][0]
        measured["tokens_per_s_per_gpu"] = round((steps[-1][1] - steps[WARM_UP][1]) / seconds / ranks.size)
    return measured


class Stopwatch:
    """Adds up the seconds spent in functions that it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._undo: list[tuple[Any, str, Any]] = []

    def watch(self, owner: Any, name: str, key: str, *, skip: bool = False) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if skip:
                return None
            began = time.monotonic()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[key] = round(self.seconds.get(key, 0.0) + time.monotonic() - began, 2)

        self._undo.append((owner, name, inner))
        setattr(owner, name, timed)

    def replace(self, owner: Any, name: str, other: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, other)

    def watch_trainer(self) -> None:
        from transformers import trainer

        from sft_dist.train import saving
        from sft_dist.train.trainer import Trainer

        save = Trainer._save_checkpoint

        def save_on_the_way(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.state.global_step < trainer.state.max_steps:
                save(trainer, *args, **kwargs)

        self.replace(Trainer, "_save_checkpoint", save_on_the_way)
        self.watch(Trainer, "_save_checkpoint", "save_s")
        self.watch(saving, "settled", "manifest_s")  # in a thread, beside the training
        self.watch(Trainer, "_load_from_checkpoint", "load_s")
        self.watch(Trainer, "_load_optimizer_and_scheduler", "load_s")
        self.watch(trainer, "deepspeed_load_checkpoint", "load_s")

    def undo(self) -> None:
        for owner, name, inner in reversed(self._undo):
            setattr(owner, name, inner)


def watch_batches(clock: Stopwatch) -> list[dict[str, Any]]:
    """What this process computes from now on: a dict of tensors for each micro batch of the training, filled as they come."""
    from sft_dist.train import loss

    seen: list[dict[str, Any]] = []
    inner = loss.trained_token_loss

    def watched(model: Any, inputs: dict[str, Any], items: Any) -> Any:
        if model.training:
            seen.append({name: inputs[name].detach() for name in ("input_ids", "position_ids", "targets")})
        return inner(model, inputs, items)

    clock.replace(loss, "trained_token_loss", watched)
    return seen


def batch_facts(batch: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens of a micro batch, how many of them are trained, and the sum of its documents' squared lengths."""
    positions = batch["position_ids"].flatten().tolist()
    starts = [index for index, position in enumerate(positions) if position == 0]
    lengths = [end - start for start, end in itertools.pairwise([*starts, len(positions)])]
    return batch["input_ids"].numel(), batch["targets"].numel(), sum(length**2 for length in lengths)


def computed(everyones: list[list[tuple[int, int, int]]], steps: int, counted: list[int]) -> dict[str, Any]:
    """The largest micro batch of a process, and of the `counted` steps what the planner wants to know."""
    largest = max(tokens for batches in everyones for tokens, _, _ in batches)
    each = len(everyones[0]) // steps
    chosen = [
        [batches[step * each + part] for batches in everyones] for step in counted for part in range(each)
    ]  # of each micro batch in time, what the processes had
    if not chosen:
        return {"largest_micro_batch_tokens": largest}
    tokens = sum(batch[0] for at_once in chosen for batch in at_once)
    slowest = sum(max(batch[0] for batch in at_once) for at_once in chosen)
    count = len(chosen) * len(everyones)
    timed = {
        "mean_tokens": round(tokens / count),
        "mean_length": round(sum(batch[2] for at_once in chosen for batch in at_once) / tokens),
        "trained_share": round(sum(batch[1] for at_once in chosen for batch in at_once) / tokens, 4),
        "fullest_over_mean": round(slowest * len(everyones) / tokens, 4),
        "micro_batches": each,
    }
    return {"largest_micro_batch_tokens": largest, "timed": timed}


class Steps:
    """When each step's log came, and what the GPU did in the last step."""

    def __init__(self, *, profiled: bool) -> None:
        self.ends: list[float] = []
        self.first = 0
        self._profiled, self._profiler = profiled, None

    def begins(self, step: int, last: int) -> None:
        import torch

        if self._profiled and step == last - 1 and torch.cuda.is_available():
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()

    def ended(self, step: int) -> None:
        if not self.ends:
            self.first = step
        self.ends.append(time.monotonic())
        if self._profiler is not None:
            self._profiler.stop()
            self._profiled = False

    def counted(self, warm_up: int, saved_at: int) -> list[int]:
        """Indices of the steps whose time counts: after the warm-up, no save before them, and no profile beside them."""
        last = len(self.ends) - (1 if self._profiler is not None else 0)
        return [index for index in range(warm_up, last) if not saved_at or (self.first + index - 1) % saved_at]

    def profile(self) -> dict[str, Any]:
        """Of the profiled step, in seconds: the GPU's span, its time with a kernel, communication, and what of that nothing hid."""
        if self._profiler is None:
            return {}
        import torch

        kernels = [
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
            for event in self._profiler.profiler.kineto_results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns()
        ]
        if not kernels:
            return {}
        sent = [(start, end) for start, end, name in kernels if "nccl" in name.lower()]
        worked = [(start, end) for start, end, name in kernels if "nccl" not in name.lower()]
        busy, working = union(sent + worked), union(worked)
        longest: dict[str, int] = {}
        for start, end, name in kernels:
            longest[name[:90]] = longest.get(name[:90], 0) + end - start
        ranked = sorted(longest.items(), key=lambda item: -item[1])[:14]
        return {
            "profile": {
                "span_s": round((max(end for _, end, _ in kernels) - min(start for start, _, _ in kernels)) / 1e9, 4),
                "busy_s": round(busy / 1e9, 4),
                "communication_s": round(union(sent) / 1e9, 4),
                "exposed_communication_s": round((busy - working) / 1e9, 4),
                "kernels": len(kernels),
                "longest_s": {name: round(ns / 1e9, 4) for name, ns in ranked},
            }
        }


def union(spans: list[tuple[int, int]]) -> int:
    """The length of what the spans cover together."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def watch_steps(clock: Stopwatch, *, profiled: bool) -> Steps:
    """Note the steps of a run of ours from now on."""
    from sft_dist.train.callbacks import RunRecorder

    steps, begin, log = Steps(profiled=profiled), RunRecorder.on_step_begin, RunRecorder.on_log

    def begins(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> Any:
        steps.begins(state.global_step, state.max_steps)
        return begin(self, args, state, *rest, **kwargs)

    def logged(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        if "loss" in (logs or {}):
            steps.ended(state.global_step)
        return log(self, args, state, control, logs=logs, **kwargs)

    clock.replace(RunRecorder, "on_step_begin", begins)
    clock.replace(RunRecorder, "on_log", logged)
    return steps


def rate(tokens: list[int], ends: list[float], counted: list[int], size: int) -> dict[str, Any]:
    """Tokens per second and GPU in the `counted` steps, from each step's total tokens and when its log came."""
    each = [now - then for then, now in zip([0, *tokens], tokens, strict=False)][-len(ends) :]
    if not counted:
        return {}
    seconds = [ends[index] - ends[index - 1] for index in counted]
    return {
        "tokens_per_s_per_gpu": round(sum(each[index] for index in counted) / sum(seconds) / size),
        "tokens_a_step": round(sum(each) / len(each)),
        "seconds_a_step": [round(second, 4) for second in seconds],
    }


def reset_peak() -> float:
    """Start counting the peak anew; GiB that an earlier arm of this process still holds."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated() / 2**30)
    return 0.0


def peak(ranks: Any) -> float:
    """GiB that the process with the most had allocated at once."""
    import torch

    own = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return round(max(ranks.everyones(own)), 2)


def make_model(shape: str, work: Path) -> None:
    """Random weights of `shape`, and a small tokenizer, as a directory that transformers loads."""
    target = work / shape
    if (target / "tokenizer_config.json").is_file():
        return
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from sft_dist.train.pretrained import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded:tiny"))
    config = Qwen3Config(**SHAPES[shape], max_position_embeddings=40960, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def write_rows(work: Path) -> tuple[Path, Path]:
    """Two files of chats with random words: long ones (median about 460 tokens), and short ones (about 125).

    A third, full.jsonl beside them, has chats of more than 2,048 tokens only (benchmarks/scaling.py).
    """
    rng = random.Random(0)
    paths = []
    if (work / "full.jsonl").is_file():
        return work / "long.jsonl", work / "short.jsonl"
    for name, count, median, longest in (("long", 4000, 350, 2000), ("short", 400, 90, 400), ("full", 2600, 0, 1850)):
        path = work / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for _ in range(count):
                length = longest
                if median:
                    length = min(longest, max(16, int(rng.lognormvariate(math.log(median), 0.9))))
                # The tiny tokenizer makes about 0.78 tokens of a character of such words.
                text = " ".join(
                    "".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 6))) for _ in range(length // 3)
                )
                middle = len(text) // 2
                messages = [
                    {"role": "user", "content": text[:middle] or "a"},
                    {"role": "assistant", "content": text[middle:] or "b"},
                ]
                stream.write(json.dumps({"messages": messages}) + "\n")
        paths.append(path)
    return paths[0], paths[1]


def table(results: list[dict[str, Any]]) -> str:
    columns = (
        "plan",
        "part",
        "tokens_per_s_per_gpu",
        "tokens_a_step",
        "peak_gib",
        "save_s",
        "manifest_s",
        "load_s",
        "publish_s",
        "checkpoint_gib",
        "resumed_losses_differ_by",
    )
    lines = [" | ".join(columns)]
    for result in results:
        losses = result.get("losses", [])
        shown = " ".join(f"{loss:.5f}" for loss in (*losses[:3], *losses[-2:]))
        lines.append(" | ".join(str(result.get(column, "")) for column in columns) + f" | {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
