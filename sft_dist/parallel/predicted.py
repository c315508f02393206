"""What the planner said of a run, against what was measured: plan/predicted.json and plan/measured.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.parallel.estimate import Cluster, estimate, job_of
from sft_dist.parallel.hardware import GpuModel
from sft_dist.parallel.plans import Layout
from sft_dist.parallel.workload import Rows

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
) -> dict[str, Any]:
    """What a run with this layout and micro batch should take, as JSON: the keys of QUANTITIES, and `estimate`.

    `longest` and `mean` are tokens of the prepared rows. Raises PreflightError for a model that cannot be counted.
    """
    longest = longest or config.data.max_length
    job = job_of(config, Rows(None, longest, mean or float(longest), "the prepared rows"), layout.dtype)
    found = estimate(job, Cluster(gpu, layout.processes_per_node, layout.nodes), layout, micro_batch)
    facts = found.facts()
    return {
        "gpu": gpu.name,
        "peak_memory_gib": facts["gpu_gib"]["allocated"],
        "checkpoint_gib": facts["checkpoint_gib"],
        "seconds_per_step": facts["seconds"]["seconds"],
        "tokens_per_s_per_gpu": facts["tokens_per_s_per_gpu"],
        "mfu": facts["mfu"],
        "estimate": facts,
    }


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
