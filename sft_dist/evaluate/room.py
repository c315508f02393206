"""How many positions a model has, where it looks them up in a table, and whether a prompt and its answer find room there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sft_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tables of some families begin with rows that no token uses (OPT has two).
UNUSED = 2


def positions(model: PreTrainedModel) -> int | None:
    """How many positions the model's table has; None if they are computed, as rotary ones are, and have no end."""
    most = getattr(model.config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = (it for it in model.modules() if isinstance(it, torch.nn.Embedding) and it is not words)
    if most and any(most <= table.num_embeddings <= most + UNUSED for table in tables):
        return int(most)
    return None


def refuse_beyond(limit: int | None, tokens: int, new_tokens: int, what: str) -> None:
    """Raise ConfigError if so many tokens with an answer of so many more need positions that the model does not have."""
    needed = tokens + max(new_tokens - 1, 0)  # the last token of an answer is not read any more
    if limit is None or needed <= limit:
        return
    answer = f" and max_new_tokens is {new_tokens}" if new_tokens else " with its answer"
    raise ConfigError(
        f"{what}: a prompt has {tokens} tokens{answer}, but the model has a table of {limit} positions and takes no more",
        hint="ask less at once" + (", or set max_new_tokens lower" if new_tokens else ""),
    )
