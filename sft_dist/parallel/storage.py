"""Host memory of a node, and bytes on disk, of a run: what loads, what is offloaded, what a checkpoint holds."""

from __future__ import annotations

from sft_dist.parallel.plans import Layout
from sft_dist.parallel.shares import GIB, state_bytes
from sft_dist.parallel.weights import Weights

# Python with torch, transformers and TRL, and CUDA's libraries, in one process.
PROCESS_BYTES = 3 * GIB


def host_bytes(weights: Weights, layout: Layout) -> int:
    """Bytes of host memory that one node needs: the weights while they load, or what is offloaded; the larger.

    Under ZeRO-3 and FSDP2 one process reads the weights and the others are sent their shards, under FSDP2 as float32 if they
    are trained. Else, and where FSDP2's frozen weights have 4 bits, every process reads them into host memory before they
    go to its GPU (in parallel, so they add up). A file in the run's type is mapped: its pages are there once for all
    processes, and this is more than the node needs.
    """
    processes, fsdp2 = layout.processes_per_node, layout.plan.engine == "fsdp2"
    once = layout.plan.name == "zero3" or (fsdp2 and not weights.quantized)
    width = 4 if layout.dtype == "float32" or (fsdp2 and not weights.lora) else 2
    loaded = weights.frozen if weights.lora else weights.trained
    loading = loaded * width * (1 if once else processes)
    return processes * PROCESS_BYTES + max(loading, processes * offloaded_bytes(weights, layout))


def offloaded_bytes(weights: Weights, layout: Layout) -> int:
    """Bytes of host memory (or NVMe) that one process's offloaded shards take.

    DeepSpeed keeps float32 masters, gradients and two moments there, and a 16-bit copy each of parameters and gradients;
    FSDP2 its float32 parameters, gradients and moments.
    """
    if layout.offload == "none":
        return 0
    own = -(-weights.trained // layout.shard_size)
    frozen = weights.frozen_bytes // layout.shard_size if "parameters" in layout.plan.shards else 0
    return own * (16 if layout.plan.engine == "fsdp2" else 20) + frozen


def checkpoint_bytes(weights: Weights, layout: Layout) -> int:
    """Bytes of one checkpoint of the whole run: trained weights, and what it takes to go on from there.

    ZeRO-3 writes its float32 shards and no 16-bit weights, which follow from them. FSDP2 writes a matrix that has two
    names under both. Frozen weights are in none: transformers asks DeepSpeed to leave them out (exclude_frozen_parameters)
    and FSDP2 for the adapter's names only, and the other plans save the adapter by itself.
    """
    parameter, _, states = state_bytes(layout, weights)
    if layout.plan.name == "zero3":
        return weights.trained * states
    again = weights.shared * parameter if layout.plan.engine == "fsdp2" else 0
    return weights.trained * (parameter + states) + again


def model_bytes(weights: Weights, layout: Layout, *, merge: bool) -> int:
    """Bytes of the final model: the weights in the type of the run, or the adapter and what it was merged into."""
    width = 4 if layout.dtype == "float32" else 2
    if not weights.lora:
        return weights.trained * width
    return (weights.trained + (weights.frozen if merge else 0)) * width


def disk_bytes(weights: Weights, layout: Layout, *, keep: int, saves: bool, merge: bool) -> int:
    """The most that a run has on disk: `keep` checkpoints, one more while it is written, and the final model."""
    checkpoints = (keep + 1) * checkpoint_bytes(weights, layout) if saves else 0
    return checkpoints + model_bytes(weights, layout, merge=merge)
