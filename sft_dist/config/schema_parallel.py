"""The fields that say how a run is spread over devices, and which of the weights it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sft_dist.config.section import Auto, Count, Positive, Section

PlanName = Literal["cpu", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


class ParallelConfig(Section):
    """How the run is spread over devices."""

    plan: PlanName | Auto = "auto"
    """`cpu` (one process), `single` (one GPU), `ddp` (a whole copy on each GPU), `zero1` `zero2` `zero3` (DeepSpeed: optimizer, and gradients, and parameters sharded), `fsdp2` (PyTorch: all three sharded); `auto` takes the fastest that fits, by the planner; what accelerate launch was told; on resume that of the checkpoint."""
    num_processes: Count | Auto = "auto"
    """Processes on this machine; `auto` is one for each visible GPU. Without a GPU a number runs the plan on the CPU, to try it; without one a plan for GPUs is refused there, under a launcher too."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where a sharded plan keeps what it does not compute with: `cpu` moves optimizer states to host memory (zero3 and fsdp2: parameters too), `nvme` to local disk (zero3 only)."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk for `offload: nvme`."""
    hybrid_shard: bool = False
    """zero3 and fsdp2 over several nodes: shard inside a node, keep copies across nodes, so that only gradients cross the network (zero3 keeps a second set of parameters in each node)."""
    sequence_parallel_size: Count = 1
    """GPUs that share one row (DeepSpeed Ulysses), for contexts too long for one GPU."""


class LoraConfig(Section):
    """A low-rank adapter; names and meanings are those of PEFT's LoraConfig."""

    r: Count = 16
    """Rank."""
    lora_alpha: Positive = 32.0
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before the adapter."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear` is every one but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole and saved with the adapter, such as `embed_tokens`."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4` keeps the frozen weights in 4 bits (QLoRA); needs bitsandbytes."""
    merge: bool = True
    """Publish the base model with the adapter merged into it, beside the adapter."""
