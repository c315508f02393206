"""Bytes that each GPU sends in one optimizer step, and how long that takes where nothing hides it.

Collectives are counted as rings (Thakur et al., 2005): gathering or scattering B bytes over N processes sends B(N-1)/N
from each, an all-reduce twice that. A ring over several nodes crosses each node's border once with all of it, spread
over the network cards of the node's GPUs. Beside the bytes every call takes as many hops as its ring has, which is what
hundreds of GPUs wait for; an all-reduce has a tree instead where that is shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sft_dist.parallel.architecture import Architecture
from sft_dist.parallel.hardware import GpuModel
from sft_dist.parallel.memory import Batch
from sft_dist.parallel.plans import Layout
from sft_dist.parallel.shares import REDUCE_BUCKET, state_bytes
from sft_dist.parallel.weights import Weights

# Seconds, as NCCL 2.2x itself expects them (src/graph/tuning.cc, protocol Simple): a call, one hop of a ring over NVLink and
# over the network, one hop of a tree over NVLink. Not measured here.
CALL_S, RING_INSIDE_S, RING_ACROSS_S, TREE_INSIDE_S = 8.4e-6, 3.4e-6, 14e-6, 4e-6
# DDP's buckets (bucket_cap_mb), bytes.
DDP_BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Sent:
    """Bytes one GPU sends, and the seconds the link that is slower for it needs."""

    inside: int = 0
    across: int = 0
    seconds: float = 0.0

    def times(self, factor: float) -> Sent:
        return Sent(round(self.inside * factor), round(self.across * factor), self.seconds * factor)

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.inside + other.inside, self.across + other.across, self.seconds + other.seconds)


@dataclass(frozen=True)
class Traffic:
    """One optimizer step's communication, by when it happens."""

    each_micro: Sent
    """In every micro batch, while it computes."""
    last_backward: Sent
    """In the backward pass of the last micro batch."""
    after: Sent
    """After the optimizer's step, when nothing computes."""

    def total(self, accumulation: int) -> Sent:
        """All of a step."""
        return self.each_micro.times(accumulation) + self.last_backward + self.after


def traffic(architecture: Architecture, weights: Weights, layout: Layout, batch: Batch, gpu: GpuModel) -> Traffic:
    """What the plan's engine sends, with accelerate 1.15 and DeepSpeed 0.19.8 as parallel/plans.py configures them."""
    nothing = Sent()
    if layout.world_size == 1:
        return Traffic(nothing, nothing, nothing)
    width = 4 if layout.dtype == "float32" else 2
    shifts = _sequence_parallel(architecture, layout, batch, gpu, width)
    gradients = weights.trained * state_bytes(layout, weights)[1]
    parameters = weights.trained * width
    buckets = math.ceil(weights.trained / REDUCE_BUCKET)
    if layout.plan.name == "ddp":
        return Traffic(shifts, all_reduce(gradients, layout, gpu, math.ceil(gradients / DDP_BUCKET)), nothing)
    if layout.plan.name in ("zero1", "zero2"):
        # use_multi_rank_bucket_allreduce (the default) all-reduces each bucket and keeps the own part of it.
        reduced, gathered = all_reduce(gradients, layout, gpu, buckets), gather(parameters, layout, gpu)
        if layout.plan.name == "zero1":
            return Traffic(shifts, reduced, gathered)
        return Traffic(shifts + reduced, nothing, gathered)
    every, units = parameters + weights.frozen_bytes, architecture.layers + 1
    inside = Layout(layout.plan, processes_per_node=layout.processes_per_node)
    if layout.plan.name == "zero3":
        again = inside if layout.hybrid_shard else layout
        gathered = gather(every, layout, gpu, units) + gather(every, again, gpu, units)
        moved = gathered + gather(gradients, layout, gpu, buckets)
        return Traffic(shifts + moved, nothing, nothing)
    # The tail stays gathered between forward and backward pass; gradients are reduced in float32.
    shards = inside if layout.hybrid_shard else layout
    tail = architecture.tail_params * width
    gathered = gather(every, shards, gpu, units) + gather(every - tail, shards, gpu, units)
    moved = gathered + gather(weights.trained * 4, shards, gpu, units)
    if layout.hybrid_shard and layout.nodes > 1:
        copies = Layout(layout.plan, nodes=layout.nodes)  # the same shard in each node
        moved += all_reduce(weights.trained * 4 // layout.processes_per_node, copies, gpu, units)
    return Traffic(shifts + moved, nothing, nothing)


def gather(size: int, layout: Layout, gpu: GpuModel, calls: int = 1) -> Sent:
    """All-gather (or reduce-scatter, which sends as much) of `size` bytes over the layout's processes, in so many calls."""
    return _sent(size, layout, gpu, calls * (CALL_S + _ring_s(layout)))


def all_reduce(size: int, layout: Layout, gpu: GpuModel, calls: int = 1) -> Sent:
    """All-reduce of `size` bytes over the layout's processes, in so many calls."""
    half = _sent(size, layout, gpu, 0.0)
    tree = (layout.processes_per_node - 1) * TREE_INSIDE_S + math.log2(layout.nodes) * RING_ACROSS_S
    hops = 2 * min(_ring_s(layout), tree)
    return half.times(2) + Sent(seconds=calls * (CALL_S + hops))


def _ring_s(layout: Layout) -> float:
    """Once around the ring, with nothing to carry."""
    across = layout.nodes - 1
    return (layout.world_size - 1 - across) * RING_INSIDE_S + across * RING_ACROSS_S


def _sent(size: int, layout: Layout, gpu: GpuModel, wait: float) -> Sent:
    """What a ring carries, and `wait` seconds of hops."""
    world = layout.world_size
    sent = size * (world - 1) / world
    # One process a node is a ring of nodes: nothing moves inside.
    inside = sent if layout.processes_per_node > 1 else 0.0
    across = sent / layout.processes_per_node if layout.nodes > 1 else 0.0
    seconds = max(inside / gpu.inside_bytes_per_s, across / gpu.network_bytes_per_s)
    return Sent(round(inside), round(across), seconds + wait)


def _sequence_parallel(architecture: Architecture, layout: Layout, batch: Batch, gpu: GpuModel, width: int) -> Sent:
    """Ulysses: each layer swaps tokens for heads before its attention and back, in forward and backward pass."""
    size = layout.sequence_parallel_size
    if size == 1:
        return Sent()
    once = batch.tokens * (2 * architecture.query + 2 * architecture.key) * width
    group = Layout(layout.plan, processes_per_node=size)
    return gather(2 * architecture.layers * once, group, gpu, 4 * architecture.layers)
