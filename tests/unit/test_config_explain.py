"""`config --explain` has a row with documentation for every field, and the JSON Schema agrees with the loader."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from sft_dist.config.explain import explain, json_schema
from sft_dist.config.loader import list_recipes, load_config, read_recipe
from sft_dist.config.spelling import all_fields
from sft_dist.config.yaml12 import parse_yaml
from sft_dist.errors import ConfigError


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_every_field_is_explained_with_value_origin_and_documentation():
    Path("a.yaml").write_text("train: {learning_rate: 1e-5, extra: {loss_type: dft}}\ndata: {eval: e.jsonl}\n")
    loaded = load_config("a.yaml", ["evaluate.labels=[x, y]"])
    rows = explain(loaded)
    assert [row[0] for row in rows] == list(loaded.provenance)
    assert all(documentation for *_, documentation in rows)
    by_path = {row[0]: row[1:] for row in rows}
    assert by_path["train.learning_rate"] == (1e-5, "file a.yaml", "Peak learning rate.")
    assert by_path["evaluate.labels"][:2] == (["x", "y"], "cli")
    assert by_path["data.eval.sample"] == (None, "default", "Use only the first so many rows.")
    assert by_path["train.extra.loss_type"] == ("dft", "file a.yaml", "A field of TRL's SFTConfig.")


def test_the_schema_documents_every_section_and_field():
    schema = json_schema()
    for path in all_fields():
        part = schema
        for key in path.split("."):
            kinds = [part, *part.get("anyOf", [])]
            references = [kind["$ref"].rpartition("/")[2] for kind in kinds if "$ref" in kind]
            part = (schema["$defs"][references[0]] if references else part)["properties"][key]
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        assert part["description"], path


@pytest.mark.parametrize("name", list(list_recipes()))
def test_every_recipe_fits_the_schema_and_loads(validator, name):
    validator.validate(parse_yaml(read_recipe(name), name))
    assert load_config(name).config.run.name == name
    assert list_recipes()[name]


@pytest.mark.parametrize(
    "text",
    [
        "extends: demo",
        "extends: [demo, other.yaml]",
        "data: {train: x.jsonl, eval: {path: y.jsonl, sample: 3}}",
        "data: {eval: null}",
        "evaluate: {data: {task: tickets}, labels: [a]}",
        "train: {extra: {loss_type: dft}, per_device_train_batch_size: auto, learning_rate: 1}",
    ],
)
def test_the_schema_accepts_what_users_write(validator, text):
    assert not list(validator.iter_errors(parse_yaml(text, "x")))


@pytest.mark.parametrize(
    "text",
    [
        "lr: 1",
        "train: {lr: 1}",
        "train: {learning_rate: fast}",
        "train: {extra: {los_type: dft}}",
        "train: {extra: {learning_rate: 1}}",
        "data: {train: 3}",
        "data: {train: null}",
        "data: {train: {task: unknown}}",
        "parallel: {plan: zero4}",
        "evaluate: {generation: {top_p: 2}}",
        "extends: 3",
    ],
)
def test_the_schema_and_the_loader_refuse_the_same(validator, text):
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(parse_yaml(text, "x"))
    Path("x.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config("x.yaml")


def test_a_broken_config_has_one_schema_error_for_each_mistake(validator):
    broken = parse_yaml("data: {max_lenght: 3}\ntrain: {learning_rate: fast}\nparallel: {plan: zero4}\n", "x")
    assert len(list(validator.iter_errors(broken))) == 3
