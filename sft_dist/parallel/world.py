"""The processes that a launcher started together, read from the environment that torchrun and accelerate set."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from dataclasses import dataclass

from sft_dist.errors import ConfigError
from sft_dist.parallel.told import Told, is_told, read_told

log = logging.getLogger(__name__)
# What accelerate reads, in these processes and in `accelerate launch`.
OF_ACCELERATE = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
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


def this_world() -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; ConfigError for nodes with different numbers of processes."""
    env = os.environ
    if "LOCAL_RANK" not in env or "WORLD_SIZE" not in env:
        return World()
    size, local = int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    if size % local:
        raise ConfigError(
            f"{size} processes, {local} of them on this node: every node needs as many",
            hint="start the same number of processes on each node",
        )
    return World(size, int(env.get("RANK", "0")), int(env["LOCAL_RANK"]), local, True)


def with_told(world: World) -> World:
    """`world` with what `accelerate launch` told this worker; commands, which start workers themselves, do not ask.

    Raises ConfigError where accelerate was told what cannot be done here.
    """
    if not is_told(os.environ):
        return world
    return dataclasses.replace(world, told=read_told(os.environ, world.size, launched=world.launched))


def accelerate_variables() -> list[str]:
    """Names of the variables of this environment that accelerate would obey."""
    return sorted(name for name in os.environ if name.startswith(OF_ACCELERATE) and name not in HARMLESS)


def unlaunched() -> dict[str, str]:
    """The environment without what launchers tell their workers: for a process that is none of them."""
    told = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE|FSDP)_.*")
    return {name: value for name, value in os.environ.items() if not told.fullmatch(name)}


def forget_accelerate(world: World) -> None:
    """Take accelerate's variables out of the environment: they would be applied a second time, beside our settings.

    The main process of `world` names those that no `accelerate launch` has set in one warning: nothing here has obeyed
    them; and what was told but is not used.
    """
    names = accelerate_variables()
    for name in names:
        del os.environ[name]
    if world.rank:
        return
    if world.told is None and names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        log.warning("%s: set without accelerate launch, and ignored; the plan is parallel.plan", shown)
    for line in () if world.told is None else world.told.unused:
        log.warning("%s", line)
