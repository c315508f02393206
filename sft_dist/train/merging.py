"""A model with its adapter merged in, whose bfloat16 weights keep what the adapter has learned.

What an adapter changes of a weight is often less than half of the step to the next bfloat16: rounded to the nearest, most of
it is lost, always towards the base model: 22 to 42 % of the change (benchmarks/merging.py). Rounded up or down at random, with
the probability that makes the mean right (stochastic rounding: Gupta et al., Deep Learning with Limited Numerical
Precision, 2015), the sum is right, and what is left are small errors that cancel out in a layer's long products.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.config.schema import ModelConfig
from sft_dist.train.adapter import with_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sft_dist.train.tokenizer import RunTokenizer

# Weights that are rounded at a time: what is needed beside them stays in a cache.
AT_ONCE = 1 << 20


def merged(model: ModelConfig, tokens: RunTokenizer, folder: Path, dtype: str) -> PreTrainedModel:
    """The base model that `model` names with the adapter in `folder` merged into it, whole, in host memory.

    The base is read again, unquantised: one way for every plan, and the adapter is used as a reader of it would.
    PEFT adds it to float32 copies of the weights, layer by layer. The result is in `dtype` and always the same.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from sft_dist.train.model import load_model

    # The training is over; under ZeRO-3 this process would load its share only, and wait for the others to do so.
    unset_hf_deepspeed_config()
    base = load_model(model.model_copy(update={"lora": None}), tokens, dtype=dtype, attn_implementation="sdpa")
    adapted = with_adapter(base, folder)
    with _all_cores(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        if dtype == "bfloat16":
            _merge_layers(adapted)
        whole: PreTrainedModel = adapted.merge_and_unload()
    return whole


def _merge_layers(adapted: torch.nn.Module) -> None:
    """Merge every layer of PEFT's into its own weights, in place; those keep their types, which some models mix."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer = module.get_base_layer()
        narrow = [part for part, weight in layer.named_parameters() if weight.dtype == torch.bfloat16]
        layer.to(torch.float32)
        module.merge()
        with torch.no_grad():
            for part in narrow:
                weight = layer.get_parameter(part)
                weight.data = rounded(weight.data, f"{name}.{part}")


def rounded(weights: torch.Tensor, name: str) -> torch.Tensor:
    """`weights`, float32, in bfloat16: each the one below or above, by chance, so that its mean is the weight itself.

    The chance is the same for the same `name`. What bfloat16 can hold stays as it is. Infinite and NaN stay so.
    """
    import numpy as np
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    chance = np.random.Generator(np.random.PCG64(seed))
    result = torch.empty(weights.shape, dtype=torch.bfloat16)
    parts = zip(torch.split(weights.reshape(-1), AT_ONCE), torch.split(result.view(-1), AT_ONCE), strict=True)
    for whole, out in parts:
        # bfloat16 is the upper half of a float32: of the sum the lower half is cut off.
        drawn = torch.from_numpy(chance.integers(0, 1 << 16, len(whole), dtype=np.uint16).astype(np.int32))
        drawn += whole.contiguous().view(torch.int32)
        out.view(torch.int16).copy_(drawn >> 16)
        if not whole.isfinite().all():
            out.copy_(torch.where(whole.isfinite(), out, whole.bfloat16()))
    return result


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Beside a GPU a process has one thread; the others wait now."""
    import torch

    was = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(was)
