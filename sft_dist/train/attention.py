"""Attention over rows that were joined into one, without padding and without a mask.

A padding-free batch is one long row with the lengths of its documents beside it. Stock SDPA would build a mask of
length x length and compute all of it; here each document attends to itself only, causally.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from sft_dist.errors import ConfigError

NAME = "sft_dist_varlen"
# Up to so many tokens torch's SDPA is faster in float32 than in bfloat16 on a CPU (147 tokens: 1.6 against 2.8 ms forward
# and backward, 400: equal, Zen 5); and more exact.
FLOAT32_UP_TO = 400


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal self-attention inside each document; the signature is that of transformers' AttentionInterface.

    `query` is [1, heads, tokens, head_dim], `key` and `value` may have fewer heads; `cu_seq_lens_q` holds the
    documents' boundaries. The result is [1, tokens, heads, head_dim]. Raises RuntimeError for a padded batch, ConfigError
    for a document beyond a sliding window, soft caps and attention sinks, which it does not compute.
    """
    if cu_seq_lens_q is None:
        if query.shape[0] != 1:
            raise RuntimeError(f"{NAME} takes one row of joined documents; load the model with sdpa for padded batches")
        bounds = [0, query.shape[2]]
    else:
        bounds = cu_seq_lens_q.tolist()
    window = kwargs.get("sliding_window")
    too_long = window is not None and any(end - start > window for start, end in itertools.pairwise(bounds))
    if too_long or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        # Sliding windows, soft caps and attention sinks change the result: better no answer than another one.
        raise ConfigError(
            f"this model's attention has a window, cap or sink that {NAME} does not compute",
            hint="set model.attn_implementation=sdpa, or eager for a cap or a sink",
        )
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    query, key = query.to(value.dtype), key.to(value.dtype)
    # split, not slices: the gradient of a split is one concatenation, that of a slice a row of zeros for each document.
    documents = zip(*(torch.split(part, lengths, 2) for part in (query, key, value)), strict=True)
    joined = torch.cat([_attend(q, k, v, scaling, dropout) for q, k, v in documents], dim=2)
    return joined.transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
) -> torch.Tensor:
    dtype = value.dtype
    if query.device.type == "cpu" and query.shape[2] <= FLOAT32_UP_TO:
        query, key, value = query.float(), key.float(), value.float()
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        scale=scaling,
        is_causal=True,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.to(dtype)


def register() -> None:
    """Make the name known to transformers. It has no mask function on purpose: the model then builds no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)
