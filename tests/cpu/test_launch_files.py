"""launch/ against accelerate's and DeepSpeed's own parsers: each key is one that they read, each value arrives.

Both take some misspelt keys without a word (accelerate nested ones, DeepSpeed top-level ones), so every check here is
also shown to fail on one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from transformers import TrainingArguments

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.accelerate_file import accelerate_config, as_yaml
from sft_dist.parallel.launch_files import VARIANTS, launch_files
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.parallel.plans import PLANS, Layout, command, deepspeed_config, fsdp_config, parallelism_config
from sft_dist.parallel.resolve import resolve
from sft_dist.parallel.world import this_world, with_told
from sft_dist.train.deepspeed_keys import check_deepspeed

FILES = launch_files()
YAMLS = {name: yaml.safe_load(FILES[f"launch/accelerate/{name}.yaml"]) for name in VARIANTS}
JSONS = {Path(path).stem: json.loads(text) for path, text in FILES.items() if path.endswith(".json")}
FSDP = [name for name, (layout, _) in VARIANTS.items() if layout.plan.engine == "fsdp2"]
MULTI = [name for name, tree in YAMLS.items() if "parallelism_config" in tree]
NESTED = ("deepspeed_config", "fsdp_config", "parallelism_config")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MASTER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # accelerate writes it; this puts it back afterwards


def launched(tree: dict[str, Any], folder: Path, *words: str) -> tuple[Any, dict[str, str]]:
    """accelerate's arguments, and what it adds to its processes' environment, for a config file with this content."""
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(tree))
    line = ["--config_file", str(file), "--main_process_port", "0", *words, "-m", "sft_dist.train", "CONFIG"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        args.deepspeed_command, env = prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.multi_gpu:
        env = prepare_multi_gpu_env(args)
    else:
        _, env = prepare_simple_launcher_cmd_env(args)
    return args, {name: value for name, value in env.items() if os.environ.get(name) != value}


def unread_keys(tree: dict[str, Any], folder: Path) -> list[str]:
    """Keys of an accelerate config that accelerate does not know, or that change nothing for its processes."""
    unread = sorted(set(tree) - {field.name for field in dataclasses.fields(ClusterConfig)})
    options = {action.dest for action in launch_command_parser()._actions}
    for section in NESTED:
        for key, value in tree.get(section, {}).items():
            changed = copy.deepcopy(tree)
            changed[section][key] = 7919 if isinstance(value, int) and not isinstance(value, bool) else "probe"
            _, env = launched(changed, folder)
            arrives = any(str(changed[section][key]) in text for text in env.values())
            # It changes the command line instead, and on several nodes only: see the test below.
            if key not in options or not (arrives or key == "deepspeed_multinode_launcher"):
                unread.append(f"{section}.{key}")
    return unread


@pytest.mark.parametrize("name", VARIANTS)
def test_accelerate_reads_every_key(name, tmp_path):
    assert unread_keys(YAMLS[name], tmp_path) == []


@pytest.mark.parametrize(
    ("name", "section", "key", "wrong"),
    [
        ("fsdp2", "fsdp_config", "fsdp_reshard_after_forward", "fsdp_reshard_after_foward"),
        ("zero3", "deepspeed_config", "zero3_init_flag", "zero3_init_flags"),
        ("fsdp2-hybrid", "parallelism_config", "parallelism_config_dp_shard_size", "dp_shard_size"),
    ],
)
def test_a_misspelt_nested_key_is_found(name, section, key, wrong, tmp_path):
    tree = copy.deepcopy(YAMLS[name])
    tree[section][wrong] = tree[section].pop(key)
    launched(tree, tmp_path)  # accelerate says nothing
    assert unread_keys(tree, tmp_path) == [f"{section}.{wrong}"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_file_starts_the_engine_of_its_plan_with_the_processes_of_its_layout(name, tmp_path):
    layout, _ = VARIANTS[name]
    args, env = launched(YAMLS[name], tmp_path, *(["--main_process_ip", "first"] if layout.nodes > 1 else []))
    engine = layout.plan.engine
    assert (args.use_deepspeed, args.use_fsdp, args.multi_gpu) == tuple(
        engine == e for e in ("deepspeed", "fsdp2", "ddp")
    )
    assert (args.num_processes, args.num_machines) == (layout.world_size, layout.nodes)
    if engine != "none":
        assert args.nproc_per_node == str(layout.processes_per_node)
    # DeepSpeed has its own place for it, and accelerate refuses to have it in both.
    precision = {"fsdp2": "bf16", "deepspeed": "no"}.get(engine, "no")
    assert env["ACCELERATE_MIXED_PRECISION"] == precision
    assert "mixed_precision" in YAMLS[name] or engine == "deepspeed"
    assert (env.get("ACCELERATE_USE_CPU") == "True") == layout.use_cpu


@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_file_tells_the_worker_is_its_layout(name, tmp_path, monkeypatch):
    """A config that leaves everything on `auto` becomes the layout that the file is for, by accelerate's own variables."""
    layout, _ = VARIANTS[name]
    if layout.plan.engine == "deepspeed":
        (tmp_path / "launch/deepspeed").mkdir(parents=True)
        path = YAMLS[name]["deepspeed_config"]["deepspeed_config_file"]
        (tmp_path / path).write_text(FILES[path])
    env = launched(YAMLS[name], tmp_path, *(["--main_process_ip", "first"] if layout.nodes > 1 else []))[1]
    each = layout.processes_per_node
    meeting = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": layout.world_size, "LOCAL_WORLD_SIZE": each}
    for key, value in {**env, **(meeting if layout.plan.engine != "none" else {})}.items():
        monkeypatch.setenv(key, str(value))
    node = Machine("x", 64, False, 512.0, () if layout.use_cpu else (Gpu("NVIDIA H100", 80.0, 9.0),) * each)
    world = with_told(this_world())
    assert world.told.unused == ()
    # Its numbers are packaged, and its heads can be shared by four.
    config = Config.model_validate({"model": {"name": "Qwen/Qwen3-0.6B"}, "train": {"global_batch_size": 64}})
    resolved = resolve(config, node, world)
    assert (
        dataclasses.replace(
            resolved.layout,
            gradient_checkpointing=layout.gradient_checkpointing,
            compile_layers=layout.compile_layers,
        )
        == layout
    )
    if layout.plan.engine == "fsdp2":
        assert resolved.gradient_checkpointing


