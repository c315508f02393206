"""Evaluation sets in a config: read with the short forms of their data, refused with the place of what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.config.loader import load_config, load_run_config, write_config
from sft_dist.errors import ConfigError

SETS = """
evaluate:
  data: held.jsonl
  labels: [a, b]
  category_field: kind
  sets:
    - name: letters
      data: {task: extraction, rows: 5, seed: 2}
      metrics: [json, own.module:score]
    - {name: pairs, data: [one.jsonl, {path: two.jsonl, weight: 2}], metrics: [rouge, bleu]}
"""


def test_sets_are_read_with_the_short_forms_of_their_data_and_survive_the_run_directory() -> None:
    Path("one.jsonl").touch()
    Path("a.yaml").write_text(SETS, encoding="utf-8")
    config = load_config("a.yaml").config
    first, letters, pairs = config.evaluate.all_sets
    assert (first.name, first.metrics, first.labels, first.category_field) == (
        "data",
        ("exact", "label"),
        ("a", "b"),
        "kind",
    )
    assert (letters.data.task, letters.data.rows, letters.metrics) == ("extraction", 5, ("json", "own.module:score"))
    assert [part.path for part in pairs.data.parts] == [str(Path("one.jsonl").resolve()), "two.jsonl"]
    Path("config.yaml").write_text(write_config(config), encoding="utf-8")
    assert load_run_config(Path("config.yaml")) == config


def test_without_labels_the_rows_of_evaluate_data_are_scored_by_exact_match() -> None:
    config = load_config("smoke", ["evaluate.labels=[]"]).config
    assert [(it.name, it.metrics) for it in config.evaluate.all_sets] == [("data", ("exact",))]
    assert load_config("smoke", ["evaluate.labels=[]", "evaluate.data=null"]).config.evaluate.all_sets == ()


@pytest.mark.parametrize(
    ("item", "line"),
    [
        ("{name: a, data: {task: mix}, metric: [json]}", "evaluate.sets[0].metric   unknown key; did you mean metrics?"),
        ("{name: a, data: {task: mix, row: 3}}", "evaluate.sets[0].data.row   unknown key; did you mean rows?"),
        ("{name: a}", "evaluate.sets[0].data   is not set"),
        ("{data: {task: mix}}", "evaluate.sets[0].name   is not set"),
        ("{name: 1, data: {task: mix}}", "evaluate.sets[0].name   1 is not text"),
        ("{name: a, data: {task: tickts}}", "evaluate.sets[0].data.task   'tickts' is not tickets or extraction or mix"),
        ("{name: a, data: {task: mix, path: b.jsonl}}", "evaluate.sets[0].data   set exactly one of path"),
        ("{name: a, data: {path: b.jsonl, rows: 3}}", "evaluate.sets[0].data.rows   would be ignored"),
        ("{name: a/b, data: {task: mix}}", "evaluate.sets[0].name   'a/b' is not a name of letters"),
        ("{name: data, data: {task: mix}}", "evaluate.sets[0].name   'data' stands for 2 sets (evaluate.data is the set"),
        ("{name: a, data: {task: mix}, metrics: []}", "evaluate.sets[0].metrics   is empty"),
        ("{name: a, data: {task: mix}, metrics: [jsno]}", "'jsno' is not one of exact, contains"),
        ("{name: a, data: {task: mix}, metrics: [jsno]}", "; did you mean json?"),
        ("{name: a, data: {task: mix}, metrics: [json, json]}", "evaluate.sets[0].metrics   'json' is listed 2 times"),
        ("{name: a, data: {task: mix}, metrics: [label]}", "evaluate.sets[0].labels   is not set, and the metric label"),
        ("{name: a, data: {task: mix}, labels: [x]}", "evaluate.sets[0].labels   would be ignored"),
        ("{name: a, data: {task: mix}, metrics: [label], labels: [x, x]}", "evaluate.sets[0].labels   'x' is listed 2"),
        ("{name: a, data: {task: mix}, metrics: ['m:bleu']}", "'m:bleu' has a name that a score of ours has; call the function my_bleu"),
        ("{name: a, data: {task: mix}, metrics: [exact, 'm:exact']}", "'m:exact' has a name that a score of ours has"),
        ("{name: a, data: {task: mix}, metrics: ['m:score', 'm2:score']}", "'m:score' and 'm2:score' would both be called score"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_set_is_said_with_its_place(item: str, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("smoke", [f"evaluate.sets=[{item}]"])
    assert line in str(refused.value)
    assert len(refused.value.problems) == 1
