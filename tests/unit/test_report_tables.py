"""Scores and answers in the terminal."""

from __future__ import annotations

import re

from rich.console import Console

from sft_dist.report.samples import pair_samples
from sft_dist.report.tables import answers_table, scores_table

SCORES = {
    "before": {"exact_match": 0.0, "label_accuracy": 1 / 3, "by_category": {"refund": {"n": 5, "exact_match": 0.2}}},
    "after": {
        "exact_match": 1.0,
        "label_accuracy": 0.5,
        "by_category": {"[red]odd[/red]": {"n": 2, "exact_match": 1.0}},
    },
    "n": 30,
}


def printed(table, width: int = 140) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def lines(table) -> list[list[str]]:
    return [re.sub("[\u2502\u2503]", " ", line).split() for line in printed(table).splitlines()]


def row(index: int, answer: str, *, right: bool, label: str | None = None) -> dict:
    marks = {"exact_match": right, "predicted_label": label, "label_correct": None if label is None else right}
    return {
        "kind": "scored",
        "index": index,
        "prompt": f"request {index}",
        "expected": "refund",
        "answer": answer,
        **marks,
    }


def test_scores_of_all_rows_then_by_category():
    found = lines(scores_table(SCORES))
    assert ["All", "rows", "30", "0.0%", "100.0%", "+100.0", "33.3%", "50.0%", "+16.7"] in found
    assert ["refund", "5", "20.0%", "-", "-", "-", "-", "-"] in found
    assert ["[red]odd[/red]", "2", "-", "100.0%", "-", "-", "-", "-"] in found


def test_a_metric_that_nothing_has_takes_no_columns():
    table = scores_table({"after": {"exact_match": 0.5, "label_accuracy": None, "by_category": {}}, "n": 4})
    assert ["All", "rows", "4", "-", "50.0%", "-"] in lines(table)
    assert "Label" not in printed(table)


def test_scores_that_are_not_there():
    assert printed(scores_table({}))
    assert scores_table({"before": None, "after": 3}).row_count == 0


def test_answers_side_by_side_with_marks():
    question = {"kind": "question", "prompt": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "5"}
    before = [question, row(0, "hm", right=False, label="other")]
    after = [{**question, "answer": "4"}, row(0, "refund", right=True, label="refund")]
    found = lines(answers_table(before, after))
    assert ["What", "is", "2", "+", "2?", "-", "5", "4"] in found
    assert ["request", "0", "refund", "hm", "refund"] in found
    assert ["wrong", "right"] in found
    assert ["label:", "other", "label:", "refund"] in found


def test_markup_and_escape_codes_have_no_effect():
    evil = "[bold red]x[/bold red] [link=file:///etc]y[/link] [/] \x1b[31mz \x07 \u202ew"
    text = printed(answers_table([{"kind": "question", "prompt": evil, "answer": evil}], []), width=400)
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert text.count("[bold red]x[/bold red] [link=file:///etc]y[/link] [/] <U+001B>[31mz <U+0007> <U+202E>w") == 2


def test_changed_rows_first_and_a_note_of_the_rest():
    before = [row(index, "hm", right=False) for index in range(5)]
    after = [*before[:4], row(4, "refund", right=True)]
    text = printed(answers_table(before, after, limit=2))
    assert text.index("request 4") < text.index("request 0")
    assert "request 1" not in text
    assert "3 more" in text


def test_rows_pair_by_index_and_prompt():
    before = [row(0, "a", right=False), row(1, "b", right=False)]
    after = [row(1, "B", right=False), {**row(0, "A", right=False), "prompt": "another request"}]
    _, scored = pair_samples(before, after)
    pairs = {(s.before and s.before.text, s.after and s.after.text) for s in scored}
    assert pairs == {("b", "B"), ("a", None), (None, "A")}


def test_repeated_questions_stay_apart():
    asked = [{"kind": "question", "prompt": "q", "answer": str(number)} for number in range(2)]
    questions, _ = pair_samples(asked, asked)
    assert [(q.before.text, q.after.text) for q in questions] == [("0", "0"), ("1", "1")]
