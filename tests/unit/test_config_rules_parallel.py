"""What the libraries cannot combine is refused with the way out; what they can is left alone."""

from __future__ import annotations

import pytest

from sft_dist.config.problems import validate
from sft_dist.config.rules_parallel import parallel_problems
from sft_dist.config.schema import Config
from sft_dist.config.schema_parallel import LoraConfig, ParallelConfig


def problems(**sections):
    return [problem.line for problem in parallel_problems(Config.model_validate(sections))]


def lora(**fields):
    return {"lora": fields}


REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
SELECTIVE = {"activation_checkpointing_kwargs": {"selective": True}}


@pytest.mark.parametrize(
    ("sections", "path", "words"),
    [
        ({"parallel": {"plan": "cpu", "num_processes": 2}}, "parallel.num_processes", "set parallel.plan=ddp"),
        ({"parallel": {"plan": "single", "num_processes": 8}}, "parallel.num_processes", "one process with one GPU"),
        (
            {"parallel": {"plan": "zero1"}, "train": {"nonfinite": "skip"}},
            "train.nonfinite",
            "not possible with plan zero1",
        ),
        ({"parallel": {"plan": "ddp", "offload": "cpu"}}, "parallel.offload", "zero1, zero2, zero3 or fsdp2"),
        ({"parallel": {"plan": "single", "offload": "cpu"}}, "parallel.offload", "not possible with plan single"),
        (
            {"parallel": {"plan": "zero2", "offload": "nvme", "nvme_path": "/disk"}},
            "parallel.offload",
            "not possible with plan zero2; set parallel.plan=zero3",
        ),
        (
            {"parallel": {"plan": "fsdp2", "offload": "nvme", "nvme_path": "/disk"}},
            "parallel.offload",
            "set parallel.plan=zero3",
        ),
        ({"parallel": {"plan": "zero3", "offload": "nvme"}}, "parallel.nvme_path", "is not set"),
        (
            {"parallel": {"plan": "zero3", "offload": "cpu", "nvme_path": "/d"}},
            "parallel.nvme_path",
            "would be ignored",
        ),
        (
            {"parallel": {"plan": "zero2", "hybrid_shard": True}},
            "parallel.hybrid_shard",
            "set parallel.plan=zero3 or fsdp2",
        ),
        (
            {"parallel": {"plan": "fsdp2", "sequence_parallel_size": 2}},
            "parallel.sequence_parallel_size",
            "set parallel.plan=zero3",
        ),
        (
            {"parallel": {"plan": "zero3", "sequence_parallel_size": 4, "num_processes": 6}},
            "parallel.sequence_parallel_size",
            "4 does not divide parallel.num_processes 6; use one of 1, 2, 3, 6",
        ),
        (
            {"parallel": {"plan": "zero3", "sequence_parallel_size": 2}, "model": {"attn_implementation": "eager"}},
            "model.attn_implementation",
            "use sdpa",
        ),
        (
            {"parallel": {"sequence_parallel_size": 2}, "train": {"extra": {"loss_type": "dft"}}},
            "train.extra.loss_type",
            "'dft' is not possible",
        ),
        (
            {"parallel": {"sequence_parallel_size": 2}, "train": {"extra": {"label_smoothing_factor": 0.1}}},
            "train.extra.label_smoothing_factor",
            "0.1 is not possible",
        ),
        (
            {"parallel": {"sequence_parallel_size": 4}, "train": {"extra": {"pad_to_multiple_of": 8}}},
            "train.extra.pad_to_multiple_of",
            "would be ignored",
        ),
        ({"parallel": {"sequence_parallel_size": 4}, "data": {"max_length": 1022}}, "data.max_length", "use 1024"),
        ({"model": lora(target_modules=("q_proj", "lm_head"))}, "model.lora.target_modules", "modules_to_save"),
        (
            {"model": lora(lora_dropout=0.1), "parallel": {"plan": "fsdp2"}},
            "model.lora.lora_dropout",
            "set it to 0, train.gradient_checkpointing=false or parallel.plan=zero3",
        ),
        ({"model": lora(quantization="nf4"), "parallel": {"plan": "zero3"}}, "model.lora.quantization", "ddp or zero2"),
        ({"model": lora(quantization="nf4"), "parallel": {"plan": "fsdp2"}}, "model.lora.quantization", "ddp or zero2"),
        (
            {"parallel": {"plan": "fsdp2"}, "train": {"extra": REENTRANT}},
            "train.extra.gradient_checkpointing_kwargs",
            "would be ignored with plan fsdp2",
        ),
        (
            {"parallel": {"plan": "zero3"}, "model": lora(), "train": {"extra": REENTRANT}},
            "train.extra.gradient_checkpointing_kwargs",
            "use_reentrant: false is not possible",
        ),
        (
            {"parallel": {"plan": "zero3"}, "model": lora(), "train": {"extra": SELECTIVE}},
            "train.extra.activation_checkpointing_kwargs",
            "selective: true is not possible",
        ),
        (
            {"parallel": {"plan": "zero1"}, "train": {"extra": {"ddp_bucket_cap_mb": 50}}},
            "train.extra.ddp_bucket_cap_mb",
            "would be ignored with plan zero1",
        ),
    ],
)
def test_a_contradiction_is_one_line_with_the_way_out(sections, path, words):
    (line,) = problems(**sections)
    assert line.startswith(f"{path}   ")
    assert words in line


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"parallel": {"plan": "cpu", "num_processes": 1}},
        {"parallel": {"offload": "cpu"}},
        {"parallel": {"plan": "zero1", "offload": "cpu"}},
        {"parallel": {"plan": "fsdp2", "offload": "cpu", "hybrid_shard": True}},
        {"parallel": {"plan": "zero3", "offload": "nvme", "nvme_path": "/disk", "hybrid_shard": True}},
        {"parallel": {"plan": "zero2", "sequence_parallel_size": 2, "num_processes": 8}},
        {"parallel": {"sequence_parallel_size": 2}, "model": {"attn_implementation": "flash_attention_2"}},
        {"parallel": {"sequence_parallel_size": 2}, "model": {"attn_implementation": "kernels-community/flash-attn2"}},
        {"parallel": {"sequence_parallel_size": 2}, "train": {"extra": {"loss_type": "nll"}}},
        {"model": lora(quantization="nf4"), "parallel": {"plan": "zero2"}},
        {"model": lora(lora_dropout=0.1), "parallel": {"plan": "zero3"}},
        {"model": lora(lora_dropout=0.1), "parallel": {"plan": "fsdp2"}, "train": {"gradient_checkpointing": False}},
        {"model": lora(), "parallel": {"plan": "zero2"}, "train": {"extra": REENTRANT}},
        {"parallel": {"plan": "zero3"}, "train": {"extra": SELECTIVE}},
        {"parallel": {"plan": "ddp"}, "train": {"extra": {"ddp_bucket_cap_mb": 50}}},
        {"parallel": {"plan": "fsdp2"}, "train": {"extra": {"loss_type": "dft"}}},
    ],
)
def test_what_the_libraries_combine_is_left_alone(sections):
    assert problems(**sections) == []


