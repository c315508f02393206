"""The one place where a config becomes TRL's arguments."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from trl import SFTConfig

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.deepspeed_file import deepspeed_settings
from sft_dist.parallel.plans import fsdp_config, parallelism_config
from sft_dist.parallel.resolve import Resolved
from sft_dist.rundir import RunDir
from sft_dist.train.resume import Resume
from sft_dist.train.trackers import name_for_trackers


def sft_config(
    config: Config,
    resolved: Resolved,
    run: RunDir,
    *,
    has_eval: bool,
    engine: bool = True,
    resume: Resume | None = None,
) -> SFTConfig:
    """TRL's arguments for a run; without `engine` those that need no other process.

    The object must exist before the model is loaded: with ZeRO-3 transformers then loads each process's share only.
    Raises ConfigError if TRL or transformers refuse the arguments.
    """
    arguments = _plain_arguments(config, resolved, run, has_eval=has_eval)
    if not engine:
        # A login node proves what GPUs will train, and transformers asks the machine that it is on.
        arguments["tf32"] = None
    if resolved.layout.sequence_parallel_size > 1:
        # Ulysses gathers the rows of a group and cuts them into equal parts: all of them need the same length.
        arguments["pad_to_multiple_of"] = config.data.max_length
    if engine:
        arguments |= _engine_arguments(resolved)
    if resume is not None and resume.universal:
        arguments["deepspeed"]["checkpoint"] = {"load_universal": True}
    loss_type = config.train.extra.get("loss_type", "nll")
    if loss_type not in ("nll", "dft"):  # checked by SFTTrainer itself only once the model is there
        raise ConfigError(f"train.extra.loss_type {loss_type!r} is not one of nll, dft")
    try:
        made = SFTConfig(**{**config.train.extra, **arguments})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"TRL refuses these settings: {error}", hint="look at train.extra and train") from error
    if "fsdp" in arguments and resolved.use_cpu:
        # accelerate 1.15 passes over FSDP for processes without a GPU, in silence (AcceleratorState): the plan would be
        # ddp. FSDP itself works over gloo.
        made.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return made


def _engine_arguments(resolved: Resolved) -> dict[str, Any]:
    """What hands the model to the plan's engine."""
    layout, engine = resolved.layout, resolved.layout.plan.engine
    if engine == "none":
        return {}
    arguments: dict[str, Any] = {"ddp_backend": "gloo"} if layout.use_cpu else {}
    # What DeepSpeed and FSDP take as the order to keep float32 masters of bfloat16 parameters.
    sharded = engine in ("deepspeed", "fsdp2")
    arguments["bf16"] = sharded and resolved.dtype == "bfloat16"
    # The decoder layers hold no buffers that training changes, and every parameter is used in every step.
    arguments |= {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
    if engine == "deepspeed":
        arguments["deepspeed"] = deepspeed_settings(layout, resolved.given)
    mesh = parallelism_config(layout).tree()
    if mesh:
        arguments["parallelism_config"] = _mesh(mesh, resolved.attn_implementation)
    if engine == "fsdp2":
        arguments |= {"fsdp": True, "fsdp_config": fsdp_config(layout).tree(), "gradient_checkpointing": False}
    return arguments


def _mesh(settings: dict[str, Any], attn_implementation: str) -> Any:
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    if "sp_size" in settings:
        # The rows of a micro batch differ in length, and Ulysses must exchange heads around the model's own kernel.
        settings["sp_handler"] = DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation=attn_implementation
        )
    return ParallelismConfig(**settings)


def _accelerator_config(resolved: Resolved) -> dict[str, Any]:
    settings: dict[str, Any] = {"non_blocking": not resolved.use_cpu}
    if resolved.layout.plan.engine == "fsdp2":
        # Each micro batch's gradients are reduced at once: kept whole they would take as much as no sharding at all.
        settings["gradient_accumulation_kwargs"] = {"sync_each_batch": True}
    return settings


def _plain_arguments(config: Config, resolved: Resolved, run: RunDir, *, has_eval: bool) -> dict[str, Any]:
    train, checkpoint = config.train, config.checkpoint
    return {
        "output_dir": str(run.checkpoints),
        "run_name": name_for_trackers(config, run),
        "project": config.tracking.project,
        "seed": config.run.seed,
        "use_cpu": resolved.use_cpu,
        # The weights are already in the type to compute in; autocast would only cast them again at every use.
        "bf16": False,
        "fp16": False,
        # What float32 products remain may use the matrix units, which came with the same GPUs as bfloat16.
        "tf32": True if not resolved.use_cpu and resolved.dtype == "bfloat16" else None,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": train.warmup_steps,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": resolved.per_device_train_batch_size,
        "per_device_eval_batch_size": train.per_device_eval_batch_size,
        "gradient_accumulation_steps": resolved.gradient_accumulation_steps,
        "gradient_checkpointing": resolved.gradient_checkpointing,
        "max_grad_norm": train.max_grad_norm,
        "weight_decay": train.weight_decay,
        "optim": "adamw_torch_fused",
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "logging_steps": train.logging_steps,
        "logging_first_step": True,
        # A non-finite loss is shown as it is: transformers would print the last good one in its place.
        "logging_nan_inf_filter": False,
        "eval_strategy": train.eval_strategy if has_eval else "no",
        "eval_steps": train.eval_steps,
        "save_strategy": checkpoint.save_strategy,
        "save_steps": checkpoint.save_steps or 500,
        # Rotation is ours: it waits for the manifest of the newer checkpoint.
        "save_total_limit": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "padding_free": resolved.padding_free or config.data.packing,
        "accelerator_config": _accelerator_config(resolved),
        "report_to": "none",
        "disable_tqdm": True,
    }
