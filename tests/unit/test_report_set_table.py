"""The table of a set: numbers by their unit, intervals where there is room, nothing from the data taken for markup."""

from __future__ import annotations

from rich.console import Console

from sft_dist.report.set_table import set_table

SCORES = {
    "n": 36,
    "first": "json_all",
    "scores": {
        "json_all": {
            "unit": "share", "before": 0.25, "after": 1.0, "change": 0.75, "before_interval": [0.125, 0.375],
            "after_interval": [1.0, 1.0], "change_interval": [0.5, 0.875], "p_value": 0.00001,
        },
        "bleu": {"unit": "points", "before": 12.34, "after": 56.78, "change": 44.44, "p_value": 0.021},
        "perplexity": {"unit": "number", "before": None, "after": 1234.5, "p_value": None},
    },
    "by_category": {"[red]odd[/red]": {"n": 3, "scores": {"json_all": {"unit": "share", "before": 0.0, "after": 0.5}}}},
}  # fmt: skip


def printed(part: object, *, wide: bool = True, width: int = 160) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(set_table("letters", part, wide=wide))
    return capture.get()


def test_scores_stand_with_their_intervals_and_the_test() -> None:
    text = printed(SCORES)
    for words in (
        "Set letters", "JSON, all fields", "25.0% [12.5, 37.5]", "100.0% [100.0, 100.0]", "+75.0 [50.0, 87.5]", "<0.0001",
        "BLEU", "12.3", "+44.4", "0.021", "1.23e+03", "[red]odd[/red], JSON, all fields",
    ):  # fmt: skip
        assert words in text, words


def test_a_narrow_terminal_gets_the_numbers_uncut_and_no_intervals() -> None:
    text = printed(SCORES, wide=False, width=60)
    assert "[12.5" not in text
    assert all(words in text for words in ("25.0%", "100.0%", "+75.0", "<0.0001"))


def test_a_damaged_file_is_no_error() -> None:
    for part in (
        {},
        {"scores": {"exact": 3}, "by_category": {"a": None}},
        {"scores": {"a": {"before": "x", "unit": 3}}},
    ):
        assert "Set letters" in printed(part)
