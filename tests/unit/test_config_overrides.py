"""Overrides on the command line, and what a layer does to the data source of an earlier one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.config import layers
from sft_dist.config.loader import load_config
from sft_dist.errors import ConfigError


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder of recipes in the place of the packaged one: base, and little, which extends it."""
    folder = tmp_path / "packaged"
    write(folder / "base.yaml", "# The base of all.\n# More.\ntrain: {learning_rate: 1e-4, max_steps: 5}\n")
    write(folder / "little.yaml", "extends: base\ndata: {train: {task: tickets, rows: 160, seed: 7}}\n")
    monkeypatch.setattr(layers, "recipes_folder", lambda: folder)
    return folder


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(source, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return caught.value.problems


def test_overrides_are_yaml_values_and_win(recipes):
    loaded = load_config(
        "little",
        [
            "train.learning_rate=1e-5",
            "train.max_steps=null",
            "evaluate.labels=[a, b]",
            "run.name='007'",
            "data.system=a=b",
        ],
    )
    config = loaded.config
    assert (config.train.learning_rate, config.train.max_steps) == (1e-5, None)
    assert (config.evaluate.labels, config.run.name, config.data.system) == (("a", "b"), "007", "a=b")
    assert loaded.provenance["train.max_steps"] == loaded.provenance["run.name"] == "cli"


def test_the_last_of_two_overrides_of_one_field_wins(recipes):
    assert load_config("base", ["train.max_steps=1", "train.max_steps=2"]).config.train.max_steps == 2


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("--train.max_steps=5", "--train.max_steps=5   config fields take no dashes; write train.max_steps=5"),
        ("--train.max_steps", "--train.max_steps   config fields take no dashes; write train.max_steps=VALUE"),
        ("train.max_steps", "train.max_steps   is not of the form key=value; write train.max_steps=VALUE"),
        ("train.max_steps=", "train.max_steps   has no value; write train.max_steps=null to unset it, or"),
        ("=5", "=5   '' is not a dotted path"),
        ("train..max_steps=5", "train..max_steps=5   'train..max_steps' is not a dotted path"),
        ("evaluate.labels=[a", "evaluate.labels   '[a' is not YAML: expected ',' or ']'"),
        ("data.system=#1", "data.system   '#1' is a comment in YAML"),
        ("extends=base", "extends=base   extends works only inside a config file"),
        ("max_steps=5", "max_steps   unknown key; did you mean train.max_steps?"),
    ],
)
def test_a_wrong_override_is_answered_with_the_right_spelling(recipes, override, line):
    (problem,) = problems_of("base", override)
    assert problem.startswith(line)


def test_override_problems_are_listed_even_if_the_file_cannot_be_read():
    write(Path("a.yaml"), "a: [\n")
    problems = problems_of("a.yaml", "train.max_steps", "--x=1")
    assert len(problems) == 3
    assert problems[0].startswith("a.yaml:2: ")


def test_text_for_a_source_is_short_for_its_path_and_can_be_overridden_below():
    write(Path("a.yaml"), "data: {train: rows.jsonl, eval: held.jsonl}\nevaluate: {data: test.jsonl}\n")
    config = load_config("a.yaml", ["data.train.sample=10", "data.eval.sample=3"]).config
    assert (config.data.train.path, config.data.train.task, config.data.train.sample) == ("rows.jsonl", None, 10)
    assert config.data.eval is not None and config.evaluate.data is not None
    assert (config.data.eval.path, config.data.eval.sample, config.evaluate.data.path) == (
        "held.jsonl",
        3,
        "test.jsonl",
    )


def test_overriding_below_the_default_source_keeps_it():
    write(Path("a.yaml"), "run: {seed: 1}\n")
    loaded = load_config("a.yaml", ["data.train.rows=10"])
    assert (loaded.config.data.train.task, loaded.config.data.train.rows) == ("tickets", 10)
    assert loaded.provenance["data.train.rows"] == "cli"


def test_text_for_a_source_replaces_the_whole_source(recipes):
    write(Path("a.yaml"), "extends: little\ndata: {train: {sample: 5, format: messages}}\n")
    loaded = load_config("a.yaml", ["data.train=x.jsonl"])
    assert loaded.config.data.train.model_dump(exclude_defaults=True) == {"path": "x.jsonl"}
    assert loaded.provenance["data.train.path"] == "cli"
    assert loaded.provenance["data.train.sample"] == "default"
    write(Path("b.yaml"), "extends: a.yaml\ndata: {train: x.jsonl}\n")
    assert load_config("b.yaml").config == loaded.config.model_copy(
        update={"run": loaded.config.run.model_copy(update={"name": "b"})}
    )


def test_text_for_a_source_and_fields_below_it_add_up_in_any_order(recipes):
    for overrides in (["data.train=x.jsonl", "data.train.sample=2"], ["data.train.sample=2", "data.train=x.jsonl"]):
        train = load_config("little", overrides).config.data.train
        assert train.model_dump(exclude_defaults=True) == {"path": "x.jsonl", "sample": 2}


def test_a_path_drops_the_task_and_a_task_the_path(recipes):
    loaded = load_config("little", ["data.train.path=x.jsonl", "data.train.sample=9"])
    assert loaded.config.data.train.model_dump(exclude_defaults=True) == {"path": "x.jsonl", "sample": 9}
    assert loaded.provenance["data.train.task"] == loaded.provenance["data.train.rows"] == "default"
    write(Path("a.yaml"), "data: {train: {path: org/set, name: en, split: test, sample: 4}}\n")
    train = load_config("a.yaml", ["data.train.task=mix", "data.train.rows=7"]).config.data.train
    assert train.model_dump(exclude_defaults=True) == {"task": "mix", "rows": 7, "sample": 4}
    write(Path("b.yaml"), "extends: little\ndata: {train: {path: x.jsonl}}\n")
    assert load_config("b.yaml").config.data.train.task is None


def test_a_path_and_a_task_in_one_place_are_refused(recipes):
    assert problems_of("little", "data.train.path=x", "data.train.task=mix") == (
        "data.train   set exactly one of path (a file or a dataset name) and task (a synthetic task)",
    )


def test_a_source_can_be_taken_away(recipes):
    write(Path("a.yaml"), "data: {eval: e.jsonl}\n")
    loaded = load_config("a.yaml", ["data.eval=null"])
    assert loaded.config.data.eval is None
    assert loaded.provenance["data.eval"] == "cli"
