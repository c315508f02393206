"""Host memory of a node, and bytes on disk, of a run: what loads, what is offloaded, what a checkpoint holds."""

from __future__ import annotations

from sft_dist.parallel.plans import Layout
from sft_dist.parallel.shares import GIB, state_bytes
from sft_dist.parallel.weights import Weights

# Python with torch, transformers and TRL, and CUDA's libraries, in one process.
PROCESS_BYTES = 3 * GIB


def host_bytes(weights: Weights, layout: Layout) -> int:
    """Bytes of host memory that one node needs: the weights while they load, or what is offloaded; the larger.

    Every process reads the weights into host memory before they go to its GPU (in parallel, so they add up); FSDP2
    reads them in one process, and casts to float32 what is trained.
    """
    processes = layout.processes_per_node
    width = 4 if layout.dtype == "float32" else 2
    if layout.plan.engine == "fsdp2":
        loading = weights.trained * 4 + weights.frozen * width
    else:
        loading = ((weights.trained if not weights.lora else 0) + weights.frozen) * width * processes
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
    """Bytes of one checkpoint of the whole run: weights, and what it takes to go on from there.

    ZeRO-3 writes its float32 shards and no 16-bit weights, which follow from them. FSDP2 writes a matrix that has two
    names under both.
    """
    parameter, _, states = state_bytes(layout, weights)
    frozen = weights.frozen_bytes if weights.lora and layout.plan.engine == "deepspeed" else 0
    if layout.plan.name == "zero3":
        return weights.trained * states + frozen
    again = weights.shared * parameter if layout.plan.engine == "fsdp2" else 0
    return weights.trained * (parameter + states) + again + frozen


def model_bytes(weights: Weights, layout: Layout, *, merge: bool) -> int:
    """Bytes of the final model: the weights in the type of the run, or the adapter and what it was merged into."""
    width = 4 if layout.dtype == "float32" else 2
    if not weights.lora:
        return weights.trained * width
    return weights.trained * 4 + (weights.frozen * width if merge else 0)


def disk_bytes(weights: Weights, layout: Layout, *, keep: int, saves: bool, merge: bool) -> int:
    """The most that a run has on disk: `keep` checkpoints, one more while it is written, and the final model."""
    checkpoints = (keep + 1) * checkpoint_bytes(weights, layout) if saves else 0
    return checkpoints + model_bytes(weights, layout, merge=merge)
