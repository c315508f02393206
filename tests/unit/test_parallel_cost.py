"""What is sent, how long a step takes, and that both follow the plan."""

from __future__ import annotations

from typing import Any

import pytest

from sft_dist.config.schema_parallel import LoraConfig
from sft_dist.parallel.architecture import Architecture, packaged, read_architecture
from sft_dist.parallel.cost import StepTime, Work, flops_per_token, gemm_flops, step_time
from sft_dist.parallel.hardware import GPUS, GpuModel
from sft_dist.parallel.memory import Batch
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.traffic import all_reduce, gather, traffic
from sft_dist.parallel.weights import weights_of

H100 = GPUS["h100"]


def shape(name: str) -> Architecture:
    return read_architecture(packaged()[name], name)


SMALL, LARGE = shape("Qwen/Qwen3-0.6B"), shape("Qwen/Qwen3-8B")


def layout(plan: str, gpus: int = 1, nodes: int = 1, **more: Any) -> Layout:
    return Layout(PLANS[plan], nodes=nodes, processes_per_node=gpus, **{"compile_layers": True, **more})


def step(
    architecture: Architecture,
    where: Layout,
    batch: Batch,
    mean: float | None = None,
    gpu: GpuModel = H100,
    lora: LoraConfig | None = None,
) -> StepTime:
    weights = weights_of(architecture, lora, where.dtype)
    length = mean or batch.tokens_per_row
    work = Work(batch.rows * length / batch.sequence_parallel, length)
    return step_time(architecture, weights, where, batch, work, gpu)


@pytest.mark.parametrize(
    ("name", "linear", "attention"),
    [
        ("Qwen/Qwen3-0.6B", 3.58, 0.352),
        ("Qwen/Qwen3-1.7B", 10.32, 0.352),
        ("Qwen/Qwen3-4B", 24.13, 0.906),
        ("Qwen/Qwen3-8B", 45.41, 0.906),
        ("HuggingFaceTB/SmolLM2-135M", 0.81, 0.106),
        ("meta-llama/Meta-Llama-3-8B", 45.03, 0.805),
    ],
)
def test_operations_a_token(name: str, linear: float, attention: float) -> None:
    layers, head, causal = flops_per_token(shape(name), 1024)
    assert (layers + head) / 1e9 == pytest.approx(linear, abs=0.006)
    # The table counts a thousand tokens of length, with 1024 to the thousand.
    assert causal / 1e9 == pytest.approx(attention, rel=0.005)


def test_wider_models_multiply_faster() -> None:
    rates = [
        gemm_flops(shape(name), H100) for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")
    ]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(761e12, rel=0.01), "measured on an H100"


def test_rings() -> None:
    two, eight = layout("ddp", 2), layout("ddp", 8)
    assert gather(1000, two, H100).inside == 500
    assert all_reduce(1000, two, H100).inside == 1000
    assert all_reduce(1000, eight, H100).inside == 1750
    assert gather(1000, two, H100).across == 0
    nodes = all_reduce(3200, layout("ddp", 8, nodes=2), H100)
    assert (nodes.inside, nodes.across) == (6000, 750), "a node's border is crossed once, over eight cards"
    alone = gather(1000, layout("ddp", 1, nodes=2), H100)
    assert (alone.inside, alone.across) == (0, 500)


def test_the_expected_times_of_an_all_reduce() -> None:
    """From the links: 8B in bfloat16, 44 ms on two H100 with NVLink, 82 ms over two nodes at 400 Gb/s a GPU."""
    size = 2 * LARGE.total_params
    assert all_reduce(size, layout("ddp", 2), H100).seconds == pytest.approx(0.044, rel=0.02)
    assert all_reduce(size, layout("ddp", 8, nodes=2), H100).seconds == pytest.approx(0.082 / 0.8 * 15 / 16, rel=0.02)


