"""Each mistake is one readable line: path, value, why, what to set; and no line for what follows from another."""

from __future__ import annotations

import math

import pytest

from sft_dist.config.problems import validate
from sft_dist.config.schema import Config


def lines(tree):
    config, problems = validate(tree)
    assert (config is None) == bool(problems)
    return [problem.line for problem in problems]


def test_a_right_tree_is_a_config():
    config, problems = validate({"train": {"learning_rate": 1, "extra": {"loss_type": "dft"}}})
    assert isinstance(config, Config)
    assert (problems, config.train.learning_rate) == ([], 1.0)


@pytest.mark.parametrize(
    ("section", "field", "value", "text"),
    [
        ("train", "learning_rate", "fast", "'fast' is not a number"),
        ("train", "learning_rate", 0, "0 is not more than 0"),
        ("train", "learning_rate", math.inf, "inf is not a finite number"),
        ("train", "max_steps", True, "true is not a whole number"),
        ("train", "max_steps", 2.0, "2.0 is not a whole number"),
        ("train", "max_steps", "2", "'2' is not a whole number"),
        ("train", "max_steps", 0, "0 is not 1 or more"),
        ("train", "adam_beta1", 1.5, "1.5 is not 1 or less"),
        ("run", "seed", 2**32, "4294967296 is not less than 4.29497e+09"),
        ("train", "global_batch_size", None, "null is not a whole number"),
        ("train", "per_device_train_batch_size", "x", "'x' is not a whole number, or auto"),
        ("train", "per_device_train_batch_size", 0, "0 is not 1 or more, or auto"),
        ("train", "gradient_checkpointing", 3, "3 is not true or false, or auto"),
        ("train", "per_device_train_batch_size", [2], "[2] is not a whole number, or auto"),
        ("data", "assistant_only_loss", "no", "'no' is not true or false"),
        ("data", "system", 5, "5 is not text; put quotes around it"),
        ("data", "eval", 3, "3 is not a section (key: value)"),
        ("train", "extra", [1], "[1] is not a mapping (key: value)"),
        ("train", "lr_scheduler_type", "cosin", "did you mean cosine?"),
        ("parallel", "plan", "zero4", "fsdp2, auto; did you mean zero3?"),
        ("evaluate", "questions", "Who?", "'Who?' is not a list; write [\"Who?\"]"),
        ("model", "name", "x" * 99, ""),
    ],
)
def test_one_line_says_what_was_set_and_what_it_should_be(section, field, value, text):
    found = lines({section: {field: value}})
    if not text:
        assert found == []
        return
    (line,) = found
    assert line.startswith(f"{section}.{field}   ")
    assert line.endswith(text)


def test_an_item_of_a_list_is_named_by_its_place():
    assert lines({"evaluate": {"labels": ["a", 1]}, "tracking": {"report_to": ["wandb", "foo"]}}) == [
        "evaluate.labels[1]   1 is not text; put quotes around it",
        "tracking.report_to[1]   'foo' is not one of wandb, tensorboard, trackio",
    ]


@pytest.mark.parametrize(
    ("source", "where", "text"),
    [
        ({"path": "a", "fields": {"mesages": "x"}}, "data.train.fields", "mesages: no format has such a column; did you mean messages?"),
        ({"path": "a", "format": "text", "fields": {"prompt": "x"}}, "data.train.fields", "prompt: the format text does not have such a column"),
        ({"sources": [{"path": "a", "fields": {"frage": "prompt"}}]}, "data.train.sources[0].fields", "frage: no format has such a column; {THEIR_NAME: YOUR_NAME}; theirs: messages, "),
    ],
)  # fmt: skip
def test_a_column_that_the_format_lacks_is_named(source, where, text):
    (line,) = lines({"data": {"train": source}})
    assert line.startswith(f"{where}   {text}")


