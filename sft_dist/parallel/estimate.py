"""What one plan with one micro batch takes in memory, on disk and in time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.parallel.architecture import Architecture, find_architecture
from sft_dist.parallel.batch import can_share, described, sizes
from sft_dist.parallel.cost import StepTime, Work, step_time
from sft_dist.parallel.hardware import GpuModel
from sft_dist.parallel.memory import Batch, GpuMemory, gpu_memory
from sft_dist.parallel.plans import Layout
from sft_dist.parallel.shares import GIB
from sft_dist.parallel.storage import checkpoint_bytes, disk_bytes, host_bytes
from sft_dist.parallel.weights import Weights, weights_of
from sft_dist.parallel.workload import Rows, rows_of, steps_of

# The share of the usable memory up to which an estimate may be wrong by what estimates are wrong by, and still fit.
COMFORT = 0.92
# The parts of a step's time, and their sum.
SECONDS = ("compute", "host", "communication", "optimizer", "seconds")


@dataclass(frozen=True)
class Cluster:
    """The GPUs to plan for."""

    gpu: GpuModel
    gpus_per_node: int
    nodes: int = 1

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes with " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node} x {self.gpu.name} ({self.gpu.memory_gib:.1f} GiB)"


@dataclass(frozen=True)
class Estimate:
    """One plan with one micro batch: what it takes, and whether it is possible."""

    layout: Layout
    batch: Batch
    memory: GpuMemory
    usable: int
    """Bytes for tensors on each GPU."""
    host: int
    """Bytes of host memory on each node."""
    checkpoint: int
    disk: int
    """Bytes on disk at most."""
    time: StepTime
    steps: int | None
    refused: str | None
    """Why it cannot run at all, whatever the memory."""

    @property
    def name(self) -> str:
        offload = "" if self.layout.offload == "none" else f" + {self.layout.offload} offload"
        return self.layout.plan.name + offload

    @property
    def fits(self) -> bool:
        return self.refused is None and self.memory.needed <= self.usable

    @property
    def comfortable(self) -> bool:
        """Whether it fits even if the estimate is a little too low."""
        return self.fits and self.memory.needed <= COMFORT * self.usable

    def facts(self) -> dict[str, Any]:
        """The estimate as JSON: bytes in GiB (2**30), times in seconds, what is sent in GB (1e9)."""
        layout, time = self.layout, self.time
        return {
            "plan": layout.plan.name,
            "offload": layout.offload,
            "gradient_checkpointing": layout.gradient_checkpointing,
            "dtype": layout.dtype,
            "compile_layers": layout.compile_layers,
            "nodes": layout.nodes,
            "processes_per_node": layout.processes_per_node,
            "per_device_train_batch_size": self.batch.rows,
            "gradient_accumulation_steps": self.batch.accumulation,
            "tokens_at_once": self.batch.tokens,
            "fits": self.fits,
            "refused": self.refused,
            "gpu_gib": {**self.memory.gib(), "usable": round(self.usable / GIB, 3)},
            "host_gib_per_node": round(self.host / GIB, 3),
            "checkpoint_gib": round(self.checkpoint / GIB, 3),
            "disk_gib": round(self.disk / GIB, 3),
            "sent_gb_per_step": {
                "inside": round(time.sent.inside / 1e9, 3),
                "across": round(time.sent.across / 1e9, 3),
            },
            "seconds": {name: round(getattr(time, name), 5) for name in SECONDS},
            "tokens_per_step": round(time.tokens),
            "tokens_per_s_per_gpu": round(time.tokens_per_s_per_gpu),
            "mfu": round(time.mfu, 4),
            "steps": self.steps,
            "total_seconds": None if self.total_seconds is None else round(self.total_seconds, 1),
        }

    @property
    def total_seconds(self) -> float | None:
        """Seconds of training, without evaluation and checkpoints; None if the number of rows is not known."""
        return None if self.steps is None else self.steps * self.time.seconds


@dataclass(frozen=True)
class Job:
    """A config with all that the estimates need to know of it."""

    config: Config
    architecture: Architecture
    origin: str
    rows: Rows
    dtype: str | None = None
    """The resolved type; None follows from the config and the GPU."""

    def type_on(self, gpu: GpuModel) -> str:
        asked = self.config.model.dtype if self.dtype is None else self.dtype
        return ("bfloat16" if gpu.bf16_tflops else "float32") if asked == "auto" else asked

    def changed(self, **sections: dict[str, Any]) -> Job:
        """The job with other fields: changed(train={"max_steps": 3})."""
        parts = {name: getattr(self.config, name).model_copy(update=fields) for name, fields in sections.items()}
        return dataclasses.replace(self, config=self.config.model_copy(update=parts))

    def with_rows(self, longest: int) -> Job:
        """The job with no row longer than so many tokens."""
        rows = dataclasses.replace(self.rows, longest=longest, mean=min(self.rows.mean, longest), spread=0.0)
        return dataclasses.replace(self.changed(data={"max_length": longest}), rows=rows)


def job_of(config: Config, rows: Rows | None = None, dtype: str | None = None) -> Job:
    """Read what is needed: the model's config.json, and the rows as far as they can be counted. PreflightError."""
    architecture, origin = find_architecture(config.model)
    return Job(config, architecture, origin, rows or rows_of(config), dtype)


