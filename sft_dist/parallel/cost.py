"""Time of one optimizer step: arithmetic, what moves through memory, launches, communication that nothing hides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.parallel.architecture import Architecture
from sft_dist.parallel.hardware import GPUS, GpuModel
from sft_dist.parallel.memory import Batch, layer_activations
from sft_dist.parallel.plans import Layout
from sft_dist.parallel.storage import offloaded_bytes
from sft_dist.parallel.traffic import Sent, Traffic, traffic
from sft_dist.parallel.weights import Weights

# Share of the peak that a matrix product with 16,384 rows reaches, by the width of the hidden state: 560, 686, 710, 714
# and 761 of 989 TFLOP/s on an H100 (torch 2.11). Other GPUs: scaled by their `gemm_share` over the H100's.
GEMM_SHARE = ((576, 0.566), (1024, 0.694), (2048, 0.718), (2560, 0.722), (4096, 0.769))
# Of that, what the products of a whole training reach, by the width again: 2.7 s of 4.1 (Qwen3-4B) and 5.5 of 7.4 (8B) in a
# step of 65,536 tokens on H200s, where the widest ones draw the most power (benchmarks/results/scaling-h200x4.json).
IN_TRAINING = ((2560, 1.0), (4096, 0.88))
# torch's varlen flash attention (flash attention 2), forward and backward pass, as a share of the peak: 0.079 for documents
# of 597 tokens (86 ms of 347, Qwen3-0.6B on an H100), 0.2 for 2,048 (Qwen3-4B on an H200), between them and beyond as
# the length to the power of 0.75; not above what is published for long rows (Shah et al., 2024: 35 % of an H100's peak).
ATTENTION_AT, ATTENTION_SHARE, ATTENTION_POWER, ATTENTION_LIMIT = 2048, 0.2, 0.75, 0.35
# How often the bytes that a layer saves go through memory in forward and backward pass, in all that is no matrix
# product and no attention: between 2 (Qwen3-0.6B on an H100) and 7 (4B on an H200) compiled. Eager: what is left of the
# 396 ms that SFTTrainer's step of 20,437 tokens took on one H200 (benchmarks/results/plans-h200x2.json).
PASSES = {True: 5.0, False: 22.0}
# Bytes through memory for each input and each output of a linear layer with an adapter, in bfloat16, eager. The input is
# read in both passes, its gradient written, read and added; the output is written, scaled and added, its gradient scaled.
# Counted from PEFT's modules, not measured.
ADAPTER_TRAFFIC = (12, 16)
# Bytes through memory for each trained token's logit, besides the head's products (train/loss.py): written 2, read for
# the best guess 2, converted 6, softmax 12, its exponential 8, divided 8, converted 6.
LOGIT_TRAFFIC = 44
# Seconds of host time to launch one layer in forward and backward pass, eager: 134 to 157 ms a micro batch of a few
# hundred tokens with 28 layers, Trainer's own work included (two H200, on a shared host). Compiled: not measured; a third
# of the kernels. Recomputing is one more forward pass.
LAUNCH_S = {True: 1.6e-3, False: 4.8e-3}
LAUNCH_AGAIN = 4 / 3
# Seconds that a micro batch takes longer with an engine, for each trained tensor, compiled: what steps took longer than
# ddp's, 6 ms (zero1), 18 (zero2), 27 (fsdp2) and 122 (zero3) with 310 tensors, 40 (fsdp2) and 50 to 80 (zero3) with 398.
HOOK_S = {"zero1": 0.02e-3, "zero2": 0.06e-3, "zero3": 0.3e-3, "fsdp2": 0.1e-3}
# Share of a pass behind which communication can hide, and the share of it that never does.
OVERLAP, ALWAYS_SEEN = 0.8, 0.05
# Bytes through memory for each element in AdamW's step: gradient, master and two moments read, three written, and the
# parameter rounded.
OPTIMIZER_TRAFFIC = 28
# Bytes a second that AdamW reaches in a node's host memory.
HOST_BYTES_PER_S = 60e9
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Work:
    """What one process computes in a micro batch, on average."""

    tokens: float
    length: float
    """Mean length of the documents, weighted by their tokens: what attention takes."""
    trained: float = 1.0
    """Share of the tokens that the head sees."""
    waiting: float = 1.0
    """Tokens of the process with the most, over the mean: the others wait for it. 1 where all rows are equally long."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they are spent on, and the work done in it."""

    compute: float
    """Arithmetic and memory on the GPU, with what is recomputed."""
    host: float
    """What the GPU waits for: launches, and what an engine adds."""
    communication: float
    """What nothing hides."""
    optimizer: float
    tokens: float
    """Tokens that all GPUs see in the step."""
    tokens_per_s_per_gpu: float
    mfu: float
    """Share of the GPU's peak that the model's own arithmetic takes; recomputing does not count."""
    sent: Sent

    @property
    def seconds(self) -> float:
        return self.compute + self.host + self.communication + self.optimizer


