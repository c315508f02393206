"""Every plan on given GPUs, and which one to choose; answered without weights or torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.batch import can_share, largest_below
from sft_dist.parallel.compiling import counted_as_compiled
from sft_dist.parallel.estimate import Cluster, Estimate, Job, estimate, job_of
from sft_dist.parallel.hardware import GpuModel
from sft_dist.parallel.plans import PLANS, Layout, Offload
from sft_dist.parallel.shares import GIB
from sft_dist.parallel.workload import Rows

# In this order a plan is preferred to a later one that is hardly faster: fewer engines, less that can go wrong.
ORDER = ("single", "ddp", "zero1", "zero2", "fsdp2", "zero3")
# The plans that can shard inside a node and keep copies across nodes.
HYBRID = ("zero3", "fsdp2")
# Differences below this share are beyond what the estimates know.
TIE = 0.03
# More tokens in a micro batch gain nothing: 32,768 keep an H100 as busy as more (Qwen3-0.6B); what is saved is room.
TOKENS_ENOUGH = 32_768


@dataclass(frozen=True)
class Choice:
    """What `auto` stands for on given GPUs."""

    plan: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    fits: bool
    estimate: Estimate
    lines: tuple[str, ...]
    """The arithmetic, a line for each decision."""


def plan_all(job: Job, cluster: Cluster) -> list[Estimate]:
    """Every plan with and without offload and checkpointing, each with its largest micro batch that fits.

    What fits in no size stands there with the smallest. Fields that the config sets stay as they are, except plan and
    offload, which are all shown.
    """
    asked = job.config.train.gradient_checkpointing
    estimates = []
    for name in ORDER:
        for offload in _offloads(name, job.config.parallel.offload):
            for checkpointing in (False, True) if asked == "auto" else (asked,):
                layout = layout_of(job, cluster, name, offload, checkpointing)
                if layout is not None:
                    estimates.append(largest_that_fits(job, cluster, layout))
    return estimates


def _offloads(plan: str, asked: Offload) -> tuple[Offload, ...]:
    if plan in ("single", "ddp"):
        return ("none",)
    return ("none", "cpu", "nvme") if asked == "nvme" and plan == "zero3" else ("none", "cpu")


def layout_of(job: Job, cluster: Cluster, plan: str, offload: Offload, checkpointing: bool) -> Layout | None:
    """The plan on the cluster; None where it is another plan: one GPU shards nothing, and several nodes are not one."""
    world = cluster.nodes * cluster.gpus_per_node
    fixed = job.config.parallel.plan == plan
    if (plan == "ddp" or (offload == "none" and plan != "single")) and world == 1 and not fixed:
        return None
    if plan == "single" and cluster.nodes > 1:
        return None
    parallel = job.config.parallel
    dtype: Literal["float32", "bfloat16"] = "float32" if job.type_on(cluster.gpu) == "float32" else "bfloat16"
    return Layout(
        PLANS[plan],
        nodes=cluster.nodes,
        processes_per_node=1 if plan == "single" else cluster.gpus_per_node,
        dtype=dtype,
        gradient_checkpointing=checkpointing,
        compile_layers=counted_as_compiled(job.config, dtype),
        offload=offload,
        nvme_path=parallel.nvme_path,
        hybrid_shard=parallel.hybrid_shard and plan in HYBRID,
        sequence_parallel_size=parallel.sequence_parallel_size,
    )


def largest_that_fits(job: Job, cluster: Cluster, layout: Layout) -> Estimate:
    """The layout with the largest micro batch that divides the global batch and fits, with room to spare if one has.

    The smallest one if none fits.
    """
    tried = []
    for micro in micro_batches(job, layout):
        tried.append(estimate(job, cluster, layout, micro))
        if tried[-1].comfortable:
            return tried[-1]
    if not tried:  # fewer rows in a step than processes
        return estimate(job, cluster, layout, 1)
    return next((found for found in tried if found.fits), tried[-1])


def micro_batches(job: Job, layout: Layout) -> Iterator[int]:
    """Micro batches that meet the global batch exactly, largest first: divisors of one process's rows in a step."""
    train = job.config.train
    if train.per_device_train_batch_size != "auto":
        yield train.per_device_train_batch_size
        return
    share = train.global_batch_size // max(1, layout.data_parallel_size)
    most = max(1, TOKENS_ENOUGH * layout.sequence_parallel_size // job.rows.longest)
    yield from (size for size in range(min(share, most), 0, -1) if share % size == 0)


def best(estimates: Iterable[Estimate]) -> Estimate | None:
    """The fastest that fits, with room to spare if any does; of those within 3 % of it the simplest.

    Simpler is without offload, then earlier in ORDER, then without recomputing.
    """
    fitting = [found for found in estimates if found.fits]
    fitting = [found for found in fitting if found.comfortable] or fitting
    if not fitting:
        return None
    fastest = min(found.time.seconds for found in fitting)
    near = [found for found in fitting if found.time.seconds <= fastest * (1 + TIE)]

    def simplicity(found: Estimate) -> tuple[bool, int, bool]:
        layout = found.layout
        return layout.offload != "none", ORDER.index(layout.plan.name), layout.gradient_checkpointing

    return min(near, key=simplicity)


def allowed(job: Job, cluster: Cluster, estimates: list[Estimate]) -> list[Estimate]:
    """Those that have the plan and the offload that the config asks for; one GPU of several only if it says so."""
    parallel = job.config.parallel
    plans: tuple[str, ...] = (parallel.plan,)
    if parallel.plan in ("auto", "cpu"):
        plans = ORDER if cluster.gpus_per_node * cluster.nodes == 1 else ORDER[1:]
    if parallel.hybrid_shard:
        plans = tuple(plan for plan in plans if plan in HYBRID)
    return [
        found for found in estimates if found.layout.plan.name in plans and found.layout.offload == parallel.offload
    ]


def choose(
    config: Config,
    gpus: int,
    gpu: GpuModel,
    nodes: int = 1,
    *,
    longest: int | None = None,
    mean: float | None = None,
    dtype: str | None = None,
) -> Choice:
    """Plan, micro batch and checkpointing for `gpus` of this kind on each of `nodes`; what the config sets stays.

    micro batch x accumulation x processes that see different rows is train.global_batch_size. `longest` and `mean` are
    the rows' tokens where they are known. If nothing fits, the choice is the one that lacks the least, `fits` is False.
    Raises PreflightError for a model that cannot be counted, ConfigError if no plan can run at all.
    """
    longest = longest or config.data.max_length
    rows = Rows(None, longest, mean or float(longest), "")
    job, cluster = job_of(config, rows, dtype), Cluster(gpu, gpus, nodes)
    candidates = allowed(job, cluster, plan_all(job, cluster))
    possible = [found for found in candidates if found.refused is None]
    if not possible:
        raise nothing_possible(job, cluster, candidates)
    chosen = best(possible) or min(possible, key=lambda found: found.memory.needed)
    return Choice(
        plan=chosen.layout.plan.name,
        per_device_train_batch_size=chosen.batch.rows,
        gradient_accumulation_steps=chosen.batch.accumulation,
        gradient_checkpointing=chosen.layout.gradient_checkpointing,
        fits=chosen.fits,
        estimate=chosen,
        lines=arithmetic(job, cluster, chosen),
    )


def arithmetic(job: Job, cluster: Cluster, chosen: Estimate) -> tuple[str, ...]:
    """A line each on the plan, the batch and checkpointing, for what the config leaves open; and on memory."""
    train, batch, layout = job.config.train, chosen.batch, chosen.layout
    lines = []
    verdict = "the fastest that fits" if chosen.fits else "what lacks the least memory"
    if job.config.parallel.plan == "auto":
        lines.append(f"parallel.plan = {layout.plan.name}: {verdict} on {cluster}")
    if train.gradient_checkpointing == "auto":
        why = (
            "activations would not fit, or only with smaller micro batches"
            if layout.gradient_checkpointing
            else ("everything fits, and recomputing costs time")
        )
        lines.append(f"train.gradient_checkpointing = {str(layout.gradient_checkpointing).lower()}: {why}")
    if train.per_device_train_batch_size == "auto":
        lines.append(
            f"train.per_device_train_batch_size = {batch.rows}: {batch.rows} x {batch.accumulation} accumulated x "
            f"{layout.data_parallel_size} = global_batch_size {train.global_batch_size}; {batch.tokens} tokens at once"
        )
    lines.append(memory_line(chosen))
    return tuple(lines)


def memory_line(chosen: Estimate) -> str:
    """The sum of the parts against what there is, in GiB."""
    memory = chosen.memory
    names = ("parameters", "gradients", "optimizer", "activations", "head", "buffers")
    parts = " + ".join(f"{name} {value / GIB:.1f}" for name in names if (value := getattr(memory, name)) >= GIB / 20)
    margin = memory.needed - memory.allocated
    verdict = "of" if chosen.fits else "is more than"
    return (
        f"memory: {f'{parts} = ' if parts else ''}{memory.allocated / GIB:.1f} GiB; with {margin / GIB:.1f} for fragmentation "
        f"{memory.needed / GIB:.1f} {verdict} {chosen.usable / GIB:.1f} GiB usable"
    )


def nothing_possible(job: Job, cluster: Cluster, candidates: Iterable[Estimate]) -> ConfigError:
    """The error for a config that no plan can run on the cluster, whatever the memory."""
    reasons = dict.fromkeys(f"{found.name}: {found.refused}" for found in candidates if found.refused)
    parallel = job.config.parallel
    return ConfigError(
        f"no plan can run this on {cluster}",
        problems=list(reasons) or [f"parallel.plan {parallel.plan} with parallel.offload {parallel.offload}"],
        hint=_way_out(job, cluster),
    )


def _way_out(job: Job, cluster: Cluster) -> str:
    """What to set where no plan can run, whatever the memory."""
    train, shared = job.config.train, job.config.parallel.sequence_parallel_size
    heads = job.architecture.heads, job.architecture.kv_heads
    if not can_share(*heads, shared):
        return f"set parallel.sequence_parallel_size={largest_below(*heads, shared)}"
    micro = 1 if train.per_device_train_batch_size == "auto" else train.per_device_train_batch_size
    step = max(1, cluster.gpus_per_node * cluster.nodes // shared) * micro
    if train.global_batch_size % step:
        near = train.global_batch_size // step * step
        return f"set train.global_batch_size to {f'{near} or ' if near else ''}{near + step}"
    return "set parallel.plan=auto, parallel.offload=none and parallel.sequence_parallel_size=1"
