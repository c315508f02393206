"""docs/planner.md: how the planner counts, what it assumes, and what it says for well-known models (`make refs`)."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config.schema import Config
from sft_dist.parallel import compiling, cost, hardware, memory, shares, storage, weights
from sft_dist.parallel.architecture import FAMILIES
from sft_dist.parallel.calibration import points
from sft_dist.parallel.estimate import COMFORT, Cluster, job_of
from sft_dist.parallel.hardware import GPUS, gpu_named
from sft_dist.parallel.planner import allowed, best, plan_all
from sft_dist.parallel.shares import GIB

MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3-8B")
# GPUs on a node, nodes.
SIZES = ((1, 1), (2, 1), (8, 1), (8, 2), (8, 8))
GPU, MAX_LENGTH, GLOBAL_BATCH = "h100", 4096, 128

_HOW = """\
# The planner

`sft-dist plan CONFIG [--gpus 8 --gpu h100 --nodes 2] [--json]` says what each plan takes in GPU memory, host memory, disk
and time, and marks the fastest that fits. `auto` in a config is decided by the same estimates. It reads the model's
config.json (a directory, the Hub's cache, or packaged numbers): no weights, no network, no torch, under a second. This page
is generated (`make refs`): the numbers in it are the constants in the code.

## What is counted

**Parameters** are counted from the shapes, exactly: embedding, head unless it is the embedding, and in each layer q, k, v,
o, gate, up, down, biases, norms, and the norms of queries and keys. By `model_type`: {families}.
Experts, and encoders with decoders, are refused rather than guessed.

**GPU memory** is that of the fullest moment, since moments do not add up: the head (all activations and the logits), the
backward pass (all activations, buckets, gathered units), its end (all gradients), the optimizer's step. Bytes an element
that is trained, in bfloat16, over N GPUs:

| plan | parameters | gradients | optimizer | besides |
|---|---|---|---|---|
| single | 2 | 2 | 12 | {step:.2f} GiB while the optimizer steps |
| ddp | 2 | 2, all the time (they are the buckets); 4 while accumulating | 12 | {step:.2f} GiB while the optimizer steps |
| zero1 | 2 | 2 while accumulating, and in the last micro batch the largest tensor's once more | 12/N | 2 buckets of {bucket}M elements and a copy of one; in the step 6/N |
| zero2 | 2 | 2/N; 4/N while accumulating | 12/N | the same |
| zero3 | 2/N | 2/N | 12/N | gathered: up to {reuse}M elements that are used again soon, {prefetch}M ahead, the head; in the step 6 for up to {group}M elements |
| fsdp2 | 4/N | 4/N | 8/N | gathered in bfloat16: three layers, and the head until the backward pass is done; one unit's gradients in bfloat16 and float32 |

- The optimizer's 12 are the float32 master and AdamW's two moments. In float32 it is 4, 4 and 8 (DeepSpeed: 12).
- `offload: cpu` takes optimizer and gradients of zero1 and zero2, and everything sharded of zero3 and fsdp2, to the host:
  20 bytes an element there, 16 with fsdp2, over the GPUs of the run.
- LoRA: the base model frozen, 2 bytes a parameter ({nf4} for the layers' matrices in NF4; zero3 and fsdp2 shard 2/N); the
  adapter's r x (inputs + outputs) elements a matrix as in the table: bfloat16 with float32 masters, 2 + 2 + 12.
- **Activations**, a token and layer, in bytes, with widths h (hidden state), q (all query heads), k (all key heads), f (feed
  forward), counted from what autograd saves in transformers' modules:

  | layers | norms, and what follows them | attention | norms of queries and keys | feed-forward | a head |
  |---|---|---|---|---|---|
  | compiled | 8h | 4q + 4k | 2q + 2k | 6f | 4 |
  | eager | 16h | 4q + 4k | 6q + 6k | 8f | 4 |
  | compiled, LoRA | 8h | 4q + 4k | 2q + 2k | 6f | 4 |
  | eager, LoRA | 12h | 4q + 4k | 4q + 4k | 8f | 4 |

  With checkpointing 2h a token and layer, and one whole layer. Each adapter saves 2r more, and with `lora_dropout`, eager,
  an input of its own with a byte an element of what was dropped.
- **Compiled** are the layers as the config's `train.compile_layers` says; `auto` is taken for yes in bfloat16 with our
  attention, unless `train.max_steps` is below {compile_from}. Under zero3 they are counted as eager, which is the most they
  can take: it has not been measured yet with all layers compiled.
- **Head**: logits of at most {chunk} trained tokens at a time, {logit_bytes} bytes each, beside 4 bytes an element of the weight's
  gradient while several chunks are summed (2 for the chunk's gradient and the product instead, where that is more); 4 bytes in
  the backward pass. A frozen head has logits only.
- **Fragmentation**: {fragmentation:.0%} of what is allocated. A choice should leave another {comfort:.0%} of the GPU free, since
  the estimates are good to about 10 %; if none does, one that just fits is taken (`tight`).
- **Usable** is what nvidia-smi shows less {context} GiB for the CUDA context, and {nccl} GiB for NCCL with several processes.

**Host memory** of a node: {process} GiB a process, and the weights while they load, once for each process (zero3: once; fsdp2:
for each process, in float32) or what is offloaded, whichever is more. Of a file in the run's own type this is more than is
needed: it is mapped, and its pages are shared. Measured on two processes on a CPU with 0.59 GiB of bfloat16 weights, beside
0.5 GiB of Python and libraries in each process: zero3 0.59 mapped by the first process and 0.12 in each beside its shard;
ddp 0.59 mapped by both; fsdp2 1.18 in each, and with an adapter 0.59 mapped by both. The {process} GiB are for CUDA's libraries
and have not been measured. Pinned buffers may be rounded up to a power of two; that is not counted.

**Disk**: a checkpoint holds the trained weights and their optimizer: 14 bytes an element (single, ddp, zero1, zero2), 12
(zero3, whose 16-bit weights follow from its float32 ones; fsdp2), and of frozen weights nothing. fsdp2 writes an embedding
that is also the head under both names, 4 bytes an element more. `checkpoint.keep` of them, one more while it is written, and
the final model.

**Sent** in a step by each GPU, in rings: an all-reduce of B bytes is 2B(N-1)/N, a gather or a reduce-scatter half of that.
ddp: gradients, once. zero1: gradients all-reduced, once, then parameters gathered. zero2: gradients in every micro batch.
zero3: parameters gathered twice and gradients scattered, in every micro batch. fsdp2: the same, gradients in float32. Across
nodes the ring crosses a node's border once, over all of its network cards. `hybrid_shard` keeps gathers inside the node. Each call takes the
hops of its ring or tree besides, as NCCL expects them; [scaling.md](scaling.md) shows what that comes to on many nodes.

**Time** of a step: matrix products, 6 operations an element and token (LoRA 4), at {low:.0%} ({low_width} wide) to {high:.0%}
({high_width}) of the GPU's peak, of which a training with the widest reaches {sustained:.0%}, the head's for trained tokens only;
attention, 6 x layers x q x mean length, at up to {attention:.0%}; all else through memory, {passes:g} times the bytes that a compiled layer saves and {eager:g} times an eager
one's, and {logit} bytes a logit; recomputing, one more forward pass; AdamW, {adam} bytes an element; and communication beyond
{overlap:.0%} of the computing that it can hide behind. A micro batch takes no less than the host needs to launch it: {launch:.1f}
ms a layer, {launch_eager:.1f} eager. Engines add to each micro batch, for each tensor, {hook1:.2f} ms (zero1: to the last one),
{hook2:.3f} (zero2), {hook3:.2f} (zero3), {hook4:.2f} (fsdp2). MFU counts the model's own operations, not the recomputed ones.
Compiling takes half a minute at the start; it is not counted.

**Rows**: from the ledger of a run of this name if there is one; else every row is taken to be `data.max_length` long, and all
its tokens trained. What fits is decided for micro batches of the longest rows. Processes wait for the one with the most
tokens: with rows of different lengths that takes time (8 % in the table below), counted where their spread is known.

## What is assumed, and what was measured

- Measured (torch 2.11, transformers 5.17, trl 1.16, DeepSpeed 0.19.8, November 2026), on H200s of one host: Qwen3-0.6B under
  every plan on one and two, 4B under every plan on one and two and some on four, 8B on two and four, the larger two with gradient
  checkpointing and accumulation; the table below. Offload and several nodes are counted, not measured; of LoRA one run, under ddp.
- Where more than a few hundred tokens are in a micro batch the peaks are within 4 %. With micro batches of some hundred
  tokens, half of them trained, 10 % too much is predicted: the head is counted for all.
- Speeds are within 16 %, most of them too high: in the measured runs every step was logged, which makes the host wait for the
  GPU; a run logs every tenth. `single` once lost about 30 ms a step (24,735 tokens, +24 %), most likely to threads on the host; a run now has
  one, and since then `single` and `ddp` are as far off as each other (32,768 tokens).
- The time that engines add was measured for three shapes; that it grows with the number of tensors is assumed.
- Matrix products and copies were measured on H100 and H200; other GPUs are taken to reach the share in the table below.
- Between nodes: the network in the table, for each GPU, of which {network:.0%} arrives. It is a property of the cluster.
- A dense decoder with our varlen attention and one-pass head. Time for evaluation and for writing checkpoints is not counted.
- After a run, `plan/predicted.json` and `plan/measured.json` in its folder hold the prediction and the measurement.

## Predicted and measured

bfloat16, compiled layers, H200. Qwen3-0.6B: micro batches of 32 rows whose lengths are spread like chats, no gradient
checkpointing (`benchmarks/results/plans-h200x2.json`); then two of 16 rows of 2,048 tokens (32,768; `scaling-h200x2.json`). 4B and 8B: four micro batches of 16,384 tokens in rows of 2,048, with
it (`scaling-h200x4.json`). Memory is torch.cuda.max_memory_allocated with the largest micro batch, the tokens of which are
given; speed is tokens a second and GPU. The constants for time are fitted to these runs but those of 32,768 tokens, which came later; those
for memory are counted.
`resume` is the end of the run once more, from its checkpoint. ddp of 4B was resumed before its states went through host memory
(106 GiB), and is left out.
"""


def planner_table() -> str:
    """The text of docs/planner.md."""
    h100_share, widths = hardware.GPUS["h100"].gemm_share, cost.GEMM_SHARE
    text = _HOW.format(
        families=", ".join(FAMILIES),
        step=shares.STEP_TRANSIENT_BYTES / GIB,
        bucket=shares.REDUCE_BUCKET // 10**6,
        reuse=shares.REUSE_KEPT // 10**6,
        prefetch=shares.PREFETCH_BUCKET // 10**6,
        group=shares.SUB_GROUP // 10**6,
        nf4=weights.NF4_BYTES,
        chunk=memory.HEAD_CHUNK,
        logit_bytes=memory.LOGIT_BYTES["bfloat16"],
        fragmentation=memory.FRAGMENTATION,
        comfort=1 - COMFORT,
        context=hardware.CONTEXT_GIB,
        nccl=hardware.NCCL_GIB,
        process=storage.PROCESS_BYTES // GIB,
        low=widths[0][1],
        low_width=widths[0][0],
        high=h100_share,
        high_width=widths[-1][0],
        attention=cost.ATTENTION_LIMIT,
        sustained=cost.IN_TRAINING[-1][1],
        passes=cost.PASSES[True],
        eager=cost.PASSES[False],
        compile_from=compiling.COMPILE_FROM_STEPS,
        logit=cost.LOGIT_TRAFFIC,
        adam=cost.OPTIMIZER_TRAFFIC,
        overlap=cost.OVERLAP,
        launch=cost.LAUNCH_S[True] * 1e3,
        launch_eager=cost.LAUNCH_S[False] * 1e3,
        hook1=cost.HOOK_S["zero1"] * 1e3,
        hook2=cost.HOOK_S["zero2"] * 1e3,
        hook3=cost.HOOK_S["zero3"] * 1e3,
        hook4=cost.HOOK_S["fsdp2"] * 1e3,
        network=hardware.NETWORK_SHARE,
    )
    return "\n".join([text, *_measured_table(), "", *_gpu_table(), "", *_model_table()]) + "\n"


def _measured_table() -> Iterator[str]:
    yield (
        "| model | GPUs | plan | run | tokens | GiB predicted | measured | off | speed predicted | measured | off "
        "| checkpoint GiB predicted | measured |"
    )
    yield "|---" * 13 + "|"
    for point in points():
        name = f"{point.model.split('/')[-1]} | {point.gpus} | {point.plan}"
        memory = (
            f"{point.predicted_peak_gib:.1f} | {point.peak_gib:.1f} | {_off(point.predicted_peak_gib, point.peak_gib)}"
        )
        speed = " | | "
        if point.speed and point.predicted_speed:
            speed = f"{point.predicted_speed:,.0f} | {point.speed:,} | {_off(point.predicted_speed, point.speed)}"
        saved = f"{point.predicted_checkpoint_gib:.2f} | {point.checkpoint_gib or ''}"
        yield f"| {name} | {point.part} | {point.tokens:,} | {memory} | {speed} | {saved} |"


def _off(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.1%}"


def _gpu_table() -> Iterator[str]:
    yield "| GPU | GiB | bf16 TFLOP/s | share | HBM TB/s | NVLink GB/s | PCIe GB/s | network GB/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for gpu in GPUS.values():
        bf16 = f"{gpu.bf16_tflops:g}" if gpu.bf16_tflops else f"none; fp32 {gpu.fp32_tflops:g}"
        share = f"{gpu.gemm_share:.0%}" + (" measured" if gpu.measured else "")
        rates = f"{gpu.hbm_tbps:g} | {gpu.nvlink_gbps or 'none'} | {gpu.pcie_gbps:g} | {gpu.network_gbps:g}"
        yield f"| {gpu.name} | {gpu.memory_gib:g} | {bf16} | {share} | {rates} |"


def _model_table() -> Iterator[str]:
    yield f"## All weights, {GPU}, max_length {MAX_LENGTH}, global_batch_size {GLOBAL_BATCH}"
    yield ""
    yield (
        "The choice of `auto`, estimated. Batch: rows of a micro batch x accumulation. GiB: needed on each GPU, of "
        f"{gpu_named(GPU).usable_gib(2):.1f} usable with several. Recompute: gradient checkpointing."
    )
    yield ""
    yield "| model | GPUs | plan | recompute | batch | GiB | tokens/s/GPU | MFU | s/step |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in MODELS:
        for gpus, nodes in SIZES:
            yield _row(name, Cluster(gpu_named(GPU), gpus, nodes))


def _row(name: str, cluster: Cluster) -> str:
    count = cluster.gpus_per_node * cluster.nodes
    where = f"{count} ({cluster.nodes} nodes)" if cluster.nodes > 1 else str(count)
    for offload in ("none", "cpu"):
        job = job_of(
            Config.model_validate(
                {
                    "model": {"name": name},
                    "data": {"max_length": MAX_LENGTH},
                    "train": {"global_batch_size": GLOBAL_BATCH},
                    "parallel": {"offload": offload},
                }
            )
        )
        chosen = best(allowed(job, cluster, plan_all(job, cluster)))
        if chosen is not None:
            layout, batch, time = chosen.layout, chosen.batch, chosen.time
            again = "yes" if layout.gradient_checkpointing else "no"
            tight = "" if chosen.comfortable else " (tight)"
            return (
                f"| {name} | {where} | {chosen.name} | {again} | {batch.rows} x {batch.accumulation} | "
                f"{chosen.memory.needed / GIB:.1f}{tight} | {time.tokens_per_s_per_gpu:,.0f} | {time.mfu:.0%} | {time.seconds:.2f} |"
            )
    return f"| {name} | {where} | nothing fits | | | | | | |"
