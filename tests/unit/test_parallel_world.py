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
from sft_dist.parallel.deepspeed_file import deepspeed_settings
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.resolve import resolve
from sft_dist.parallel.told import Told
from sft_dist.parallel.world import World, forget_accelerate, this_world, with_told

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
LAPTOP = Machine(cpu="x", cores=8, cpu_bf16=False, memory_gib=16.0, gpus=())
GPU_NODE = dataclasses.replace(LAPTOP, cores=64, gpus=(Gpu("NVIDIA H100", 80.0, 9.0),) * 4)


def world(monkeypatch: pytest.MonkeyPatch, **variables: str) -> World:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return this_world()


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert this_world() == World(size=1, rank=0, local_rank=0, local_size=1, launched=False, told=None)


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

# What the launchers of accelerate 1.15 set for several GPUs, for DeepSpeed, and for one process (accelerate/utils/launch.py).
SEVERAL = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"}
ONE = {**SEVERAL, "ACCELERATE_USE_CPU": "False"}
DEEPSPEED = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage",
    "ACCELERATE_USE_DEEPSPEED": "true",
}
FSDP = {**SEVERAL, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def told(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Told:
    """What a worker among eight processes on two nodes is told."""
    for name, value in {**TORCHRUN, **variables}.items():
        monkeypatch.setenv(name, value)
    found = with_told(this_world()).told
    assert found is not None
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_is_the_one_in_the_deepspeed_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: int
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": False}}))
    # What accelerate's own switch says beside a file is its default and means nothing.
    variables = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    found = told(monkeypatch, **DEEPSPEED, **variables)
    assert found.fields == {"parallel.plan": f"zero{stage}"}
    assert found.deepspeed == {"zero_optimization": {"stage": stage, "overlap_comm": False}}


def test_all_that_a_deepspeed_file_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 4, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}
    tree = {"zero_optimization": zero, "bf16": {"enabled": True}, "gradient_clipping": 0.5}
    batch = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "train_batch_size": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps({**tree, **batch}))
    found = told(monkeypatch, **DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "ds.json"))
    assert found.fields == {
        "parallel.plan": "zero3",
        "parallel.offload": "nvme",
        "parallel.nvme_path": "/nvme",
        "parallel.hybrid_shard": True,
        "model.dtype": "bfloat16",
        "train.max_grad_norm": 0.5,
        "train.per_device_train_batch_size": 2,
    }
    assert found.accumulation == 3


def test_all_that_accelerate_says_of_deepspeed_without_a_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_GRADIENT_CLIPPING": "2.0",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3",
    }
    found = told(monkeypatch, **{**DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "bf16"}, **own)
    assert found.fields == {
        "parallel.plan": "zero3",
        "parallel.offload": "cpu",
        "model.dtype": "bfloat16",
        "train.max_grad_norm": 2.0,
    }
    assert found.accumulation == 3
    layout = resolved(World(8, 0, 0, 4, True, found)).layout
    zero = deepspeed_settings(layout, found.deepspeed)["zero_optimization"]
    assert (zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == ("cpu", "none")


@pytest.mark.parametrize("content", ['{"zero_optimization": {"stage": 0}}', "{}", '{"zero_optimization": {}}'])
def test_a_deepspeed_file_that_shards_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError, match="ZeRO stage 0") as refused:
        told(monkeypatch, **DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "ds.json"))
    assert "ddp.yaml" in str(refused.value)


@pytest.mark.parametrize("content", [None, "zero_optimization: {stage: 2}\n", "[]", '{"zero_optimization": true}'])
def test_a_deepspeed_file_that_cannot_be_read_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError, match=r"ds\.json"):
        told(monkeypatch, **DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "ds.json"))


def test_all_that_accelerate_says_of_fsdp_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    found = told(monkeypatch, **{**FSDP, **own})
    assert found.fields == {
        "parallel.plan": "fsdp2",
        "parallel.offload": "cpu",
        "model.dtype": "bfloat16",
        "train.gradient_checkpointing": True,
        "train.compile_layers": True,
    }
    assert len(found.unused) == 1
    assert "fsdp_reshard_after_forward: false is not used" in found.unused[0]


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ({"DP_REPLICATE": "2", "DP_SHARD": "4"}, {"parallel.hybrid_shard": True}),
        ({"DP_SHARD": "2", "SP": "4", "CP": "1"}, {"parallel.sequence_parallel_size": 4}),
    ],
)
def test_copies_and_shared_rows_are_told(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, str], fields: dict[str, Any]
) -> None:
    mesh = {f"PARALLELISM_CONFIG_{name}_SIZE": size for name, size in sizes.items()}
    found = told(monkeypatch, **FSDP, ACCELERATE_USE_PARALLELISM_CONFIG="true", **mesh)
    assert found.fields == {"parallel.plan": "fsdp2", **fields}


