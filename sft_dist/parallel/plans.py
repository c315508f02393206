"""The parallelism plans: values that render to a DeepSpeed config, an FSDP config and a command line.

A config holds only what a plan needs and what differs from the library's default, each with its reason; docs/plans.md
and the files in launch/ are written from here (`make refs`). accelerate's config file is in accelerate_file.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Engine = Literal["none", "ddp", "deepspeed", "fsdp2"]
Offload = Literal["none", "cpu", "nvme"]

# Bytes that a parameter takes in bfloat16 training. fsdp2 keeps parameters and gradients in float32 instead of a master
# copy beside bfloat16 ones, which comes to the same 16.
BYTES = {"parameters": 2, "gradients": 2, "optimizer": 12}


@dataclass(frozen=True)
class Plan:
    """What is sharded by which engine, and when to choose it."""

    name: str
    engine: Engine
    shards: frozenset[str]
    """What each process keeps only its share of: `optimizer`, `gradients`, `parameters`."""
    when: str
    communication: str = "none"
    """What the processes exchange."""


_O = frozenset({"optimizer"})
_OG = _O | {"gradients"}
_OGP = _OG | {"parameters"}
_REDUCED, _EACH = "gradients, once a step", "gradients, in every micro batch"
_GATHERED = f"{_EACH}; parameters, gathered for each forward and each backward pass"
PLANS = {
    plan.name: plan
    for plan in (
        Plan("cpu", "none", frozenset(), "no GPU: laptops, CI, trying out a config"),
        Plan("single", "none", frozenset(), "one GPU that holds everything"),
        Plan(
            "ddp", "ddp", frozenset(), "several GPUs, each of which holds everything: the least communication", _REDUCED
        ),
        Plan(
            "zero1",
            "deepspeed",
            _O,
            "optimizer states do not fit; many micro batches a step",
            f"{_REDUCED}; parameters, once a step",
        ),
        Plan(
            "zero2",
            "deepspeed",
            _OG,
            "optimizer states and gradients do not fit; few micro batches a step",
            f"{_EACH}; parameters, once a step",
        ),
        Plan(
            "zero3",
            "deepspeed",
            _OGP,
            "not even the parameters fit; NVMe offload; rows that several GPUs share",
            _GATHERED,
        ),
        Plan(
            "fsdp2",
            "fsdp2",
            _OGP,
            "not even the parameters fit; needs no other package; other numbers of GPUs load its checkpoints as they are",
            _GATHERED,
        ),
    )
}


@dataclass(frozen=True)
class Layout:
    """A plan on given processes: all that its files depend on."""

    plan: Plan
    nodes: int = 1
    processes_per_node: int = 1
    use_cpu: bool = False
    """Run the plan's engine on the CPU over gloo (to try it, and in tests)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    compile_layers: bool = False
    offload: Offload = "none"
    nvme_path: str | None = None
    hybrid_shard: bool = False
    sequence_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def data_parallel_size(self) -> int:
        """Processes that see different rows."""
        return self.world_size // self.sequence_parallel_size

    @property
    def shard_size(self) -> int:
        """Processes among which a sharded part is divided; hybrid sharding divides it inside a node only."""
        hybrid = self.hybrid_shard and self.plan.engine == "fsdp2"
        return self.processes_per_node if hybrid else self.world_size