def sent(plan: str, accumulation: int, **more: Any) -> tuple[int, int]:
    where = layout(plan, 8, **more)
    batch = Batch(1, 4096, accumulation)
    total = traffic(LARGE, weights_of(LARGE, None, "bfloat16"), where, batch, H100).total(accumulation)
    return total.inside, total.across


def test_what_each_plan_sends_in_a_step() -> None:
    one = 2 * LARGE.total_params * 7 // 8  # gathering all parameters in bfloat16
    for plan, gathers_once, gathers_each in (("ddp", 2, 0), ("zero1", 3, 0), ("zero2", 1, 2), ("zero3", 0, 3)):
        for accumulation in (1, 4):
            expected = one * (gathers_once + gathers_each * accumulation)
            assert sent(plan, accumulation)[0] == pytest.approx(expected, rel=1e-6), (plan, accumulation)
    # Gradients in float32 count twice, and the head is not gathered again for the backward pass.
    assert sent("fsdp2", 1)[0] == pytest.approx(one * 4 - 2 * LARGE.tail_params * 7 / 8, rel=1e-6)


@pytest.mark.parametrize("plan", ["zero3", "fsdp2"])
def test_hybrid_sharding_sends_less_across_nodes(plan: str) -> None:
    whole, hybrid = sent(plan, 1, nodes=4), sent(plan, 1, nodes=4, hybrid_shard=True)
    assert 0 < hybrid[1] < whole[1]


def test_one_process_sends_nothing() -> None:
    found = step(LARGE, layout("single"), Batch(1, 4096))
    assert (found.communication, found.sent.inside) == (0, 0)


