"""What an answer scores: fields, numbers, containment, functions of the user's own; checked before a model is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft_dist.config.rules_evaluate import METRICS, SCORES, metric_of
from sft_dist.config.schema import SetConfig, SourceConfig
from sft_dist.data.example import Example
from sft_dist.errors import ConfigError, DataError, PreflightError
from sft_dist.evaluate.answer_fields import json_scores, normalised, plain_scores
from sft_dist.evaluate.metrics import (
    CORPUS,
    LIKELIHOODS,
    TASKS,
    TEXT,
    Scorer,
    contains,
    exact,
    first_score,
    numeric,
    unit,
)
from sft_dist.evaluate.summary import set_scores

WANTED = json.dumps({"name": "Ann Lee", "order": "A 12"})


def a_set(*metrics: str, labels: tuple[str, ...] = ()) -> SetConfig:
    return SetConfig(name="a", data=SourceConfig(task="tickets"), metrics=metrics, labels=labels)


def row(expected: str, **fields: object) -> Example:
    return Example(prompt="q", completion=expected, fields=fields, where="rows.jsonl:1")


def test_every_metric_that_a_config_may_name_is_known_and_no_other() -> None:
    assert set(METRICS) == {*TEXT, *CORPUS, *LIKELIHOODS}


@pytest.mark.parametrize(
    ("answer", "valid", "whole", "share"),
    [
        ('{"name": "Ann Lee", "order": "A 12"}', 1, 1, 1),
        ('{"order": "A 12", "name": "Ann Lee"}', 1, 1, 1),
        ('```json\n{"name": "Ann Lee", "order": "A 12"}\n```', 1, 1, 1),
        ('{"name": "Ann\u3000Lee ", "order": "\uff21 \uff11\uff12"}', 1, 1, 1),  # full-width letters, digits and space
        ('{"name": "ann lee", "order": "A 12"}', 1, 0, 0.5),
        ('{"name": "Ann Lee", "order": "A 12", "more": 1}', 1, 0, 1),
        ('{"name": "Ann Lee"}', 1, 0, 0.5),
        ('{"name": "Ann Lee", "order": 12}', 1, 0, 0.5),
        ('Sure! {"name": "Ann Lee", "order": "A 12"} Bye', 0, 0, 1),
        ('{x} {"name": "Ann Lee"}', 0, 0, 0.5),
        ('["Ann Lee"]', 0, 0, 0),
        ('{"name": "Ann Lee", "order": ', 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_json_is_scored_as_a_whole_and_field_by_field(answer: str, valid: int, whole: int, share: float) -> None:
    found = json_scores(answer, WANTED)
    assert (found["json_valid"], found["json_all"], found["json_fields"]) == (valid, whole, share)
    assert {name for name in found if "." in name} == {"json.name", "json.order"}
    assert found["json_fields"] == (found["json.name"] + found["json.order"]) / 2


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1", "1.0", 1), ("true", "1", 0), ("0", "false", 0), ("null", "null", 1), ("null", "0", 0),
        ('["\uff11", {"b": 2}]', '["1", {"b": 2}]', 1), ("[1, 2]", "[1]", 0), ('{"b": 1}', '{"c": 1}', 0), ('"1"', "1", 0),
    ],
)  # fmt: skip
def test_json_values_are_compared_by_kind_and_value(one: str, other: str, equal: int) -> None:
    assert json_scores(f'{{"a": {one}}}', f'{{"a": {other}}}')["json_all"] == equal


def test_plain_fields_take_colons_of_any_width_and_names_of_any_case() -> None:
    expected = "name: Ann Lee\norder: A12"
    assert plain_scores("Name\uff1aAnn  Lee\nORDER: \uff2112\nthanks: no", expected) == {
        "fields_all": 1.0, "fields": 1.0, "fields.name": 1.0, "fields.order": 1.0,
    }  # fmt: skip
    assert plain_scores("name: Ann\nname: Ann Lee", expected)["fields"] == 0.0
    assert plain_scores("order: A12", expected)["fields"] == 0.5
    assert plain_scores("order: A12", expected)["fields_all"] == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It is 1,200.", "1200", 1), ("1200.0 euros", "#### 1200", 1), ("3 then 4", "4", 1), ("4 then 3", "4", 0),
        ("-4", "4", 0), ("\uff14", "4", 1), ("none", "4", 0), (".5", "0.5", 1), ("12", "2", 0),
        ("\u22125", "-5", 1), ("\u22125", "5", 0), ("10-3", "3", 1), ("10-3", "-3", 0), ("10 - 3", "3", 1), ("x = -3", "-3", 1),
    ],
)  # fmt: skip
def test_the_last_number_counts(answer: str, expected: str, right: int) -> None:
    assert numeric(answer, expected) == {"numeric": right}


def test_exact_and_contained() -> None:
    assert exact(" a b\n", "a b ") == {"exact": 1.0}
    assert exact("a  b", "a b") == {"exact": 0.0}
    assert contains("So: PARIS,\nFrance", "Paris, France") == {"contains": 1.0}
    assert contains("Pari", "Paris") == {"contains": 0.0}
    assert normalised("\uff21\u3000\uff11 \n x") == "A 1 x"


@pytest.mark.parametrize(
    ("metric", "lacks"), [("json", "JSON object"), ("fields", "`name: value`"), ("numeric", "number")]
)
def test_a_row_that_a_metric_cannot_use_is_named(metric: str, lacks: str) -> None:
    spec = a_set(metric)
    with pytest.raises(
        DataError, match=f"rows.jsonl:1: the expected answer .*{lacks}.*, which the metric {metric} needs"
    ):
        Scorer(spec, [row("words")]).score(row("words"), "words")


OWN = """
def shorter(answer, expected, row):
    return {"short": len(answer) < row["limit"], "long": 2 * len(answer)}