def test_a_problem_rests_on_fields_that_exist():
    fields = {f"parallel.{name}" for name in ParallelConfig.model_fields}
    fields |= {
        "train.gradient_checkpointing",
        "model.lora",
        *(f"model.lora.{name}" for name in LoraConfig.model_fields),
    }
    everything = {
        "parallel": {
            "plan": "ddp",
            "offload": "nvme",
            "hybrid_shard": True,
            "sequence_parallel_size": 2,
            "num_processes": 3,
        },
        "model": {"attn_implementation": "eager", **lora(lora_dropout=0.1, quantization="nf4")},
        "train": {"extra": {"loss_type": "dft", "pad_to_multiple_of": 3, **REENTRANT}},
    }
    for plan in ("cpu", "ddp", "zero3", "fsdp2"):
        config = Config.model_validate({**everything, "parallel": {**everything["parallel"], "plan": plan}})
        found = list(parallel_problems(config))
        assert len(found) > 3
        assert {field for problem in found for field in problem.rests_on} <= fields


def test_a_rule_about_a_mistyped_field_is_not_listed_beside_it():
    _, found = validate({"parallel": {"plan": "zero4", "offload": "cpu", "nvme_path": "/disk"}})
    assert [problem.path for problem in found] == ["parallel.plan", "parallel.nvme_path"]


@pytest.mark.parametrize(
    ("tree", "meant"),
    [
        ({"parallel": {"zero_stage": 2}}, "parallel.plan"),
        ({"deepspeed": "ds.json"}, "parallel.plan"),
        ({"train": {"fsdp": True}}, "parallel.plan"),
        ({"parallel": {"cpu_offload": True}}, "parallel.offload"),
        ({"train": {"offload_optimizer": True}}, "parallel.offload"),
        ({"num_gpus": 8}, "parallel.num_processes"),
        ({"use_peft": True}, "model.lora"),
        ({"model": {"lora_r": 8}}, "model.lora.r"),
        ({"model": {"lora": {"rank": 8}}}, "model.lora.r"),
        ({"train": {"lora_rank": 8}}, "model.lora.r"),
        ({"model": {"load_in_4bit": True}}, "model.lora.quantization"),
        ({"parallel": {"sp_size": 2}}, "parallel.sequence_parallel_size"),
        ({"parallel": {"hsdp": True}}, "parallel.hybrid_shard"),
    ],
)
def test_the_names_of_other_trainers_are_known(tree, meant):
    _, (problem,) = validate(tree)
    assert f"did you mean {meant}?" in problem.text
