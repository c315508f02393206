"""Plans are data: each value has its reason, and the texts about them agree."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path

import pytest
import yaml

from sft_dist.config.schema_parallel import PlanName
from sft_dist.parallel.accelerate_file import accelerate_config
from sft_dist.parallel.launch_files import VARIANTS, launch_files, plan_files
from sft_dist.parallel.plans import (
    BYTES,
    PLANS,
    Layout,
    Rendered,
    Setting,
    deepspeed_config,
    fsdp_config,
    parallelism_config,
)
from sft_dist.parallel.plans_page import formula

ROOT = Path(__file__).resolve().parents[2]


def test_the_schema_names_every_plan():
    assert typing.get_args(PlanName) == tuple(PLANS)


def test_a_tree_nests_what_has_dots():
    settings = (Setting("a.b", 1, ""), Setting("c", 2, ""), Setting("a.d.e", 3, ""))
    assert Rendered(settings).tree() == {"a": {"b": 1, "d": {"e": 3}}, "c": 2}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_value_has_a_reason(name):
    layout = VARIANTS[name][0]
    rendered = [accelerate_config(layout), parallelism_config(layout)]
    if layout.plan.engine in ("deepspeed", "fsdp2"):
        rendered.append((deepspeed_config if layout.plan.engine == "deepspeed" else fsdp_config)(layout))
    assert all(setting.reason for config in rendered for setting in config.settings)


@pytest.mark.parametrize(
    ("plan", "eight"),
    [("single", 16.0), ("ddp", 16.0), ("zero1", 5.5), ("zero2", 3.75), ("zero3", 2.0), ("fsdp2", 2.0)],
)
def test_the_formula_counts_what_stays_on_one_gpu(plan, eight):
    assert eval(formula(PLANS[plan]), {"N": 8}) == eight
    assert eval(formula(PLANS[plan]), {"N": 1}) == sum(BYTES.values())


def test_the_readme_has_the_plans_as_they_are():
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| ([\d/N +]+) \|$", readme, re.MULTILINE)
    assert rows == [(plan.name, plan.when, formula(plan)) for plan in PLANS.values()]


def test_the_files_that_the_texts_name_exist():
    files = launch_files()
    texts = [(ROOT / "README.md").read_text("utf-8"), *files.values()]
    named = {
        name for text in texts for name in re.findall(r"launch/(?:accelerate|deepspeed)/[\w.-]+\.(?:yaml|json)", text)
    }
    assert len(named) > len(VARIANTS)
    assert named <= set(files)


def test_each_launch_file_says_which_fields_the_config_needs():
    heads = {
        name: launch_files()[f"launch/accelerate/{name}.yaml"].partition("compute_environment")[0] for name in VARIANTS
    }
    assert "It decides:  parallel: {plan: zero3, offload: cpu}\n" in heads["zero3-offload"]
    assert "It decides:  parallel: {plan: fsdp2, hybrid_shard: true}\n" in heads["fsdp2-hybrid"]
    assert "It decides:  parallel: {plan: zero3, sequence_parallel_size: 4}\n" in heads["zero3-sequence"]
    assert all(f"--config_file launch/accelerate/{name}.yaml" in head for name, head in heads.items())
    assert all(line.startswith("#") for head in heads.values() for line in head.splitlines())


def test_hybrid_shards_stay_inside_a_node():
    layout = Layout(PLANS["fsdp2"], nodes=4, processes_per_node=8, hybrid_shard=True)
    assert parallelism_config(layout).tree() == {"dp_replicate_size": 4, "dp_shard_size": 8}
    assert (layout.world_size, layout.shard_size) == (32, 8)
    zero3 = Layout(PLANS["zero3"], nodes=4, processes_per_node=8, hybrid_shard=True)
    assert deepspeed_config(zero3).tree()["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert parallelism_config(zero3).tree() == {}


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_keeps_its_plans_settings_as_accelerate_and_deepspeed_read_them(plan: str) -> None:
    files = plan_files(Layout(PLANS[plan], processes_per_node=1 if PLANS[plan].engine == "none" else 4))
    tree = yaml.safe_load(files["accelerate.yaml"])
    assert tree["num_processes"] == (1 if plan in ("cpu", "single") else 4)
    if PLANS[plan].engine == "deepspeed":
        assert tree["deepspeed_config"]["deepspeed_config_file"] == "deepspeed.json"
        assert json.loads(files["deepspeed.json"])["zero_optimization"]["stage"] == int(plan[-1])
    else:
        assert list(files) == ["accelerate.yaml"]