def test_columns_that_the_format_has_may_have_other_names():
    fields = {"question": "frage", "answer": "antwort", "expected": "loesung", "category": "art"}
    assert lines({"data": {"train": {"path": "a", "format": "question_answer", "fields": fields}}}) == []
    assert lines({"data": {"train": {"path": "a", "format": "nonsense", "fields": {"text": "x"}}}}) == [
        "data.train.format   'nonsense' is not one of auto, messages, sharegpt, prompt_completion, instruction, question_answer, text"
    ]


def test_a_long_value_is_cut():
    (line,) = lines({"train": {"max_steps": "x" * 500}})
    assert len(line) < 120


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"learning_rate": 1}, "learning_rate   unknown key; did you mean train.learning_rate?"),
        ({"lr": 1}, "lr   unknown key; did you mean train.learning_rate?"),
        ({"train": {"lr": 1}}, "train.lr   unknown key; did you mean train.learning_rate?"),
        ({"train": {"epochs": 1}}, "train.epochs   unknown key; did you mean train.num_train_epochs?"),
        (
            {"batch_size": 1},
            "batch_size   unknown key; did you mean train.global_batch_size or train.per_device_train_batch_size?",
        ),
        ({"model_name_or_path": "x"}, "model_name_or_path   unknown key; did you mean model.name?"),
        ({"dataset": "x"}, "dataset   unknown key; did you mean data.train?"),
        ({"train": {"seed": 1}}, "train.seed   unknown key; did you mean run.seed?"),
        ({"train": {"learning-rate": 1}}, "train.learning-rate   unknown key; did you mean learning_rate?"),
        ({"train": {"loss_type": "x"}}, "train.loss_type   unknown key; did you mean train.extra.loss_type?"),
        ({"train": {"bf16": True}}, "train.bf16   unknown key; did you mean model.dtype?"),
        ({"evaluate": {"top_p": 1}}, "evaluate.top_p   unknown key; did you mean evaluate.generation.top_p?"),
        (
            {"train.max_steps": 1},
            "train.max_steps   unknown key; nest it: `train:`, and indented below it `max_steps:`",
        ),
        (
            {"train": {"gradient_accumulation_steps": 8}},
            (
                "train.gradient_accumulation_steps   unknown key; follows from train.global_batch_size / "
                "(train.per_device_train_batch_size x devices)"
            ),
        ),
        ({"run": {"nmae": "x"}}, "run.nmae   unknown key; did you mean name? (valid: name, dir, seed)"),
        ({"run": {"qqq": "x"}}, "run.qqq   unknown key; valid: name, dir, seed"),
        (
            {"qqq": 1},
            "qqq   unknown key; valid: run, model, data, train, parallel, checkpoint, evaluate, slurm, container, tracking, extends",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_what_was_meant(tree, line):
    assert lines(tree) == [line]


def test_a_wrong_type_does_not_hide_other_mistakes_in_its_section():
    found = lines({"evaluate": {"labels": ["a", "a"], "generation": {"top_k": 5, "batch_size": "x"}}})
    assert [line.split()[0] for line in found] == [
        "evaluate.generation.batch_size",
        "evaluate.generation.top_k",
        "evaluate.labels",
    ]


@pytest.mark.parametrize(
    "tree",
    [
        {"data": {"train": {"path": 3}}},
        {"data": {"evl": "x"}, "train": {"eval_strategy": "epoch"}},
        {"data": {"eval": 3}, "train": {"eval_strategy": "epoch"}},
        {"eval_dataset": "x", "train": {"eval_strategy": "epoch"}},
        {"train": {"eval_strategy": "stesp", "eval_steps": 3}},
        {"train": {"global_batch_size": 10, "per_device_train_batch_size": "4"}},
        {"checkpoint": {"save_steps": "x", "save_strategy": "steps"}},
    ],
)
def test_what_follows_from_a_mistake_is_not_a_second_one(tree):
    assert len(lines(tree)) == 1


def test_half_a_surrogate_pair_is_refused():
    assert lines({"data": {"system": "\ud800"}}) == ["data.system   '\\ud800' is not Unicode text"]
