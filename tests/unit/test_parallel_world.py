"""What a launcher's environment says about this process, and what accelerate launch asked for."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.parallel.resolve import resolve
from sft_dist.parallel.world import ACCELERATE_SWITCHES, World, forget_accelerate, this_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true"}
LAPTOP = Machine(cpu="x", cores=8, cpu_bf16=False, memory_gib=16.0, gpus=())
GPU_NODE = dataclasses.replace(LAPTOP, cores=64, gpus=(Gpu("NVIDIA H100", 80.0, 9.0),) * 4)


def world(monkeypatch: pytest.MonkeyPatch, **variables: str) -> World:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return this_world()


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert this_world() == World(size=1, rank=0, local_rank=0, local_size=1, launched=False, plan=None)


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = world(monkeypatch, **TORCHRUN)
    assert found == World(size=8, rank=5, local_rank=1, local_size=4, launched=True)
    assert found.nodes == 2


def test_one_process_of_a_launcher_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    found = world(monkeypatch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert (found.size, found.launched) == (1, True)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "RANK"])
def test_a_single_variable_that_something_else_left_is_no_launcher(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Kubernetes' operators set WORLD_SIZE and RANK, SLURM scripts LOCAL_RANK."""
    assert not world(monkeypatch, **{name: "2"}).launched


def test_nodes_with_different_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="7 processes, 4 of them on this node"):
        world(monkeypatch, **{**TORCHRUN, "WORLD_SIZE": "7"})


# --- accelerate launch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_is_the_one_in_the_deepspeed_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: int
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": False}}))
    # What accelerate's own switch says beside a file is its default and means nothing.
    variables = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    found = world(monkeypatch, **TORCHRUN, **DEEPSPEED, **variables)
    assert found.plan == f"zero{stage}"
    assert found.deepspeed == {"zero_optimization": {"stage": stage, "overlap_comm": False}}


def test_without_a_file_the_stage_is_accelerates(monkeypatch: pytest.MonkeyPatch) -> None:
    found = world(monkeypatch, **TORCHRUN, **DEEPSPEED, ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    assert (found.plan, found.deepspeed) == ("zero3", None)


@pytest.mark.parametrize("content", ['{"zero_optimization": {"stage": 0}}', "{}", '{"zero_optimization": {}}'])
def test_a_deepspeed_file_that_shards_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError, match="ZeRO stage 0") as refused:
        world(monkeypatch, **TORCHRUN, **DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "ds.json"))
    assert "ddp.yaml" in str(refused.value)


def test_a_deepspeed_file_that_is_not_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        world(monkeypatch, **TORCHRUN, **DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE="nowhere.json")


def test_a_deepspeed_file_that_is_not_json_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("zero_optimization: {stage: 2}\n")
    with pytest.raises(ConfigError, match=r"ds\.json"):
        world(monkeypatch, **TORCHRUN, **DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "ds.json"))


def test_fsdp_2_is_a_plan_and_fsdp_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world(monkeypatch, **TORCHRUN, **FSDP, FSDP_VERSION="2").plan == "fsdp2"
    for version in ("1", None):
        with monkeypatch.context() as patch:
            patch.setenv("FSDP_VERSION", version) if version else patch.delenv("FSDP_VERSION")
            with pytest.raises(ConfigError, match="FSDP 1") as refused:
                this_world()
            assert "fsdp_version: 2" in str(refused.value)


def test_switches_that_are_off_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    off = {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "no"}
    assert world(monkeypatch, **TORCHRUN, **off).plan is None


def test_accelerates_switches_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ACCELERATE_SWITCHES:
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("RANK", "1")
    forget_accelerate()
    assert not set(ACCELERATE_SWITCHES) & set(os.environ)
    assert os.environ["RANK"] == "1"


# --- the world and the config ----------------------------------------------------------------------------------------


def resolved(found: World, machine: Machine = GPU_NODE, **parallel: Any) -> Any:
    return resolve(Config.model_validate({"train": {"global_batch_size": 24}, "parallel": parallel}), machine, found)


def test_auto_is_what_accelerate_launch_was_told() -> None:
    found = resolved(World(8, 0, 0, 4, True, "zero3"))
    assert (found.plan, found.layout.world_size, found.layout.nodes) == ("zero3", 8, 2)
    assert any("accelerate launch was told so" in line for line in found.decisions)


def test_the_plan_of_the_config_and_of_the_launch_must_agree() -> None:
    told = World(4, 0, 0, 4, True, "zero2")
    assert resolved(told, plan="zero2").plan == "zero2"
    with pytest.raises(
        ConfigError, match=r"parallel\.plan is 'fsdp2', but accelerate launch was told zero2"
    ) as refused:
        resolved(told, plan="fsdp2")
    assert "launch/accelerate/fsdp2.yaml" in (refused.value.hint or "")


@pytest.mark.parametrize("plan", ["cpu", "single"])
def test_a_plan_of_one_process_refuses_a_launcher_of_several(plan: str) -> None:
    with pytest.raises(ConfigError, match="the launcher started 2"):
        resolved(World(2, 0, 0, 2, True), plan=plan)


@pytest.mark.parametrize(("machine", "plan"), [(LAPTOP, "cpu"), (GPU_NODE, "single")])
def test_one_launched_process_is_a_plan_of_one(machine: Machine, plan: str) -> None:
    assert resolved(World(1, 0, 0, 1, True), machine).plan == plan


def test_launched_processes_are_as_many_as_the_launcher_says() -> None:
    assert resolved(World(8, 3, 3, 4, True), num_processes=4).layout.processes_per_node == 4
    with pytest.raises(ConfigError, match=r"parallel\.num_processes is 8, but the launcher started 4 on this node"):
        resolved(World(8, 3, 3, 4, True), num_processes=8)


def test_launched_processes_without_a_gpu_run_their_plan_on_the_cpu() -> None:
    found = resolved(World(2, 0, 0, 2, True), LAPTOP, plan="zero3")
    assert (found.plan, found.use_cpu, found.dtype, found.num_threads) == ("zero3", True, "float32", 4)


def test_the_deepspeed_file_of_the_launch_is_kept() -> None:
    file = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}}
    assert resolved(World(4, 0, 0, 4, True, "zero2", file)).given == file
