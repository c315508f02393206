"""The processes that a launcher started together, read from the environment that torchrun and accelerate set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.errors import ConfigError
from sft_dist.files import read_json

# What `accelerate launch` tells its processes; the plan is read from it once, then sft-dist sets everything itself.
ACCELERATE_SWITCHES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_DYNAMO_BACKEND",
)


@dataclass(frozen=True)
class World:
    """This process among those that a launcher started."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    """Whether a launcher started this process at all, be it as the only one."""
    plan: str | None = None
    """The sharded plan that `accelerate launch` was told, None if it was told none."""
    deepspeed: Mapping[str, Any] | None = None
    """The DeepSpeed config file that `accelerate launch` was given."""

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


def nodes_of(count: int) -> World:
    """The world of a job of so many nodes, before there are workers on them."""
    return World(size=count)


def this_world() -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and accelerate's variables.

    Raises ConfigError where accelerate was asked for FSDP 1, and for processes that differ in number between nodes.
    """
    env = os.environ
    launched = "LOCAL_RANK" in env and "WORLD_SIZE" in env
    if not launched:
        return World()
    size, local = int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    if size % local:
        raise ConfigError(
            f"{size} processes, {local} of them on this node: every node needs as many",
            hint="start the same number of processes on each node",
        )
    plan, deepspeed = _accelerate_plan()
    return World(size, int(env.get("RANK", "0")), int(env["LOCAL_RANK"]), local, True, plan, deepspeed)


def forget_accelerate() -> None:
    """Take accelerate's switches out of the environment: they would be applied a second time, over ours."""
    for name in ACCELERATE_SWITCHES:
        os.environ.pop(name, None)


def _accelerate_plan() -> tuple[str | None, dict[str, Any] | None]:
    env = os.environ
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        path = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        tree = _deepspeed_file(path) if path.lower() != "none" else None
        stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if tree is not None:
            stage = str(tree.get("zero_optimization", {}).get("stage", 0))
        if stage not in ("1", "2", "3"):
            raise ConfigError(
                f"accelerate launch asks for DeepSpeed ZeRO stage {stage}",
                hint="use stage 1, 2 or 3, as in launch/accelerate/zero2.yaml; without sharding take ddp.yaml",
            )
        return f"zero{stage}", tree
    if env.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if env.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "accelerate launch asks for FSDP 1, which PyTorch no longer develops",
                hint="set fsdp_version: 2 in its config, as in launch/accelerate/fsdp2.yaml",
            )
        return "fsdp2", None
    return None, None


def _deepspeed_file(path: str) -> dict[str, Any]:
    hint = "its path is relative to the folder in which accelerate launch was typed"
    try:
        tree = read_json(Path(path))
    except (ValueError, OSError) as error:
        raise ConfigError(f"the DeepSpeed file {path} cannot be read: {error}", hint=hint) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"the DeepSpeed file {path} is missing, or it holds no JSON object", hint=hint)
    return tree
