"""Bytes a parameter by plan, the fullest moment, and what grows with what."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sft_dist.config.schema_parallel import LoraConfig
from sft_dist.parallel.architecture import Architecture, packaged, read_architecture
from sft_dist.parallel.memory import Batch, GpuMemory, activations, gpu_memory, head_bytes, layer_activations
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.shares import GIB, STEP_TRANSIENT_BYTES, held_by, state_bytes
from sft_dist.parallel.storage import (
    PROCESS_BYTES,
    checkpoint_bytes,
    disk_bytes,
    host_bytes,
    model_bytes,
    offloaded_bytes,
)
from sft_dist.parallel.weights import Weights, weights_of

SHARDED = ("zero1", "zero2", "zero3", "fsdp2")


def shape(name: str) -> Architecture:
    return read_architecture(packaged()[name], name)


SMALL, LARGE = shape("Qwen/Qwen3-0.6B"), shape("Qwen/Qwen3-8B")


def layout(plan: str, gpus: int = 1, **more: Any) -> Layout:
    return Layout(PLANS[plan], processes_per_node=gpus, **{"compile_layers": True, **more})


def memory(architecture: Architecture, where: Layout, batch: Batch, lora: LoraConfig | None = None) -> GpuMemory:
    return gpu_memory(architecture, weights_of(architecture, lora, where.dtype), where, batch)


@pytest.mark.parametrize(
    ("plan", "gpus", "parameters", "gradients", "optimizer"),
    [
        ("single", 1, 2, 2, 12),
        ("ddp", 2, 2, 4, 12),
        ("zero1", 4, 2, 2, 3),
        ("zero2", 4, 2, 0.5, 3),
        ("zero3", 4, 0.5, 0.5, 3),
        ("fsdp2", 4, 1, 1, 2),
    ],
)
def test_bytes_a_parameter(plan: str, gpus: int, parameters: float, gradients: float, optimizer: float) -> None:
    # With accumulation and long rows the fullest moment is the head's, when gradients of earlier micro batches are kept.
    found = memory(SMALL, layout(plan, gpus), Batch(2, 8192, accumulation=2))
    total = SMALL.total_params
    assert found.parameters / total == pytest.approx(parameters, rel=1e-6)
    assert found.gradients / total == pytest.approx(gradients, rel=1e-6)
    assert found.optimizer / total == pytest.approx(optimizer, rel=1e-6)


def test_float32_has_no_master_copy() -> None:
    found = memory(SMALL, layout("single", dtype="float32"), Batch(2, 8192, accumulation=2))
    total = SMALL.total_params
    assert (found.parameters, found.gradients, found.optimizer) == (4 * total, 4 * total, 8 * total)


def test_the_measured_point() -> None:
    """35.4 GiB with bfloat16 states (4 bytes a parameter): Qwen3-0.6B, 16,384 tokens, TRL, whose head takes little."""
    one = layout("single", compile_layers=False)
    saved, _ = activations(SMALL, weights_of(SMALL, None, "bfloat16"), one, 16_384)
    assert (saved + 8 * SMALL.total_params) / GIB == pytest.approx(35.4, rel=0.03)


@pytest.mark.parametrize(
    ("name", "tokens", "measured"), [("Qwen/Qwen3-0.6B", 32_768, 47.3), ("Qwen/Qwen3-1.7B", 24_576, 61.4)]
)
def test_the_measured_points_with_compiled_layers(name: str, tokens: int, measured: float) -> None:
    """A plain loop with compiled layers, bfloat16 states, and a head of 2,048 to 4,096 tokens at a time, 2.5 GiB."""
    architecture = shape(name)
    saved = architecture.layers * layer_activations(architecture, "bfloat16", compiled=True) * tokens
    assert (saved + 8 * architecture.total_params) / GIB + 2.5 == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(
    ("compiled", "counted"),
    [(False, 71_848), (True, 45_224)],
)
def test_what_a_layer_saves(compiled: bool, counted: int) -> None:
    """Bytes a token counted with saved_tensors_hooks: transformers 5.17, torch.compile's partitioner.

    The norms' 4 bytes a token and head are left out: below 1 %.
    """
    assert layer_activations(SMALL, "bfloat16", compiled=compiled) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_saves_no_float32_inputs_and_its_own_inner_ones(compiled: bool) -> None:
    """tests/cpu/test_planner_counts.py counts the eager ones."""

    def saved(**lora: Any) -> int:
        weights = weights_of(SMALL, LoraConfig(**lora), "bfloat16")
        return layer_activations(SMALL, "bfloat16", weights, compiled=compiled)

    whole = layer_activations(SMALL, "bfloat16", compiled=compiled)
    assert saved(r=16) <= whole + 2 * 16 * 7
    assert saved(r=64) - saved(r=16) == 2 * 48 * 7
    assert (saved(r=16, lora_dropout=0.1) > saved(r=16)) is not compiled, "compiled, what was dropped is drawn again"


@pytest.mark.parametrize("plan", ["single", "ddp", "zero1", "fsdp2"])
def test_an_adapter_takes_the_bytes_of_everything_that_is_trained(plan: str) -> None:
    """2 + 2 + 12, or 4 + 4 + 8 as shards of fsdp2, beside 2 for a frozen weight; beside 4-bit ones it is bfloat16."""
    adapter = weights_of(SMALL, LoraConfig(r=64), "bfloat16")
    assert state_bytes(layout(plan), adapter) == ((4, 4, 8) if plan == "fsdp2" else (2, 2, 12))
    held = held_by(SMALL, adapter, layout(plan), several=True)
    assert (
        held.parameters + held.optimizer == 2 * SMALL.total_params + (12 if plan == "fsdp2" else 14) * adapter.trained
    )
    assert checkpoint_bytes(adapter, layout(plan)) == (12 if plan == "fsdp2" else 14) * adapter.trained
    assert checkpoint_bytes(adapter, layout("zero3", 4)) == 12 * adapter.trained, "nothing of the frozen weights"
    in_4_bits = weights_of(SMALL, LoraConfig(quantization="nf4"), "float32")
    if plan != "fsdp2":
        assert state_bytes(layout(plan, dtype="float32"), in_4_bits) == (2, 2, 12)


def test_an_embedding_that_is_the_head_is_trained_once() -> None:
    both = LoraConfig(modules_to_save=("embed_tokens", "lm_head"))
    alone = weights_of(SMALL, LoraConfig(), "bfloat16").trained
    assert SMALL.tied and weights_of(SMALL, both, "bfloat16").trained == alone + SMALL.embedding_params
    untied = weights_of(LARGE, both, "bfloat16")
    assert (
        not LARGE.tied
        and untied.trained == weights_of(LARGE, LoraConfig(), "bfloat16").trained + 2 * LARGE.embedding_params
    )
    assert untied.largest == LARGE.embedding_params, "two tensors, not one"


def test_compiled_layers_save_less() -> None:
    for architecture in (SMALL, LARGE, shape("google/gemma-2-2b") if "google/gemma-2-2b" in packaged() else SMALL):
        eager = layer_activations(architecture, "bfloat16")
        assert 0.5 * eager < layer_activations(architecture, "bfloat16", compiled=True) < 0.7 * eager


def test_the_head_holds_one_chunk_and_the_sum_over_chunks() -> None:
    weights = weights_of(SMALL, None, "bfloat16")
    logits, matrix = 2048 * SMALL.vocab, SMALL.embedding_params
    assert head_bytes(SMALL, weights, "bfloat16", 2048)[0] == 10 * logits
    assert head_bytes(SMALL, weights, "bfloat16", 100)[0] == 2 * (100 * SMALL.vocab + matrix), "more is the gradient"
    assert head_bytes(SMALL, weights, "bfloat16", 50_000)[0] == 10 * logits + 4 * matrix


def test_without_a_first_micro_batch_there_are_no_gradients_beside_the_activations() -> None:
    once = memory(LARGE, layout("single"), Batch(1, 8192))
    again = memory(LARGE, layout("single"), Batch(1, 8192, accumulation=4))
    assert (once.gradients, again.gradients) == (0, 2 * LARGE.total_params)


def test_short_rows_are_fullest_at_the_end_of_the_backward_pass_or_in_the_step() -> None:
    found = memory(LARGE, layout("single"), Batch(1, 16))
    assert found.gradients == 2 * LARGE.total_params
    assert found.head == 0
    assert found.buffers <= STEP_TRANSIENT_BYTES


@pytest.mark.parametrize("plan", ["single", "ddp", *SHARDED])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_tokens_take_more(plan: str, checkpointing: bool) -> None:
    where = layout(plan, 8 if plan != "single" else 1, gradient_checkpointing=checkpointing)
    sizes = [memory(SMALL, where, Batch(rows, 4096)).allocated for rows in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]


@pytest.mark.parametrize("plan", SHARDED)
def test_more_gpus_take_less_each(plan: str) -> None:
    sizes = [memory(LARGE, layout(plan, gpus), Batch(1, 4096, 2)).allocated for gpus in (2, 4, 8, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)


def test_each_stage_takes_less_than_the_one_before() -> None:
    sizes = [memory(LARGE, layout(plan, 8), Batch(1, 4096, 2)).allocated for plan in ("ddp", "zero1", "zero2", "zero3")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("plan", ["single", *SHARDED])
def test_checkpointing_takes_less(plan: str) -> None:
    batch = Batch(2, 4096, 2)
    plain, again = layout(plan, 2), layout(plan, 2, gradient_checkpointing=True)
    assert memory(LARGE, again, batch).allocated < memory(LARGE, plain, batch).allocated


@pytest.mark.parametrize("plan", SHARDED)
def test_offload_leaves_no_states_on_the_gpu(plan: str) -> None:
    away = layout(plan, 2, offload="cpu")
    found = memory(LARGE, away, Batch(1, 4096))
    assert found.optimizer == 0
    assert (found.parameters == 0) is (plan in ("zero3", "fsdp2"))
    everything = weights_of(LARGE, None, "bfloat16")
    assert offloaded_bytes(everything, away) == (16 if plan == "fsdp2" else 20) * -(-LARGE.total_params // 2)
    assert host_bytes(everything, away) > host_bytes(everything, layout(plan, 2))


def test_hybrid_sharding_divides_inside_a_node() -> None:
    whole = Layout(PLANS["fsdp2"], nodes=4, processes_per_node=8)
    hybrid = dataclasses.replace(whole, hybrid_shard=True)
    batch = Batch(1, 4096, 2)
    assert memory(LARGE, hybrid, batch).optimizer == pytest.approx(4 * memory(LARGE, whole, batch).optimizer, rel=1e-6)


def test_a_shared_row_takes_a_share() -> None:
    shared = Batch(1, 32_768, sequence_parallel=4)
    assert shared.tokens == 8192
    where = layout("zero3", 4, sequence_parallel_size=4)
    assert memory(LARGE, where, shared) == memory(LARGE, where, Batch(1, 8192))


def test_an_adapter() -> None:
    adapter = LoraConfig(r=16)
    trained = weights_of(LARGE, adapter, "bfloat16")
    # PEFT on Qwen3-8B with all-linear and r=16: 43,646,976 trainable parameters.
    assert trained.trained == 43_646_976
    assert trained.frozen == LARGE.total_params
    found = memory(LARGE, layout("single", gradient_checkpointing=True), Batch(1, 4096, 2), adapter)
    assert found.parameters == 2 * LARGE.total_params + 2 * trained.trained
    assert found.optimizer == 12 * trained.trained
    four_bits = weights_of(LARGE, LoraConfig(quantization="nf4"), "bfloat16")
    assert 0.3 * trained.frozen_bytes < four_bits.frozen_bytes < 0.45 * trained.frozen_bytes


def test_an_adapter_on_some_modules() -> None:
    few = weights_of(LARGE, LoraConfig(r=8, target_modules=("q_proj", "v_proj")), "bfloat16")
    assert few.trained == 36 * 8 * ((4096 + 4096) + (4096 + 1024))
    saved = weights_of(LARGE, LoraConfig(r=8, modules_to_save=("embed_tokens",)), "bfloat16")
    assert saved.trained > LARGE.embedding_params


@pytest.mark.parametrize(
    ("plan", "bytes_each"), [("single", 14), ("ddp", 14), ("zero1", 14), ("zero2", 14), ("zero3", 12), ("fsdp2", 12)]
)
def test_a_checkpoint(plan: str, bytes_each: int) -> None:
    everything = weights_of(LARGE, None, "bfloat16")
    assert checkpoint_bytes(everything, layout(plan, 8)) == bytes_each * LARGE.total_params
    # FSDP2 writes an embedding that is also the head under both names.
    tied = weights_of(SMALL, None, "bfloat16")
    again = 4 * SMALL.embedding_params if plan == "fsdp2" else 0
    assert checkpoint_bytes(tied, layout(plan, 8)) == bytes_each * SMALL.total_params + again


def test_the_disk_holds_one_checkpoint_more_while_it_saves() -> None:
    everything: Weights = weights_of(SMALL, None, "bfloat16")
    where = layout("single")
    one, model = checkpoint_bytes(everything, where), model_bytes(everything, where, merge=False)
    assert disk_bytes(everything, where, keep=2, saves=True, merge=False) == 3 * one + model
    assert disk_bytes(everything, where, keep=2, saves=False, merge=False) == model == 2 * SMALL.total_params


@pytest.mark.parametrize(
    ("plan", "lora", "bytes_each"),
    [
        ("ddp", None, 2 * 8), ("zero2", None, 2 * 8), ("zero3", None, 2), ("fsdp2", None, 4),
        ("zero3", LoraConfig(), 2), ("fsdp2", LoraConfig(), 2), ("fsdp2", LoraConfig(quantization="nf4"), 2 * 8),
    ],
)  # fmt: skip
def test_how_often_a_node_has_the_weights_while_they_load(plan: str, lora: LoraConfig | None, bytes_each: int) -> None:
    """As measured with two processes (docs/decisions.md): zero3 and fsdp2 read them once, fsdp2 as float32."""
    weights = weights_of(LARGE, lora, "bfloat16")
    assert host_bytes(weights, layout(plan, 8)) - 8 * PROCESS_BYTES == bytes_each * LARGE.total_params


def test_the_parts_add_up() -> None:
    found = memory(LARGE, layout("zero2", 8), Batch(1, 4096, 2))
    gib = found.gib()
    parts = ("parameters", "gradients", "optimizer", "activations", "head", "buffers")
    assert sum(gib[part] for part in parts) == pytest.approx(gib["allocated"], abs=0.01)
    assert gib["needed"] > gib["allocated"]
