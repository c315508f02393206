"""A plan as the file that `accelerate launch --config_file` reads."""

from __future__ import annotations

import json
import re
import textwrap

from sft_dist.parallel.plans import Layout, Rendered, Setting, fsdp_config, parallelism_config

DISTRIBUTED_TYPE = {"none": "NO", "ddp": "MULTI_GPU", "deepspeed": "DEEPSPEED", "fsdp2": "FSDP"}
# transformers' name in `fsdp_config` -> accelerate's option without its prefix `fsdp_`, where the two differ.
RENAMED = {"cpu_offload": "offload_params"}
LINE = 120


def accelerate_config(layout: Layout, deepspeed_file: str = "deepspeed.json") -> Rendered:
    """accelerate's config; a zero plan refers to `deepspeed_file`, which holds what deepspeed_config(layout) renders."""
    engine = layout.plan.engine
    settings = [
        Setting("compute_environment", "LOCAL_MACHINE", "not SageMaker"),
        Setting("distributed_type", DISTRIBUTED_TYPE[engine], "the engine"),
        Setting("num_machines", layout.nodes, "nodes"),
        Setting("num_processes", layout.world_size, "over all nodes, one a GPU"),
        Setting("machine_rank", 0, "number of this node, from 0"),
        Setting("use_cpu", layout.use_cpu, "compute on the CPU" if layout.use_cpu else "compute on GPUs"),
    ]
    if engine == "fsdp2":
        precision = "bf16" if layout.dtype == "bfloat16" else "no"
        why = "model.dtype; parameters, gradients and states stay float32 in the shards"
        settings.append(Setting("mixed_precision", precision, why))
    elif engine != "deepspeed":  # beside a DeepSpeed file accelerate refuses the key: it stands there as bf16.enabled
        why = "no autocast: the weights already have the type to compute in"
        settings.append(Setting("mixed_precision", "no", why))
    if engine == "deepspeed":
        settings += _deepspeed(layout, deepspeed_file)
    if engine == "fsdp2":
        for setting in fsdp_config(layout).settings:
            key = f"fsdp_config.fsdp_{RENAMED.get(setting.key, setting.key)}"
            settings.append(Setting(key, setting.value, setting.reason))
    for setting in parallelism_config(layout).settings:
        settings.append(Setting(f"parallelism_config.parallelism_config_{setting.key}", setting.value, setting.reason))
    return Rendered(tuple(settings))


def _deepspeed(layout: Layout, deepspeed_file: str) -> list[Setting]:
    settings = [Setting("deepspeed_config.deepspeed_config_file", deepspeed_file, "relative to the current folder")]
    if layout.plan.name == "zero3":
        why = "the weights are split up while they are loaded"
        settings.append(Setting("deepspeed_config.zero3_init_flag", True, why))
    why = "on several nodes: run the command on each, without ssh; the default is pdsh"
    return [*settings, Setting("deepspeed_config.deepspeed_multinode_launcher", "standard", why)]


def as_yaml(rendered: Rendered, head: str) -> str:
    """The settings as YAML, each with its reason as a comment, below `head` as a comment."""
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    open_parents: list[str] = []
    for setting in rendered.settings:
        *parents, key = setting.key.split(".")
        if parents != open_parents:
            lines += [f"{'  ' * depth}{parent}:" for depth, parent in enumerate(parents)]
            open_parents = parents
        indent = "  " * len(parents)
        line = f"{indent}{key}: {_scalar(setting.value)}"
        if len(line) + len(setting.reason) + 4 <= LINE:
            lines.append(f"{line}  # {setting.reason}")
        else:
            comment = textwrap.wrap(setting.reason, LINE - len(indent) - 2)
            lines += [*(f"{indent}# {part}" for part in comment), line]
    return "\n".join(lines) + "\n"


def _scalar(value: str | int) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    # YAML 1.1, which accelerate reads, takes a bare no or NO for false.
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in ("no", "yes", "on", "off")
    return value if plain else json.dumps(value)
