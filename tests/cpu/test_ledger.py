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
        "special_token_rows": 0,
        "special_texts": {},
        "reasoning_left_out": 0,
        "duplicates": 1,
        "duplicates_share": round(1 / 6, 6),
        "tokens_in": sum(lengths) + over + LIMIT,
        "lost_tokens": LIMIT,
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
    by_source = {
        "answers_cut_or_lost_share": (round(2 / 5, 6), 0.0),
        "turns": (6, 2),
        "end_of_turn_trained_share": (round(4 / 6, 6), 1.0),
        "doubled_bos_removed": (0, 0),
        "unknown_share": (0.0, 0.0),
        "duplicates": (1, 0),
        "duplicates_share": (0.25, 0.0),
        "dropped_share": (round(3 / 8, 6), round(1 / 3, 6)),
        "tokens_in": (sum(kept) + over + LIMIT, sum(answers)),
        "lost_tokens": (LIMIT, 0),
        "length_percentiles": tuple(
            {"5": one[0], "25": one[n // 4], "50": one[n // 2], "75": one[n * 3 // 4], "95": one[-2], "99": one[-2]}
            for one, n in ((sorted(kept), 3), (sorted(answers), 1))
        ),
    }
    assert {name: (a[name], b[name]) for name in by_source} == by_source
    assert (ledger["eval"]["rows"], ledger["eval"]["also_in_train"]) == (2, 1)


@pytest.mark.parametrize("data", [{}, {"packing": True}, {"packing": True, "packing_overflow": "split"}])
def test_every_token_is_accounted_for_where_rows_are_held_out(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, sources: tuple[Path, Path], data: dict[str, Any]
) -> None:
    parts = {"sources": [{"path": str(sources[0]), "weight": 2}, {"path": str(sources[1])}]}
    ledger = prepared(tiny_tokens(), tmp_path, parts, eval_size=3, **data)
    train = ledger["train"]
    summed = (
        "tokens",
        "trained_tokens",
        "tokens_in",
        "held_out_documents",
        "held_out_tokens",
        "lost_tokens",
        "rows_in",
    )
    for one in (train, *train["sources"]):
        rest = one["truncated_tokens"] + one["lost_tokens"] + one["held_out_tokens"]
        assert one["tokens_in"] == one["tokens"] + rest
    assert all(train[name] == sum(one[name] for one in train["sources"]) for name in summed)
    assert sum(one["documents"] for one in train["sources"]) == train.get("documents", train["rows"])
    assert (train["held_out_documents"] > 0) and ledger["eval"]["rows_in"] >= 3


def test_rows_that_spell_what_marks_turns_are_counted_and_said(tmp_path: Path, tiny_model_dir: Path) -> None:
    from sft_dist.data.preview import _flat
    from sft_dist.train.worker import summary

    tokens = load_tokenizer(ModelConfig(name=str(tiny_model_dir), new_special_tokens=("<thing>",)))
    rows = [
        chat("What is <|im_end|>?", "It ends a turn: <|im_end|>."),
        chat("And <|im_start|>system?", "It begins one."),
        chat("a < b, <|im|> and <thing>", "<b>no</b>"),
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    ledger = prepared(tokens, tmp_path, {"path": str(tmp_path / "rows.jsonl")})
    train = ledger["train"]
    assert (train["special_token_rows"], train["special_texts"]) == (2, {"<|im_end|>": 1, "<|im_start|>": 1})
    assert "2 rows spell <|im_end|>, <|im_start|> in their words; " in summary(ledger)
    assert _flat(train)["special texts: <|im_end|>"] == 1
    (tmp_path / "plain").mkdir()
    write_jsonl(tmp_path / "plain" / "rows.jsonl", [{"text": "<|im_start|>user\nHi<|im_end|>"}])
    ledger = prepared(tokens, tmp_path, {"path": str(tmp_path / "plain" / "rows.jsonl")})
    assert ledger["train"]["special_token_rows"] == 0
    assert "spell" not in summary(ledger)


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


def test_a_token_that_also_ends_texts_is_none_for_unknown_ones(tmp_path: Path, tiny_model_dir: Path) -> None:
    """GPT-2's way: a vocabulary of all bytes whose unk_token is its eos_token; WordLevel's where the two are one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {"<|im_end|>": 0, "<|im_start|>": 1, "user": 2, "assistant": 3, "yes": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|im_end|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    same = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<|im_end|>", eos_token="<|im_end|>")
    same.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    in_bytes = AutoTokenizer.from_pretrained(tiny_model_dir)
    in_bytes.unk_token = "<|im_start|>"  # no other text is this token
    write_jsonl(tmp_path / "rows.jsonl", [chat("yes", "yes yes"), chat("yes", "yes")] * 20)
    for name, tokenizer in (("same", same), ("bytes", in_bytes)):
        tokenizer.save_pretrained(tmp_path / name)
        tokens = load_tokenizer(ModelConfig(name=str(tmp_path / name)))
        assert tokens.tokenizer.unk_token_id is not None
        train = prepared(tokens, tmp_path, {"path": str(tmp_path / "rows.jsonl")})["train"]
        assert (train["unknown_tokens"], train["unknown_share"], train["unknown_texts"]) == (0, 0.0, {}), name


def test_copies_that_a_weight_makes_go_one_way_and_are_no_duplicates(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    tokens, path = tiny_tokens(), tmp_path / "rows.jsonl"
    write_jsonl(path, [chat(f"Number {n}?", f"{n}.") for n in range(30)] + [chat("Number 3?", "3.")])
    parts: list[Any] = [
        {"path": str(path), "weight": 3},
        {"path": str(path), "weight": 0.5},
        {"task": "tickets", "rows": 9},
    ]
    ledger = prepared(tokens, tmp_path, parts[0], eval_size=10)
    train, held_out = ledger["train"], ledger["eval"]
    assert (train["rows_in"], train["rows"], train["held_out_documents"]) == (93, 63, 30)
    assert (held_out["rows"], held_out["duplicates"]) == (10, 0)
    assert held_out["also_in_train"] <= 1 and train["duplicates"] <= 1, "the row that stands there twice"
    both = prepared(tokens, tmp_path, {"sources": parts}, eval_size=0.5, max_length=512)
    # 31 rows, every second of them once more, and nine: 31 + 15 + 9 are 55, of which 28 are drawn.
    assert (both["train"]["rows_in"], both["eval"]["rows"]) == (93 + 15 + 9, 28)
    assert prepared(tokens, tmp_path, parts[0])["train"]["duplicates"] == 1


def test_without_weights_the_same_rows_are_held_out_as_ever(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    """Old runs go on with their data: rows are drawn from those that can be used, by their number."""
    import random

    from sft_dist.config.schema import Config
    from sft_dist.data.prepare import prepare

    tokens, path = tiny_tokens(), tmp_path / "rows.jsonl"
    rows = [chat(f"Number {n}?", f"{n}." if n % 5 else " ") for n in range(40)]
    write_jsonl(path, rows)
    source = {"sources": [{"path": str(path), "sample": 13}, {"path": str(path)}]}
    text = json.dumps({"data": {"train": source, "eval_size": 7, "on_bad_row": "drop"}})
    config = Config.model_validate_json(text)
    found = prepare(config, tokens.tokenizer, tokens.template, tmp_path / "cache")
    usable = [n for n in [*range(13), *range(40)] if n % 5]
    drawn = sorted(random.Random(config.run.seed).sample(range(len(usable)), 7))
    assert found.eval is not None
    shown = [tokens.tokenizer.decode(row["input_ids"]) for row in found.eval]
    assert ["Number " + text.split("Number ")[1].split("?")[0] for text in shown] == [
        f"Number {usable[n]}" for n in drawn
    ]


def test_a_weight_that_leaves_no_row_is_said(tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "five.jsonl", [chat("Hi", "Hello!")] * 5)
    five = {"path": str(tmp_path / "five.jsonl"), "weight": 0.1}
    for source in (five, {"sources": [{"task": "mix", "rows": 30}, five]}):
        with pytest.raises(DataError, match=r"weight 0\.1 leaves no row of .*five\.jsonl") as refused:
            prepared(tiny_tokens(), tmp_path, source)
        assert refused.value.hint


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
    assert ledger["eval"]["also_in_train"] == 4, "of so few no share says anything"
    assert "4 of the 4 held-out rows also stand in the training rows" in caplog.text
    said = r"100\.0 % of the held-out rows also stand in the training rows; data\.limits\.max_eval_overlap is 0\.5"
    for source in ({"eval_size": 20}, {"eval": {"path": path}}):
        with pytest.raises(DataError, match=said):
            prepared(tiny_tokens(), tmp_path, {"path": path}, **source)
        assert prepared(tiny_tokens(), tmp_path, {"path": path}, **source, limits={"max_eval_overlap": 1})["eval"]


def test_rows_of_eval_have_limits_as_well(tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path) -> None:
    good = many(tmp_path / "good.jsonl", *(chat(f"Number {n}?", f"{n}.") for n in range(30)))
    bad = many(tmp_path / "bad.jsonl", chat("Hi", " "), chat("Hi", " "), chat("Hi", "Hello!"))
    said = r"data\.eval: 66\.7 % of the rows cannot be used; data\.limits\.max_dropped is 0\.5 \(empty_answer 20\)"
    with pytest.raises(DataError, match=said):
        prepared(tiny_tokens(), tmp_path, {"path": good}, eval={"path": bad})
    with pytest.raises(DataError, match=r"data\.eval: none of the 30 rows has an answer"):
        prepared(
            tiny_tokens(), tmp_path, {"path": good}, eval={"path": many(tmp_path / "c.jsonl", chat("why " * 60, "x"))}
        )


def test_what_is_beyond_a_limit_is_named_and_the_ledger_shown(
    call_cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_dist.config.schema_data import LimitsConfig
    from sft_dist.data.prepared import check_limits

    path = many(tmp_path / "rows.jsonl", chat("Hi"), chat("Hi", " "), chat("Hi", " "), chat("Hi", "Hello!"))
    quiet = ("data.eval=null", "data.eval_size=0", "train.eval_strategy=no")
    assert call_cli("data", "prepare", "smoke", f"data.train={path}", "data.on_bad_row=drop", *quiet) == 4
    said = capsys.readouterr()
    assert "data.limits.max_dropped is 0.5 (empty_answer 15, no_answer 8)" in said.err
    assert "dropped reasons: empty answer" in said.err and "length percentiles: 50" in said.err
    assert json.loads(said.out)["train"]["dropped_reasons"] == {"empty_answer": 15, "no_answer": 8}
    texts = {"\u6211": 3, "\u202e": 7, "c": 1}
    unknown = {"rows_in": 30, "rows": 30, "unknown_share": 0.25, "unknown_texts": texts}
    with pytest.raises(DataError, match=r"0\.1 \('\\u202e' 7, '\u6211' 3, 'c' 1\)"):
        check_limits(LimitsConfig(), {"train": unknown})


def test_the_command_ends_with_4_before_a_run_exists(
    call_cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = many(
        tmp_path / "rows.jsonl", chat("why " * 300, "because"), chat("Hi", "Hello!"), chat("why " * 300, "because")
    )
    assert call_cli("train", "smoke", f"data.train={path}", "data.max_length=64", f"run.dir={tmp_path / 'runs'}") == 4
    assert "of the rows lose their answer or its end to data.max_length" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_reasoning_that_the_template_leaves_out_is_counted_and_said(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, loss_on: str
) -> None:
    """As Qwen3's own template does with that of earlier answers, when it asks: nobody is refused for it."""
    from sft_dist.train.worker import summary

    answer = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ m.reasoning_content if loop.last }}"
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        + answer
        + "<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    tokens = tiny_tokens(chat_template=str(tmp_path / "own.jinja"))
    thought = "<think>\nTwo and two.\n</think>\n\n4"
    asked, four = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    apart = {**four, "reasoning_content": "It is even."}
    rows = [
        chat("2 + 2?", thought, "And now?", "<think></think>5"),
        chat("2 + 2?", "Two and two.</think>4", "And now?", thought.replace("Two", "2")),
        chat("2 + 2?", "4", "And now?", thought),
        {"messages": [asked, apart, asked, {**apart, "reasoning_content": "As before."}]},
        chat("What is </think>?", "A mark."),
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    ledger = prepared(tokens, tmp_path, {"path": str(tmp_path / "rows.jsonl")}, loss_on=loss_on)
    assert ledger["train"]["dropped_refused_by_template"] == 0
    assert ledger["train"]["reasoning_left_out"] == 3
    assert "the template leaves out the reasoning of 3 answers; " in summary(ledger)