@pytest.mark.parametrize("plan", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_eight_gpus_take_about_an_eighth_of_the_time(plan: str) -> None:
    alone = step(LARGE, layout("single"), Batch(4, 4096, 16)).seconds
    together = step(LARGE, layout(plan, 8), Batch(4, 4096, 2)).seconds
    assert alone / 8 * 0.98 < together < alone / 8 * 1.2


def test_recomputing_costs_about_a_third() -> None:
    batch = Batch(4, 4096)
    plain = step(LARGE, layout("single"), batch)
    again = step(LARGE, layout("single", gradient_checkpointing=True), batch)
    assert 1.2 < again.seconds / plain.seconds < 1.34
    assert again.mfu < plain.mfu


def test_compiled_layers_are_about_twice_as_fast_for_a_small_model() -> None:
    batch = Batch(8, 2048)
    eager, compiled = (
        step(SMALL, layout("single", compile_layers=compiled), batch).seconds for compiled in (False, True)
    )
    assert 1.6 < eager / compiled < 2.4


@pytest.mark.parametrize(
    ("name", "tokens", "compiled", "measured"),
    [
        ("Qwen/Qwen3-0.6B", 32_768, True, 94_434),
        ("Qwen/Qwen3-0.6B", 16_384, False, 44_126),
        ("Qwen/Qwen3-1.7B", 24_576, True, 45_907),
        ("Qwen/Qwen3-4B", 8_192, True, 17_773),
        ("HuggingFaceTB/SmolLM2-135M", 65_536, True, 295_857),
    ],
)
def test_speeds_that_nothing_was_fitted_to(name: str, tokens: int, compiled: bool, measured: float) -> None:
    """A plain loop without Trainer on one H100, all tokens trained, documents of 597 tokens (weighted by length)."""
    architecture, where = shape(name), layout("single", compile_layers=compiled)
    weights = weights_of(architecture, None, where.dtype)
    found = step_time(architecture, weights, where, Batch(1, tokens), Work(tokens, 597), H100)
    assert found.tokens_per_s_per_gpu == pytest.approx(measured, rel=0.15)


def test_untrained_tokens_and_waiting() -> None:
    where, batch = layout("ddp", 8), Batch(4, 4096)
    weights = weights_of(LARGE, None, where.dtype)

    def seconds(**work: float) -> float:
        return step_time(LARGE, weights, where, batch, Work(16_384, 4096, **work), H100).compute

    assert seconds(trained=0.5) < seconds()
    assert seconds(waiting=1.1) == pytest.approx(1.1 * seconds())


def test_time_grows_with_rows_and_length() -> None:
    by_rows = [step(LARGE, layout("single"), Batch(rows, 2048)).seconds for rows in (1, 2, 4)]
    by_length = [step(LARGE, layout("single"), Batch(1, length)).seconds for length in (1024, 4096, 16_384)]
    assert by_rows == sorted(by_rows)
    assert by_length == sorted(by_length)
    assert by_length[2] > 4 * by_length[1], "attention grows with the square"


def test_faster_gpus_are_faster() -> None:
    times = [
        step(LARGE, layout("single"), Batch(1, 4096), gpu=GPUS[name]).seconds
        for name in ("l4", "a100-80", "h100", "b200")
    ]
    assert times == sorted(times, reverse=True)


def test_a_slow_network_is_seen() -> None:
    fast = step(LARGE, layout("zero3", 8, nodes=2), Batch(1, 1024), gpu=H100)
    slow = step(LARGE, layout("zero3", 8, nodes=2), Batch(1, 1024), gpu=GPUS["a10g"])
    assert fast.communication / fast.seconds < 0.2 < slow.communication / slow.seconds


def test_offload_costs_time() -> None:
    batch = Batch(4, 4096)
    assert (
        step(LARGE, layout("zero3", 8, offload="cpu"), batch).seconds > step(LARGE, layout("zero3", 8), batch).seconds
    )


def test_an_adapter_takes_less_arithmetic_than_all_weights() -> None:
    where, batch = layout("single", gradient_checkpointing=True), Batch(2, 4096)
    assert step(LARGE, where, batch, lora=LoraConfig()).seconds < step(LARGE, where, batch).seconds


def test_the_time_of_a_step_is_the_sum_of_its_parts() -> None:
    found = step(LARGE, layout("zero1", 8), Batch(1, 4096, 4))
    parts = (found.compute, found.host, found.communication, found.optimizer)
    assert found.seconds == pytest.approx(sum(parts))
    assert all(part >= 0 for part in parts)
    assert found.tokens == 4 * 8 * 4096
    assert found.tokens_per_s_per_gpu == pytest.approx(found.tokens / 8 / found.seconds)
    assert 0 < found.mfu < 0.8


def test_every_call_waits_for_the_hops_of_its_ring() -> None:
    """NCCL's own numbers (src/graph/tuning.cc): 3.4 us over NVLink, 14 us over the network, 8.4 us a call."""
    eight, many = layout("fsdp2", 8), layout("fsdp2", 8, nodes=128)
    assert gather(0, eight, H100).seconds == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    assert gather(0, many, H100).seconds == pytest.approx(8.4e-6 + 896 * 3.4e-6 + 127 * 14e-6)
    assert gather(0, many, H100, calls=37).seconds == pytest.approx(37 * gather(0, many, H100).seconds)
    assert gather(0, layout("single", 1), H100).inside == 0


def test_an_all_reduce_over_many_nodes_has_a_tree() -> None:
    many = layout("ddp", 8, nodes=128)
    assert all_reduce(0, many, H100).seconds == pytest.approx(8.4e-6 + 2 * (7 * 4e-6 + 7 * 14e-6))
    assert all_reduce(0, layout("ddp", 2), H100).seconds == pytest.approx(8.4e-6 + 2 * 3.4e-6)


def test_gathering_inside_a_node_is_what_scales_to_many() -> None:
    batch = Batch(rows=2, tokens_per_row=2048, accumulation=1)
    whole, hybrid = (step(LARGE, layout("fsdp2", 8, nodes=128, hybrid_shard=it), batch) for it in (False, True))
    assert hybrid.communication < whole.communication / 2
