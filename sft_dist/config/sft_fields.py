"""The fields of TRL's SFTConfig: which of them `train.extra` may set, and where the others are set."""

from __future__ import annotations

import functools
import json
from importlib import resources

from sft_dist.config.schema import TrainConfig

FOLLOWS = dict.fromkeys(
    ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum_steps", "accumulation_steps"),
    "follows from train.global_batch_size / (train.per_device_train_batch_size x devices)",
)
# Fields of `train` that SFTConfig does not have.
_OURS = (
    "extra",
    "global_batch_size",
    "compile_layers",
    "nonfinite",
    "max_nonfinite_steps",
    "hang_timeout",
    "stop_timeout",
)
_BY_SFT_DIST = "is set by sft-dist and cannot be changed here"
SET_ELSEWHERE = {
    **{name: f"train.{name}" for name in TrainConfig.model_fields if name not in _OURS},
    "activation_checkpointing": "train.gradient_checkpointing",
    "assistant_only_loss": "data.assistant_only_loss",
    "bf16": "model.dtype",
    "bf16_full_eval": "model.dtype",
    "chat_template_path": "model.chat_template",
    "packing": "data.packing",
    "data_seed": "run.seed",
    "deepspeed": "parallel.plan (zero1, zero2 or zero3)",
    "fp16": "model.dtype",
    "fp16_full_eval": "model.dtype",
    "fsdp": "parallel.plan (fsdp2)",
    "fsdp_config": "parallel (plan, offload, hybrid_shard)",
    "max_length": "data.max_length",
    "model_init_kwargs": "model (dtype, attn_implementation, revision)",
    "output_dir": "run.dir and run.name",
    "parallelism_config": "parallel (hybrid_shard, sequence_parallel_size)",
    "project": "tracking.project",
    "report_to": "tracking.report_to",
    "run_name": "run.name",
    "save_steps": "checkpoint.save_steps",
    "save_strategy": "checkpoint.save_strategy",
    "save_total_limit": "checkpoint.keep",
    "seed": "run.seed",
    "torch_compile": "train.compile_layers",
    "torch_compile_backend": "train.compile_layers",
    "torch_compile_mode": "train.compile_layers",
    "trust_remote_code": "model.trust_remote_code",
    "use_cpu": "parallel.plan",
}
SET_BY_SFT_DIST = {
    **dict.fromkeys(
        ("packing_strategy", "eval_packing", "padding_free"), "follows from data.packing and the attention kernel"
    ),
    **dict.fromkeys(("dataset_kwargs", "dataset_text_field", "completion_only_loss"), "rows are tokenised before"),
    **dict.fromkeys(("truncation_mode", "remove_unused_columns", "label_names"), "rows are tokenised before"),
    **dict.fromkeys(("shuffle_dataset",), "rows are shuffled by run.seed"),
    **dict.fromkeys(("eos_token", "pad_token"), "they come from the model and its chat template"),
    **dict.fromkeys(("dataset_num_proc",), "rows are tokenised before"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the commands say what is done"),
    **dict.fromkeys(("disable_tqdm", "log_level", "log_level_replica", "logging_strategy"), "logs have one form"),
    **dict.fromkeys(
        ("resume_from_checkpoint", "ignore_data_skip"), "`sft-dist resume` goes on exactly where it stopped"
    ),
    **dict.fromkeys(("restore_callback_states_from_checkpoint",), "`sft-dist resume` goes on exactly where it stopped"),
    **dict.fromkeys(("logging_first_step",), "the first step is always logged"),
    **dict.fromkeys(("logging_nan_inf_filter",), "a loss that is not finite is shown as it is"),
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), "always AdamW with float32 states"),
    **dict.fromkeys(("tf32",), "on where a GPU has it"),
    **dict.fromkeys(("save_only_model",), "a checkpoint without the optimizer cannot be resumed"),
    **dict.fromkeys(("load_best_model_at_end",), "complete checkpoints are kept by age, see checkpoint.keep"),
    **dict.fromkeys(("enable_jit_checkpoint",), "a run that is asked to stop always saves"),
    **dict.fromkeys(("auto_find_batch_size",), "it would change train.global_batch_size"),
    **dict.fromkeys(("accelerator_config", "local_rank", "ddp_backend"), "see parallel.plan"),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_broadcast_buffers"), "every parameter is used in every step"),
    **dict.fromkeys(("average_tokens_across_devices",), "a token counts the same on any number of devices"),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"), "a run leaves its machine by export"),
    **dict.fromkeys(("hub_private_repo", "hub_always_push", "hub_revision"), "a run leaves its machine by export"),
}


def sft_config_fields() -> list[str]:
    """The field names of TRL's SFTConfig, sorted. Imports trl, which takes seconds."""
    import dataclasses

    from trl import SFTConfig

    return sorted(field.name for field in dataclasses.fields(SFTConfig))


@functools.cache
def known_sft_fields() -> frozenset[str]:
    """What `sft_config_fields` returned for the supported trl, from the packaged list."""
    return frozenset(json.loads((resources.files("sft_dist") / "resources/sft_config_fields.json").read_text("utf-8")))


def refused_extra(name: str) -> str | None:
    """Why `train.extra` may not hold this field of SFTConfig, and what to set instead; None if it may."""
    if name in FOLLOWS:
        return FOLLOWS[name]
    if name in SET_ELSEWHERE:
        return f"has its own place: set {SET_ELSEWHERE[name]}"
    if name in SET_BY_SFT_DIST:
        return f"{_BY_SFT_DIST}: {SET_BY_SFT_DIST[name]}"
    return None
