"""What the planner counts from shapes is what transformers and PEFT build and what autograd saves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM

from sft_dist.config.schema_parallel import LoraConfig
from sft_dist.parallel import memory
from sft_dist.parallel.architecture import read_architecture
from sft_dist.parallel.memory import layer_activations
from sft_dist.parallel.weights import weights_of
from sft_dist.train import loss

SHAPE = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
    "vocab_size": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = 128
R = 16
KINDS = {
    "llama": ("LlamaConfig", {}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3 with biases": ("Qwen3Config", {"head_dim": 32, "attention_bias": True}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
}


class FlashLike(torch.autograd.Function):
    """Saves what a flash attention kernel saves: queries, keys, values, output and a float32 sum a head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.clone()
        ctx.save_for_backward(query, key, value, output, torch.zeros(query.shape[:2]))
        return output


def flash_like(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    batch, heads, length, width = query.shape
    rows = (part.transpose(1, 2).reshape(batch * length, -1, width) for part in (query, key, value))
    return FlashLike.apply(*rows).view(batch, length, heads, width), None


def built(kind: str, layers: int = 2) -> Any:
    name, more = KINDS[kind]
    return getattr(transformers, name)(**SHAPE, num_hidden_layers=layers, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters(kind: str) -> None:
    config = built(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = read_architecture(config.to_diff_dict(), kind)
    assert architecture.total_params == sum(param.numel() for param in model.parameters())
    assert architecture.layer_params == sum(param.numel() for param in model.model.layers[0].parameters())


def saved_bytes(kind: str, layers: int, dtype: str, lora: bool) -> int:
    """Bytes that one forward pass of the decoder saves, parameters not counted."""
    AttentionInterface.register("planner_probe", flash_like)
    model = AutoModelForCausalLM.from_config(
        built(kind, layers), dtype=getattr(torch, dtype), attn_implementation="planner_probe"
    )
    if lora:
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)  # as train/adapter.py does
    decoder = model.get_base_model().model if lora else model.model
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = decoder(input_ids=torch.zeros((1, TOKENS), dtype=torch.int64), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
def test_activations(kind: str, dtype: str, lora: bool) -> None:
    layer = saved_bytes(kind, 3, dtype, lora) - saved_bytes(kind, 2, dtype, lora)
    architecture = read_architecture(built(kind).to_diff_dict(), kind)
    weights = weights_of(architecture, LoraConfig(r=R) if lora else None, dtype)
    assert layer_activations(architecture, dtype, weights) == pytest.approx(layer / TOKENS, rel=0.03)


def allocated_at_most(work: Any) -> int:
    """The most bytes that `work` has allocated at once, by torch's own account of its CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("hidden_size", [64, 1024], ids=["wide logits", "large matrix"])
@pytest.mark.parametrize("tokens", [100, 1000], ids=["one chunk", "four chunks"])
def test_the_head(tokens: int, hidden_size: int, dtype: str, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What train/loss.py has allocated while it computes: counted, and the hidden states' gradient, which is not the head's."""
    monkeypatch.setattr(loss, "CPU_CHUNK", 250)
    monkeypatch.setattr(memory, "HEAD_CHUNK", 250)
    kind = getattr(torch, dtype)
    hidden = torch.randn((tokens, hidden_size), dtype=kind, requires_grad=True)
    weight = torch.randn((8000, hidden_size), dtype=kind, requires_grad=trained)
    targets, divisor = torch.zeros(tokens, dtype=torch.int64), torch.tensor(tokens)

    def forward() -> None:
        loss._HeadLoss.apply(hidden, weight, targets, divisor)

    forward()  # what is made once
    tree = {**built("llama").to_diff_dict(), "hidden_size": hidden_size, "vocab_size": 8000}
    architecture = read_architecture(tree, "head")
    weights = weights_of(architecture, None if trained else LoraConfig(), dtype)
    counted, _ = memory.head_bytes(architecture, weights, dtype, tokens)
    most = allocated_at_most(forward) - hidden.nbytes
    chunk = 250 * hidden_size * weight.itemsize  # a chunk's part of the hidden states' gradient
    if dtype == "bfloat16" and trained and tokens > 250:
        chunk += 4 * weight.numel()  # on a CPU bfloat16 is converted before it is added to a float32 sum
    assert counted * 0.98 <= most <= counted * 1.02 + chunk
