"""What every `auto` of a config means on a given machine, with the arithmetic behind each decision."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.machine import Machine

# Tokens that one device takes through the model at once when the micro batch is `auto`. On a CPU larger batches gain
# nothing, since every matrix product is already long; on a GPU this many keep a model of about 1B parameters busy.
CPU_TOKENS = 4096
GPU_TOKENS = 16384
# bfloat16 arithmetic in the matrix units came with this compute capability (Ampere).
BF16_GPU_CAPABILITY = 8.0


@dataclass(frozen=True)
class Resolved:
    """The values that `auto` stands for, and one line on each decision."""

    plan: Literal["cpu", "single"]
    dtype: Literal["float32", "bfloat16"]
    attn_implementation: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    num_threads: int
    """Threads of the CPU plan."""
    decisions: tuple[str, ...]

    @property
    def padding_free(self) -> bool:
        """Whether a batch is one long row without padding, its documents told apart by their lengths."""
        return self.attn_implementation == "sft_dist_varlen"


def resolve(config: Config, machine: Machine) -> Resolved:
    """Decide every `auto` for `machine`; raises ConfigError where the config asks for what it does not have."""
    notes: list[str] = []
    plan = _plan(config, machine, notes)
    dtype = _dtype(config, machine, plan, notes)
    attention = _attention(config, plan, notes)
    micro, accumulation = _batch(config, plan, notes)
    checkpointing = config.train.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = plan != "cpu"
        why = "host memory is ample and recomputing costs a third" if plan == "cpu" else "GPU memory is the limit"
        notes.append(f"train.gradient_checkpointing = {str(checkpointing).lower()}: {why}")
    return Resolved(plan, dtype, attention, micro, accumulation, checkpointing, machine.cores, tuple(notes))


def _plan(config: Config, machine: Machine, notes: list[str]) -> Literal["cpu", "single"]:
    plan = config.parallel.plan
    if plan == "single" and not machine.gpus:
        raise ConfigError(
            "parallel.plan is 'single' (one GPU), but no CUDA GPU is visible here",
            hint="set parallel.plan=cpu, or run where nvidia-smi lists a GPU (CUDA_VISIBLE_DEVICES may hide it)",
        )
    if plan == "auto":
        plan = "single" if machine.gpus else "cpu"
        found = f"{len(machine.gpus)} GPU(s) visible" if machine.gpus else "no GPU visible"
        notes.append(f"parallel.plan = {plan}: {found}, {machine.cores} CPU core(s)")
    return plan


def _dtype(config: Config, machine: Machine, plan: str, notes: list[str]) -> Literal["float32", "bfloat16"]:
    if config.model.dtype != "auto":
        return config.model.dtype
    if plan == "cpu":
        fast, unit = machine.cpu_bf16, "the CPU multiplies bfloat16 in hardware"
    else:
        gpu = machine.gpus[0]
        fast, unit = gpu.compute_capability >= BF16_GPU_CAPABILITY, f"compute capability {gpu.compute_capability}"
    if fast:
        notes.append(f"model.dtype = bfloat16: {unit}; the optimizer keeps float32 master weights")
        return "bfloat16"
    notes.append("model.dtype = float32: no bfloat16 arithmetic in hardware here")
    return "float32"


def _attention(config: Config, plan: str, notes: list[str]) -> str:
    if config.model.attn_implementation != "auto":
        return config.model.attn_implementation
    if plan == "cpu":
        notes.append("model.attn_implementation = sft_dist_varlen: rows are joined without padding and kept apart")
        return "sft_dist_varlen"
    notes.append("model.attn_implementation = sdpa")
    return "sdpa"


def with_longest_row(config: Config, resolved: Resolved, longest: int) -> Resolved:
    """`resolved` once the rows are tokenised: an `auto` micro batch follows from the longest row, not from max_length."""
    notes: list[str] = []
    micro, accumulation = _batch(config, resolved.plan, notes, longest)
    if micro == resolved.per_device_train_batch_size:
        return resolved
    return dataclasses.replace(
        resolved,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        decisions=(*resolved.decisions, *notes),
    )


def _batch(config: Config, plan: str, notes: list[str], longest: int | None = None) -> tuple[int, int]:
    total, asked = config.train.global_batch_size, config.train.per_device_train_batch_size
    if asked != "auto":
        micro = asked
    else:
        budget = CPU_TOKENS if plan == "cpu" else GPU_TOKENS
        row = config.data.max_length if longest is None else longest
        room = max(1, budget // row)
        micro = max(size for size in range(1, total + 1) if total % size == 0 and size <= room)
        what = "max_length" if longest is None else "longest row"
        notes.append(
            f"train.per_device_train_batch_size = {micro}: the largest divisor of global_batch_size {total} "
            f"within {budget} tokens / {what} {row} = {room} row(s)"
        )
    accumulation = total // micro
    notes.append(f"gradient accumulation = {accumulation}: global_batch_size {total} / ({micro} x 1 device)")
    return micro, accumulation
