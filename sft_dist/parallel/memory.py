"""GPU memory of one process at its fullest moment, part by part, for a model, a plan and a micro batch.

What is held all the time follows from the plan. On top of it there are moments that do not coincide: the head (all
activations, and the logits), the backward pass (all activations, buckets, gathered units), its end (all gradients) and
the optimizer's step. The fullest one decides; the parts of a GpuMemory are those of that moment, so they add up to
what torch.cuda.max_memory_allocated() shows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sft_dist.parallel.architecture import Architecture
from sft_dist.parallel.plans import Layout
from sft_dist.parallel.shares import GIB, held_by
from sft_dist.parallel.weights import Weights

# --- the head, train/loss.py --------------------------------------------------------------------------------------
# Trained tokens whose logits exist at a time (GPU_CHUNK), and bytes a logit while they do: bfloat16 logits 2, their
# float32 copy 4 (torch converts bfloat16 before the softmax), log-probabilities 4. Float32 makes no copy.
HEAD_CHUNK = 2048
LOGIT_BYTES = {"bfloat16": 10, "float32": 8}
# --- the layers -----------------------------------------------------------------------------------------------------
# Families whose norms multiply by their weight in float32.
FLOAT_NORMS = ("gemma", "gemma2", "gemma3_text")
# Bytes a token beside the layers, in widths of the hidden state: final norm, trained positions and their gradient.
OUTSIDE_LAYERS = 12
# --- the allocator --------------------------------------------------------------------------------------------------
# What the caching allocator loses between blocks, as a share of all that is allocated, and at least.
FRAGMENTATION = 0.04
FRAGMENTATION_BYTES = GIB // 4


@dataclass(frozen=True)
class Batch:
    """The rows that one process takes through the model at once."""

    rows: int
    tokens_per_row: int
    accumulation: int = 1
    """Micro batches in one optimizer step."""
    sequence_parallel: int = 1

    @property
    def tokens(self) -> int:
        """Tokens on one GPU at once."""
        return -(-self.rows * self.tokens_per_row // self.sequence_parallel)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes in one process at its fullest moment."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    head: int = 0
    buffers: int = 0
    """Gathered units, communication buckets, and what the step copies."""

    @property
    def allocated(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def needed(self) -> int:
        """With what the allocator loses: this has to fit."""
        return self.allocated + max(FRAGMENTATION_BYTES, round(self.allocated * FRAGMENTATION))

    def gib(self) -> dict[str, float]:
        """Each part, `allocated` and `needed` in GiB."""
        names = [*(part.name for part in fields(self)), "allocated", "needed"]
        return {name: round(getattr(self, name) / GIB, 3) for name in names}


def gpu_memory(architecture: Architecture, weights: Weights, layout: Layout, batch: Batch) -> GpuMemory:
    """The fullest moment of one process, in bytes by part."""
    held = held_by(architecture, weights, layout, several=batch.accumulation > 1)
    inputs, layer = activations(architecture, weights, layout, batch.tokens)
    head, head_kept = head_bytes(architecture, weights, layout.dtype, batch.tokens)
    temporary = round((6 * architecture.ffn + 8 * architecture.hidden) * _width(layout) / 2) * batch.tokens
    always = {"parameters": held.parameters, "optimizer": held.optimizer}
    moments = (
        GpuMemory(**always, gradients=held.before, activations=inputs, head=head, buffers=held.gathered),
        GpuMemory(
            **always,
            gradients=held.during,
            activations=inputs + layer + temporary,
            head=head_kept,
            buffers=held.gathered + held.buckets,
        ),
        GpuMemory(
            **always,
            gradients=held.end,
            activations=temporary,
            buffers=held.gathered + held.buckets + held.last_bucket,
        ),
        GpuMemory(**always, gradients=held.end, buffers=held.step),
    )
    return max(moments, key=lambda moment: moment.allocated)


def activations(architecture: Architecture, weights: Weights, layout: Layout, tokens: int) -> tuple[int, int]:
    """Bytes saved by the forward pass for so many tokens, and what recomputing one layer adds to them."""
    width = _width(layout)
    outside = OUTSIDE_LAYERS * architecture.hidden * width // 2
    per_layer = layer_activations(architecture, layout.dtype, weights, compiled=layout.compile_layers)
    if layout.gradient_checkpointing:
        return tokens * (architecture.layers * architecture.hidden * width + outside), tokens * per_layer
    return tokens * (architecture.layers * per_layer + outside), 0


def layer_activations(
    architecture: Architecture, dtype: str, weights: Weights | None = None, *, compiled: bool = False
) -> int:
    """Bytes that one layer saves for the backward pass, a token; `weights` only says whether they are an adapter's.

    Counted from transformers' modules as they are: a norm saves its float32 input and what its weight is multiplied with
    (if that is trained); attention saves queries, keys, values, its output and a float32 sum a head; the gated
    feed-forward saves the gate, its activation, the other branch and their product; each linear layer its input, for the
    weight's gradient or for the adapter's, which has the same type. A rotary embedding saves nothing.
    """
    lora, width = weights is not None and weights.lora, 4 if dtype == "float32" else 2
    inner = width * weights.inner if weights is not None else 0
    if compiled:
        return _compiled_layer(architecture, width) + inner
    h, q, k, f = architecture.hidden, architecture.query, architecture.key, architecture.ffn
    # The norms of queries and keys count like those of the hidden state.
    normed = architecture.norms * h + (q + k if architecture.qk_norm else 0)
    # In float32 nothing is cast: a norm's input is saved, and what its weight is multiplied with.
    total = normed * (4 if lora else 4 + width)
    total += width * (2 * h + 2 * (q + k) + 4 * f)  # what two norms give to linear layers; attention; the feed-forward
    if weights is not None and weights.dropout:
        # Each adapter's own input and a byte that says what was dropped, in place of those that it has in common.
        total += (width + 1) * (5 * h + q + f) - width * (2 * h + f)
    if architecture.family in FLOAT_NORMS and not lora and dtype != "float32":
        total += 2 * normed
    return total + inner + 4 * architecture.heads


def _compiled_layer(architecture: Architecture, width: int) -> int:
    """The same once torch.compile has cut the layer into forward and backward pass (AOTAutograd's min-cut partitioner).

    What is cheap to compute again is: saved are the inputs of norms and linear layers in their own type, queries and keys
    before and after their norms, values, the attention's output, gate, other branch and their product.
    """
    h, q, k, f = architecture.hidden, architecture.query, architecture.key, architecture.ffn
    normed = architecture.norms * h + (q + k if architecture.qk_norm else 0)
    total = normed + q + 2 * k + (2 * h + q + f) + 2 * f  # norms; queries, keys, values; linear layers; gate and branch
    return width * total + 4 * architecture.heads


def head_bytes(architecture: Architecture, weights: Weights, dtype: str, tokens: int) -> tuple[int, int]:
    """Bytes while the loss is computed, with all positions trained; and what of it the backward pass still finds.

    train/loss.py, chunk by chunk: logits, their float32 copy and log-probabilities; then, those gone, the chunk's gradient
    and its product, the part of the weight's gradient. With several chunks the parts are summed in float32.
    """
    width = 4 if dtype == "float32" else 2
    matrix = architecture.embedding_params
    logits = min(tokens, HEAD_CHUNK) * architecture.vocab
    if weights.lora:
        return logits * LOGIT_BYTES[dtype], 0
    summed = 0 if tokens <= HEAD_CHUNK else 4 * matrix
    softmax, product = logits * LOGIT_BYTES[dtype] + summed, (logits + matrix) * width + summed
    return max(softmax, product), 2 * matrix * width  # kept: the gradient, and its product with that of the loss


def _width(layout: Layout) -> int:
    return 4 if layout.dtype == "float32" else 2