def test_deepspeed_on_several_nodes_needs_no_ssh(tmp_path):
    args, env = launched(YAMLS["zero3"], tmp_path, "--num_machines", "2", "--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "first")  # fmt: skip
    assert args.deepspeed_command is None  # accelerate then runs torch's launcher itself
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert args.rdzv_endpoint.startswith("first:")
    assert env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "launch/deepspeed/zero3.json"


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_gets_the_same_from_the_file_as_from_transformers(name, tmp_path, monkeypatch):
    layout, _ = VARIANTS[name]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", fsdp=True, fsdp_config=fsdp_config(layout).tree())  # fmt: skip
    ours = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING")
    for key, value in launched(YAMLS[name], tmp_path)[1].items():
        monkeypatch.setenv(key, value)
    theirs = FullyShardedDataParallelPlugin()
    for field in dataclasses.fields(ours):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        same = type(one) is type(other) if field.name.endswith(("offload", "_config")) else one == other
        # accelerate has defaults for policies that FSDP2 does not use.
        assert same or field.name == "min_num_params", field.name
    assert ours.fsdp_version == 2
    assert ours.reshard_after_forward is True
    assert ours.cpu_ram_efficient_loading is True
    assert ours.activation_checkpointing is True
    assert type(ours.cpu_offload).__name__ == ("CPUOffloadPolicy" if layout.offload == "cpu" else "OffloadPolicy")


@pytest.mark.parametrize("name", FSDP)
def test_transformers_reads_every_fsdp_key(name, tmp_path):
    """It ignores keys that it does not know, so each must change what the plugin gets."""
    tree = fsdp_config(VARIANTS[name][0]).tree()

    def plugin_arguments(tree):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", fsdp=True, fsdp_config=dict(tree))
        return arguments.fsdp_plugin_args

    other = {"version": 1, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "FULL_STATE_DICT"}
    for key, value in tree.items():
        changed = {**tree, key: other.get(key, not value)}
        assert plugin_arguments(changed) != plugin_arguments(tree), key
    assert plugin_arguments({**tree, "reshard_after_foward": False}) == plugin_arguments(tree)


@pytest.mark.parametrize("name", MULTI)
def test_the_sizes_of_a_mesh_arrive_and_multiply_to_all_processes(name, tmp_path, monkeypatch):
    layout, _ = VARIANTS[name]
    for key, value in launched(YAMLS[name], tmp_path, "--main_process_ip", "first")[1].items():
        monkeypatch.setenv(key, value)
    theirs, ours = ParallelismConfig(), ParallelismConfig(**parallelism_config(layout).tree())
    assert theirs._sizes == ours._sizes
    assert theirs.total_size == layout.world_size
    assert theirs.data_parallel_size == layout.data_parallel_size


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


class Read(dict):
    """A dict that notes which of its keys are asked for."""

    asked: set[str]

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def parsed_by_deepspeed(tree: dict[str, Any], tmp_path: Path, *, bf16: bool = True) -> tuple[Any, set[str]]:
    """DeepSpeed's config once transformers has filled in `auto`, and the top-level keys that nothing asked for."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", bf16=bf16, max_grad_norm=0.5, gradient_accumulation_steps=3)  # fmt: skip
    filled = HfTrainerDeepSpeedConfig(copy.deepcopy(tree))
    filled.trainer_config_process(arguments)
    assert filled.mismatches == []
    seen = Read(filled.config)
    seen.asked = set()
    return DeepSpeedConfig(seen), set(filled.config) - seen.asked


@pytest.mark.parametrize("name", JSONS)
def test_deepspeed_reads_every_key_and_takes_every_value(name, tmp_path):
    layout, tree = VARIANTS[name][0], JSONS[name]
    config, unread = parsed_by_deepspeed(tree, tmp_path)
    assert unread == set()
    assert (config.gradient_clipping, config.gradient_accumulation_steps) == (0.5, 3)
    assert (config.bfloat16_config.enabled, config.bfloat16_config.check_grad_overflow) == (True, False)
    zero = config.zero_config
    assert zero.stage == int(layout.plan.name[-1])
    assert (zero.overlap_comm, zero.contiguous_gradients, zero.reduce_bucket_size) == (True, True, 50_000_000)
    assert zero.gather_16bit_weights_on_model_save == (zero.stage == 3)
    assert zero.zero_hpz_partition_size == (8 if layout.hybrid_shard else 1)
    offloaded = layout.offload == "cpu"
    assert (zero.offload_optimizer is not None) == offloaded
    assert (zero.offload_param is not None) == (offloaded and zero.stage == 3)
    assert config.zero_force_ds_cpu_optimizer is not offloaded


def test_a_misspelt_deepspeed_key_is_found(tmp_path):
    from pydantic import ValidationError

    tree = copy.deepcopy(JSONS["zero3-offload"])
    _, unread = parsed_by_deepspeed({**tree, "zero_force_ds_cpu_optimiser": False}, tmp_path)
    assert unread == {"zero_force_ds_cpu_optimiser"}
    for section, wrong in (("zero_optimization", "overlap_com"), ("bf16", "enable")):
        with pytest.raises(ValidationError):
            parsed_by_deepspeed({**tree, section: {**tree[section], wrong: True}}, tmp_path)
    with pytest.raises(ValidationError):
        zero = {**tree["zero_optimization"], "offload_param": {"device": "cpu", "pin": True}}
        parsed_by_deepspeed({**tree, "zero_optimization": zero}, tmp_path)


def test_no_value_repeats_deepspeeds_default():
    """Each setting is there because a plan needs it or because it differs; what equals the default only ages."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for tree in JSONS.values():
        zero = tree["zero_optimization"]
        plain = DeepSpeedZeroConfig(stage=zero["stage"]).model_dump(by_alias=True)
        assert [key for key, value in zero.items() if key != "stage" and plain[key] == value] == []


def test_nvme_offload_names_its_folder_in_both_parts(tmp_path):
    layout = Layout(PLANS["zero3"], processes_per_node=8, offload="nvme", nvme_path="/local/disk")
    zero = parsed_by_deepspeed(deepspeed_config(layout).tree(), tmp_path)[0].zero_config
    assert zero.offload_optimizer.device == zero.offload_param.device == "nvme"
    assert str(zero.offload_optimizer.nvme_path) == str(zero.offload_param.nvme_path) == "/local/disk"


@pytest.mark.parametrize("plan", ["zero1", "zero2", "zero3"])
def test_float32_is_for_trying_out_on_a_cpu(plan, tmp_path):
    tree = deepspeed_config(Layout(PLANS[plan], processes_per_node=2, use_cpu=True, dtype="float32")).tree()
    config, unread = parsed_by_deepspeed(tree, tmp_path, bf16=False)
    assert (config.bfloat16_config.enabled, unread) == (False, set())


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "plan"), [(1, "ddp"), (2, "zero3")])
def test_torchrun_takes_the_command_line(nodes, plan):
    from torch.distributed.run import get_args_parser

    python, dash_m, launcher, *rest = command(Layout(PLANS[plan], nodes=nodes, processes_per_node=4), "my.yaml")
    assert [python, dash_m, launcher] == ["python", "-m", "torch.distributed.run"]
    args = get_args_parser().parse_args(rest)
    assert (args.module, args.training_script, args.training_script_args) == (True, "sft_dist.train", ["my.yaml"])
    assert (args.nnodes, args.nproc_per_node, args.standalone) == (str(nodes), "4", nodes == 1)
    if nodes > 1:
        assert (args.rdzv_backend, args.rdzv_id, args.rdzv_endpoint) == ("c10d", "RUN", "HOST:29500")


