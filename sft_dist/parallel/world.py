"""The processes that a launcher started together, read from the environment that torchrun and accelerate set."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from sft_dist.errors import ConfigError
from sft_dist.parallel.told import Told, is_told, read_told

log = logging.getLogger(__name__)
# What accelerate reads, in these processes and in `accelerate launch`.
OF_ACCELERATE = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "FP8_")
# Of these, what changes nothing of a training: logging, and where a process's threads run.
HARMLESS = (
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_DISABLE_RICH",
    "ACCELERATE_ENABLE_RICH",
    "ACCELERATE_CPU_AFFINITY",
)


@dataclass(frozen=True)
class World:
    """This process among those that a launcher started."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    """Whether a launcher started this process as one that meets others, be it as the only one."""
    told: Told | None = None
    """What `accelerate launch` said, None if it did not start this process."""

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


def nodes_of(count: int) -> World:
    """The world of a job of so many nodes, before there are workers on them."""
    return World(size=count)


def this_world(*, worker: bool = False) -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and, for a worker, what `accelerate launch` told it.

    Raises ConfigError where accelerate was told what cannot be done here, and for processes that differ in number
    between nodes.
    """
    env = os.environ
    launched = "LOCAL_RANK" in env and "WORLD_SIZE" in env
    told = worker and is_told(env)
    if not launched:
        return World(told=read_told(env, 1, launched=False) if told else None)
    size, local = int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    if size % local:
        raise ConfigError(
            f"{size} processes, {local} of them on this node: every node needs as many",
            hint="start the same number of processes on each node",
        )
    said = read_told(env, size, launched=True) if told else None
    return World(size, int(env.get("RANK", "0")), int(env["LOCAL_RANK"]), local, True, said)


def accelerate_variables() -> list[str]:
    """Names of the variables of this environment that accelerate would obey."""
    return sorted(name for name in os.environ if name.startswith(OF_ACCELERATE) and name not in HARMLESS)


def forget_accelerate(told: Told | None) -> None:
    """Take accelerate's variables out of the environment: they would be applied a second time, beside our settings.

    Those that no `accelerate launch` has set are named in one warning: nothing here has obeyed them.
    """
    names = accelerate_variables()
    for name in names:
        del os.environ[name]
    if told is None and names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        log.warning("%s: set without accelerate launch, and ignored; the plan is parallel.plan", shown)
    for line in () if told is None else told.unused:
        log.warning("%s", line)
