"""Answers in the terminal."""

from __future__ import annotations

import re

from rich.console import Console

from sft_dist.report.samples import pair_samples
from sft_dist.report.tables import answers_table
from sft_dist.report.text import clip


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


def test_a_text_is_not_cut_for_a_note_that_is_longer_than_what_it_leaves_out():
    assert clip("x" * 70, 60) == "x" * 70
    assert clip("x" * 1060, 60) == "x" * 60 + " ... (1,000 more characters)"
