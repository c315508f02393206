"""What `auto` means on a given machine, and the arithmetic that is told for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.parallel.resolve import Resolved, resolve

LAPTOP = Machine(cpu="x", cores=4, cpu_bf16=False, memory_gib=16.0, gpus=())
SERVER = dataclasses.replace(LAPTOP, cores=64, cpu_bf16=True)
H100 = Gpu("NVIDIA H100", 80.0, 9.0)
GPU_NODE = dataclasses.replace(SERVER, gpus=(H100, H100))
OLD_GPU = dataclasses.replace(LAPTOP, gpus=(Gpu("Tesla T4", 15.0, 7.5),))


def resolved(machine: Machine, **sections: Any) -> Resolved:
    return resolve(Config.model_validate(sections), machine)


def test_a_laptop() -> None:
    found = resolved(LAPTOP)
    assert (found.plan, found.dtype, found.attn_implementation) == ("cpu", "float32", "sft_dist_varlen")
    assert found.padding_free
    assert found.gradient_checkpointing is False
    assert found.num_threads == 4


def test_a_cpu_that_multiplies_bfloat16() -> None:
    found = resolved(SERVER)
    assert (found.plan, found.dtype) == ("cpu", "bfloat16")
    assert any("float32 master weights" in line for line in found.decisions)


def test_a_gpu() -> None:
    found = resolved(GPU_NODE)
    assert (found.plan, found.dtype, found.attn_implementation) == ("single", "bfloat16", "sdpa")
    assert not found.padding_free
    assert found.gradient_checkpointing is True
    assert "parallel.plan = single: 2 GPU(s) visible, 64 CPU core(s)" in found.decisions


@pytest.mark.parametrize(("capability", "dtype"), [(7.5, "float32"), (8.0, "bfloat16"), (12.0, "bfloat16")])
def test_bfloat16_needs_a_gpu_that_computes_in_it(capability: float, dtype: str) -> None:
    machine = dataclasses.replace(LAPTOP, gpus=(Gpu("some GPU", 16.0, capability),))
    assert resolved(machine).dtype == dtype


def test_the_cpu_plan_beside_a_gpu_asks_the_cpu() -> None:
    assert resolved(OLD_GPU, parallel={"plan": "cpu"}).plan == "cpu"
    fast_gpu_slow_cpu = dataclasses.replace(LAPTOP, gpus=(H100,))
    assert resolved(fast_gpu_slow_cpu, parallel={"plan": "cpu"}).dtype == "float32"


def test_a_gpu_plan_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.plan is 'single'") as refused:
        resolved(LAPTOP, parallel={"plan": "single"})
    assert "parallel.plan=cpu" in (refused.value.hint or "")


def test_what_is_set_is_kept_and_not_explained() -> None:
    found = resolved(
        GPU_NODE,
        model={"dtype": "float32", "attn_implementation": "eager"},
        train={"gradient_checkpointing": False, "per_device_train_batch_size": 2, "global_batch_size": 8},
        parallel={"plan": "single"},
    )
    assert (found.dtype, found.attn_implementation, found.gradient_checkpointing) == ("float32", "eager", False)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (2, 4)
    assert found.decisions == ("gradient accumulation = 4: global_batch_size 8 / (2 x 1 device)",)


@pytest.mark.parametrize(
    ("total", "length", "micro"),
    [(8, 512, 8), (8, 1024, 4), (8, 2048, 2), (8, 5000, 1), (6, 1024, 3), (7, 1024, 1), (1, 16, 1), (12, 700, 4)],
)
def test_the_micro_batch_on_a_cpu(total: int, length: int, micro: int) -> None:
    found = resolved(LAPTOP, data={"max_length": length}, train={"global_batch_size": total})
    assert found.per_device_train_batch_size == micro
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == total
    (line,) = [line for line in found.decisions if line.startswith("train.per_device_train_batch_size")]
    assert f"= {micro}: " in line
    assert f"global_batch_size {total}" in line
    assert f"max_length {length} = {max(1, 4096 // length)} row(s)" in line


def test_the_micro_batch_on_a_gpu_is_larger() -> None:
    sections = {"data": {"max_length": 1024}, "train": {"global_batch_size": 64}}
    assert resolved(GPU_NODE, **sections).per_device_train_batch_size == 16
    assert resolved(SERVER, **sections).per_device_train_batch_size == 4


@pytest.mark.parametrize("total", range(1, 33))
def test_the_global_batch_is_always_met(total: int) -> None:
    for machine in (LAPTOP, GPU_NODE):
        found = resolved(machine, train={"global_batch_size": total})
        assert found.per_device_train_batch_size * found.gradient_accumulation_steps == total


def test_padding_free_is_the_varlen_kernel_only() -> None:
    assert not resolved(LAPTOP, model={"attn_implementation": "sdpa"}).padding_free
    assert resolved(GPU_NODE, model={"attn_implementation": "sft_dist_varlen"}).padding_free


def test_once_the_rows_are_known_the_micro_batch_follows_from_the_longest() -> None:
    from sft_dist.parallel.resolve import with_longest_row

    config = Config()
    first = resolve(config, LAPTOP)
    assert (first.per_device_train_batch_size, first.gradient_accumulation_steps) == (4, 2), "4096 / max_length 1024"
    refined = with_longest_row(config, first, 200)
    assert (refined.per_device_train_batch_size, refined.gradient_accumulation_steps) == (8, 1)
    assert "longest row 200 = 20 row(s)" in refined.decisions[-2]
    assert with_longest_row(config, first, 1000) is first
    fixed = Config.model_validate({"train": {"per_device_train_batch_size": 2}})
    assert with_longest_row(fixed, resolve(fixed, LAPTOP), 10).per_device_train_batch_size == 2
