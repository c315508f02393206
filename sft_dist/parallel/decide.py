"""The single decisions behind resolve.py: plan, processes, dtype, attention, compiling; each says why in `notes`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.compiling import VARLEN, compiled_by_default
from sft_dist.parallel.machine import Machine
from sft_dist.parallel.world import World

# bfloat16 arithmetic in the matrix units came with this compute capability (Ampere).
BF16_GPU_CAPABILITY = 8.0
# Plans whose checkpoints hold the whole model and optimizer in the same files.
WHOLE = ("cpu", "single", "ddp")


def decide_plan(
    config: Config, machine: Machine, world: World, notes: list[str], saved: Mapping[str, Any] | None = None
) -> str:
    """The plan that the config names or `saved`, the facts of the checkpoint to go on from, allows; `auto` where the
    planner must choose among those for GPUs.

    Raises ConfigError where config and launcher contradict each other, or where the GPUs are not there.
    """
    plan: str = config.parallel.plan
    count = config.parallel.num_processes
    if plan in ("cpu", "single") and world.size > 1:
        raise ConfigError(
            f"parallel.plan is {plan!r}, one process, but the launcher started {world.size}",
            hint="set parallel.plan=ddp (or leave it on auto), or start one process on one node",
        )
    each = world.local_size if world.launched else count if count != "auto" else max(1, len(machine.gpus))
    processes = each * world.nodes
    if plan == "auto" and saved is not None:
        plan = _goes_on(str(saved["plan"]), processes, machine)
        notes.append(f"parallel.plan = {plan}: the checkpoint to go on from is one of {saved['plan']}")
    stated = config.parallel.plan != "auto" or (plan not in ("auto", *WHOLE) and not (saved or {}).get("use_cpu"))
    if stated and plan != "cpu" and not machine.gpus and (count == "auto" or plan == "single"):
        tried = "" if plan == "single" else f"; parallel.num_processes={max(2, each)} tries the plan on the CPU"
        raise ConfigError(
            f"parallel.plan is {plan!r}, but no CUDA GPU is visible here",
            hint=f"set parallel.plan=cpu, or run where nvidia-smi lists a GPU (CUDA_VISIBLE_DEVICES may hide it){tried}",
        )
    if plan == "fsdp2" and config.parallel.offload != "none" and not machine.gpus:  # torch asks for "the accelerator"
        raise ConfigError(
            f"parallel.offload is {config.parallel.offload!r}, which plan fsdp2 can only do beside a GPU, and none is visible here",
            hint="parallel.offload=none tries the plan on the CPU; the zero plans try theirs there as it is",
        )
    if plan != "auto":
        return plan
    if not machine.gpus:
        plan = "ddp" if processes > 1 else "cpu"
        notes.append(f"parallel.plan = {plan}: {processes} process(es), no GPU visible, {machine.cores} CPU core(s)")
    return plan


def _goes_on(plan: str, processes: int, machine: Machine) -> str:
    """The plan of this many processes that can read the checkpoints of `plan`."""
    if plan not in WHOLE:
        return plan
    return "ddp" if processes > 1 else "single" if machine.gpus else "cpu"


def decide_processes(config: Config, machine: Machine, world: World, plan: str) -> int:
    """Processes on this node; one for `auto` on one GPU. ConfigError where config, launcher and GPUs disagree."""
    asked = config.parallel.num_processes
    if world.launched:
        if asked not in ("auto", world.local_size):
            raise ConfigError(
                f"parallel.num_processes is {asked}, but the launcher started {world.local_size} on this node",
                hint="leave parallel.num_processes on auto, or start as many",
            )
        return world.local_size
    if plan in ("cpu", "single"):
        if asked not in ("auto", 1):
            raise ConfigError(
                f"parallel.num_processes is {asked}, but parallel.plan {plan!r} is one process",
                hint="set parallel.plan=ddp, or leave parallel.num_processes on auto",
            )
        return 1
    if asked != "auto":
        if machine.gpus and asked > len(machine.gpus):
            raise ConfigError(
                f"parallel.num_processes is {asked}, but {len(machine.gpus)} GPU(s) are visible",
                hint=f"set it to {len(machine.gpus)} or less, or leave it on auto",
            )
        return asked
    return max(1, len(machine.gpus))  # without a GPU, one process on each of several nodes


def decide_threads(config: Config, machine: Machine, processes: int, notes: list[str]) -> int:
    """Threads of each process on the CPU: its share of the cores. torchrun gives one where several processes start."""
    threads = max(1, machine.cores // processes)
    offload, told = config.parallel.offload, os.environ.get("OMP_NUM_THREADS", "")
    if offload != "none":
        share = f"{machine.cores} cores / {processes} processes"
        why = f"{share}: the optimizer steps on the host (parallel.offload={offload}), and torchrun would give it 1"
        if told not in ("", str(threads)):  # the user's, or of torchrun started by hand
            why = f"as the environment says; {share} would be {threads}, and the optimizer steps on the host"
        notes.append(f"OMP_NUM_THREADS = {told or threads}: {why}")
    return threads


def decide_dtype(
    config: Config, machine: Machine, use_cpu: bool, notes: list[str], saved: Mapping[str, Any] | None = None
) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the hardware computes in it; what the checkpoint to go on from has."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if saved is not None:
        found: Literal["float32", "bfloat16"] = "bfloat16" if saved["dtype"] == "bfloat16" else "float32"
        notes.append(f"model.dtype = {found}: the checkpoint to go on from has it")
        return found
    if use_cpu:
        fast, unit = machine.cpu_bf16, "the CPU multiplies bfloat16 in hardware"
    else:
        gpu = machine.gpus[0]
        fast, unit = gpu.compute_capability >= BF16_GPU_CAPABILITY, f"compute capability {gpu.compute_capability}"
    if fast:
        notes.append(f"model.dtype = bfloat16: {unit}; the optimizer keeps float32 master weights")
        return "bfloat16"
    notes.append("model.dtype = float32: no bfloat16 arithmetic in hardware here")
    return "float32"


def decide_attention(config: Config, machine: Machine, use_cpu: bool, dtype: str, notes: list[str]) -> str:
    """Our kernel for rows of any length, where it computes."""
    if config.model.attn_implementation != "auto":
        return config.model.attn_implementation
    # torch's flash attention for documents of different lengths computes in 16 bits, on Ampere and later.
    # Ulysses exchanges heads around the kernels that transformers knows, so ours cannot share rows.
    shared = config.parallel.sequence_parallel_size > 1
    if shared:
        notes.append("model.attn_implementation = sdpa: rows are shared between GPUs (sequence_parallel_size)")
        return "sdpa"
    if use_cpu or (dtype == "bfloat16" and machine.gpus[0].compute_capability >= BF16_GPU_CAPABILITY):
        notes.append(f"model.attn_implementation = {VARLEN}: rows are joined without padding and kept apart")
        return VARLEN
    notes.append("model.attn_implementation = sdpa: the varlen kernel needs bfloat16 and compute capability 8.0")
    return "sdpa"


def decide_compiled(config: Config, use_cpu: bool, attention: str, notes: list[str]) -> bool:
    """Whether the decoder layers are compiled."""
    if config.train.compile_layers != "auto":
        return config.train.compile_layers
    steps = config.train.max_steps
    compiled = not use_cpu and attention == VARLEN and compiled_by_default(steps)
    if not use_cpu:
        why = "half a minute, once" if compiled else f"{steps} steps are over before it pays"
        why = why if attention == VARLEN else f"only with {VARLEN}"
        notes.append(f"train.compile_layers = {str(compiled).lower()}: {why}")
    return compiled