def estimate(job: Job, cluster: Cluster, layout: Layout, micro: int) -> Estimate:
    """What `layout` takes with `micro` rows at once on each GPU."""
    config, gpu, rows = job.config, cluster.gpu, job.rows
    weights = weights_of(job.architecture, config.model.lora, layout.dtype)
    devices = max(1, layout.data_parallel_size)
    batch = Batch(
        rows=micro,
        # Rows that are shared are padded to data.max_length (train/arguments.py).
        tokens_per_row=rows.longest if layout.sequence_parallel_size == 1 else config.data.max_length,
        accumulation=max(1, config.train.global_batch_size // (micro * devices)),
        sequence_parallel=layout.sequence_parallel_size,
    )
    work = Work(
        tokens=micro * rows.mean / batch.sequence_parallel,
        length=rows.weighted_mean,
        trained=rows.trained,
        waiting=rows.fullest(micro, devices) / (micro * rows.mean),
    )
    merge = config.model.lora.merge if config.model.lora is not None else False
    saves, steps = config.checkpoint.save_strategy != "no", steps_of(config, rows.count)
    milestones = (steps or 0) // (config.checkpoint.milestone_steps or (steps or 0) + 1)
    return Estimate(
        layout=layout,
        batch=batch,
        memory=gpu_memory(job.architecture, weights, layout, batch),
        usable=round(gpu.usable_gib(layout.world_size) * GIB),
        host=host_bytes(weights, layout),
        checkpoint=checkpoint_bytes(weights, layout),
        disk=disk_bytes(weights, layout, keep=config.checkpoint.keep + milestones, saves=saves, merge=merge),
        time=step_time(job.architecture, weights, layout, batch, work, gpu),
        steps=steps,
        refused=_refusal(job, layout, weights, micro),
    )


def _refusal(job: Job, layout: Layout, weights: Weights, micro: int) -> str | None:
    """Why the layout cannot run, in words; config/rules_parallel.py cites the libraries."""
    config, heads = job.config, (job.architecture.heads, job.architecture.kv_heads)
    total, devices, shared = config.train.global_batch_size, layout.data_parallel_size, layout.sequence_parallel_size
    if not can_share(*heads, shared):
        possible = ", ".join(map(str, sizes(*heads)))
        return f"sequence_parallel_size {shared} cannot deal out {described(*heads)}, only {possible} can"
    if layout.world_size % shared:
        return f"sequence_parallel_size {shared} does not divide {layout.world_size} GPUs"
    if shared > 1 and layout.plan.engine != "deepspeed":
        return "rows are shared between GPUs by DeepSpeed only"
    if weights.quantized and "parameters" in layout.plan.shards:
        return "4-bit weights cannot be sharded"
    if total % (devices * micro):
        each = f" x {micro} rows" if micro > 1 else ""
        return f"global_batch_size {total} does not divide by {devices} GPUs{each}"
    return None
