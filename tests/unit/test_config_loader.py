"""Files, recipes, extends, overrides, provenance: which value wins, and who is named as its origin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.config import layers
from sft_dist.config.loader import list_recipes, load_config, read_recipe
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.rundir import check_run_name


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


def test_a_file_sets_its_values_and_the_rest_are_defaults():
    loaded = load_config(write(Path("a.yaml"), "train: {learning_rate: 1e-5}\n"))
    assert loaded.config.train.learning_rate == 1e-5
    assert loaded.config.model == Config().model
    assert loaded.path == Path("a.yaml")
    assert loaded.provenance["train.learning_rate"] == "file a.yaml"
    assert loaded.provenance["train.max_steps"] == "default"
    assert loaded.provenance["data.train.task"] == "default"


def test_provenance_names_every_leaf_once():
    loaded = load_config(write(Path("a.yaml"), "train: {extra: {loss_type: dft}}\ndata: {eval: e.jsonl}\n"))
    paths = set(loaded.provenance)
    assert {
        "run.seed",
        "data.eval.path",
        "train.extra.loss_type",
        "evaluate.data",
        "evaluate.generation.top_k",
    } <= paths
    assert not {"data", "data.eval", "train.extra", "evaluate.generation"} & paths
    assert loaded.provenance["train.extra.loss_type"] == "file a.yaml"
    assert loaded.provenance["data.eval.format"] == "default"


def test_a_recipe_is_found_by_name_and_lists_its_first_comment(recipes):
    loaded = load_config("base")
    assert (loaded.config.train.max_steps, loaded.path) == (5, None)
    assert loaded.provenance["train.max_steps"] == "recipe base"
    assert list_recipes() == {"base": "The base of all.", "little": ""}
    assert read_recipe("base").startswith("# The base of all.\n")


def test_a_file_wins_over_a_recipe_of_the_same_name(recipes):
    write(Path("base"), "train: {max_steps: 9}\n")
    assert load_config("base").config.train.max_steps == 9


def test_an_unknown_source_names_the_nearest_recipe(recipes):
    with pytest.raises(ConfigError, match=r"no config file 'litle' and no recipe.*did you mean little\?") as caught:
        load_config("litle")
    assert caught.value.exit_code == 2
    assert "base, little" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="did you mean base"):
        read_recipe("bse")


def test_a_run_directory_as_source_points_to_its_config():
    write(Path("runs/x/config.yaml"), "run: {name: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_config("runs/x")
    assert "runs/x/config.yaml" in str(caught.value.hint)


def test_extends_merges_mappings_and_replaces_lists_along_the_chain(recipes):
    write(Path("c/one.yaml"), "extends: base\ntrain: {max_steps: 1}\nevaluate: {labels: [a, b], questions: [q]}\n")
    write(Path("c/two.yaml"), "extends: one.yaml\ntrain: {logging_steps: 3}\nevaluate: {labels: [c]}\n")
    loaded = load_config("c/two.yaml")
    train, evaluate = loaded.config.train, loaded.config.evaluate
    assert (train.learning_rate, train.max_steps, train.logging_steps) == (1e-4, 1, 3)
    assert (evaluate.labels, evaluate.questions) == (("c",), ("q",))
    origins = [loaded.provenance[f"train.{name}"] for name in ("learning_rate", "max_steps", "logging_steps")]
    assert origins == ["recipe base", "file c/one.yaml", "file c/two.yaml"]


def test_a_list_of_parents_is_merged_in_order(recipes):
    write(Path("one.yaml"), "train: {max_steps: 1, weight_decay: 0.1}\n")
    write(Path("two.yaml"), "train: {max_steps: 2}\n")
    write(Path("x.yaml"), "extends: [one.yaml, two.yaml]\n")
    train = load_config("x.yaml").config.train
    assert (train.max_steps, train.weight_decay) == (2, 0.1)


def test_a_diamond_is_no_cycle():
    write(Path("root.yaml"), "train: {max_steps: 1}\n")
    write(Path("l.yaml"), "extends: root.yaml\n")
    write(Path("r.yaml"), "extends: root.yaml\n")
    write(Path("x.yaml"), "extends: [l.yaml, r.yaml]\n")
    assert load_config("x.yaml").config.train.max_steps == 1


def test_a_cycle_is_an_error_that_shows_the_way():
    write(Path("a.yaml"), "extends: b.yaml\n")
    write(Path("b.yaml"), "extends: ./a.yaml\n")
    with pytest.raises(ConfigError, match=r"a.yaml extends itself: a.yaml -> b.yaml -> a.yaml"):
        load_config("a.yaml")


def test_a_missing_parent_is_named(recipes):
    write(Path("a.yaml"), "extends: litle\n")
    with pytest.raises(ConfigError, match=r"a.yaml extends 'litle', which is neither .* did you mean little\?"):
        load_config("a.yaml")


def test_a_recipe_never_extends_a_file_of_the_current_directory(recipes):
    write(Path("base"), "train: {max_steps: 9}\n")
    assert load_config("little").config.train.max_steps == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("# only a comment\n", "is empty"), ("- a\n", "not sections"), ("a: [\n", "a.yaml:2: ")],
)
def test_a_file_without_sections_is_refused(text, words):
    write(Path("a.yaml"), text)
    with pytest.raises(ConfigError, match=words):
        load_config("a.yaml")


def test_a_file_that_is_no_text_is_refused():
    Path("a.yaml").write_bytes(b"run: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"a\.yaml is not UTF-8 text"):
        load_config("a.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    Path("a.yaml").write_bytes(b"\xef\xbb\xbfrun: {seed: 5}\n")
    assert load_config("a.yaml").config.run.seed == 5


def test_relative_files_are_found_from_here_first_then_beside_the_config():
    for name in ("here.jsonl", "c/here.jsonl", "c/beside.jsonl", "c/t.jinja"):
        write(Path(name), "{}\n")
    write(
        Path("c/a.yaml"),
        "model: {chat_template: t.jinja}\ndata: {train: here.jsonl, eval: {path: beside.jsonl}}\n"
        "evaluate: {data: nowhere.jsonl}\n",
    )
    config = load_config("c/a.yaml").config
    assert config.data.eval is not None and config.evaluate.data is not None
    assert config.data.train.path == str(Path("here.jsonl").resolve())
    assert config.data.eval.path == str(Path("c/beside.jsonl").resolve())
    assert config.evaluate.data.path == "nowhere.jsonl"
    assert config.model.chat_template == str(Path("c/t.jinja").resolve())


def test_an_inherited_file_is_found_beside_the_config_that_names_it_and_an_override_only_from_here():
    write(Path("c/rows.jsonl"), "{}\n")
    write(Path("c/base.yaml"), "data: {train: rows.jsonl}\n")
    write(Path("d/a.yaml"), "extends: ../c/base.yaml\n")
    found = load_config("d/a.yaml").config.data.train.path
    assert found is not None and Path(found).samefile("c/rows.jsonl")
    assert load_config("c/base.yaml", ["data.train=rows.jsonl"]).config.data.train.path == "rows.jsonl"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my run!.yaml", "my-run"),
        ("exp_1.2.yaml", "exp_1.2"),
        ("_x.yml", "x"),
        ("\u00e9.yaml", "run"),
        ("a" * 140, "a" * 120),
    ],
)
def test_the_run_is_named_after_the_file(file, name):
    loaded = load_config(write(Path(file), "run: {seed: 1}\n"))
    assert loaded.config.run.name == name
    assert loaded.provenance["run.name"] == "name of the file"
    check_run_name(name)


def test_the_run_is_named_after_the_recipe_unless_it_has_a_name(recipes):
    assert load_config("little").config.run.name == "little"
    assert load_config("little", ["run.name=mine"]).config.run.name == "mine"


def test_five_mistakes_in_files_and_overrides_are_five_lines(recipes):
    write(Path("base.yaml"), "train: {learning_rate: fast}\n")
    write(
        Path("a.yaml"),
        "extends: base.yaml\nrun: {seed: 1, seed: 2}\ndata: {max_lenght: 9}\n"
        "train: {global_batch_size: 10, per_device_train_batch_size: 4}\n",
    )
    assert problems_of("a.yaml", "parallel.plan=zero4") == (
        "a.yaml:2   duplicate key seed, already set in line 2",
        (
            "data.max_lenght   unknown key; did you mean max_length? (valid: train, eval, eval_size, system, max_length, "
            "assistant_only_loss, loss_on, packing, packing_overflow, on_bad_row, limits)"
        ),
        "train.learning_rate   'fast' is not a number (in file base.yaml)",
        (
            "parallel.plan   'zero4' is not one of cpu, single, ddp, zero1, zero2, zero3, fsdp2, auto; "
            "did you mean zero3?"
        ),
        (
            "train.global_batch_size   10 is not divisible by per_device_train_batch_size 4 x 1 device = 4; use 8 or 12, "
            "or per_device_train_batch_size 1, 2, 5, 10 or auto"
        ),
    )


def test_the_config_room_imports_nothing_heavy():
    code = (
        "import sys, sft_dist.config.loader as loader, sft_dist.config.explain as explain\n"
        "explain.json_schema()\n"
        "[loader.load_config(name) for name in loader.list_recipes()]\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'matplotlib', 'rich', 'numpy'}\n"
        "print(*heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
