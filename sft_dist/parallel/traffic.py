"""Bytes that each GPU sends in one optimizer step, and how long that takes where nothing hides it.

Collectives are counted as rings (Thakur et al., 2005): gathering or scattering B bytes over N processes sends B(N-1)/N
from each, an all-reduce twice that. A ring over several nodes crosses each node's border once with all of it, spread
over the network cards of the node's GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.parallel.architecture import Architecture
from sft_dist.parallel.hardware import GpuModel
from sft_dist.parallel.memory import Batch
from sft_dist.parallel.plans import Layout
from sft_dist.parallel.shares import state_bytes
from sft_dist.parallel.weights import Weights


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
    if layout.plan.name == "ddp":
        return Traffic(shifts, all_reduce(gradients, layout, gpu), nothing)
    if layout.plan.name in ("zero1", "zero2"):
        # use_multi_rank_bucket_allreduce (the default) all-reduces each bucket and keeps the own part of it.
        reduced, gathered = all_reduce(gradients, layout, gpu), gather(parameters, layout, gpu)
        if layout.plan.name == "zero1":
            return Traffic(shifts, reduced, gathered)
        return Traffic(shifts + reduced, nothing, gathered)
    every = parameters + weights.frozen_bytes
    inside = Layout(layout.plan, processes_per_node=layout.processes_per_node)
    if layout.plan.name == "zero3":
        again = inside if layout.hybrid_shard else layout
        moved = gather(every, layout, gpu) + gather(every, again, gpu) + gather(gradients, layout, gpu)
        return Traffic(shifts + moved, nothing, nothing)
    # The tail stays gathered between forward and backward pass; gradients are reduced in float32.
    shards = inside if layout.hybrid_shard else layout
    tail = architecture.tail_params * width
    moved = gather(every, shards, gpu) + gather(every - tail, shards, gpu) + gather(weights.trained * 4, shards, gpu)
    if layout.hybrid_shard and layout.nodes > 1:
        copies = Layout(layout.plan, nodes=layout.nodes)  # the same shard in each node
        moved += all_reduce(weights.trained * 4 // layout.processes_per_node, copies, gpu)
    return Traffic(shifts + moved, nothing, nothing)


def gather(size: int, layout: Layout, gpu: GpuModel) -> Sent:
    """All-gather (or reduce-scatter, which sends as much) of `size` bytes over the layout's processes."""
    world = layout.world_size
    sent = size * (world - 1) / world
    # One process a node is a ring of nodes: nothing moves inside.
    inside = sent if layout.processes_per_node > 1 else 0.0
    across = sent / layout.processes_per_node if layout.nodes > 1 else 0.0
    seconds = max(inside / gpu.inside_bytes_per_s, across / gpu.network_bytes_per_s)
    return Sent(round(inside), round(across), seconds)


def all_reduce(size: int, layout: Layout, gpu: GpuModel) -> Sent:
    """All-reduce of `size` bytes over the layout's processes."""
    return gather(size, layout, gpu).times(2)


def _sequence_parallel(architecture: Architecture, layout: Layout, batch: Batch, gpu: GpuModel, width: int) -> Sent:
    """Ulysses: each layer swaps tokens for heads before its attention and back, in forward and backward pass."""
    size = layout.sequence_parallel_size
    if size == 1:
        return Sent()
    once = batch.tokens * (2 * architecture.query + 2 * architecture.key) * width
    group = Layout(layout.plan, processes_per_node=size)
    return gather(2 * architecture.layers * once, group, gpu)