@dataclass(frozen=True)
class Setting:
    """One value in a rendered config: its dotted key, and the reason for it."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Rendered:
    """Settings in order; `tree()` is the nested dict that the library reads."""

    settings: tuple[Setting, ...] = field(default_factory=tuple)

    def tree(self) -> dict[str, Any]:
        """{"a": {"b": 1}} for the setting a.b = 1."""
        tree: dict[str, Any] = {}
        for setting in self.settings:
            *parents, last = setting.key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = setting.value
        return tree


def deepspeed_config(layout: Layout) -> Rendered:
    """The DeepSpeed config of a zero plan; `auto` values are filled in by transformers from TrainingArguments."""
    stage = int(layout.plan.name.removeprefix("zero"))
    settings = [
        Setting("train_micro_batch_size_per_gpu", "auto", "train.per_device_train_batch_size"),
        Setting("gradient_accumulation_steps", "auto", "follows from train.global_batch_size"),
        Setting("gradient_clipping", "auto", "train.max_grad_norm"),
        Setting("bf16.enabled", layout.dtype == "bfloat16", "model.dtype; DeepSpeed keeps float32 masters and states"),
    ]
    if layout.dtype == "bfloat16":
        no_check = "bfloat16 hardly overflows; the check makes the host wait for the GPU once a step"
        settings.append(Setting("bf16.check_grad_overflow", False, no_check))
    settings.append(Setting("zero_optimization.stage", stage, "what is sharded"))
    if stage < 3:
        # Stage 3 does it by itself. With stage 1 it happens in a step's last backward pass only (stage_1_and_2.py).
        settings.append(
            Setting("zero_optimization.overlap_comm", True, "reduce gradients while the backward pass goes on")
        )
    settings.append(
        Setting(
            "zero_optimization.reduce_bucket_size",
            50_000_000,
            "elements; with the default, 500M, a small model is one bucket and nothing overlaps, and two buffers of "
            "that size take 2 GB",
        )
    )
    if stage == 3:
        # accelerate asks for it when it gathers the state dict; without it the final save raises.
        gather = "the final model is one set of weights, not shards"
        settings.append(Setting("zero_optimization.stage3_gather_16bit_weights_on_model_save", True, gather))
    if stage == 3 and layout.compile_layers:
        slow = (
            "DeepSpeed's own linear function is compiled anew for each parameter, until torch gives up and goes eager"
        )
        settings.append(Setting("zero_optimization.memory_efficient_linear", False, slow))
    if layout.hybrid_shard:
        reason = "each node keeps a second set of parameter shards: backward passes gather them without the network"
        settings.append(Setting("zero_optimization.zero_hpz_partition_size", layout.processes_per_node, reason))
    return Rendered((*settings, *_offload_settings(layout, stage)))


def _offload_settings(layout: Layout, stage: int) -> list[Setting]:
    if layout.offload == "none":
        return []
    settings = []
    for part in ("offload_optimizer", "offload_param") if stage == 3 else ("offload_optimizer",):
        settings.append(Setting(f"zero_optimization.{part}.device", layout.offload, "parallel.offload"))
        if layout.offload == "nvme":
            settings.append(Setting(f"zero_optimization.{part}.nvme_path", layout.nvme_path, "parallel.nvme_path"))
    reason = "torch's fused AdamW makes the update on the host; DeepSpeed's own would be compiled when the run starts"
    return [*settings, Setting("zero_force_ds_cpu_optimizer", False, reason)]


def fsdp_config(layout: Layout) -> Rendered:
    """`fsdp_config` of transformers' TrainingArguments for the fsdp2 plan."""
    settings = [
        Setting("version", 2, "per-parameter sharding (DTensor)"),
        Setting(
            "reshard_after_forward", True, "parameters are gathered again in the backward pass: memory before speed"
        ),
        Setting("auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "one unit a decoder layer"),
        Setting(
            "cpu_ram_efficient_loading",
            True,
            "the shards are filled from the first process's weights, without a whole copy on a GPU",
        ),
        Setting("state_dict_type", "SHARDED_STATE_DICT", "each process writes its own part of a checkpoint"),
        Setting(
            "activation_checkpointing",
            layout.gradient_checkpointing,
            "FSDP's own checkpointing: the model's would gather the parameters once more",
        ),
    ]
    if layout.offload == "cpu":
        settings.append(Setting("cpu_offload", True, "parallel.offload"))
    return Rendered(tuple(settings))


def parallelism_config(layout: Layout) -> Rendered:
    """Arguments of accelerate's ParallelismConfig; empty where the plan needs none."""
    if layout.sequence_parallel_size > 1:
        return Rendered(
            (
                Setting("dp_shard_size", layout.data_parallel_size, "groups of processes that see different rows"),
                Setting("sp_size", layout.sequence_parallel_size, "parallel.sequence_parallel_size"),
                Setting(
                    "sp_backend", "deepspeed", "Ulysses: each process computes the whole row for some of the heads"
                ),
            )
        )
    if layout.hybrid_shard and layout.plan.engine == "fsdp2":
        return Rendered(
            (
                Setting("dp_replicate_size", layout.nodes, "copies, one a node: only gradients cross the network"),
                Setting("dp_shard_size", layout.processes_per_node, "shards, inside a node"),
            )
        )
    return Rendered()


def command(layout: Layout, config_argument: str, *, endpoint: str = "HOST:29500", run_id: str = "RUN") -> list[str]:
    """The command line that starts the workers of one node; `endpoint` and `run_id` are for several nodes.

    Every node runs the same line. HOST is the name of any one of them.
    """
    worker = ["-m", "sft_dist.train", config_argument]
    if layout.plan.engine == "none":
        return ["python", *worker]
    count = ["--nnodes", str(layout.nodes), "--nproc-per-node", str(layout.processes_per_node)]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", run_id, "--rdzv-endpoint", endpoint]
    where = ["--standalone"] if layout.nodes == 1 else meeting
    return ["python", "-m", "torch.distributed.run", *where, *count, *worker]
