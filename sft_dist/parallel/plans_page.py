"""docs/plans.md: the plans, what they set and why, what `accelerate launch` says, and resuming with other processes."""

from __future__ import annotations

import json

from sft_dist.parallel.launch_files import VARIANTS
from sft_dist.parallel.plans import BYTES, PLANS, Layout, Plan, Rendered, deepspeed_config, fsdp_config

PLANS_HEAD = """\
# Plans

How a run is spread over processors (`parallel.plan`). `auto` takes the fastest that fits. This file is generated
(`make refs`) from sft_dist/parallel/plans.py.

N is the number of GPUs. Bytes a parameter are what stays on one GPU in bfloat16 training: 2 for the parameter, 2 for its
gradient, 12 for the float32 master copy and AdamW's two states (fsdp2 keeps parameter and gradient in float32 and no
master copy: 16 as well). Activations come on top, and so do the parameters gathered for the layer at work.
"""

SETTINGS_HEAD = """\
## Settings

What the plans set, and why; what is not listed has the library's default. The column "in" names the files in
[launch/](../launch/README.md) that hold the value. What accelerate itself reads stands in launch/accelerate/, with the
reasons beside it.
"""

RESUMING = """\
## Resuming with other processes

A run goes on with any number of processes whose micro batches make up `train.global_batch_size`: rows, loss, optimizer
states and schedule are those of the uninterrupted run, up to the rounding of sums. Random numbers (dropout) go on only in
processes that were there before; from one process to several, and back, they begin anew.

| from | to | how |
|---|---|---|
| `cpu`, `single`, `ddp` | the same three | the files hold everything whole |
| `fsdp2` | `fsdp2` | each process reads its new share of the old shards |
| `zero1`, `zero2`, `zero3` | the same three | the main process first has DeepSpeed's tool make a universal copy inside the checkpoint |

The universal copy is removed once it is loaded. Until then it takes up to two and a half times the checkpoint's size on
disk, which is looked up first. It is not needed with as many processes and the plan of before. Refused, with what to
do instead: other pairs of plans; states that were offloaded to NVMe; under `zero1` and `zero2` rows that several GPUs
share, and under `zero3` if a step would have other rows.
"""


TOLD = """\
## What `accelerate launch` says

`accelerate launch --config_file FILE -m sft_dist.train CONFIG` decides what CONFIG leaves open. The worker knows that
accelerate started it by the variables that accelerate's launchers set together, and then holds to one rule:

- What has a field of ours (the table) is adopted where CONFIG has `auto` or the field's default there, and stands in the run
  directory's config.yaml from then on, with `accelerate launch` in provenance.json.
- Where CONFIG says something else the worker refuses to start and names both.
- What changes the computation and has no field is refused: FSDP 1, float16, fp8, Megatron-LM, tensor and context
  parallelism, copies that are not one a node.
- What is the plan's own (`fsdp_reshard_after_forward`, `fsdp_auto_wrap_policy`, `fsdp_cpu_ram_efficient_loading`,
  `fsdp_state_dict_type`, another `dynamo_backend`) is not used; a value that differs is named in a warning.
- Then all variables `ACCELERATE_*`, `FSDP_*`, `PARALLELISM_CONFIG_*` and `MEGATRON_LM_*` are taken out of the environment, but
  for those about logging and CPU affinity: accelerate sees our settings only.
- Variables of these names without `accelerate launch`, from a shell's profile, are ignored everywhere, with one warning.

| said by accelerate's file | or by the DeepSpeed file | field |
|---|---|---|
| `distributed_type`, `zero_stage`, `use_cpu` (one process) | `zero_optimization.stage` | `parallel.plan` |
| `fsdp_offload_params`, `offload_optimizer_device`, `offload_param_device` | `offload_optimizer`, `offload_param` | `parallel.offload`, `parallel.nvme_path` |
| `parallelism_config_dp_replicate_size` | `zero_hpz_partition_size` | `parallel.hybrid_shard` |
| `parallelism_config_sp_size` | | `parallel.sequence_parallel_size` |
| `mixed_precision: bf16` (`no` says nothing) | `bf16.enabled` | `model.dtype` |
| `fsdp_activation_checkpointing: true` | | `train.gradient_checkpointing` |
| `dynamo_backend: INDUCTOR` | | `train.compile_layers` |
| `gradient_clipping` | `gradient_clipping` | `train.max_grad_norm` |
| | `train_micro_batch_size_per_gpu`, `train_batch_size` | `train.per_device_train_batch_size`, `train.global_batch_size` |
| `gradient_accumulation_steps` above 1 | `gradient_accumulation_steps` | `train.per_device_train_batch_size`, which follows from it |

A DeepSpeed file goes over our settings (above) as a whole; `auto` in it says nothing. Its keys are checked against DeepSpeed's
own. It stays in the run directory as plan/deepspeed_given.json, and `sft-dist resume` uses it again; plan/deepspeed.json is
what DeepSpeed got. Launching the run again with another file replaces it.
"""


def formula(plan: Plan) -> str:
    """Bytes on one GPU for each parameter, as a formula in the number N of GPUs."""
    shared = sum(size for part, size in BYTES.items() if part in plan.shards)
    whole = sum(BYTES.values()) - shared
    return " + ".join([*([str(whole)] if whole else []), *([f"{shared}/N"] if shared else [])])


def plans_page() -> str:
    """docs/plans.md: a table of the plans, then each setting with its reason."""
    rows = ["| plan | when to use it | bytes a parameter | sharded | communication |", "|---|---|---|---|---|"]
    for plan in PLANS.values():
        shards = ", ".join(part for part in BYTES if part in plan.shards) or "nothing"
        rows.append(f"| `{plan.name}` | {plan.when} | {formula(plan)} | {shards} | {plan.communication} |")
    tables = (
        ("DeepSpeed: zero1, zero2, zero3", {name: deepspeed_config(layout) for name, layout in _of("deepspeed")}),
        ("fsdp2: `fsdp_config`", {name: fsdp_config(layout) for name, layout in _of("fsdp2")}),
    )
    parts = [PLANS_HEAD.strip(), "\n".join(rows), SETTINGS_HEAD.strip()]
    parts += [f"### {title}\n\n{_settings(rendered)}" for title, rendered in tables]
    parts.append(TOLD.strip())
    parts.append(RESUMING.strip())
    return "\n\n".join(parts) + "\n"


def _of(engine: str) -> list[tuple[str, Layout]]:
    return [(name, layout) for name, (layout, _) in VARIANTS.items() if layout.plan.engine == engine]


def _settings(rendered: dict[str, Rendered]) -> str:
    """One row for each value that a setting has in any of the named configs, with the names of those that have it."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, config in rendered.items():
        for item in config.settings:
            rows.setdefault((item.key, json.dumps(item.value), item.reason), []).append(name)
    order = {key: place for place, key in enumerate(dict.fromkeys(key for key, _, _ in rows))}
    lines = ["| setting | value | in | reason |", "|---|---|---|---|"]
    for (key, value, reason), names in sorted(rows.items(), key=lambda row: order[row[0][0]]):
        where = "all" if len(names) == len(rendered) else ", ".join(names)
        lines.append(f"| `{key}` | `{value}` | {where} | {reason} |")
    return "\n".join(lines)
