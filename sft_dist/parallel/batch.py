"""How the rows of one step are shared: devices, micro batches, accumulation; and heads where processes share a row."""

from __future__ import annotations

from typing import Any

from sft_dist.config.schema import Config, ModelConfig
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.parallel.architecture import find_config
from sft_dist.parallel.plans import Layout

# Tokens that one device takes through the model at once when the micro batch is `auto`. On a CPU larger batches gain
# nothing, since every matrix product is already long; on a GPU this many keep a model of about 1B parameters busy.
CPU_TOKENS = 4096
GPU_TOKENS = 16384


def check_share(config: Config, layout: Layout) -> None:
    """Raise ConfigError unless every device of `layout` can have as many whole micro batches of a step's rows."""
    total, asked = config.train.global_batch_size, config.train.per_device_train_batch_size
    if layout.world_size % layout.sequence_parallel_size:
        raise ConfigError(
            f"parallel.sequence_parallel_size is {layout.sequence_parallel_size}, which does not divide "
            f"{layout.world_size} process(es)",
            hint="set it to a divisor, or start another number of processes (parallel.num_processes)",
        )
    devices = layout.data_parallel_size
    share, rest = divmod(total, devices)
    if rest:
        near = " or ".join(str(number * devices) for number in (share, share + 1) if number)
        raise ConfigError(
            f"train.global_batch_size is {total}, which {devices} processes cannot share evenly",
            hint=f"set it to {near}, or parallel.num_processes to a number that divides it",
        )
    if asked != "auto" and share % asked:
        raise ConfigError(
            f"train.global_batch_size {total} is not divisible by per_device_train_batch_size {asked} x "
            f"{devices} devices = {asked * devices}",
            hint=f"each device has {share} rows a step: set per_device_train_batch_size to a divisor of it, or auto",
        )


def share_rows(config: Config, layout: Layout, notes: list[str], longest: int | None = None) -> tuple[int, int]:
    """Micro batch and accumulation steps of each device of `layout`, which together make the global batch.

    `longest` is the longest row once the rows are known. The arithmetic goes into `notes`. `check_share` comes before it.
    """
    total, asked = config.train.global_batch_size, config.train.per_device_train_batch_size
    devices = layout.data_parallel_size
    share = total // devices
    if asked != "auto":
        micro = asked
    else:
        budget = CPU_TOKENS if layout.use_cpu else GPU_TOKENS
        row = config.data.max_length if longest is None else longest
        room = max(1, budget // row)
        micro = max(size for size in range(1, share + 1) if share % size == 0 and size <= room)
        what = "max_length" if longest is None else "longest row"
        whose = f"global_batch_size {total}" if devices == 1 else f"{share} rows a device"
        notes.append(
            f"train.per_device_train_batch_size = {micro}: the largest divisor of {whose} "
            f"within {budget} tokens / {what} {row} = {room} row(s)"
        )
    accumulation = share // micro
    notes.append(
        f"gradient accumulation = {accumulation}: global_batch_size {total} / ({micro} x {devices} device{'s' * (devices > 1)})"
    )
    return micro, accumulation


def check_heads(config: Config) -> None:
    """Raise ConfigError if the model's heads cannot be dealt out among parallel.sequence_parallel_size processes.

    Says nothing where no config.json of the model is here yet, or it does not name its heads.
    """
    size = config.parallel.sequence_parallel_size
    heads = heads_of(config.model) if size > 1 else None
    if heads is None or can_share(*heads, size):
        return
    possible = ", ".join(map(str, sizes(*heads)))
    raise ConfigError(
        f"parallel.sequence_parallel_size is {size}, but {config.model.name} has {described(*heads)}: "
        "each process that shares a row computes as many of the heads",
        hint=f"set parallel.sequence_parallel_size={largest_below(*heads, size)}; with this model {possible} can be",
    )


def check_during(config: Config, plan: str) -> None:
    """Raise ConfigError if the model is to be asked during the training, and no process of `plan` has the whole of it."""
    shared = config.parallel.sequence_parallel_size > 1
    if config.evaluate.during is None or not (shared or plan in ("zero3", "fsdp2")):
        return
    why = "each GPU sees a part of a row only" if shared else "no process has the whole model"
    raise ConfigError(
        f"evaluate.during asks the model in the main process, and under {'parallel.sequence_parallel_size' if shared else plan} {why}",
        hint="take evaluate.during out (the evaluation loss, train.eval_strategy, works under every plan), or choose zero2, zero1 or ddp",
    )


def can_share(heads: int, kv_heads: int, size: int) -> bool:
    """Whether DeepSpeed can give each of `size` processes as many heads.

    deepspeed/runtime/sequence_parallel/ulysses_sp.py, UlyssesSPAttentionHF.__init__: query heads must be a multiple of the
    size. Key/value heads too; or where they are fewer, the size a multiple of them, and each is sent to several processes.
    """
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def sizes(heads: int, kv_heads: int) -> list[int]:
    """Every size that can_share, from 1 on."""
    return [size for size in range(1, heads + 1) if can_share(heads, kv_heads, size)]


def largest_below(heads: int, kv_heads: int, size: int) -> int:
    """The largest that can_share and is not above `size`; 1 always can."""
    return max(possible for possible in sizes(heads, kv_heads) if possible <= size)


def described(heads: int, kv_heads: int) -> str:
    """The heads in words."""
    return f"{heads} attention heads" + (f" and {kv_heads} key/value heads" if kv_heads != heads else "")


def heads_of(model: ModelConfig) -> tuple[int, int] | None:
    """Query heads and key/value heads by the model's config.json, of any kind of model; None if it is not known."""
    try:
        tree, _ = find_config(model)
        text: Any = tree.get("text_config")
        text = text if isinstance(text, dict) else tree
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
    except (PreflightError, KeyError, TypeError, ValueError):
        return None
    return (heads, kv_heads) if heads > 0 and kv_heads > 0 else None