def half(answer, expected, row):
    return 0.5 if answer else None

def nan(answer, expected, row):
    return float("nan")

def label_len(answer, expected, row):
    return 40

def named(answer, expected, row):
    return {row["name"]: 0.3}

constant = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    name = f"own_metrics_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(OWN, encoding="utf-8")  # every test has a working directory of its own
    return name


def test_a_function_of_the_users_own_scores_by_its_name_or_by_several(own: str) -> None:
    spec = a_set(f"{own}:half", f"{own}:shorter")
    found = Scorer(spec, []).score(row("e", limit=3), "ab").values
    assert found == {"half": 0.5, "short": 1.0, "long": 4.0}
    assert first_score(spec) == "half"
    assert [unit(name) for name in ("half", "json.name", "json_all", "bleu", "perplexity")] == [
        "number", "share", "share", "points", "number",
    ]  # fmt: skip


def test_a_score_of_a_function_is_a_mean_of_numbers_whatever_its_name_begins_with(own: str) -> None:
    spec = a_set(f"{own}:label_len", f"{own}:named")
    scores = Scorer(spec, []).score(row("e", name="accent"), "a").values
    found = set_scores(first_score(spec), [], [{"index": 0, "scores": scores, "expected": "e", "answer": "a"}])
    assert {name: (part["unit"], part["after"]) for name, part in found["scores"].items()} == {
        "label_len": ("number", 40.0), "accent": ("number", 0.3),
    }  # fmt: skip


def test_the_first_score_is_the_first_that_the_rows_have(own: str) -> None:
    spec = a_set(f"{own}:named")
    rows = [{"index": 0, "category": None, "scores": {"polite": 0.3}, "expected": "e", "answer": "a"}]
    better = [{**rows[0], "scores": {"polite": 0.5}}]
    found = set_scores(first_score(spec), rows, better)
    assert (found["first"], len(found["gains"])) == ("polite", 1)


@pytest.mark.parametrize("name", ["bleu", "perplexity", "exact", "json.city", "rouge1", "rouge", "fields", "n"])
def test_a_score_of_a_function_is_not_taken_for_one_of_ours(name: str, own: str) -> None:
    assert metric_of(name) is not None
    with pytest.raises(ConfigError, match=f"gave a score {name}, and scores of that name are those of"):
        Scorer(a_set(f"{own}:named"), []).score(row("e", name=name), "a")


def test_no_score_of_a_row_is_lost_or_no_number(own: str) -> None:
    with pytest.raises(ConfigError, match="gave a score half, and so did one before it"):
        Scorer(a_set(f"{own}:half", f"{own}:named"), []).score(row("e", name="half"), "a")
    with pytest.raises(ConfigError, match=r"gave nan as nan on rows.jsonl:1, which has no mean"):
        Scorer(a_set(f"{own}:nan"), []).score(row("e"), "a")


def test_the_names_that_are_ours_are_those_that_the_metrics_give() -> None:
    given = {"json": {"a": 1}, "fields": "a: 1", "numeric": "1"}
    for metric, score in TEXT.items():
        if metric != "rouge":  # needs its package
            text = given.get(metric, "a")
            names = score(*[json.dumps(text) if isinstance(text, dict) else text] * 2)
            assert {name for name in names if "." not in name} == set(SCORES[metric])
            assert all(metric_of(name) == metric for name in names)


def test_scores_of_the_harness_are_means_under_its_own_names() -> None:
    assert [TASKS.unit(name) for name in ("acc", "acc_norm", "exact_match.strict-match", "f1", "bleu")] == [
        *["share"] * 3, "number", "number",
    ]  # fmt: skip
    rows = [{"index": index, "scores": {"bleu": value}} for index, value in enumerate((0.25, 0.75))]
    assert set_scores(None, [], rows, TASKS)["scores"]["bleu"]["after"] == 0.5


def test_a_function_that_cannot_be_used_is_refused_before_a_model_is_asked(own: str) -> None:
    for metric, reason in (
        ("no_such_module_at_all:f", "cannot be imported: ModuleNotFoundError"),
        (f"{own}:nothing", "has no function nothing"),
        (f"{own}:constant", "has no function constant"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Scorer(a_set(metric), [])
    with pytest.raises(ConfigError, match=r"half failed on rows.jsonl:1: TypeError"):
        Scorer(a_set(f"{own}:half"), []).score(row("e"), "")


def test_a_metric_whose_package_is_missing_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_dist.config.schema import Config, EvaluateConfig
    from sft_dist.parallel.machine import this_machine
    from sft_dist.parallel.resolve import one_process, resolve
    from sft_dist.train import settle

    monkeypatch.setattr(settle, "find_spec", lambda name: None)
    resolved = resolve(one_process(Config()), this_machine())
    for metric, package in (("rouge", "rouge_score"), ("bleu", "sacrebleu"), ("chrf", "sacrebleu")):
        config = Config(evaluate=EvaluateConfig(sets=(a_set("exact", metric),)))
        with pytest.raises(PreflightError, match=rf"asks for {metric}, but the package {package} is not") as refused:
            settle.needs_packages(config, resolved)
        assert "sft-dist[metrics]" in str(refused.value)
    settle.needs_packages(Config(evaluate=EvaluateConfig(sets=(a_set("exact"),))), resolved)