def flops_per_token(
    architecture: Architecture, mean_length: float, *, frozen: bool = False
) -> tuple[float, float, float]:
    """Floating-point operations a token in forward and backward pass: layers' matrices, head, attention.

    6 for each element of a matrix (2 forward, 4 backward; 4 in all where the weights are frozen and have no gradient).
    Attention is causal, so half of 12 times layers, width of the heads and length (PaLM, appendix B).
    """
    factor = 4 if frozen else 6
    layers = factor * architecture.layers * architecture.layer_matmul
    attention = 6 * architecture.layers * architecture.query * mean_length
    return float(layers), float(factor * architecture.embedding_params), float(attention)


def gemm_flops(architecture: Architecture, gpu: GpuModel) -> float:
    """Operations a second that matrix products of this width reach on `gpu`."""
    share = _between(GEMM_SHARE, architecture.hidden)
    return gpu.peak_flops * share * gpu.gemm_share / GPUS["h100"].gemm_share


def _between(table: Sequence[tuple[int, float]], width: int) -> float:
    """The value at `width`, on the line between its neighbours; that of the first or last beyond them."""
    for (low, at_low), (high, at_high) in itertools.pairwise(table):
        if low <= width <= high:
            return at_low + (at_high - at_low) * (width - low) / (high - low)
    return table[0][1] if width < table[0][0] else table[-1][1]


def step_time(
    architecture: Architecture, weights: Weights, layout: Layout, batch: Batch, work: Work, gpu: GpuModel
) -> StepTime:
    """Seconds of one optimizer step whose micro batches have so much `work`."""
    tokens = work.tokens
    forward_and_backward, flops = _micro_batch(architecture, weights, layout, work, gpu)
    forward_and_backward *= work.waiting
    launch = LAUNCH_S[layout.compile_layers] * (LAUNCH_AGAIN if layout.gradient_checkpointing else 1)
    hooks = HOOK_S.get(layout.plan.name, 0.0) * weights.tensors
    # ZeRO-1's hooks do nothing but in the last micro batch.
    repeated = hooks if layout.plan.name != "zero1" else hooks / batch.accumulation
    host = max(0.0, architecture.layers * launch - forward_and_backward) + repeated
    micro = forward_and_backward + host
    sent = traffic(architecture, weights, layout, batch, gpu)
    optimizer = _optimizer_time(weights, layout, gpu)
    offload = _offload_time(weights, layout, gpu)
    visible = _visible(sent, micro, batch.accumulation) + offload * batch.accumulation
    compute = batch.accumulation * forward_and_backward
    total = compute + batch.accumulation * host + visible + optimizer
    all_tokens = tokens * batch.accumulation * layout.world_size
    per_gpu = tokens * batch.accumulation / total
    return StepTime(
        compute=compute,
        host=batch.accumulation * host,
        communication=visible,
        optimizer=optimizer,
        tokens=all_tokens,
        tokens_per_s_per_gpu=per_gpu,
        mfu=per_gpu * flops / tokens / gpu.peak_flops,
        sent=sent.total(batch.accumulation),
    )


