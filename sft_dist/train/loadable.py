"""What a run would find out only when it loads the model, looked at before there is a run: takes no memory for weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.config.schema import ModelConfig
from sft_dist.errors import PreflightError
from sft_dist.files import read_json
from sft_dist.train.model import missing_weights
from sft_dist.train.pretrained import resolve_model
from sft_dist.train.tokenizer import missing_model

if TYPE_CHECKING:
    from sft_dist.parallel.resolve import Resolved


def prove_loadable(model: ModelConfig, resolved: Resolved) -> None:
    """Raise PreflightError if weight files here are missing or cut off, or the model has no such attention."""
    folder = Path(resolve_model(model.name))
    if folder.is_dir():
        _prove_files(model, folder)
    if model.attn_implementation != "auto":
        _prove_attention(model, resolved)


def _prove_files(model: ModelConfig, folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if missing := missing_weights(folder):
        raise missing_model(model, str(folder), "model", OSError(f"{', '.join(missing[:3])} is not there"))
    # A folder may hold others, which nobody reads: the same weights in another layout, as a stub that git-lfs left.
    index = read_json(folder / "model.safetensors.index.json") or {"weight_map": {}}
    whole = folder / "model.safetensors"
    names = {whole.name} if whole.is_file() else set(index["weight_map"].values())
    for path in sorted(map(folder.joinpath, names)):
        try:
            with safe_open(path, framework="numpy"):  # compares the file's length with its header; reads no weights
                pass
        except (OSError, SafetensorError) as error:
            raise missing_model(model, str(folder), "model", OSError(f"{path.name}: {error}")) from None


def _prove_attention(model: ModelConfig, resolved: Resolved) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft_dist.train.attention import register

    register()
    source, own_code = resolve_model(model.name), model.trust_remote_code
    config = AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=own_code)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, resolved.dtype),
                attn_implementation=model.attn_implementation,
                trust_remote_code=own_code,
            )
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise PreflightError(
            f"model.attn_implementation is {model.attn_implementation!r}, which {model.name} cannot have here: {reason}",
            hint="set auto, sdpa or eager; flash_attention_2 needs a GPU and the package flash-attn",
        ) from None
