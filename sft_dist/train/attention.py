"""Attention over rows that were joined into one, without padding and without a mask.

A padding-free batch is one long row with the lengths of its documents beside it. Stock SDPA would build a mask of
length x length and compute all of it; here each document attends to itself only, causally: on a GPU in torch's own flash
attention for documents of different lengths, on a CPU document by document.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from sft_dist.errors import ConfigError

NAME = "sft_dist_varlen"
# Up to so many tokens torch's SDPA is faster in float32 than in bfloat16 on a CPU (147 tokens: 1.6 against 2.8 ms forward
# and backward, 400: equal, Zen 5); and more exact.
FLOAT32_UP_TO = 400
# torch 2.13 refuses fewer key heads than query heads unless told; 2.11 takes them and has no such argument.
MUST_NAME_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal self-attention inside each document; the signature is that of transformers' AttentionInterface.

    `query` is [1, heads, tokens, head_dim], `key` and `value` may have fewer heads; `cu_seq_lens_q` (int32) holds the
    documents' boundaries, `max_length_q` the longest one's length. The result is [1, tokens, heads, head_dim]. Raises
    RuntimeError for a padded batch, ConfigError for soft caps, attention sinks and, on a CPU, a document beyond a sliding
    window, which it does not compute.
    """
    tokens = query.shape[2]
    if cu_seq_lens_q is None:
        if query.shape[0] != 1:
            raise RuntimeError(f"{NAME} takes one row of joined documents; load the model with sdpa for padded batches")
        cu_seq_lens_q, max_length_q = torch.tensor([0, tokens], dtype=torch.int32, device=query.device), tokens
    window = kwargs.get("sliding_window")
    _refuse(kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None)
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda:
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        return _flash(q, k, v, cu_seq_lens_q, int(max_length_q or tokens), scaling, window)[None], None
    bounds = cu_seq_lens_q.tolist()
    _refuse(window is not None and any(end - start > window for start, end in itertools.pairwise(bounds)))
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    # split, not slices: the gradient of a split is one concatenation, that of a slice a row of zeros for each document.
    documents = zip(*(torch.split(part, lengths, 2) for part in (query, key, value)), strict=True)
    joined = torch.cat([_attend(q, k, v, scaling, dropout) for q, k, v in documents], dim=2)
    return joined.transpose(1, 2).contiguous(), None


def _refuse(foreign: bool) -> None:
    """Windows, caps and sinks that we do not compute change the result: better no answer than another one."""
    if foreign:
        raise ConfigError(
            f"this model's attention has a window, cap or sink that {NAME} does not compute",
            hint="set model.attn_implementation=sdpa, or eager for a cap or a sink",
        )


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """[tokens, heads, head_dim] three times -> [tokens, heads, head_dim], in bfloat16 or float16."""
    # A window of w tokens sees itself and w - 1 before; -1 is all of them, 0 none after: causal.
    settings: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if MUST_NAME_GQA and query.shape[1] != key.shape[1]:
        settings["enable_gqa"] = True
    # With return_aux, which is not asked for, it would be a pair.
    return cast(torch.Tensor, varlen_attn(query, key, value, bounds, bounds, longest, longest, **settings))


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