def _micro_batch(
    architecture: Architecture, weights: Weights, layout: Layout, work: Work, gpu: GpuModel
) -> tuple[float, float]:
    """Seconds of GPU time for one micro batch, and the model's own operations in it."""
    tokens = work.tokens
    layers, head, attention = (
        part * tokens for part in flops_per_token(architecture, work.length, frozen=weights.lora)
    )
    head *= work.trained
    flops = layers + head + attention
    if weights.lora:  # the adapter's own products
        layers += 6 * weights.trained * tokens
    layer = layer_activations(architecture, layout.dtype, compiled=layout.compile_layers)
    saved = layer * architecture.layers * tokens
    matrix_s = gemm_flops(architecture, gpu) * _between(IN_TRAINING, architecture.hidden)
    attention_share = min(ATTENTION_LIMIT, ATTENTION_SHARE * (work.length / ATTENTION_AT) ** ATTENTION_POWER)
    attention_s = gpu.peak_flops * attention_share
    parts = layers / matrix_s, attention / attention_s, PASSES[layout.compile_layers] * saved / gpu.hbm_bytes_per_s
    if weights.lora:
        ends = sum(
            inputs * ADAPTER_TRAFFIC[0] + outputs * ADAPTER_TRAFFIC[1]
            for inputs, outputs in architecture.linears.values()
        )
        parts = parts[0], parts[1], parts[2] + ends * architecture.layers * tokens / gpu.hbm_bytes_per_s
    # Recomputing is one more forward pass of the layers: a third, or half where the weights have no gradient; of
    # attention, whose backward pass has five products to the forward's two, 2 in 7.
    again = 0.0
    if layout.gradient_checkpointing:
        again = parts[0] / (2 if weights.lora else 3) + parts[1] * 2 / 7 + parts[2] / 3
    logits = tokens * work.trained * architecture.vocab * LOGIT_TRAFFIC / gpu.hbm_bytes_per_s
    return sum(parts) + again + head / matrix_s + logits, flops


def _visible(sent: Traffic, micro: float, accumulation: int) -> float:
    """Seconds of communication in a step that no computing hides."""

    def seen(part: Sent, window: float) -> float:
        return max(part.seconds - OVERLAP * window, part.seconds * ALWAYS_SEEN)

    each = seen(sent.each_micro, micro) * accumulation
    return each + seen(sent.last_backward, micro * BACKWARD_SHARE) + sent.after.seconds


def _optimizer_time(weights: Weights, layout: Layout, gpu: GpuModel) -> float:
    """Seconds of AdamW's step on the elements that one process updates."""
    own = weights.trained / (layout.shard_size if layout.plan.shards else 1)
    if layout.offload == "none":
        return own * OPTIMIZER_TRAFFIC / gpu.hbm_bytes_per_s
    # All processes of a node share its memory; the new parameters come back over PCIe.
    host = own * OPTIMIZER_TRAFFIC * layout.processes_per_node / HOST_BYTES_PER_S
    return host + own * 2 / gpu.pcie_bytes_per_s


def _offload_time(weights: Weights, layout: Layout, gpu: GpuModel) -> float:
    """Seconds a micro batch in which gradients go to host memory, and offloaded parameters come from it twice."""
    if layout.offload == "none":
        return 0.0
    own = weights.trained / layout.shard_size
    parameters = 2 * (own * 2 + weights.frozen_bytes / layout.shard_size) if "parameters" in layout.plan.shards else 0.0
    seconds = (own * 2 + parameters) / gpu.pcie_bytes_per_s
    # A disk gives 5 GB/s at best, to the whole node, and everything that is offloaded goes through it.
    disk = offloaded_bytes(weights, layout) * layout.processes_per_node / 5e9 if layout.offload == "nvme" else 0.0
    return seconds + disk
