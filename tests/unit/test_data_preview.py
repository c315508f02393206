"""The preview shows rows and tokens as they are, tells trained from masked tokens, and takes hostile data."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sft_dist.data.formats import parse_row
from sft_dist.data.preview import ledger_table, rows_table, tokens_view, visible


def printed(renderable, *, colour=False, width=100):
    console = Console(
        no_color=not colour,
        force_terminal=colour,
        color_system="standard" if colour else None,
        file=io.StringIO(),
        width=width,
    )
    console.print(renderable)
    return console.file.getvalue()


def chat(*texts, **fields):
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False)]
    return parse_row({"messages": messages, **fields}, "auto", "w", None)


TOKENS = [
    "<|im_start|>",
    "user",
    "\n",
    "Hi",
    " there",
    "<|im_end|>",
    "\n",
    "Hel",
    "lo",
    "\n",
    "you",
    "<|im_end|>",
    "\n",
]
TRAINED = [False] * 7 + [True] * 5 + [False]


def test_trained_spans_are_seen_without_colour():
    text = printed(tokens_view(TOKENS, TRAINED))
    assert "\x1b" not in text
    legend, blank, *body = text.rstrip("\n").split("\n")
    assert legend == "⟦trained⟧  masked   13 tokens, 5 trained (38.5 %), 8 masked"
    assert blank == ""
    assert body == ["<|im_start|>user↵", "Hi·there<|im_end|>↵", "⟦Hello↵", "you<|im_end|>⟧↵"]


def test_trained_tokens_have_a_colour_of_their_own():
    text = printed(tokens_view(["a", "b"], [False, True]), colour=True)
    body = text.rstrip("\n").split("\n")[-1]
    masked, trained = body.split("a", 1)
    assert "\x1b[2m" in masked
    assert "\x1b[1;32m⟦" in trained and "\x1b[1;92mb" in trained


def test_several_spans_and_the_ends_of_the_row():
    body = printed(tokens_view(["a", "b", "c", "d"], [True, False, True, True])).rstrip("\n").split("\n")[-1]
    assert body == "⟦a⟧b⟦cd⟧"


def test_counts_at_the_edges():
    assert "0 tokens, 0 trained (0 %), 0 masked" in printed(tokens_view([], []))
    assert "1 tokens, 1 trained (100.0 %), 0 masked" in printed(tokens_view(["a"], [True]))


def test_title_and_unequal_lengths():
    assert printed(tokens_view(["a"], [True], title="rows.jsonl:1 [b]")).startswith("rows.jsonl:1 [b]\n")
    with pytest.raises(ValueError, match="2 tokens but 1 marks"):
        tokens_view(["a", "b"], [True])


def test_hostile_tokens_are_text():
    body = printed(tokens_view(["[red]", "\x1b[31m", "\u202e", "⟧", "↵", "\ud83d", "\ufffd"], [True] * 7), colour=False)
    assert body.rstrip("\n").split("\n")[-1] == r"⟦[red]\x1b[31m\u202e\u27e7\u21b5\ud83d" + "\ufffd⟧"


def test_long_rows_wrap_and_lose_nothing():
    text = printed(tokens_view(["word "] * 100, [True] * 100), width=40)
    assert "".join(text.split("\n")).count("word·") == 100
    assert all(len(line) <= 40 for line in text.split("\n"))


def test_visible():
    assert visible("a b\n\tc\r\x00") == "a b↵⇥c\\r\\x00"
    assert visible("a b", spaces=True) == "a·b"
    assert visible("Grüße 你好 😀") == "Grüße 你好 😀"


def test_table_shows_question_and_answer_of_the_first_rows():
    plain = parse_row({"prompt": "2 + 2 =", "completion": " 4"}, "auto", "w", None)
    text = printed(rows_table([chat("Hi", "Hello!"), plain, chat("No", "Never")], 2))
    assert text.startswith("2 of 3 rows")
    assert all(part in text for part in ("user", "assistant", "Hi", "Hello!", "2 + 2 =", " 4"))
    assert "Never" not in text


def test_table_shows_the_last_of_several_turns():
    text = printed(rows_table([chat("one?", "1", "two?", "2")]))
    assert "(2 turns, the last:) two?" in text
    assert "one?" not in text


def test_table_takes_hostile_rows():
    text = printed(rows_table([chat("[bold red]Hi[/bold red] [/] \x1b[2J\x07", "a\nb \u202egpj")]))
    assert "[bold red]Hi[/bold red] [/] \\x1b[2J\\x07" in text
    assert "a↵b \\u202egpj" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_table_cuts_long_texts():
    text = printed(rows_table([chat("q" * 500, "a" * 500)], width=50))
    assert text.count("q") == 49 and "…" in text


def test_table_of_nothing():
    assert printed(rows_table([])).startswith("0 of 0 rows")


def test_the_ledger_as_a_table_has_a_column_for_each_source_and_spells_out_odd_names():
    one = {"format": "messages", "rows_in": 1200, "tokens": 5, "dropped_reasons": {"not_json": 1}}
    sources = [{**one, "source": "a.jsonl"}, {**one, "source": "[red]b\x1b.jsonl"}]
    ledger = {"key": "abc", "train": {"rows_in": 2400, "tokens": 10, "sources": sources}, "eval": {"rows_in": 7}}
    text = printed(ledger_table(ledger, 200), width=200)
    assert "rows abc" in text
    assert "train: a.jsonl (messages)" in text and "[red]b\\x1b.jsonl" in text
    (line,) = [line for line in text.splitlines() if "rows in" in line]
    assert [cell.strip() for cell in line.strip("\u2502").split("\u2502")] == [
        "rows in",
        "1,200",
        "1,200",
        "2,400",
        "7",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_ledger_of_many_sources_is_read_on_a_narrow_terminal(width):
    numbers = {"rows_in": 1_234_567, "answers_cut_or_lost_share": 0.604839, "tokens_in": 98_765_432}
    sources = [{"source": f"rows/{'x' * 30}/{n}.jsonl", "format": "messages", **numbers} for n in range(7)]
    text = printed(ledger_table({"key": "abc", "train": {**numbers, "sources": sources}}, width), width=width)
    assert text.count("answers cut or lost share") == text.count("tokens in")
    for number in ("1,234,567", "0.604839", "98,765,432"):
        assert text.count(number) == 8
    assert all(len(line) <= width for line in text.splitlines())
