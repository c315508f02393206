"""Every packaged recipe runs from end to end, with overrides that make it small."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from sft_dist.config.loader import list_recipes, load_config
from sft_dist.files import read_json, read_jsonl
from sft_dist.stages import new_run, run_here

FOLDER = resources.files("sft_dist") / "resources" / "recipes"
RECIPES = sorted(Path(entry.name).stem for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))


def test_the_files_are_the_recipes_that_are_listed() -> None:
    assert sorted(list_recipes()) == RECIPES
    assert {"demo", "qwen3-0.6b", "smoke", "tutorial"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_from_end_to_end(recipe: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    asked_for = load_config(recipe).config
    small = [
        f"run.dir={tmp_path}",
        "model.name=embedded:tiny",
        "parallel.plan=cpu",
        "data.train.sample=24",
        "train.max_steps=2",
        "evaluate.generation.max_new_tokens=4",
    ]
    if not asked_for.data.train.sources:
        small.append("data.train.rows=24")
    if asked_for.evaluate.data is not None:
        small.append("evaluate.data.rows=3")
    sets = [{**it.model_dump(exclude_defaults=True), "name": it.name} for it in asked_for.evaluate.sets]
    if sets:
        small.append(f"evaluate.sets={json.dumps([{**it, 'data': {**it['data'], 'rows': 3}} for it in sets])}")
    loaded = load_config(recipe, small)
    assert loaded.config.train.learning_rate == asked_for.train.learning_rate
    run = new_run(loaded)
    run_here(run)
    assert run.name == recipe
    assert run.read_status()["state"] == "done"
    assert run.read_status()["step"] == 2
    assert (run.model / "DONE").is_file()
    assert run.report.stat().st_size > 0
    assert run.loss_plot.stat().st_size > 0
    evaluate = loaded.config.evaluate
    expected = len(evaluate.questions) + 3 * len(evaluate.all_sets)
    assert expected > 0, "the recipe shows nothing of what the model learned"
    for when in ("before", "after"):
        assert len(read_jsonl(run.eval / f"{when}.jsonl")) == expected
    if evaluate.data:
        assert read_json(run.scores)["n"] == 3


def test_the_demo_and_the_tutorial_have_the_settings_of_the_issue() -> None:
    tutorial = load_config("tutorial").config
    assert tutorial.train.learning_rate == 8e-5
    assert tutorial.train.num_train_epochs == 1
    assert tutorial.train.per_device_train_batch_size == 1
    assert tutorial.train.global_batch_size == 8
    assert tutorial.train.gradient_checkpointing is False
    assert tutorial.train.logging_steps == 2
    assert tutorial.data.train.sample == 100
    demo = load_config("demo").config
    assert demo.evaluate.data.rows >= 30
    assert demo.evaluate.data.seed != demo.data.train.seed
    assert len(demo.evaluate.labels) == 6