def test_one_process_needs_no_launcher():
    assert command(Layout(PLANS["cpu"], use_cpu=True), "my.yaml") == ["python", "-m", "sft_dist.train", "my.yaml"]


def test_yaml_values_that_are_words_to_yaml_stay_text():
    layout = Layout(PLANS["zero3"], processes_per_node=2)
    for path in ("no", "on", "1e5", "a: b", "# x", "plan/deepspeed.json"):
        text = as_yaml(accelerate_config(layout, path), "head")
        assert yaml.safe_load(text) == SimpleNamespace(**accelerate_config(layout, path).tree()).__dict__


# --- a DeepSpeed file of the user's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JSONS)
def test_our_own_files_are_ones_that_deepspeed_knows(name):
    pytest.importorskip("deepspeed")
    check_deepspeed(JSONS[name])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping: no such setting; did you mean gradient_clipping?"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com: no such setting; did you mean"),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise: no such setting; did you mean device?",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "many"}},
            "zero_optimization.reduce_bucket_size: Input should be",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable: no such setting; did you mean enabled?"),
        ({"bf16": True}, "bf16: True is no object"),
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_named_with_the_nearest(given, told):
    """DeepSpeed passes over the first in silence and gives a traceback for the others."""
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError) as refused:
        check_deepspeed({"train_batch_size": "auto", **given})
    (problem,) = refused.value.problems
    assert problem.startswith(told)
