"""What `auto` means on a given machine, and the arithmetic that is told for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.config.schema_parallel import ParallelConfig
from sft_dist.errors import ConfigError
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.parallel.resolve import Resolved, one_process, resolve, with_rows

LAPTOP = Machine(cpu="x", cores=4, cpu_bf16=False, memory_gib=16.0, gpus=())
SERVER = dataclasses.replace(LAPTOP, cores=64, cpu_bf16=True)
H100 = Gpu("NVIDIA H100", 80.0, 9.0)
ONE_GPU = dataclasses.replace(SERVER, gpus=(H100,))
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
    found = resolved(ONE_GPU)
    assert (found.plan, found.dtype, found.attn_implementation) == ("single", "bfloat16", "sft_dist_varlen")
    assert found.padding_free
    assert found.gradient_checkpointing is False, "SmolLM2-135M fits into 80 GB without"
    assert "parallel.plan = single: the fastest that fits" in " ".join(found.decisions)
    assert found.layout.gradient_checkpointing is found.gradient_checkpointing


def test_a_model_that_needs_room_gets_checkpointing_and_shards() -> None:
    found = resolved(
        dataclasses.replace(SERVER, gpus=(H100,) * 8),
        model={"name": "Qwen/Qwen3-8B"},
        data={"max_length": 8192},
        train={"global_batch_size": 64},
    )
    assert found.layout.plan.shards >= {"optimizer"}, "16 bytes for each of 8 billion parameters do not fit into 80 GB"
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps * 8 == 64


def test_a_model_that_cannot_be_counted_is_sharded_to_be_safe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    sections = {"model": {"name": str(tmp_path)}, "train": {"global_batch_size": 8}}
    found = resolved(GPU_NODE, **sections)
    assert (found.plan, found.gradient_checkpointing) == ("fsdp2", True)
    assert "parallel.plan = fsdp2: the planner cannot count this model" in found.decisions
    assert resolved(ONE_GPU, **sections).plan == "single"


def test_what_auto_comes_to_is_held_against_the_rules() -> None:
    sections = {"model": {"attn_implementation": "eager"}, "parallel": {"hybrid_shard": True}}
    with pytest.raises(ConfigError, match="no plan can run"):
        resolved(ONE_GPU, **sections)


def test_a_gpu_too_old_for_the_varlen_kernel_pads() -> None:
    found = resolved(OLD_GPU)
    assert (found.plan, found.dtype, found.attn_implementation) == ("single", "float32", "sdpa")
    assert not found.padding_free
    assert resolved(ONE_GPU, model={"dtype": "float32"}).attn_implementation == "sdpa"


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
        train={
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 2,
            "global_batch_size": 8,
            "compile_layers": False,
        },
        parallel={"plan": "single"},
    )
    assert (found.dtype, found.attn_implementation, found.gradient_checkpointing) == ("float32", "eager", False)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (2, 4)
    assert [line.partition(":")[0] for line in found.decisions] == ["memory"]


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
    assert resolved(ONE_GPU, **sections).per_device_train_batch_size == 32, "32,768 tokens keep it busy"
    assert resolved(SERVER, **sections).per_device_train_batch_size == 4


@pytest.mark.parametrize("total", range(1, 33))
def test_the_global_batch_is_always_met(total: int) -> None:
    for machine, processes in ((LAPTOP, 1), (ONE_GPU, 1), (GPU_NODE, 2)):
        found = resolved(machine, train={"global_batch_size": total * processes})
        assert found.per_device_train_batch_size * found.gradient_accumulation_steps == total


@pytest.mark.parametrize(
    ("machine", "sections", "compiled", "why"),
    [
        (ONE_GPU, {}, True, "half a minute, once"),
        (ONE_GPU, {"train": {"max_steps": 10}}, False, "10 steps are over before it pays"),
        (ONE_GPU, {"model": {"attn_implementation": "sdpa"}}, False, "only with sft_dist_varlen"),
        (LAPTOP, {}, False, None),
    ],
)
def test_layers_are_compiled_where_it_pays(
    machine: Machine, sections: dict[str, Any], compiled: bool, why: str | None
) -> None:
    found = resolved(machine, **sections)
    assert found.compile_layers is compiled
    told = [line for line in found.decisions if line.startswith("train.compile_layers")]
    assert told == ([f"train.compile_layers = {str(compiled).lower()}: {why}"] if why else [])


def test_padding_free_is_the_varlen_kernel_only() -> None:
    assert not resolved(LAPTOP, model={"attn_implementation": "sdpa"}).padding_free
    assert resolved(GPU_NODE, model={"attn_implementation": "sft_dist_varlen"}).padding_free


def test_once_the_rows_are_known_the_micro_batch_follows_from_the_longest() -> None:
    def ledger(longest: int) -> dict[str, int]:
        return {"longest_row": longest, "tokens": longest * 10, "rows": 10}

    config = Config()
    first = resolve(config, LAPTOP)
    assert (first.per_device_train_batch_size, first.gradient_accumulation_steps) == (4, 2), "4096 / max_length 1024"
    refined = with_rows(first, LAPTOP, ledger(200))
    assert (refined.per_device_train_batch_size, refined.gradient_accumulation_steps) == (8, 1)
    assert "longest row 200 = 20 row(s)" in refined.decisions[-2]
    assert with_rows(first, LAPTOP, ledger(1000)) is first
    fixed = Config.model_validate({"train": {"per_device_train_batch_size": 2}})
    assert with_rows(resolve(fixed, LAPTOP), LAPTOP, ledger(10)).per_device_train_batch_size == 2


# --- a run that goes on ----------------------------------------------------------------------------------------------


def saved(run: Resolved, **other: Any) -> dict[str, Any]:
    return {**run.facts(), **other}


def goes_on(machine: Machine, facts: dict[str, Any], **sections: Any) -> Resolved:
    return resolve(Config.model_validate(sections), machine, None, facts)


def test_auto_stays_what_the_checkpoint_was_trained_with() -> None:
    """The planner, or this hardware, would choose otherwise today."""
    before = resolved(GPU_NODE)
    assert (before.plan, before.per_device_train_batch_size, before.gradient_checkpointing) == ("ddp", 4, False)
    other = {"plan": "zero2", "per_device_train_batch_size": 2, "gradient_checkpointing": True, "dtype": "float32"}
    found = goes_on(GPU_NODE, saved(before, **other))
    assert {name: found.facts()[name] for name in other} == other
    assert sum("the checkpoint to go on from" in line for line in found.decisions) == 4
    assert len({line.partition(" = ")[0] for line in found.decisions}) == len(found.decisions)
    ledger = {"longest_row": 20, "tokens": 200, "rows": 10}
    assert with_rows(found, GPU_NODE, ledger).per_device_train_batch_size == 2, "the rows change nothing either"


def test_what_the_config_says_stands_over_the_checkpoint() -> None:
    facts = saved(resolved(GPU_NODE), per_device_train_batch_size=2)
    found = goes_on(GPU_NODE, facts, train={"per_device_train_batch_size": 1}, parallel={"plan": "fsdp2"})
    assert (found.plan, found.per_device_train_batch_size) == ("fsdp2", 1), "train() refuses the plan, and says why"


def test_another_number_of_processes_shares_the_rows_anew() -> None:
    facts = saved(resolved(GPU_NODE), per_device_train_batch_size=2)
    four = dataclasses.replace(SERVER, gpus=(H100,) * 4)
    found = goes_on(four, facts, train={"global_batch_size": 64})
    assert (found.plan, found.per_device_train_batch_size) == ("ddp", 16)
    assert (goes_on(ONE_GPU, facts).plan, goes_on(LAPTOP, facts).plan) == ("single", "cpu"), "these hold whole models"


def test_an_edited_global_batch_is_shared_anew() -> None:
    facts = saved(resolved(GPU_NODE), per_device_train_batch_size=4)
    assert goes_on(GPU_NODE, facts, train={"global_batch_size": 6}).per_device_train_batch_size == 3


def test_a_micro_batch_that_does_not_fit_here_is_decided_anew() -> None:
    facts = saved(resolved(ONE_GPU), per_device_train_batch_size=8, dtype="float32")
    big = {"data": {"max_length": 16384}, "train": {"global_batch_size": 8}}
    small = dataclasses.replace(SERVER, gpus=(Gpu("NVIDIA A10", 24.0, 8.6),))
    assert goes_on(ONE_GPU, facts).per_device_train_batch_size == 8
    assert goes_on(small, facts, **big).per_device_train_batch_size < 8


def test_shards_of_gpus_do_not_go_on_on_a_cpu_in_silence() -> None:
    facts = saved(resolved(GPU_NODE), plan="zero2")
    with pytest.raises(ConfigError, match="no CUDA GPU is visible"):
        goes_on(LAPTOP, facts)
    tried = goes_on(LAPTOP, {**facts, "use_cpu": True}, parallel={"num_processes": 2})
    assert (tried.plan, tried.use_cpu) == ("zero2", True)


# --- several processes -----------------------------------------------------------------------------------------------


def test_every_gpu_gets_a_process() -> None:
    found = resolved(GPU_NODE, train={"global_batch_size": 8})
    assert (found.plan, found.layout.world_size, found.use_cpu) == ("ddp", 2, False)
    assert found.num_threads == 32


def test_fewer_processes_than_gpus_are_possible_and_more_are_not() -> None:
    assert resolved(GPU_NODE, parallel={"plan": "zero3", "num_processes": 1}).layout.world_size == 1
    with pytest.raises(ConfigError, match=r"parallel\.num_processes is 3, but 2 GPU\(s\) are visible") as refused:
        resolved(GPU_NODE, parallel={"plan": "zero3", "num_processes": 3})
    assert "set it to 2 or less" in (refused.value.hint or "")


def test_only_the_zero_plans_offload_where_there_is_no_gpu() -> None:
    """FSDP2 asks torch for an accelerator then, and says no more than that there is none."""
    parallel = {"num_processes": 2, "offload": "cpu"}
    train = {"global_batch_size": 8}
    assert resolved(LAPTOP, parallel={"plan": "zero3", **parallel}, train=train).layout.offload == "cpu"
    assert resolved(GPU_NODE, parallel={"plan": "fsdp2", **parallel}, train=train).layout.offload == "cpu"
    with pytest.raises(ConfigError, match="which plan fsdp2 can only do beside a GPU") as refused:
        resolved(LAPTOP, parallel={"plan": "fsdp2", **parallel}, train=train)
    assert "parallel.offload=none" in (refused.value.hint or "")


@pytest.mark.parametrize("plan", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_sharded_plan_is_tried_on_a_cpu_only_when_the_processes_are_counted(plan: str) -> None:
    """Without a number it is a mistake: somebody forgot that this machine has no GPU."""
    found = resolved(LAPTOP, parallel={"plan": plan, "num_processes": 2}, train={"global_batch_size": 8})
    assert (found.plan, found.use_cpu, found.layout.world_size, found.num_threads) == (plan, True, 2, 2)
    assert (found.attn_implementation, found.gradient_checkpointing) == ("sft_dist_varlen", False)
    with pytest.raises(ConfigError, match="no CUDA GPU is visible") as refused:
        resolved(LAPTOP, parallel={"plan": plan})
    assert "parallel.num_processes=2" in (refused.value.hint or "")


def test_several_processes_without_a_gpu_are_ddp() -> None:
    assert resolved(LAPTOP, parallel={"num_processes": 2}, train={"global_batch_size": 8}).plan == "ddp"


def test_a_plan_of_one_process_refuses_a_number() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.plan 'single' is one process"):
        resolve(Config().model_copy(update={"parallel": ParallelConfig.model_construct(
            **{**ParallelConfig().__dict__, "plan": "single", "num_processes": 2})}), GPU_NODE)  # fmt: skip


@pytest.mark.parametrize(
    ("total", "processes", "choices"), [(9, 2, "8 or 10"), (3, 4, "4"), (1, 2, "2"), (30, 4, "28 or 32")]
)
def test_a_batch_that_processes_cannot_share_names_those_they_can(total: int, processes: int, choices: str) -> None:
    with pytest.raises(
        ConfigError, match=f"train.global_batch_size is {total}, which {processes} processes"
    ) as refused:
        resolved(LAPTOP, parallel={"num_processes": processes}, train={"global_batch_size": total})
    for number in choices.split(" or "):
        assert number in (refused.value.hint or "").replace(",", "").split()
        resolved(LAPTOP, parallel={"num_processes": processes}, train={"global_batch_size": int(number)})


def test_a_micro_batch_must_divide_the_share_of_a_process() -> None:
    found = {"train": {"global_batch_size": 8, "per_device_train_batch_size": 2}, "parallel": {"num_processes": 2}}
    assert resolved(LAPTOP, **found).gradient_accumulation_steps == 2
    found["train"]["per_device_train_batch_size"] = 8
    with pytest.raises(ConfigError, match="8 x 2 devices = 16") as refused:
        resolved(LAPTOP, **found)
    assert "each device has 4 rows a step" in (refused.value.hint or "")


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_global_batch_holds_when_the_world_changes(processes: int) -> None:
    for total in (8, 16, 24, 64):
        found = resolved(
            LAPTOP, parallel={"plan": "ddp", "num_processes": processes}, train={"global_batch_size": total}
        )
        assert found.per_device_train_batch_size * found.gradient_accumulation_steps * processes == total


def test_processes_that_share_a_row_count_once() -> None:
    node = dataclasses.replace(SERVER, gpus=(H100,) * 8)
    found = resolved(
        node, parallel={"plan": "zero3", "sequence_parallel_size": 4}, train={"global_batch_size": 6},
        model={"name": "Qwen/Qwen3-0.6B", "attn_implementation": "sdpa"},
    )  # fmt: skip
    assert (found.layout.world_size, found.layout.data_parallel_size) == (8, 2)
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == 3


def test_the_shards_of_fsdp2_are_loaded_as_float32_masters() -> None:
    plans = {plan: resolved(GPU_NODE, parallel={"plan": plan}) for plan in ("ddp", "zero3", "fsdp2")}
    assert {plan: found.loading_dtype for plan, found in plans.items()} == {
        "ddp": "bfloat16", "zero3": "bfloat16", "fsdp2": "float32"
    }  # fmt: skip
    assert {found.dtype for found in plans.values()} == {"bfloat16"}


@pytest.mark.parametrize("plan", ["auto", "ddp", "zero3", "fsdp2"])
def test_a_process_that_only_answers_is_alone_on_the_first_gpu(plan: str) -> None:
    config = Config.model_validate(
        {"parallel": {"plan": plan, "num_processes": 2, "offload": "cpu" if plan in ("zero3", "fsdp2") else "none"}}
    )
    alone = one_process(config)
    assert (resolve(alone, GPU_NODE).plan, resolve(alone, GPU_NODE).layout.world_size) == ("single", 1)
    assert resolve(alone, GPU_NODE).layout.offload == "none"
    assert resolve(alone, LAPTOP).plan == "cpu"
    assert alone.train == config.train


def test_a_process_that_only_answers_stays_on_the_cpu_if_told_so() -> None:
    assert resolve(one_process(Config.model_validate({"parallel": {"plan": "cpu"}})), GPU_NODE).plan == "cpu"


def test_the_facts_are_json_and_say_where_the_run_is() -> None:
    facts = resolved(GPU_NODE, train={"global_batch_size": 8}).facts()
    assert json.loads(json.dumps(facts)) == facts
    assert {"plan": "ddp", "world_size": 2, "nodes": 1, "use_cpu": False}.items() <= facts.items()
    assert "decisions" not in facts


def test_threads_of_an_optimizer_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {"parallel": {"plan": "zero2", "offload": "cpu"}}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = resolved(GPU_NODE, **sections)
    assert found.num_threads == 32
    (line,) = [line for line in found.decisions if line.startswith("OMP_NUM_THREADS")]
    assert line.startswith("OMP_NUM_THREADS = 32: 64 cores / 2 processes: ")
    monkeypatch.setenv("OMP_NUM_THREADS", "32")
    assert line in resolved(GPU_NODE, **sections).decisions, "in the worker it reads the same"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    said = " ".join(resolved(GPU_NODE, **sections).decisions)
    assert "OMP_NUM_THREADS = 7: as the environment says; 64 cores / 2 processes would be 32" in said
    assert not any("OMP_NUM_THREADS" in line for line in resolved(GPU_NODE).decisions)
