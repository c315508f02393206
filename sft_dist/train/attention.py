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
    query, key = query.to(value.dtype), key.to(value.dtype)
    documents = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in itertools.pairwise(bounds)
        if end > start
    ]
    return torch.cat(documents, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the name known to transformers. It has no mask function on purpose: the model then builds no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)
