"""What one process holds all the time under each plan, and what its engine needs besides.

Read from the sources of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py)
and accelerate 1.15 (utils/fsdp_utils.py), as parallel/plans.py configures them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.parallel.architecture import Architecture
from sft_dist.parallel.plans import Layout
from sft_dist.parallel.weights import Weights

GIB = 2**30
# Float32 gradients that train/optimizer.py has at a time in its step.
STEP_TRANSIENT_BYTES = GIB // 4
# DeepSpeed 0.19.8. Elements: reduce_bucket_size of parallel/plans.py, stage3_prefetch_bucket_size, half of
# stage3_max_reuse_distance (what the backward pass uses soon stays gathered), sub_group_size.
REDUCE_BUCKET = 50_000_000
PREFETCH_BUCKET = 50_000_000
REUSE_KEPT = 500_000_000
SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Held:
    """Bytes that follow from the plan."""

    parameters: int
    optimizer: int
    before: int
    """Gradients kept from the micro batches before."""
    during: int
    """Gradients that are there as soon as the backward pass begins."""
    end: int
    buckets: int
    """Gradients on their way to other processes while layers are differentiated."""
    gathered: int
    step: int
    last_bucket: int = 0
    """What is on its way when the backward pass ends, beyond `buckets`."""


def state_bytes(layout: Layout, weights: Weights) -> tuple[int, int, int]:
    """Bytes a trained element takes as parameter, gradient and in the optimizer, before anything is sharded.

    bfloat16: 2, 2, and 12 for the float32 master and AdamW's two moments (train/optimizer.py, and DeepSpeed). FSDP2
    keeps the parameters themselves in float32 (accelerate casts what is trained). An adapter has the type that the model
    computes in, as everything that is trained (train/adapter.py); beside 4-bit weights TRL makes it bfloat16.
    """
    engine = layout.plan.engine
    if layout.dtype == "float32" and not weights.quantized:
        return 4, 4, 12 if engine == "deepspeed" else 8
    return (4, 4, 8) if engine == "fsdp2" else (2, 2, 12)


def held_by(architecture: Architecture, weights: Weights, layout: Layout, *, several: bool) -> Held:
    """What one process holds under the layout's plan; `several` is whether a step has more than one micro batch."""
    parameter, gradient, states = state_bytes(layout, weights)
    trained = weights.trained
    engine, name = layout.plan.engine, layout.plan.name
    if engine in ("none", "ddp"):
        full = trained * gradient
        # DDP's buckets hold the gradients and stay. Those of micro batches that are not reduced are beside them until the
        # last one's are copied in (measured, Qwen3-4B).
        kept = full * (several + (engine == "ddp"))
        step = min(STEP_TRANSIENT_BYTES, 4 * trained) if parameter == 2 else 0
        parameters = trained * parameter + weights.frozen_bytes
        return Held(parameters, trained * states, kept, kept, full, 0, 0, step)
    own = -(-trained // layout.shard_size)
    if engine == "fsdp2":
        away = layout.offload != "none"
        gathered, buckets, last = _fsdp_buffers(architecture, weights)
        part = 0 if away else own * gradient
        parameters = 0 if away else own * parameter + weights.frozen_bytes // layout.shard_size
        optimizer = 0 if away else own * states
        return Held(parameters, optimizer, part if several else 0, part, part, buckets, gathered, 0, last)
    if name == "zero3":
        return _zero3(architecture, weights, layout, own)
    return _zero12(weights, layout, own, several=several)


def _zero12(weights: Weights, layout: Layout, own: int, *, several: bool) -> Held:
    """ZeRO-1 and ZeRO-2; `own` is how many elements this process updates."""
    parameter, gradient, states = state_bytes(layout, weights)
    away = layout.offload != "none"
    parameters = weights.trained * parameter + weights.frozen_bytes
    # Two buckets with overlap_comm, and the copy that the all-reduce is made on.
    buckets = gradient * (2 * REDUCE_BUCKET + max(REDUCE_BUCKET, weights.largest))
    end = 0 if away else own * gradient
    # ZeRO-2 reduces in every micro batch: the sum of its part so far, and beside it this micro batch's. ZeRO-1 accumulates
    # whole gradients; in the last micro batch it copies its part out bucket by bucket and lets those gradients go, so that the
    # most is there when the first one comes, that of the head (measured, Qwen3-4B).
    whole = layout.plan.name == "zero1" and several
    before = weights.trained * gradient if whole else end if several else 0
    beside = min(end, weights.largest * gradient) if whole else end
    # The part is flattened and cast to float32; before that the norm is taken of one tensor at a time, in float64.
    step = 0 if away else max(own * (gradient + 4), 8 * min(weights.largest, own))
    return Held(parameters, 0 if away else own * states, before, before + beside, end, buckets, 0, step)


def _zero3(architecture: Architecture, weights: Weights, layout: Layout, own: int) -> Held:
    """ZeRO-3; `own` is how many elements this process keeps of each kind."""
    parameter, gradient, states = state_bytes(layout, weights)
    shards, away = layout.shard_size, layout.offload != "none"
    parameters = 0 if away else own * parameter + weights.frozen_bytes // shards
    if layout.hybrid_shard:  # a second set of shards in each node
        parameters += (weights.trained * parameter + weights.frozen_bytes) // layout.processes_per_node
    part = 0 if away else own * gradient
    # A reduction copies the bucket's gradients into one buffer (reduce_scatter_coalesced).
    buckets = gradient * (REDUCE_BUCKET + max(REDUCE_BUCKET, weights.largest))
    kept = max(min(weights.trained + weights.frozen, REUSE_KEPT), architecture.embedding_params)
    gathered = parameter * (kept + PREFETCH_BUCKET + architecture.hidden * architecture.ffn)
    group = min(own, SUB_GROUP)
    step = 0 if away else max(group * (gradient + 4), 8 * weights.largest // shards)
    return Held(parameters, 0 if away else own * states, part, part, part, buckets, gathered, step)


def _fsdp_buffers(architecture: Architecture, weights: Weights) -> tuple[int, int, int]:
    """Bytes of what FSDP2 has gathered, of a unit's gradient on its way, and of what the last unit's has more.

    Units are bfloat16, reduced in float32. A unit is one layer: the one in use, the next, and the buffer that it arrives in.
    The tail (final norm and head) stays gathered from the first use to the end of the backward pass (accelerate's
    `fsdp2_prepare_model`), where its gradient leaves (measured with Qwen3-4B and 8B).
    """
    layer, tail = architecture.layer_params, architecture.tail_params
    gathered = 2 * (3 * layer + tail)
    if weights.lora:
        return gathered, (2 + 4) * weights.trained // architecture.layers, 0
    return gathered, (2 + 4) * layer, (2 + 4) * max(0, tail - layer)
