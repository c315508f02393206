"""Every number of the ledger against rows that were counted by hand; numbers beyond their limits end a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config, ModelConfig
from sft_dist.data.prepare import prepare
from sft_dist.errors import DataError
from sft_dist.files import write_jsonl
from sft_dist.train.tokenizer import RunTokenizer, load_tokenizer

LIMIT = 48


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(turns)]}


def prepared(tokens: RunTokenizer, folder: Path, train: Any, **data: Any) -> dict[str, Any]:
    text = json.dumps({"data": {"train": train, "max_length": LIMIT, "on_bad_row": "drop", **data}})
    config = Config.model_validate_json(text)
    return prepare(config, tokens.tokenizer, tokens.template, folder / "cache").ledger


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """Two files; beside each row stands what becomes of it."""
    first = [
        chat("Hi", "Hello!"),  # kept
        chat("Hi", "Hello!"),  # kept: a duplicate of the first
        chat("One?", "1", "Two?", "2"),  # kept, two turns
        chat("Count", "one two three four five six seven eight nine ten eleven twelve " * 2),  # its answer is cut
        chat("why " * 60, "because"),  # its answer is lost
        chat("Hi", " "),  # an empty answer
        {"messages": [{"role": "boss", "content": "x"}]},  # an unknown role
        chat("Hi"),  # no answer
    ]
    second = [
        {"question": "2 + 2?", "answer": "4"},
        {"question": "3 + 3?", "answer": "6"},
        {"question": "?", "answer": ""},
    ]
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, rows in zip(paths, (first, second), strict=True):
        write_jsonl(path, rows)
    return paths


def test_every_number(tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, sources: tuple[Path, Path]) -> None:
    tokens = tiny_tokens()
    write_jsonl(tmp_path / "eval.jsonl", [chat("Hi", "Hello!"), chat("New", "Yes")])
    ledger = prepared(
        tokens,
        tmp_path,
        {"sources": [{"path": str(path)} for path in sources]},
        eval={"path": str(tmp_path / "eval.jsonl")},
    )

    def count(text: str) -> int:
        return len(tokens.tokenizer(text, add_special_tokens=False)["input_ids"])

    def whole(*turns: str) -> int:
        roles = ("user", "assistant")
        return sum(count(f"<|im_start|>{roles[n % 2]}\n{words}<|im_end|>\n") for n, words in enumerate(turns))

    long = ("Count", "one two three four five six seven eight nine ten eleven twelve " * 2)
    lost = ("why " * 60, "because")
    kept = [whole("Hi", "Hello!"), whole("Hi", "Hello!"), whole("One?", "1", "Two?", "2"), LIMIT]
    answers = [whole("2 + 2?", "4"), whole("3 + 3?", "6")]
    assert whole(*long) > LIMIT and count(f"<|im_start|>user\n{lost[0]}") > LIMIT and max(kept[:3] + answers) <= LIMIT
    opening = count("<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\n")
    trained = [2 * (count("Hello!") + 1), count("1") + count("2") + 2, LIMIT - opening]
    lengths = sorted(kept + answers)
    train = ledger["train"]
    over = whole(*long) + whole(*lost) - 2 * LIMIT
    expected = {
        "rows_in": 11,
        "rows": 6,
        "dropped_bad_rows": 4,
        "dropped_reasons": {"empty_answer": 2, "no_answer": 1, "unknown_role": 1},
        "dropped_share": round(4 / 11, 6),
        "dropped_refused_by_template": 0,
        "dropped_answer_empty": 0,
        "dropped_answer_cut_off": 1,
        "truncated_rows": 2,
        "truncated_tokens": over,
        "answers_cut_or_lost": 2,
        "answers_cut_or_lost_share": round(2 / 7, 6),
        "turns": 8,  # two in one row, one in six
        "end_of_turn_trained_share": round(6 / 8, 6),
        "doubled_bos_removed": 0,
        "unknown_tokens": 0,
        "unknown_share": 0.0,
        "unknown_texts": {},
        "duplicates": 1,
        "tokens": sum(lengths),
        "trained_tokens": sum(trained) + count("4") + count("6") + 2,
        "longest_row": LIMIT,
        "length_percentiles": {
            "5": lengths[0], "25": lengths[1], "50": lengths[2], "75": lengths[3], "95": lengths[4], "99": lengths[4]
        },
    }  # fmt: skip
    assert {name: train[name] for name in expected} == expected
    assert [one["source"] for one in train["sources"]] == [str(path) for path in sources]
    a, b = train["sources"]
    assert (a["format"], b["format"]) == ("messages", "question_answer")
    assert (a["rows_in"], a["documents"], a["tokens"], a["trained_tokens"]) == (8, 4, sum(kept), sum(trained))
    assert (b["rows_in"], b["documents"], b["tokens"]) == (3, 2, sum(answers))
    assert (a["dropped_reasons"], b["dropped_reasons"]) == (
        {"empty_answer": 1, "no_answer": 1, "unknown_role": 1},
        {"empty_answer": 1},
    )
    assert (ledger["eval"]["rows"], ledger["eval"]["also_in_train"]) == (2, 1)


def test_unknown_tokens_are_counted_and_shown(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "<|im_start|>": 1, "<|im_end|>": 2, "user": 3, "assistant": 4, "yes": 5}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "words")
    tokens = load_tokenizer(ModelConfig(name=str(tmp_path / "words")))
    write_jsonl(tmp_path / "rows.jsonl", [chat("who what who", "yes"), chat("yes", "no")])
    train = prepared(tokens, tmp_path, {"path": str(tmp_path / "rows.jsonl")})["train"]
    assert train["unknown_tokens"] == 4
    assert train["unknown_texts"] == {"who": 2, "what": 1, "no": 1}
    # Two marks and a role for each of two turns, and the words.
    assert train["unknown_share"] == round(4 / (6 + 4 + 6 + 2), 6)


def many(path: Path, *rows: dict[str, Any]) -> str:
    write_jsonl(path, [rows[n % len(rows)] for n in range(30)])
    return str(path)


@pytest.mark.parametrize(
    ("rows", "limits", "message"),
    [
        ([chat("Hi", "Hello!"), chat("Hi", " ")], {"max_dropped": 0.4}, r"50\.0 % of the rows cannot be used; data\.limits\.max_dropped is 0\.4"),
        ([chat("Hi", "one two " * 60), chat("why " * 60, "x")], {"max_answers_cut": 0.4}, r"100\.0 % of the rows lose their answer"),
        ([chat("Hi", "one two " * 60)], {"max_answers_cut": 1}, r" 0\.0 % of the answers train the token that ends them"),
        ([chat("Hi", "Hello!")], {"max_duplicates": 0.5}, r"96\.7 % of the training rows stand there more than once"),
    ],
)  # fmt: skip
def test_numbers_beyond_their_limits_are_a_data_error(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, rows: Any, limits: dict[str, Any], message: str
) -> None:
    tokens, path = tiny_tokens(), many(tmp_path / "rows.jsonl", *rows)
    for _ in range(2):  # prepared anew, and found in the cache
        with pytest.raises(DataError, match=message) as refused:
            prepared(tokens, tmp_path, {"path": path}, limits=limits)
        assert refused.value.exit_code == 4 and refused.value.hint
    open_limits = {"max_dropped": 1, "max_answers_cut": 1, "min_end_of_turn_trained": 0, "max_duplicates": 1}
    assert prepared(tokens, tmp_path, {"path": path}, limits=open_limits)["train"]["rows_in"] == 30


def test_held_out_rows_that_are_trained_on_may_be_refused(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = many(tmp_path / "rows.jsonl", chat("Hi", "Hello!"))
    ledger = prepared(tiny_tokens(), tmp_path, {"path": path}, eval_size=4)
    assert ledger["eval"]["also_in_train"] == 4
    assert "4 of the 4 held-out rows also stand in the training rows" in caplog.text
    with pytest.raises(DataError, match=r"100\.0 % of the held-out rows also stand in the training rows"):
        prepared(tiny_tokens(), tmp_path, {"path": path}, eval_size=4, limits={"max_eval_overlap": 0.1})


def test_the_command_ends_with_4_before_a_run_exists(
    call_cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = many(
        tmp_path / "rows.jsonl", chat("why " * 300, "because"), chat("Hi", "Hello!"), chat("why " * 300, "because")
    )
    assert call_cli("train", "smoke", f"data.train={path}", "data.max_length=64", f"run.dir={tmp_path / 'runs'}") == 4
    assert "of the rows lose their answer or its end to data.max_length" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
