"""What a config comes to on given processors: every `auto` decided (resolve.py decides)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sft_dist.config.schema import Config
from sft_dist.parallel.compiling import VARLEN
from sft_dist.parallel.plans import Layout


@dataclass(frozen=True)
class Resolved:
    """The values that `auto` stands for, and one line on each decision."""

    config: Config
    """The config, with what a launcher and the checkpoint to go on from say in place of `auto`."""
    layout: Layout
    dtype: Literal["float32", "bfloat16"]
    attn_implementation: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    compile_layers: bool
    num_threads: int
    """Threads of one process on the CPU."""
    decisions: tuple[str, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    """The DeepSpeed file that the user launched with; what it sets stands."""
    adopted: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config that `accelerate launch` decided."""

    @property
    def plan(self) -> str:
        return self.layout.plan.name

    @property
    def use_cpu(self) -> bool:
        return self.layout.use_cpu

    @property
    def gpus(self) -> int:
        """On all nodes together."""
        return 0 if self.use_cpu else self.layout.world_size

    @property
    def computes_on_host(self) -> bool:
        """Whether the CPU's cores do what takes long: everything, or the optimizer's step on what is offloaded."""
        return self.use_cpu or self.layout.offload != "none"

    @property
    def loading_dtype(self) -> str:
        """The type in which the weights are read: FSDP2's shards are the float32 masters themselves."""
        return "float32" if self.layout.plan.engine == "fsdp2" else self.dtype

    @property
    def padding_free(self) -> bool:
        """Whether a batch is one long row without padding, its documents told apart by their lengths."""
        return self.attn_implementation == VARLEN

    def facts(self) -> dict[str, Any]:
        """The values as JSON, without the decisions."""
        values = {name: getattr(self, name) for name in _PLAIN}
        layout = {name: getattr(self.layout, name) for name in _LAYOUT}
        return {"plan": self.plan, **layout, **values}


_PLAIN = (
    "dtype",
    "attn_implementation",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "compile_layers",
    "num_threads",
)
_LAYOUT = (
    "nodes",
    "processes_per_node",
    "world_size",
    "use_cpu",
    "offload",
    "hybrid_shard",
    "sequence_parallel_size",
)
