"""Training speed on a CPU: sft-dist's defaults against SFTTrainer's own, on the same rows, in turns.

    python benchmarks/cpu.py                                   # many-turn chats, and the tasks tickets and mix
    python benchmarks/cpu.py --rows chats.json                 # your own rows
    python benchmarks/cpu.py --out benchmarks/results/cpu.json

Each arm is a process of its own, started alternately (A B A B ...), so that a machine whose speed drifts is fair to
both. Counted are non-padding tokens a second over the steps after the second, from the start of a step to its end.

  trl       SFTTrainer(model="DIR", train_dataset=...), every setting at its default but use_cpu, the number of steps,
            and no files or trackers
  sft-dist  the config's defaults: `model.dtype`, `attn_implementation`, micro batch and checkpointing all `auto`

Both take the same token ids and labels, 8 rows a step in the same order, from the same weights; the losses of the first
step are printed so that it can be seen that they compute the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS_A_STEP = 8
# Steps that are not counted: the first makes the optimizer's state, the second still finds its memory.
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--rows", action="append", help="data file, or chat, tickets or mix; may be repeated")
    parser.add_argument(
        "--steps", type=int, default=6, help="optimizer steps of a process; the first two are not counted"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each arm runs")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--arm", choices=["trl", "sft-dist"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.model, options.rows[0], options.steps)))
        return
    results = [compare(options, rows) for rows in options.rows or ["chat", "tickets", "mix"]]
    record = {"machine": machine(), "model": options.model, "rows_a_step": ROWS_A_STEP, "results": results}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["machine"]))
    for result in results:
        print(table(result))


def compare(options: argparse.Namespace, rows: str) -> dict[str, Any]:
    """Run both arms in turns; medians over the rounds and the ratio round by round."""
    arms: dict[str, list[dict[str, Any]]] = {"trl": [], "sft-dist": []}
    for number in range(options.rounds):
        for arm, runs in arms.items():
            command = [sys.executable, __file__, "--arm", arm, "--model", options.model, "--rows", rows]
            answer = subprocess.run(
                [*command, "--steps", str(options.steps)], stdout=subprocess.PIPE, text=True, check=True
            )
            runs.append(json.loads(answer.stdout.strip().splitlines()[-1]))
            print(f"round {number + 1} {arm}: {runs[-1]['tokens_per_s']:.0f} tokens/s", file=sys.stderr, flush=True)
    ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for theirs, ours in zip(*arms.values(), strict=True)]
    return {"rows": Path(rows).name, "arms": arms, "ratio_by_round": [round(ratio, 2) for ratio in ratios]}


def run_arm(arm: str, model: str, rows: str, steps: int) -> dict[str, Any]:
    """Train a few steps; tokens a second, seconds of each step, loss of the first."""
    from sft_dist.train.settle import resolve_here

    # Before anything imports torch, as `sft-dist train` does it; TRL's arm gets torch as it comes.
    resolved = resolve_here(config_for(model, rows, steps)) if arm == "sft-dist" else None
    from datasets import disable_progress_bars

    from sft_dist.train.quiet import quiet_libraries

    disable_progress_bars()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(resolved, model, rows, steps, scratch)
        clock = timed(trainer)
        trainer.train()
    seconds = [step["seconds"] for step in clock]
    tokens = [step["tokens"] for step in clock]
    return {
        "tokens_per_s": sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:]),
        "step_seconds": [round(value, 3) for value in seconds],
        "step_tokens": tokens,
        "padded_tokens": [step["padded"] for step in clock],
        "first_loss": round(clock[0]["loss"], 4),
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }


def config_for(model: str, rows: str, steps: int) -> Any:
    """A config with every default but the rows, the number of steps and no checkpoints."""
    from sft_dist.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig, SourceConfig, TrainConfig

    count = steps * ROWS_A_STEP
    if rows == "chat":
        source = {"path": write_chats(count)}
    elif rows in ("tickets", "mix"):
        source = {"task": rows, "rows": count}
    else:
        source = {"path": rows, "sample": count}
    return Config(
        model=ModelConfig(name=model),
        data=DataConfig(train=SourceConfig(**source)),
        train=TrainConfig(max_steps=steps, global_batch_size=ROWS_A_STEP),
        checkpoint=CheckpointConfig(save_strategy="no"),
    )


def write_chats(count: int) -> str:
    """A JSONL file of many-turn chats, lengths lognormal: median about 350 tokens, 99th percentile about 2,000.

    The turns are those of the synthetic task `mix`; four characters count as a token, and six more tokens for each turn.
    """
    import random

    from sft_dist.data.mix import mix

    random_lengths = random.Random(0)
    turns = mix(60 * count, seed=1)
    lines = []
    for _ in range(count):
        wanted = random_lengths.lognormvariate(math.log(350), 0.75)
        messages: list[dict[str, str]] = []
        while sum(len(message["content"]) / 4 + 6 for message in messages) < wanted:
            messages += [message for message in next(turns)["messages"] if message["role"] != "system"]
        lines.append(json.dumps({"messages": messages}))
    path = Path(tempfile.gettempdir()) / f"sft-dist-benchmark-chats-{count}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def build(resolved: Any, model: str, rows: str, steps: int, scratch: str) -> Any:
    """The trainer of an arm, ours if `resolved` is given. Both get the same token ids and labels, so that they differ in nothing but the training."""
    from sft_dist.data.prepare import prepare
    from sft_dist.parallel.machine import this_machine
    from sft_dist.parallel.resolve import with_rows
    from sft_dist.train.tokenizer import load_tokenizer

    config = config_for(model, rows, steps)
    tokens = load_tokenizer(config.model)
    prepared = prepare(config, tokens.tokenizer, tokens.template, Path(scratch))
    if resolved is None:
        return build_trl(model, prepared.train, steps, scratch)
    resolved = with_rows(resolved, this_machine(), prepared.ledger["train"])
    return build_ours(config, resolved, tokens, prepared, scratch)


def build_trl(model: str, rows: Any, steps: int, scratch: str) -> Any:
    """SFTTrainer as its documentation shows it: a model's name and a dataset, nothing tuned."""
    from trl import SFTConfig, SFTTrainer

    from sft_dist.train.pretrained import resolve_model

    # use_cpu, since without a GPU the default (bf16=True) is refused unless the CPU is asked for by name.
    arguments = SFTConfig(
        output_dir=scratch, max_steps=steps, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    return SFTTrainer(model=resolve_model(model), args=arguments, train_dataset=rows)


def build_ours(config: Any, resolved: Any, tokens: Any, prepared: Any, scratch: str) -> Any:
    """The trainer that `sft-dist train` builds."""
    from sft_dist.rundir import RunDir
    from sft_dist.train.attention import register
    from sft_dist.train.model import load_model
    from sft_dist.train.trainer import build_trainer

    register()
    loaded = load_model(config.model, tokens, dtype=resolved.dtype, attn_implementation=resolved.attn_implementation)
    return build_trainer(config, resolved, RunDir(Path(scratch)), loaded, tokens.tokenizer, prepared, [])


def timed(trainer: Any) -> list[dict[str, Any]]:
    """Note seconds, tokens and loss of every optimizer step from here on; one entry a step."""
    from transformers import TrainerCallback

    steps: list[dict[str, Any]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            steps.append({"start": time.perf_counter(), "tokens": 0, "padded": 0, "loss": 0.0})

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps[-1]["seconds"] = time.perf_counter() - steps[-1].pop("start")

    compute_loss = trainer.compute_loss

    def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        steps[-1]["tokens"] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        steps[-1]["padded"] += inputs["input_ids"].numel()
        loss = compute_loss(model, inputs, *args, **kwargs)
        steps[-1]["loss"] += float(loss.detach())
        return loss

    trainer.compute_loss = counted
    trainer.add_callback(Clock())
    return steps


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    from sft_dist.parallel.machine import this_machine

    here = this_machine()
    return {
        "cpu": here.cpu,
        "cores": here.cores,
        "bfloat16_in_hardware": here.cpu_bf16,
        "memory_gib": round(here.memory_gib, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def table(result: dict[str, Any]) -> str:
    """Tokens a second as median (lowest to highest) of the rounds, and the ratio round by round."""
    head = f"{'arm':10} {'tokens/s':>24} {'fill':>6} {'GiB':>6} {'first loss':>11}"
    lines = [f"rows: {result['rows']}", head]
    for arm, runs in result["arms"].items():
        fill = sum(runs[0]["step_tokens"]) / sum(runs[0]["padded_tokens"])
        speeds = [run["tokens_per_s"] for run in runs]
        speed = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        lines.append(
            f"{arm:10} {speed:>24} {fill:6.2f} {runs[0]['peak_memory_gib']:6.2f} {runs[0]['first_loss']:11.4f}"
        )
    lines.append(f"ratio by round: {result['ratio_by_round']}, median {statistics.median(result['ratio_by_round'])}")
    return "\n".join(lines)


def peak_memory_gib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
