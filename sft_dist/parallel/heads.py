"""Whether a model's attention heads can be dealt out among the processes that share rows (Ulysses)."""

from __future__ import annotations

from typing import Any

from sft_dist.config.schema import Config, ModelConfig
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.parallel.architecture import find_config


def check_heads(config: Config) -> None:
    """Raise ConfigError if the model's heads cannot be dealt out among parallel.sequence_parallel_size processes.

    Says nothing where no config.json of the model is here yet, or it does not name its heads.
    """
    size = config.parallel.sequence_parallel_size
    heads = heads_of(config.model) if size > 1 else None
    if heads is None or can_share(*heads, size):
        return
    possible = ", ".join(map(str, sizes(*heads)))
    raise ConfigError(
        f"parallel.sequence_parallel_size is {size}, but {config.model.name} has {described(*heads)}: "
        "each process that shares a row computes as many of the heads",
        hint=f"set parallel.sequence_parallel_size={largest_below(*heads, size)}; with this model {possible} can be",
    )


def can_share(heads: int, kv_heads: int, size: int) -> bool:
    """Whether DeepSpeed can give each of `size` processes as many heads.

    deepspeed/runtime/sequence_parallel/ulysses_sp.py, UlyssesSPAttentionHF.__init__: query heads must be a multiple of the
    size. Key/value heads too; or where they are fewer, the size a multiple of them, and each is sent to several processes.
    """
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def sizes(heads: int, kv_heads: int) -> list[int]:
    """Every size that can_share, from 1 on."""
    return [size for size in range(1, heads + 1) if can_share(heads, kv_heads, size)]


def largest_below(heads: int, kv_heads: int, size: int) -> int:
    """The largest that can_share and is not above `size`; 1 always can."""
    return max(possible for possible in sizes(heads, kv_heads) if possible <= size)


def described(heads: int, kv_heads: int) -> str:
    """The heads in words."""
    return f"{heads} attention heads" + (f" and {kv_heads} key/value heads" if kv_heads != heads else "")


def heads_of(model: ModelConfig) -> tuple[int, int] | None:
    """Query heads and key/value heads by the model's config.json, of any kind of model; None if it is not known."""
    try:
        tree, _ = find_config(model)
        text: Any = tree.get("text_config")
        text = text if isinstance(text, dict) else tree
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
    except (PreflightError, KeyError, TypeError, ValueError):
        return None
    return (heads, kv_heads) if heads > 0 and kv_heads > 0 else None
