"""The DeepSpeed file that a user launches with: what it says in terms of our config, and how it goes over our settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_dist.errors import ConfigError
from sft_dist.files import read_json
from sft_dist.parallel.plans import Layout, deepspeed_config

PARTS = ("offload_optimizer", "offload_param")


@dataclass
class Said:
    """What a launcher said, as it is collected: fields of our config, with its own words for each."""

    fields: dict[str, Any] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    accumulation: int | None = None

    def add(self, name: str, value: Any, words: str) -> None:
        self.fields.setdefault(name, value)
        self.words.setdefault(name, words)


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """The JSON object in the file at `path`; ConfigError if there is none."""
    hint = "its path is relative to the folder in which accelerate launch was typed"
    try:
        tree = read_json(Path(path))
    except (ValueError, OSError) as error:
        raise ConfigError(f"the DeepSpeed file {path} cannot be read: {error}", hint=hint) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"the DeepSpeed file {path} is missing, or it holds no JSON object", hint=hint)
    for section in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(tree.get(section, {}), dict):
            raise ConfigError(f"the DeepSpeed file {path}: {section} is no object", hint="see launch/deepspeed/")
    return tree


def said_by_file(tree: Mapping[str, Any], path: str, said: Said) -> None:
    """Add to `said` what the file at `path`, read as `tree`, says; a value `auto` says nothing.

    Raises ConfigError for a file that shards nothing, and for float16.
    """
    zero = tree.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"accelerate launch asks for DeepSpeed ZeRO stage {stage} ({path})",
            hint="use stage 1, 2 or 3, as in launch/deepspeed/zero2.json; without sharding launch with ddp.yaml",
        )
    if tree.get("fp16", {}).get("enabled") is True:
        raise ConfigError(
            f"the DeepSpeed file {path} asks for float16 (fp16.enabled), which sft-dist does not train in",
            hint='set "bf16": {"enabled": true} instead',
        )
    said.add("parallel.plan", f"zero{stage}", f"zero_optimization.stage: {stage}")
    if not offload(zero, stage, said) and any(part in zero for part in PARTS):
        said.add("parallel.offload", "none", "offload_optimizer.device: none")
    group = zero.get("zero_hpz_partition_size", 1)
    if stage == 3 and isinstance(group, int) and group > 1:
        said.add("parallel.hybrid_shard", True, f"zero_hpz_partition_size: {group}")
    enabled = tree.get("bf16", {}).get("enabled")
    if isinstance(enabled, bool):
        said.add("model.dtype", "bfloat16" if enabled else "float32", f"bf16.enabled: {str(enabled).lower()}")
    for key, name in (
        ("gradient_clipping", "train.max_grad_norm"),
        ("train_micro_batch_size_per_gpu", "train.per_device_train_batch_size"),
        ("train_batch_size", "train.global_batch_size"),
    ):
        value = tree.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            said.add(name, value, f"{key}: {value}")
    steps = tree.get("gradient_accumulation_steps")
    said.accumulation = steps if isinstance(steps, int) else None


def offload(zero: Mapping[str, Any], stage: int, said: Said) -> dict[str, Any]:
    """Add to `said` where `zero` (a section zero_optimization) keeps what; returns what our setting would have otherwise.

    parallel.offload moves all that the stage can move; a launcher may move optimizer states or parameters alone.
    """
    parts = PARTS if stage == 3 else PARTS[:1]
    found = {part: (zero.get(part) or {}) for part in parts}
    devices = {part: str(settings.get("device") or "none") for part, settings in found.items()}
    used = [device for device in ("nvme", "cpu") if device in devices.values()]
    if not used:
        return {}
    words = ", ".join(f"{part}.device: {device}" for part, device in devices.items())
    said.add("parallel.offload", used[0], words)
    path = next((settings["nvme_path"] for settings in found.values() if settings.get("nvme_path")), None)
    if used[0] == "nvme" and path is not None:
        said.add("parallel.nvme_path", str(path), f"nvme_path: {path}")
    return {"zero_optimization": {part: {"device": device} for part, device in devices.items()}}


def deepspeed_settings(layout: Layout, given: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config of the run: ours, overlaid with the file `given` that the user launched with."""
    ours = deepspeed_config(layout).tree()
    if not given:
        return ours
    # The file may move less than parallel.offload does: what it leaves out beside the other stays on the GPU.
    theirs = given.get("zero_optimization", {})
    if any(part in theirs for part in PARTS):
        left_out = [part for part in PARTS if part not in theirs]
        ours["zero_optimization"] = {
            name: value for name, value in ours["zero_optimization"].items() if name not in left_out
        }
    return _overlaid(ours, given)


def _overlaid(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in given.items():
        mine = ours.get(name)
        merged[name] = _overlaid(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return merged
