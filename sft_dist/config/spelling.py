"""One mistake in a config, how its message shows values, and what a user probably meant by a key that does not exist."""

from __future__ import annotations

import difflib
import functools
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sft_dist.config.schema import Config
from sft_dist.config.sft_fields import FOLLOWS, SET_ELSEWHERE, known_sft_fields, refused_extra

# Names that other trainers, or older versions of the libraries, use. A name with a dot holds in that section only.
_ALIASES = {
    "run.name": "run_name experiment_name output_dir",
    "run.dir": "output_dir save_dir",
    "model.name": "model.path model.id model_name model_id model_path base_model pretrained_model model_name_or_path "
    "pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path",
    "model.dtype": "torch_dtype precision mixed_precision",
    "model.attn_implementation": "attn_impl flash_attention use_flash_attention_2",
    "data.train": "train.data train.dataset dataset datasets dataset_name dataset_path train_dataset train_file train_data "
    "data_path data_files",
    "data.train.name": "dataset_config dataset_config_name",
    "data.train.sample": "limit max_samples max_train_samples",
    "data.eval": "eval_dataset eval_file validation validation_file val_data",
    "data.eval_size": "val_size val_set_size test_size validation_split",
    "data.system": "system_prompt system_message",
    "data.max_length": "max_seq_length max_seq_len seq_len sequence_len cutoff_len block_size model_max_length",
    "data.assistant_only_loss": "train_on_inputs completion_only_loss",
    "train.learning_rate": "lr max_lr base_lr peak_lr",
    "train.lr_scheduler_type": "scheduler lr_scheduler lr_schedule",
    "train.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "train.num_train_epochs": "epoch epochs num_epochs n_epochs max_epochs",
    "train.max_steps": "steps num_steps total_steps num_train_steps",
    "train.global_batch_size": "batch_size global_batch train_batch_size effective_batch_size total_batch_size",
    "train.per_device_train_batch_size": "batch_size micro_batch micro_batch_size",
    "train.max_grad_norm": "grad_clip clip_grad gradient_clipping max_norm",
    "train.eval_strategy": "evaluation_strategy",
    "train.logging_steps": "log_every log_steps log_interval",
    "model.lora": "peft use_peft peft_config use_lora lora_config adapter finetuning_type",
    "model.lora.r": "lora_r lora_rank lora.rank rank",
    "model.lora.lora_alpha": "lora.alpha",
    "model.lora.lora_dropout": "lora.dropout",
    "model.lora.target_modules": "lora_target_modules lora_target lora_modules",
    "model.lora.modules_to_save": "lora_modules_to_save additional_target",
    "model.lora.quantization": "load_in_4bit use_bnb_nested_quant bnb_4bit_quant_type quantization_bit qlora use_qlora",
    "model.lora.use_rslora": "rslora",
    "model.lora.merge": "merge_lora merge_adapter",
    "parallel.plan": "strategy distributed accelerator device deepspeed deepspeed_config fsdp fsdp_version zero_stage stage "
    "distributed_type distributed_strategy",
    "parallel.num_processes": "num_gpus n_gpus gpus ngpus devices world_size nproc_per_node gpus_per_node",
    "parallel.offload": "cpu_offload offload_optimizer offload_optimizer_device offload_param offload_param_device "
    "offload_params fsdp_offload_params zero_offload",
    "parallel.nvme_path": "offload_path nvme_dir",
    "parallel.hybrid_shard": "hsdp hybrid zero_hpz_partition_size",
    "parallel.sequence_parallel_size": "sp_size sequence_parallel_degree context_parallel_size cp_size ulysses_size",
    "checkpoint.save_steps": "save_every checkpoint_interval",
    "evaluate.generation.max_new_tokens": "max_tokens",
    "evaluate.generation.enable_thinking": "thinking",
    "tracking.report_to": "logger loggers trackers wandb",
    "tracking.project": "wandb_project project_name",
}


@dataclass(frozen=True)
class Problem:
    """One mistake: the field's dotted path, what is wrong, and the other fields that the judgement rests on."""

    path: str
    text: str
    rests_on: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return f"{self.path}   {self.text}"


def shown(value: Any) -> str:
    """`value` as an error message shows it: text in quotes, the rest as YAML would have it, cut after 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(word: str, known: Any, cutoff: float = 0.6) -> str:
    """'; did you mean X?' for the nearest of `known`, '' if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def suggest(path: tuple[str, ...]) -> tuple[str, list[str]]:
    """Advice on the unknown key at `path`, and the dotted fields that were probably meant."""
    parent, key = ".".join(path[:-1]), path[-1].replace("-", "_").lower()
    here = [field.rpartition(".")[2] for field in all_fields() if field.rpartition(".")[0] == parent]
    valid = f"valid: {', '.join(here if parent else [*here, 'extends'])}"
    if parent == "train.extra":
        here, valid = sorted(known_sft_fields()), ""
    if key in all_fields() and "." in key:
        section, _, rest = key.partition(".")
        return f"nest it: `{section}:`, and indented below it `{rest}:`", [key]
    if key in here:
        return f"did you mean {key}?", [f"{parent}.{key}".lstrip(".")]
    meant = _elsewhere(parent, key)
    if meant:
        return f"did you mean {' or '.join(meant)}?", meant
    if key in FOLLOWS:
        return FOLLOWS[key], []
    if key in known_sft_fields() and parent in ("", "train"):
        refusal = refused_extra(key)
        return (f"it {refusal}", []) if refusal else (f"did you mean train.extra.{key}?", [f"train.extra.{key}"])
    near = difflib.get_close_matches(key, here, n=1)
    if near:
        place = SET_ELSEWHERE.get(near[0], near[0]) if parent == "train.extra" else near[0]
        return f"did you mean {place}?" + f" ({valid})" * bool(valid), [f"{parent}.{near[0]}".lstrip(".")]
    names = {field.rpartition(".")[2] for field in all_fields()} | set(_foreign())
    for name in difflib.get_close_matches(key, names, n=1, cutoff=0.8):
        meant = _elsewhere(parent, name)
        return f"did you mean {' or '.join(meant)}?", meant
    return valid, []


@functools.cache
def all_fields() -> tuple[str, ...]:
    """The dotted path of every section and field, in the schema's order."""
    return tuple(_walk(Config, ""))


def submodel(annotation: Any) -> type[BaseModel] | None:
    """The model class that a field's type is, or holds beside None; None for a plain value and for a list."""
    if typing.get_origin(annotation) is tuple:
        return None
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


@functools.cache
def _foreign() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for field, aliases in _ALIASES.items():
        for alias in aliases.split():
            names.setdefault(alias, []).append(field)
    return names


def _elsewhere(parent: str, key: str) -> list[str]:
    """Fields that `key` may stand for: below `parent`, by a foreign name, in other sections."""
    named = [field for field in all_fields() if field.rpartition(".")[2] == key]
    below = [field for field in named if parent and field.startswith(f"{parent}.")]
    foreign = _foreign().get(f"{parent}.{key}") or _foreign().get(key)
    place = SET_ELSEWHERE.get(key)
    return below or foreign or ([place] if place else named[:3])


def _walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        child = submodel(field.annotation)
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")
