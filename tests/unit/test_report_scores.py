"""The scores of a run as lines of a table: of sets, and of versions before there were sets."""

from __future__ import annotations

from typing import Any

import pytest

from sft_dist.report.scores import asked_while_training, score_lines, sets_of

OLDER: dict[str, Any] = {
    "before": {"exact_match": 0.0, "label_accuracy": 1 / 3, "by_category": {"refund": {"n": 5, "exact_match": 0.2}}},
    "after": {"exact_match": 1.0, "label_accuracy": 0.5, "by_category": {"odd": {"n": 2, "exact_match": 1.0}}},
    "n": 30,
}


def texts(part: dict[str, Any], of_category: int = 1) -> list[tuple[Any, ...]]:
    return [
        (line.category, line.score, line.n, line.before.text, line.after.text, line.change.text)
        for line in score_lines(part, of_category)
    ]


def test_scores_without_sets_are_those_of_one_set() -> None:
    ((name, part),) = sets_of(OLDER)
    assert name == "data"
    assert texts(part) == [
        (None, "exact match", 30, "0.0%", "100.0%", "+100.0"),
        (None, "likeliest label right", 30, "33.3%", "50.0%", "+16.7"),
        ("odd", "exact match", 2, "-", "100.0%", "-"),
        ("refund", "exact match", 5, "20.0%", "-", "-"),
    ]
    assert [line.shares for line in score_lines(part)] == [(0.0, 1.0), (1 / 3, 0.5), None, None]


def test_a_score_that_nothing_has_takes_no_line() -> None:
    ((_, part),) = sets_of({"after": {"exact_match": 0.5, "label_accuracy": None, "by_category": {}}, "n": 4})
    assert texts(part) == [(None, "exact match", 4, "-", "50.0%", "-")]


@pytest.mark.parametrize("scores", [{}, {"before": None, "after": 3}, {"sets": 3}, {"sets": {"a": None, "b": {}}}])
def test_scores_that_are_not_there(scores: dict[str, Any]) -> None:
    assert sets_of(scores) == []


def test_the_set_of_the_data_and_the_first_score_come_first() -> None:
    part = {"n": 3, "first": "rougeL", "scores": {"rouge1": {"after": 0.5}, "rougeL": {"after": 0.25, "unit": "share"}}}
    categories = {"a": {"n": 1, "scores": part["scores"]}}
    found = sets_of({"sets": {"letters": part, "data": {**part, "by_category": categories}}})
    assert [name for name, _ in found] == ["data", "letters"]
    assert [row[:2] for row in texts(found[0][1])] == [(None, "ROUGE-L"), (None, "ROUGE-1"), ("a", "ROUGE-L")]
    assert [row[:2] for row in texts(found[0][1], 2)][2:] == [("a", "ROUGE-L"), ("a", "ROUGE-1")]
    assert [line.title for line in score_lines(found[1][1])] == ["ROUGE-L", "ROUGE-1"]


def test_scores_of_a_training_are_found_by_their_sets() -> None:
    rows = [
        {"step": 1, "loss": 2.0, "eval_loss": 1.0, "eval_runtime": 3.0},
        {"step": 2, "eval_my_set/rougeL": 0.5, "eval_my_set/n": 4.0, "eval_data/exact": 0.25, "eval_data/n": 16.0},
    ]
    assert asked_while_training(rows) == [
        ("Exact match, data", "eval_data/exact"),
        ("ROUGE-L, my_set", "eval_my_set/rougeL"),
    ]
    assert asked_while_training(rows[:1]) == []