MESH = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(
    ("variables", "what", "instead"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "FSDP 1", "fsdp_version: 2"),
        ({**SEVERAL, "ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron", "launch/accelerate/"),
        ({**SEVERAL, "ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16", "bf16"),
        ({**MESH, "PARALLELISM_CONFIG_TP_SIZE": "8"}, "tensor parallelism", "zero3"),
        ({**MESH, "PARALLELISM_CONFIG_CP_SIZE": "8"}, "context parallelism", "sp_size"),
        ({**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, "1 x 4 x 1 processes", "--num_processes"),
        (
            {**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4"},
            "4 copies of 2 shards",
            "one copy a node",
        ),
    ],
)
def test_what_changes_the_computation_and_has_no_field_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], what: str, instead: str
) -> None:
    with pytest.raises(ConfigError, match=what) as refused:
        told(monkeypatch, **variables)
    assert instead in str(refused.value.hint)


def test_a_plain_launch_is_the_plan_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    off = {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "false"}
    found = told(monkeypatch, **SEVERAL, **off)
    assert found.fields == {"parallel.plan": "ddp"}
    eight = {"model": {"name": "Qwen/Qwen3-8B"}, "train": {"global_batch_size": 24}}
    assert resolve(Config.model_validate(eight), GPU_NODE, World(8, 0, 0, 4, True, found)).plan == "ddp"
    assert resolve(Config.model_validate(eight), GPU_NODE, World(8, 0, 0, 4, True)).plan != "ddp"


@pytest.mark.parametrize(("use_cpu", "plan"), [("True", "cpu"), ("False", "single")])
def test_a_launch_of_one_process_is_a_plan_of_one(monkeypatch: pytest.MonkeyPatch, use_cpu: str, plan: str) -> None:
    """accelerate starts it without the variables that processes meet by."""
    for name, value in {**ONE, "ACCELERATE_USE_CPU": use_cpu}.items():
        monkeypatch.setenv(name, value)
    found = with_told(this_world())
    assert (found.launched, found.size) == (False, 1)
    assert resolved(found).plan == plan


# --- variables that nobody launched with -----------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [TORCHRUN, {}], ids=["torchrun", "no launcher"])
def test_variables_of_a_users_shell_say_nothing(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    stray = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "fp8", "FSDP_VERSION": "1"}
    for name, value in {**variables, **stray}.items():
        monkeypatch.setenv(name, value)
    assert with_told(this_world()).told is None


def test_commands_are_told_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """They start processes of their own, which accelerate did not tell either."""
    for name, value in {**ONE, "ACCELERATE_USE_CPU": "True"}.items():
        monkeypatch.setenv(name, value)
    assert this_world().told is None


def test_accelerates_variables_are_taken_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"RANK": "1", "ACCELERATE_LOG_LEVEL": "info"}
    mesh = {"PARALLELISM_CONFIG_SP_SIZE": "4", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in {**kept, **DEEPSPEED, **mesh}.items():
        monkeypatch.setenv(name, value)
    unused = Told(unused=("accelerate launch's x is not used",))
    for rank in (0, 1):
        forget_accelerate(World(2, rank, rank, 2, True, unused))
    assert not {*DEEPSPEED, *mesh} & set(os.environ)
    assert {name: os.environ[name] for name in kept} == kept
    assert [record.getMessage() for record in caplog.records] == ["accelerate launch's x is not used"]


def test_variables_of_a_users_shell_are_named_in_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("FSDP_VERSION", "1")
    forget_accelerate(World())
    monkeypatch.setenv("FSDP_VERSION", "1")
    forget_accelerate(World(2, 1, 1, 2, True))
    assert "FSDP_VERSION" not in os.environ, "the main process has said so"
    (record,) = caplog.records
    assert record.getMessage().startswith("ACCELERATE_MIXED_PRECISION, FSDP_VERSION: set without accelerate launch")


# --- the world and the config ----------------------------------------------------------------------------------------


def resolved(found: World, machine: Machine = GPU_NODE, **parallel: Any) -> Any:
    return resolve(Config.model_validate({"train": {"global_batch_size": 24}, "parallel": parallel}), machine, found)


def said(**fields: Any) -> Told:
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return Told(names, {name: f"its {name}" for name in names})


def test_auto_is_what_accelerate_launch_was_told() -> None:
    found = resolved(World(8, 0, 0, 4, True, said(parallel__plan="zero3", parallel__offload="cpu")))
    assert (found.plan, found.layout.world_size, found.layout.nodes) == ("zero3", 8, 2)
    assert found.layout.offload == "cpu"
    assert found.adopted == {"parallel.plan": "zero3", "parallel.offload": "cpu"}
    assert any(line.startswith("parallel.plan = zero3: accelerate launch was told so") for line in found.decisions)


def test_what_the_config_says_as_well_is_not_adopted() -> None:
    found = resolved(World(8, 0, 0, 4, True, said(parallel__plan="zero3")), plan="zero3")
    assert (found.plan, found.adopted) == ("zero3", {})


def test_the_plan_of_the_config_and_of_the_launch_must_agree() -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.plan is 'fsdp2', but accelerate launch was told zero2"
    ) as refused:
        resolved(World(4, 0, 0, 4, True, said(parallel__plan="zero2")), plan="fsdp2")
    assert "launch/accelerate/fsdp2.yaml" in (refused.value.hint or "")


