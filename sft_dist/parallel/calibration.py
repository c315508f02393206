"""The planner's numbers beside measured ones: benchmarks/results/plans-h200x2.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sft_dist.parallel.architecture import packaged, read_architecture
from sft_dist.parallel.cost import Work, step_time
from sft_dist.parallel.hardware import gpu_named
from sft_dist.parallel.memory import Batch, gpu_memory
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.shares import GIB
from sft_dist.parallel.storage import checkpoint_bytes
from sft_dist.parallel.weights import weights_of

# In a checkout only: benchmarks are no part of the package.
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "plans-h200x2.json"


@dataclass(frozen=True)
class Point:
    """One measured run, and what the planner says of it."""

    plan: str
    part: str
    """speed, or resume: the last steps once more, from a checkpoint."""
    layers: str
    """eager, compiled, or partly compiled."""
    tokens: int
    """Tokens of the largest micro batch."""
    peak_gib: float
    predicted_peak_gib: float
    speed: int | None
    """Tokens a second and GPU; None where compiling is part of the time."""
    predicted_speed: float | None
    checkpoint_gib: float | None
    predicted_checkpoint_gib: float

    @property
    def calibrated(self) -> bool:
        """Whether the planner counts what was run: layers that are partly compiled it takes for eager ones."""
        return self.layers in ("eager", "compiled")


def points(path: Path = RESULTS) -> list[Point]:
    """The runs of sft-dist in `path`, with the planner's numbers for exactly the tokens that they had."""
    told = json.loads(path.read_text(encoding="utf-8"))
    architecture = read_architecture(packaged()[told["model"]], told["model"])
    weights = weights_of(architecture, None, told["settings"]["dtype"])
    gpu = gpu_named(told["gpu"])
    found = []
    for arm in told["arms"]:
        if arm["part"] == "trl":
            continue
        compiled, tokens = arm["layers"] == "compiled", arm["largest_micro_batch_tokens"]
        layout = Layout(PLANS[arm["plan"]], processes_per_node=arm["gpus"], compile_layers=compiled)
        batch = Batch(rows=1, tokens_per_row=tokens)
        memory = gpu_memory(architecture, weights, layout, batch)
        timed, speed = arm.get("timed"), None
        if timed is not None:
            mean, length = timed["mean_tokens"], timed["mean_length"]
            work = Work(mean, length, timed["trained_share"], timed["fullest_over_mean"])
            time = step_time(architecture, weights, layout, batch, work, gpu)
            speed = time.tokens_per_s_per_gpu
        found.append(
            Point(
                plan=arm["plan"],
                part=arm["part"],
                layers=arm["layers"],
                tokens=tokens,
                peak_gib=arm["peak_gib"],
                predicted_peak_gib=memory.allocated / GIB,
                speed=arm["tokens_per_s_per_gpu"] if timed else None,
                predicted_speed=speed,
                checkpoint_gib=arm.get("checkpoint_gib"),
                predicted_checkpoint_gib=checkpoint_bytes(weights, layout) / GIB,
            )
        )
    return found
