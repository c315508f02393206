"""What must hold between fields."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sft_dist
from sft_dist.config.rules import rule_problems
from sft_dist.config.schema import Config
from sft_dist.config.sft_fields import known_sft_fields, refused_extra


def problems(**sections):
    return [problem.line for problem in rule_problems(Config.model_validate(sections))]


def test_the_defaults_hold_together():
    assert problems() == []


@pytest.mark.parametrize(
    ("total", "micro", "advice"),
    [
        (10, 4, "10 is not divisible by per_device_train_batch_size 4 x 1 device = 4; use 8 or 12, or "),
        (3, 8, "3 is not divisible by per_device_train_batch_size 8 x 1 device = 8; use 8, or "),
    ],
)
def test_an_indivisible_batch_comes_with_values_that_work(total, micro, advice):
    (line,) = problems(train={"global_batch_size": total, "per_device_train_batch_size": micro})
    assert line.startswith(f"train.global_batch_size   {advice}")
    offered = line.rpartition("per_device_train_batch_size ")[2].removesuffix(" or auto").split(", ")
    assert all(total % int(size) == 0 for size in offered)


@pytest.mark.parametrize(
    ("total", "micro", "parallel", "advice"),
    [
        (
            12,
            2,
            {"num_processes": 4},
            "12 is not divisible by per_device_train_batch_size 2 x 4 devices = 8; use 8 or 16, or ",
        ),
        (
            10,
            2,
            {"num_processes": 4},
            "10 is not divisible by per_device_train_batch_size 2 x 4 devices = 8; use 8 or 16",
        ),
        (10, "auto", {"num_processes": 4}, "10 is not divisible by 4 devices; use 8 or 12"),
        (3, "auto", {"num_processes": 4}, "3 is not divisible by 4 devices; use 4"),
        (
            6,
            1,
            {"num_processes": 8, "sequence_parallel_size": 2, "plan": "zero3"},
            "6 is not divisible by per_device_train_batch_size 1 x 4 devices = 4; use 4 or 8",
        ),
    ],
)
def test_an_indivisible_batch_counts_the_processes_that_see_different_rows(total, micro, parallel, advice):
    train = {"global_batch_size": total, "per_device_train_batch_size": micro}
    (line,) = problems(train=train, parallel=parallel)
    assert line.startswith(f"train.global_batch_size   {advice}")
    offered = line.partition(", or per_device_train_batch_size ")[2].removesuffix(" or auto")
    assert all(total % (int(size) * 4) == 0 for size in offered.split(", ") if size)
    assert line.endswith((advice, "or auto"))


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"num_processes": 8},
        {"num_processes": 2},
        {"num_processes": 8, "sequence_parallel_size": 4, "plan": "zero2"},
    ],
)
def test_a_batch_that_the_processes_can_share_is_fine(parallel):
    train = {"global_batch_size": 16, "per_device_train_batch_size": 2}
    assert problems(train=train, parallel=parallel) == []


@pytest.mark.parametrize("micro", [1, 2, 5, 10, "auto"])
def test_a_divisible_batch_is_fine(micro):
    assert problems(train={"global_batch_size": 10, "per_device_train_batch_size": micro}) == []


@pytest.mark.parametrize(
    ("sections", "path", "words"),
    [
        ({"train": {"eval_strategy": "epoch"}}, "train.eval_strategy", "set data.eval, or data.eval_size above 0"),
        ({"train": {"eval_strategy": "steps"}, "data": {"eval_size": 5}}, "train.eval_steps", "is not set"),
        ({"train": {"eval_steps": 5}}, "train.eval_steps", "5 would be ignored, since eval_strategy is 'no'"),
        ({"checkpoint": {"save_strategy": "steps"}}, "checkpoint.save_steps", "is not set"),
        ({"checkpoint": {"save_steps": 5}}, "checkpoint.save_steps", "ignored, since save_strategy is 'epoch'"),
        (
            {"checkpoint": {"milestone_steps": 5}},
            "checkpoint.milestone_steps",
            "ignored, since save_strategy is 'epoch'",
        ),
        (
            {"checkpoint": {"save_strategy": "steps", "save_steps": 4, "milestone_steps": 10}},
            "checkpoint.milestone_steps",
            "10 is not a multiple of save_steps 4",
        ),
        ({"data": {"eval": {"task": "mix"}, "eval_size": 0.1}}, "data.eval_size", "0.1 would be ignored"),
        ({"data": {"packing_overflow": "split"}}, "data.packing_overflow", "'split' would be ignored"),
        (
            {"data": {"packing": True}, "parallel": {"plan": "zero2", "sequence_parallel_size": 2, "num_processes": 2}},
            "data.packing",
            "rows that several GPUs share",
        ),
        ({"data": {"loss_on": "last", "assistant_only_loss": False}}, "data.loss_on", "'last' would be ignored"),
        ({"data": {"eval_size": 2.5}}, "data.eval_size", "neither a share (below 1) nor a whole number"),
        ({"train": {"warmup_steps": 1.5}}, "train.warmup_steps", "neither a share"),
        ({"evaluate": {"generation": {"temperature": 0.7}}}, "evaluate.generation.temperature", "do_sample is false"),
        ({"evaluate": {"generation": {"top_p": 0.9}}}, "evaluate.generation.top_p", "0.9 would be ignored"),
        ({"evaluate": {"generation": {"top_k": 50}}}, "evaluate.generation.top_k", "50 would be ignored"),
        ({"evaluate": {"labels": ("a", "b", "a")}}, "evaluate.labels", "'a' is listed 2 times"),
        ({"evaluate": {"labels": ("a", " ")}}, "evaluate.labels", "holds an empty label"),
        ({"run": {"name": "../x"}}, "run.name", "'../x' cannot be a folder name; use letters"),
        ({"model": {"name": "embedded:smollm"}}, "model.name", "embedded:smollm2-135m, embedded:tiny"),
        ({"model": {"chat_template": "no.jinja"}}, "model.chat_template", "there is no file 'no.jinja'"),
        ({"model": {"chat_template": "chatlm"}}, "model.chat_template", "did you mean chatml?"),
        ({"train": {"extra": {"lerning_rate": 1}}}, "train.extra.lerning_rate", "did you mean train.learning_rate?"),
        ({"train": {"extra": {"los_type": 1}}}, "train.extra.los_type", "SFTConfig; did you mean loss_type?"),
        ({"train": {"extra": {"qqqq": 1}}}, "train.extra.qqqq", "is not a field of TRL's SFTConfig"),
    ],
)
def test_a_contradiction_is_one_line(sections, path, words):
    (line,) = problems(**sections)
    assert line.startswith(f"{path}   ")
    assert words in line


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"eval_strategy": "epoch"}, "data": {"eval_size": 0.1}},
        {"train": {"eval_strategy": "steps", "eval_steps": 5}, "data": {"eval": {"task": "mix"}}},
        {"checkpoint": {"save_strategy": "steps", "save_steps": 5}},
        {"checkpoint": {"save_strategy": "steps", "save_steps": 5, "milestone_steps": 20}},
        {"data": {"eval_size": 1.0}, "train": {"warmup_steps": 10.0}},
        {"evaluate": {"generation": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50}}},
        {"evaluate": {"data": {"task": "mix"}}},
        {"model": {"name": "org/embedded"}},
        {"train": {"extra": {"loss_type": "dft", "use_liger_kernel": True, "neftune_noise_alpha": 5}}},
    ],
)
def test_what_holds_together_is_left_alone(sections):
    assert problems(**sections) == []


def test_a_template_file_that_exists_is_fine():
    Path("mine.jinja").write_text("{{ messages }}")
    assert problems(model={"chat_template": "mine.jinja"}) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("learning_rate", "set train.learning_rate"),
        ("per_device_train_batch_size", "set train.per_device_train_batch_size"),
        ("per_device_eval_batch_size", "set train.per_device_eval_batch_size"),
        ("gradient_accumulation_steps", "follows from train.global_batch_size"),
        ("activation_checkpointing", "set train.gradient_checkpointing"),
        ("max_length", "set data.max_length"),
        ("output_dir", "set run.dir and run.name"),
        ("report_to", "set tracking.report_to"),
        ("bf16", "set model.dtype"),
        ("fp16", "set model.dtype"),
        ("seed", "set run.seed"),
        ("packing", "set data.packing"),
        ("dataset_kwargs", "set by sft-dist"),
        ("model_init_kwargs", "set model (dtype"),
        ("chat_template_path", "set model.chat_template"),
        ("save_total_limit", "set checkpoint.keep"),
        ("enable_jit_checkpoint", "set by sft-dist"),
        ("hub_token", "set by sft-dist"),
        ("optim", "set by sft-dist"),
        ("deepspeed", "set parallel.plan (zero1, zero2 or zero3)"),
        ("fsdp", "set parallel.plan (fsdp2)"),
        ("fsdp_config", "set parallel (plan, offload, hybrid_shard)"),
        ("parallelism_config", "sequence_parallel_size"),
        ("ddp_find_unused_parameters", "every parameter is used in every step"),
    ],
)
def test_extra_refuses_what_has_its_own_place(name, words):
    assert name in known_sft_fields()
    (line,) = problems(train={"extra": {name: 1}})
    assert line.startswith(f"train.extra.{name}   ")
    assert words in line


def test_extra_refuses_every_field_that_train_already_has():
    ours = set(Config().train.model_dump()) & known_sft_fields()
    assert {"max_steps", "weight_decay", "eval_steps"} <= ours
    assert all(refused_extra(name) for name in ours)


def test_extra_refuses_every_argument_that_the_trainer_sets():
    source = (Path(sft_dist.__file__).parent / "train" / "arguments.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    keys = [key.value for node in dicts for key in node.keys if isinstance(key, ast.Constant)]
    # arguments["bf16"] = ...
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)]
    keys += [node.slice.value for node in assigned if isinstance(node.slice, ast.Constant)]
    set_there = {key for key in keys if isinstance(key, str)} & known_sft_fields()
    assert {"learning_rate", "deepspeed", "ddp_find_unused_parameters"} <= set_there
    # Set only where rows are shared between GPUs; rules_parallel.py refuses it there.
    set_there -= {"pad_to_multiple_of"}
    assert [name for name in sorted(set_there) if refused_extra(name) is None] == []
