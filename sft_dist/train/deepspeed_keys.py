"""See that DeepSpeed knows every key of a user's file: it passes over some in silence, and fails over others in a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ValidationError

from sft_dist.config.spelling import submodel
from sft_dist.errors import ConfigError

# Sections that DeepSpeed 0.19 reads with a model of its own.
MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
    "compile": "deepspeed.compile.config:CompileConfig",
}
# Keys of the file itself that stand in no list of DeepSpeed's; those that do are in deepspeed/runtime/constants.py.
SECTIONS = (
    *MODELS,
    "activation_checkpointing",
    "aio",
    "autotuning",
    "compression_training",
    "data_efficiency",
    "datastates_ckpt",
    "expert_parallel",
    "flops_profiler",
    "hybrid_engine",
    "pipeline",
    "sequence_parallel_size",
    "tensor_parallel",
    "timers",
    "weight_quantization",
)


def check_deepspeed(given: Mapping[str, Any]) -> None:
    """Raise ConfigError, with a line on each, for keys and values of a DeepSpeed file that DeepSpeed does not know.

    Imports DeepSpeed, and torch with it.
    """
    problems = list(_top(given))
    for section, place in MODELS.items():
        if section in given:
            module, name = place.split(":")
            problems += _section(section, getattr(import_module(module), name), given[section])
    if problems:
        hint = "its keys: https://www.deepspeed.ai/docs/config-json/; what sft-dist sets is in launch/deepspeed/"
        raise ConfigError(
            "the DeepSpeed file of the launch is not one that DeepSpeed reads", problems=problems, hint=hint
        )


def _top(given: Mapping[str, Any]) -> Iterator[str]:
    constants = vars(import_module("deepspeed.runtime.constants"))
    listed = {value for name, value in constants.items() if name.isupper() and isinstance(value, str)}
    for key in given:
        if key not in listed and key not in SECTIONS:
            yield _unknown(key, key, [*SECTIONS, *sorted(listed)])


def _section(section: str, model: type[BaseModel], values: Any) -> Iterator[str]:
    if not isinstance(values, dict):
        yield f"{section}: {values!r} is no object"
        return
    try:
        model(**values)
    except ValidationError as error:
        for found in error.errors():
            where = [section, *(str(part) for part in found["loc"])]
            if found["type"] == "extra_forbidden":
                yield _unknown(".".join(where), where[-1], _fields(model, where[1:-1]))
            else:
                yield f"{'.'.join(where)}: {found['msg']} (it is {found.get('input')!r})"
    except (ValueError, AssertionError) as error:
        yield f"{section}: {error}"


def _fields(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields of the model that stands at `path` inside of `model`."""
    for name in path:
        found = submodel(model.model_fields[name].annotation) if name in model.model_fields else None
        model = found or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _unknown(where: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"{where}: no such setting" + (f"; did you mean {near[0]}?" if near else "")