def test_every_field_that_disagrees_is_named() -> None:
    words = said(parallel__offload="cpu", parallel__sequence_parallel_size=4, parallel__plan="zero3")
    with pytest.raises(ConfigError) as refused:
        resolved(World(4, 0, 0, 4, True, words), offload="nvme", nvme_path="/x", sequence_parallel_size=2)
    for text in ("offload is 'nvme'", "told cpu", "sequence_parallel_size is 2", "told 4"):
        assert text in str(refused.value)


def test_what_was_told_must_go_with_the_rest() -> None:
    with pytest.raises(ConfigError, match="does not go with the config") as refused:
        resolved(World(4, 0, 0, 4, True, said(parallel__plan="ddp")), offload="cpu")
    assert "parallel.offload" in str(refused.value)


def test_micro_batches_that_were_told_must_come_out_even() -> None:
    """24 rows, 4 devices: 6 each."""
    four = World(4, 0, 0, 4, True, Told(accumulation=3))
    assert (resolved(four).per_device_train_batch_size, resolved(four).gradient_accumulation_steps) == (2, 3)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps: 4, but train\.global_batch_size is 24 / 4"):
        resolved(dataclasses.replace(four, told=Told(accumulation=4)))


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


def test_launched_processes_without_a_gpu_try_a_plan_on_the_cpu_only_when_asked_to() -> None:
    """A node whose driver is broken must not train a GPU plan for days on its CPU."""
    found = resolved(World(2, 0, 0, 2, True), LAPTOP, plan="zero3", num_processes=2)
    assert (found.plan, found.use_cpu, found.dtype, found.num_threads) == ("zero3", True, "float32", 4)
    for world in (World(2, 0, 0, 2, True), World(2, 0, 0, 2, True, said(parallel__plan="zero3"))):
        with pytest.raises(ConfigError, match="no CUDA GPU is visible") as refused:
            resolved(world, LAPTOP, **({} if world.told else {"plan": "zero3"}))
        assert "parallel.num_processes=2 tries the plan on the CPU" in str(refused.value.hint)
    assert resolved(World(2, 0, 0, 2, True), LAPTOP).plan == "ddp", "auto is what the machine has"


def test_the_deepspeed_file_of_the_launch_is_kept() -> None:
    file = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}}
    assert (
        resolved(World(4, 0, 0, 4, True, Told({"parallel.plan": "zero2"}, {"parallel.plan": ""}, file))).given == file
    )


def test_the_deepspeed_file_of_an_earlier_launch_stands_until_there_is_another() -> None:
    file = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}}
    zero2 = Config.model_validate({"parallel": {"plan": "zero2"}})
    assert resolve(zero2, GPU_NODE, None, None, file).given == file
    other = World(4, 0, 0, 4, True, Told(deepspeed={"steps_per_print": 1}))
    assert resolve(zero2, GPU_NODE, other, None, file).given == {"steps_per_print": 1}
    ddp = Config.model_validate({"parallel": {"plan": "ddp"}})
    assert resolve(ddp, GPU_NODE, None, None, file).given == {}


def test_a_deepspeed_file_goes_over_our_settings() -> None:
    """What it leaves out beside the other part of an offload stays on the GPU."""
    layout = Layout(PLANS["zero3"], processes_per_node=2, offload="cpu")
    ours = deepspeed_settings(layout, {})["zero_optimization"]
    assert {"offload_param", "offload_optimizer"} <= ours.keys()
    given = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}}
    found = deepspeed_settings(layout, given)["zero_optimization"]
    assert found["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "offload_optimizer" not in found
    assert found["reduce_bucket_size"] == ours["reduce_bucket_size"]
    assert "offload_optimizer" in deepspeed_settings(layout, {"bf16": {"enabled": True}})["zero_optimization"]
