"""The planner's numbers beside measured ones: benchmarks/results/plans-h200x2.json, scaling-h200x2.json and -h200x4.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.parallel.architecture import packaged, read_architecture
from sft_dist.parallel.cost import Work, step_time
from sft_dist.parallel.hardware import gpu_named
from sft_dist.parallel.memory import Batch, gpu_memory
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.shares import GIB
from sft_dist.parallel.storage import checkpoint_bytes
from sft_dist.parallel.weights import weights_of

# In a checkout only: benchmarks are no part of the package.
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FILES = ("plans-h200x2.json", "scaling-h200x2.json", "scaling-h200x4.json")


@dataclass(frozen=True)
class Point:
    """One measured run, and what the planner says of it."""

    model: str
    gpus: int
    plan: str
    part: str
    """speed, or resume: the last steps once more, from a checkpoint."""
    tokens: int
    """Tokens of the largest micro batch."""
    peak_gib: float
    predicted_peak_gib: float
    speed: int | None
    """Tokens a second and GPU; None where compiling is part of the time."""
    predicted_speed: float | None
    checkpoint_gib: float | None
    predicted_checkpoint_gib: float


def points(files: Sequence[str] = FILES) -> list[Point]:
    """The runs of sft-dist in `files`, with the planner's numbers for exactly the tokens that they had.

    Runs of code that has changed since (`before`) are left out.
    """
    return [point for name in files for point in _points(json.loads((RESULTS / name).read_text(encoding="utf-8")))]


def _points(told: dict[str, Any]) -> Iterator[Point]:
    gpu = gpu_named(told["gpu"])
    for arm in told["arms"]:
        if arm["part"] == "trl" or "before" in arm:
            continue
        architecture = read_architecture(packaged()[arm["model"]], arm["model"])
        weights = weights_of(architecture, None, told["settings"]["dtype"])
        layout = Layout(
            PLANS[arm["plan"]],
            processes_per_node=arm["gpus"],
            compile_layers=arm["layers"] == "compiled",
            gradient_checkpointing=arm["gradient_checkpointing"],
        )
        timed, speed = arm.get("timed") if arm["part"] == "speed" else None, None
        micro_batches = told["settings"].get("tokens_a_gpu_and_step", 0) // told["settings"].get(
            "micro_batch_tokens", 1
        )
        batch = Batch(rows=1, tokens_per_row=arm["largest_micro_batch_tokens"], accumulation=max(1, micro_batches))
        if timed is not None:
            work = Work(timed["mean_tokens"], timed["mean_length"], timed["trained_share"], timed["fullest_over_mean"])
            speed = step_time(architecture, weights, layout, batch, work, gpu).tokens_per_s_per_gpu
        yield Point(
            model=arm["model"],
            gpus=arm["gpus"],
            plan=arm["plan"],
            part=arm["part"],
            tokens=arm["largest_micro_batch_tokens"],
            peak_gib=arm["peak_gib"],
            predicted_peak_gib=gpu_memory(architecture, weights, layout, batch).allocated / GIB,
            speed=arm["tokens_per_s_per_gpu"] if timed else None,
            predicted_speed=speed,
            checkpoint_gib=arm.get("checkpoint_gib"),
            predicted_checkpoint_gib=checkpoint_bytes(weights, layout) / GIB,
        )
