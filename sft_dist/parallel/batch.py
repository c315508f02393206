"""How the rows of one step are shared: devices, micro batches, accumulation."""

from __future__ import annotations

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
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
