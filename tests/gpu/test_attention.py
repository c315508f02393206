"""The varlen kernel on a GPU against plain attention in float64, document by document: outputs and gradients.

bfloat16 operands land between 1e-3 and 1e-2 of the reference; measured on an H200 with torch 2.11: 1.9e-3 to 3.1e-3.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from sft_dist.train.attention import varlen_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LENGTHS = (300, 17, 1, 900, 46)
BOUNDS = tuple(itertools.accumulate(LENGTHS, initial=0))
TOLERANCE = 6e-3


def reference(parts: list[torch.Tensor], window: int | None) -> torch.Tensor:
    """Causal attention of each document in float64; `parts` are query, key and value, [1, heads, tokens, head_dim]."""
    query, key, value = parts
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for start, end in itertools.pairwise(BOUNDS):
        place = torch.arange(end - start, device=query.device)
        distance = place[:, None] - place[None]
        seen = (distance >= 0) & (distance < (window or end))
        document = (part[:, :, start:end] for part in (query, key, value))
        q, k, v = document
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 64], ids=["whole", "window"])
@pytest.mark.parametrize(("heads", "key_heads"), [(16, 8), (8, 8)])
def test_outputs_and_gradients_are_those_of_each_document_alone(heads: int, key_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    shapes = [(1, count, BOUNDS[-1], 128) for count in (heads, key_heads, key_heads)]
    parts = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact = [part.detach().double().requires_grad_() for part in parts]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    found, _ = varlen_attention(
        torch.nn.Identity(), *parts, None, cu_seq_lens_q=bounds, max_length_q=max(LENGTHS), sliding_window=window
    )
    wanted = reference(exact, window)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    wanted.backward(gradient.double())
    pairs = [(found, wanted), *((part.grad, other.grad) for part, other in zip(parts, exact, strict=True))]
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        assert float((ours.double() - theirs).norm() / theirs.norm()) < TOLERANCE
