"""What the planner said of a run, against what was measured: plan/predicted.json and plan/measured.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.parallel.estimate import Cluster, Estimate, Job, estimate, job_of
from sft_dist.parallel.hardware import GpuModel
from sft_dist.parallel.memory import gpu_memory
from sft_dist.parallel.plans import Layout
from sft_dist.parallel.shares import GIB
from sft_dist.parallel.weights import weights_of
from sft_dist.parallel.workload import Rows

# Steps of a run whose length is not known: ten times as many have a micro batch that is fuller by half a deviation.
MANY_STEPS = 1000

# What both files hold, in this order: key, words, unit. `peak_memory_gib` is the largest of
# torch.cuda.max_memory_allocated() over the processes, in GiB; `checkpoint_gib` a checkpoint's files together;
# `seconds_per_step` the median of the steps after the first ones, without evaluation and saving.
QUANTITIES = (
    ("peak_memory_gib", "GPU memory", "GiB"),
    ("checkpoint_gib", "checkpoint", "GiB"),
    ("seconds_per_step", "time a step", "s"),
    ("tokens_per_s_per_gpu", "tokens/s/GPU", ""),
    ("mfu", "MFU", ""),
)


def predicted(
    config: Config,
    layout: Layout,
    gpu: GpuModel,
    micro_batch: int,
    *,
    longest: int | None = None,
    mean: float | None = None,
    trained: float = 1.0,
    spread: float = 0.0,
    count: int | None = None,
) -> dict[str, Any]:
    """What a run with this layout and micro batch should take, as JSON: the keys of QUANTITIES, and `estimate`.

    Of the prepared rows: tokens of the longest, on average and their standard deviation, the share that is trained, and
    how many they are. With `spread` the peak is that of the fullest micro batch to be expected, without it that of one with the longest rows only. Raises
    PreflightError for a model that cannot be counted.
    """
    longest = longest or config.data.max_length
    rows = Rows(count, longest, mean or float(longest), "the prepared rows", trained, spread)
    job = job_of(config, rows, layout.dtype)
    found = estimate(job, Cluster(gpu, layout.processes_per_node, layout.nodes), layout, micro_batch)
    facts = found.facts()
    return {
        "gpu": gpu.name,
        "peak_memory_gib": round(_expected_peak(job, found) / GIB, 3),
        "checkpoint_gib": facts["checkpoint_gib"],
        "seconds_per_step": facts["seconds"]["seconds"],
        "tokens_per_s_per_gpu": facts["tokens_per_s_per_gpu"],
        "mfu": facts["mfu"],
        "estimate": facts,
    }


def _expected_peak(job: Job, found: Estimate) -> int:
    """Bytes of the fullest micro batch in the run; `found` holds those of one in which every row is the longest."""
    rows, batch, layout = job.rows, found.batch, found.layout
    if not rows.spread:
        return found.memory.allocated
    batches = (found.steps or MANY_STEPS) * batch.accumulation * layout.data_parallel_size
    tokens = math.ceil(rows.fullest(batch.rows, batches) / batch.rows)
    weights = weights_of(job.architecture, job.config.model.lora, layout.dtype)
    fullest = dataclasses.replace(batch, tokens_per_row=tokens)
    return gpu_memory(job.architecture, weights, layout, fullest).allocated


def compare(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each quantity that both hold: `what`, `unit`, `predicted`, `measured`, and `off`.

    `off` is how far the prediction is from the measurement, as a share of it: 0.1 is 10 % too high.
    """
    rows = []
    for key, what, unit in QUANTITIES:
        said, was = predicted.get(key), measured.get(key)
        if said is None or not was:
            continue
        rows.append({"what": what, "unit": unit, "predicted": said, "measured": was, "off": round(said / was - 1, 4)})
    return rows
