"""A published model against the untouched base model's files, where these are on this machine. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_dist.evaluate.tensor_files import Tensor, headers, is_zero
from sft_dist.files import read_json

# What PEFT starts at zero, and a training of a few steps may leave there.
ZERO_AT_FIRST = ("lora_B.", "lora_embedding_A.")
IN_ADAPTER = "base_model.model."

Base = Mapping[str, tuple[str, tuple[int, ...], Path]]
"""Type, shape and file of each of the base model's tensors."""


def base_folder(proof: dict[str, Any]) -> Path | None:
    """Where the base model's files are on this machine, if they are."""
    from sft_dist.errors import PreflightError
    from sft_dist.train.pretrained import resolve_model

    name = proof["base"]["name"]
    if name is None:  # an upload does not say where a folder was
        return None
    try:
        source = resolve_model(name)
    except PreflightError:  # the folder is on another machine
        return None
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=proof["base"]["revision"])
    return Path(found).parent if isinstance(found, str) else None


def base_tensors(proof: dict[str, Any]) -> Base:
    """What the headers of the base model's files say; nothing without files, or where they hold packed weights."""
    folder = base_folder(proof)
    if folder is None or "quantization_config" in (read_json(folder / "config.json") or {}):
        return {}
    try:
        return headers(folder)
    except (OSError, ValueError):
        return {}


def shape_problems(there: Mapping[str, Tensor], proof: dict[str, Any], base: Base) -> Iterator[str]:
    """Tensors that the base model has in another shape; a vocabulary may have grown."""
    for name, (_, old, _) in base.items():
        if name not in there:
            continue
        new = there[name].shape
        grown = proof["added_tokens"] and old[1:] == new[1:] and new[0] > old[0]
        if old != new and not grown:
            yield f"{name} is {list(new)}, and {list(old)} in the base model"


def zero_problems(there: Mapping[str, Tensor], proof: dict[str, Any], base: Base) -> Iterator[str]:
    """Tensors of zeros only, which no training makes: one was lost while the model was gathered or merged.

    The base model's own zeros, biases and an adapter's second matrix may be zero. `zeros` are those that were found so when the
    base was here.
    """
    for name, tensor in there.items():
        plain = name.removeprefix(IN_ADAPTER)
        may_be = plain.endswith("bias") or name in proof.get("zeros", ()) or any(it in name for it in ZERO_AT_FIRST)
        if not tensor.zero or may_be or (plain in base and is_zero(plain, base[plain][2])):
            continue
        why = "" if plain in base else "; the base model's files, which could say that it is so there, are not here"
        yield f"{name} holds nothing but zeros{why if not base else ''}"


def name_problems(names: set[str], architecture: set[str], ties: Mapping[str, str]) -> Iterator[str]:
    """Tensors that a model of the base's settings has and the published one lacks, or the other way round.

    Weights that are tied by design need one name only. Not the names in the base's files: older files have other ones, and
    tensors that transformers ignores.
    """
    if not architecture:
        return
    groups = [{one, other} for one, other in ties.items()]
    for name in sorted(architecture - names):
        if not any(name in group and group & names for group in groups):
            yield f"{name} is missing, which the base model's architecture has"
    yield from (f"{name} is no tensor of the base model's architecture" for name in sorted(names - architecture))


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, as PEFT wrote it."""
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found
