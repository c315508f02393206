"""What `accelerate launch` told the processes that it started, as fields of our config.

The rule: each value that has a field of ours is that field's, where the config leaves it on `auto` or on its default, and is
refused where the config says something else. What changes the computation and has no field is refused. What is the plan's
own (how layers are wrapped, how a checkpoint is written) is named once and not used. Then all of it is forgotten
(world.py), so that accelerate does not read it a second time, beside our settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_dist.errors import ConfigError
from sft_dist.parallel.deepspeed_file import Said, offload, read_deepspeed_file, said_by_file

PRECISIONS = {"no": None, "bf16": "bfloat16"}
# What the fsdp2 plan has of its own, under accelerate's names: another value is named, and not used.
OF_FSDP2 = {
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


@dataclass(frozen=True)
class Told:
    """Fields of the config that `accelerate launch` has decided, and what else it said."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    """Of each field: accelerate's or DeepSpeed's own setting, as its file has it."""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """The DeepSpeed file; what it sets stands."""
    accumulation: int | None = None
    """Micro batches of a step, where it says more than accelerate's default."""
    unused: tuple[str, ...] = ()
    """A line on each setting that is the plan's own and differs."""


def is_told(env: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` made this environment: its three launchers set these variables together, nobody else does."""
    marks = ("ACCELERATE_DYNAMO_MODE", "ACCELERATE_CONFIG_DS_FIELDS")
    return "ACCELERATE_MIXED_PRECISION" in env and any(mark in env for mark in marks)


def read_told(env: Mapping[str, str], size: int, *, launched: bool) -> Told:
    """What `env` says; `size` is the number of processes, `launched` whether they are to meet at all.

    Raises ConfigError for what this package cannot do (FSDP 1, float16, Megatron, ...), and for a DeepSpeed file that
    cannot be read.
    """
    said, unused, given = Said(), [], {}
    _refuse_foreign(env)
    if _on(env, "ACCELERATE_USE_DEEPSPEED"):
        given = _deepspeed(env, said)
    elif _on(env, "ACCELERATE_USE_FSDP"):
        unused += _fsdp(env, said)
    elif launched and size > 1:
        said.add("parallel.plan", "ddp", "distributed_type: MULTI_GPU")
    elif not launched and _on(env, "ACCELERATE_USE_CPU"):
        said.add("parallel.plan", "cpu", "use_cpu: true")
    elif not launched:
        said.add("parallel.num_processes", 1, "num_processes: 1")
    precision = env["ACCELERATE_MIXED_PRECISION"]
    if PRECISIONS[precision]:
        said.add("model.dtype", PRECISIONS[precision], f"mixed_precision: {precision}")
    backend = env.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if backend == "INDUCTOR":
        said.add("train.compile_layers", True, "dynamo_backend: INDUCTOR")
    elif backend != "NO":
        unused.append(_unused("dynamo_backend", backend, "torch.compile's own or none (train.compile_layers)"))
    if _on(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        _parallelism(env, said, size)
    return Told(said.fields, said.words, given, said.accumulation, tuple(unused))


def _refuse_foreign(env: Mapping[str, str]) -> None:
    sizes = {name: _number(env, f"PARALLELISM_CONFIG_{name}_SIZE") for name in ("TP", "CP")}
    precision = env["ACCELERATE_MIXED_PRECISION"]
    refused = [
        (_on(env, "ACCELERATE_USE_MEGATRON_LM"), "Megatron-LM", "use one of launch/accelerate/"),
        (precision not in PRECISIONS, f"mixed_precision: {precision}", "set mixed_precision: bf16 in its file, or no"),
        (
            sizes["TP"] > 1,
            "tensor parallelism (parallelism_config_tp_size)",
            "take it out; zero3 and fsdp2 shard as well",
        ),
        (sizes["CP"] > 1, "context parallelism (parallelism_config_cp_size)", "use parallelism_config_sp_size"),
        (
            _on(env, "ACCELERATE_USE_FSDP") and env.get("FSDP_VERSION", "1") != "2",
            "FSDP 1, which PyTorch no longer develops",
            "set fsdp_version: 2 in its config, as in launch/accelerate/fsdp2.yaml",
        ),
    ]
    for is_so, what, instead in refused:
        if is_so:
            raise ConfigError(f"accelerate launch asks for {what}, which sft-dist does not do", hint=instead)


def _deepspeed(env: Mapping[str, str], said: Said) -> dict[str, Any]:
    path = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path.lower() != "none":
        # What accelerate's own settings say beside a file is their default and means nothing.
        tree = read_deepspeed_file(path)
        said_by_file(tree, path, said)
        return tree
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise ConfigError(
            f"accelerate launch asks for DeepSpeed ZeRO stage {stage}",
            hint="use stage 1, 2 or 3, as in launch/accelerate/zero2.yaml; without sharding take ddp.yaml",
        )
    said.add("parallel.plan", f"zero{stage}", f"zero_stage: {stage}")
    devices = {
        part: {"device": env.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE", "none")}
        for part in ("offload_optimizer", "offload_param")
    }
    clipping = env.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto"):
        said.add("train.max_grad_norm", float(clipping), f"gradient_clipping: {clipping}")
    steps = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):  # 1 is also what it says when nobody has set it
        said.accumulation = int(steps)
    return offload(devices, int(stage), said)


def _fsdp(env: Mapping[str, str], said: Said) -> list[str]:
    said.add("parallel.plan", "fsdp2", "fsdp_version: 2")
    if _on(env, "FSDP_OFFLOAD_PARAMS"):
        said.add("parallel.offload", "cpu", "fsdp_offload_params: true")
    if _on(env, "FSDP_ACTIVATION_CHECKPOINTING"):
        said.add("train.gradient_checkpointing", True, "fsdp_activation_checkpointing: true")
    values = {name: env.get(name, ours) for name, ours in OF_FSDP2.items()}
    return [
        _unused(name.lower(), value, OF_FSDP2[name])
        for name, value in values.items()
        if value.lower() != OF_FSDP2[name].lower()
    ]


def _unused(name: str, value: str, ours: str) -> str:
    return f"accelerate launch's {name}: {value} is not used; the plan has {ours}"


def _parallelism(env: Mapping[str, str], said: Said, size: int) -> None:
    names = ("DP_REPLICATE", "DP_SHARD", "SP")
    copies, shards, shared = (_number(env, f"PARALLELISM_CONFIG_{name}_SIZE") for name in names)
    if copies * shards * shared != size:
        raise ConfigError(
            f"accelerate launch's parallelism_config is for {copies} x {shards} x {shared} processes "
            f"(dp_replicate, dp_shard, sp), but {size} were started",
            hint="change it, or start as many with --num_processes",
        )
    if copies > 1:
        local = int(env.get("LOCAL_WORLD_SIZE", size))
        if (copies, shards) != (size // local, local):
            raise ConfigError(
                f"accelerate launch asks for {copies} copies of {shards} shards, but there are {size // local} node(s) of "
                f"{local} process(es)",
                hint="sft-dist keeps one copy a node: set dp_replicate_size to the nodes, dp_shard_size to the rest",
            )
        said.add("parallel.hybrid_shard", True, f"parallelism_config_dp_replicate_size: {copies}")
    if shared > 1:
        backend = env.get("PARALLELISM_CONFIG_SP_BACKEND", "deepspeed")
        if backend != "deepspeed":
            raise ConfigError(f"accelerate launch asks for sp_backend {backend}", hint="set it to deepspeed (Ulysses)")
        said.add("parallel.sequence_parallel_size", shared, f"parallelism_config_sp_size: {shared}")


def _on(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "false").lower() in ("true", "1", "yes")


def _number(env: Mapping[str, str], name: str) -> int:
    return max(1, int(env.get(name, "1")))
