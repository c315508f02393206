"""Which of a model's weights are trained, and what one of each kind takes in memory."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.config.schema_parallel import LoraConfig
from sft_dist.parallel.architecture import Architecture

# A frozen weight in NF4: half a byte, its block's scale (64 weights share one, itself in 8 bits) another 0.016
# (Dettmers et al., 2023, QLoRA, section 3), and what bitsandbytes adds to a tensor.
NF4_BYTES = 0.53


@dataclass(frozen=True)
class Weights:
    """Elements that are trained and frozen, and how many bytes the frozen ones take altogether."""

    trained: int
    frozen: int
    frozen_bytes: int
    lora: bool
    quantized: bool
    largest: int
    """Elements of the largest tensor that is trained: what engines copy in one piece."""
    tensors: int
    """How many tensors are trained."""
    inner: int = 0
    """Ranks of one layer's adapters together: what they save besides their inputs, a token."""
    dropout: bool = False
    """Whether each adapter drops values of its input, and so saves one of its own."""
    shared: int = 0
    """Elements of a trained matrix that has two names: the embedding that is also the head."""


def weights_of(architecture: Architecture, lora: LoraConfig | None, dtype: str) -> Weights:
    """What is trained of `architecture`: everything, or the adapter that `lora` describes beside frozen weights."""
    total = architecture.total_params
    if lora is None:
        largest = max(architecture.embedding_params, architecture.hidden * architecture.ffn)
        shared = architecture.embedding_params if architecture.tied else 0
        return Weights(total, 0, 0, False, False, largest, architecture.tensors, shared=shared)
    shapes = {
        name: shape
        for name, shape in architecture.linears.items()
        if lora.target_modules == "all-linear" or name in lora.target_modules
    }
    pairs = sum(lora.r * (inputs + outputs) for inputs, outputs in shapes.values())
    ends = sum(name in lora.modules_to_save for name in ("embed_tokens", "lm_head"))
    ends = min(ends, 1) if architecture.tied else ends  # one matrix stays one (train/adapter.py)
    whole = ends * architecture.embedding_params
    width = 4 if dtype == "float32" else 2
    quantized = lora.quantization == "nf4"
    # bitsandbytes quantizes the linear layers of the decoder; embedding, head and norms stay as they are.
    in_four_bits = architecture.layers * architecture.layer_matmul if quantized else 0
    return Weights(
        trained=architecture.layers * pairs + whole,
        frozen=total,
        frozen_bytes=round(in_four_bits * NF4_BYTES) + (total - in_four_bits) * width,
        lora=True,
        quantized=quantized,
        largest=max([whole and architecture.embedding_params, *(lora.r * max(shape) for shape in shapes.values())]),
        tensors=2 * architecture.layers * len(shapes) + ends,
        inner=lora.r * len(shapes),
        dropout=lora.lora_dropout > 0,
    )
