"""The synthetic tasks: the same rows for the same seed, right answers, and a held-out set that is one."""

from __future__ import annotations

import collections
import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from sft_dist.data import tickets_zh
from sft_dist.data.extraction import extraction
from sft_dist.data.formats import parse_row
from sft_dist.data.mix import KINDS, LANGUAGES, PHRASES, mix
from sft_dist.data.sources import task_rows, write_splits
from sft_dist.data.tickets import CATEGORIES, INSTRUCTION, REQUESTS, tickets
from sft_dist.errors import ConfigError


def request(row):
    return row["prompt"][0]["content"].removeprefix(INSTRUCTION)


def test_ticket_rows_have_the_promised_shape():
    for row in tickets(12, 1):
        (user,), (answer,) = row["prompt"], row["completion"]
        assert user["role"] == "user" and user["content"].startswith(INSTRUCTION)
        assert answer == {"role": "assistant", "content": row["category"]}
        assert row["expected"] == row["category"] and row["metric"] == "exact_match"
        assert parse_row(row, "auto", "w", None).first_trained == 1


def test_categories_are_six_plain_words_and_all_are_offered():
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 6
    assert tuple(REQUESTS) == CATEGORIES
    assert all(re.fullmatch("[a-z]+", name) and name in INSTRUCTION for name in CATEGORIES)


@pytest.mark.parametrize("rows", [1, 5, 6, 36, 100])
def test_tickets_are_balanced_at_every_length(rows):
    made = list(tickets(rows, 3))
    counts = collections.Counter(row["category"] for row in made)
    assert len(made) == rows
    assert max(counts.values()) - min(counts[name] for name in CATEGORIES) <= 1


def test_a_shorter_set_is_the_beginning_of_a_longer_one():
    assert list(tickets(20, 7)) == list(itertools.islice(tickets(500, 7), 20))
    assert list(mix(20, 7)) == list(itertools.islice(mix(500, 7), 20))


@pytest.mark.parametrize("task", ["tickets", "mix"])
def test_same_seed_same_rows_in_any_process(task):
    program = f"from sft_dist.data.{task} import {task}; import hashlib\nprint(hashlib.sha256(repr(list({task}(60, 1))).encode()).hexdigest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_tickets_have_no_duplicates_and_seeds_share_none():
    train = [request(row) for row in tickets(2000, 1)]
    held_out = {request(row) for row in tickets(500, 1001)}
    assert len(set(train)) == len(train)
    assert not held_out & set(train)


def test_held_out_tickets_recombine_sentences_with_new_values():
    def orders(seed):
        return {re.search(r"\b[A-Z]\d{5}\b", request(row)).group() for row in tickets(200, seed)}

    def emails(seed):
        return {re.search(r"\S+@\S+\w", request(row)).group() for row in tickets(200, seed)}

    assert len(orders(1) & orders(2)) <= 2
    assert len(emails(1) & emails(2)) < 40


def test_requests_do_not_name_a_category():
    for row in tickets(1500, 2):
        words = set(re.findall(r"[a-z]+", request(row).lower()))
        assert not words & set(CATEGORIES), request(row)


def test_requests_are_filled_in_and_about_a_hundred_tokens_long():
    lengths = []
    for row in tickets(600, 4):
        text = request(row)
        assert not re.search(r"[{}]|  |None", text), text
        lengths.append(len(row["prompt"][0]["content"].split()))
    assert 55 <= sum(lengths) / len(lengths) <= 80
    assert max(lengths) < 110


def test_every_category_has_varied_wording():
    for category in CATEGORIES:
        problems, asks = REQUESTS[category]
        assert len(set(problems)) >= 6 and len(set(asks)) >= 5
        others = {s for name in CATEGORIES if name != category for part in REQUESTS[name] for s in part}
        assert not others & {*problems, *asks}


def test_mix_rows_are_different_chats_of_every_kind():
    rows = list(mix(300, 1))
    assert collections.Counter(row["category"] for row in rows) == dict.fromkeys(KINDS, 60)
    assert len({str(row["messages"]) for row in rows}) == 300
    for row in rows:
        example = parse_row(row, "messages", "w", None)
        assert not any(re.search(r"[{}]", m["content"]) for m in example.messages)
    turns = collections.Counter(len(row["messages"]) for row in rows)
    assert turns[2] == 240 and turns[4] and turns[6]


def test_mix_goes_on_without_duplicates_when_its_tables_are_used_up():
    rows = list(mix(4000, 1))
    assert len({str(row["messages"]) for row in rows}) == 4000


def test_another_seed_gives_another_mix():
    assert list(mix(50, 1)) != list(mix(50, 2))


def test_arithmetic_is_right():
    checked = 0
    signs = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": int.__floordiv__}
    for row in mix(1500, 5):
        for message in row["messages"]:
            for a, sign, b, result in re.findall(r"(\d+) ([-+x/]) (\d+) = (-?\d+)", message["content"]):
                assert signs[sign](int(a), int(b)) == int(result), message
                assert sign != "/" or int(a) % int(b) == 0
                checked += message["role"] == "assistant"
    assert checked > 300


def test_arithmetic_answers_belong_to_their_questions():
    for row in mix(1500, 6):
        if row["category"] == "arithmetic":
            question, answer = (m["content"] for m in row["messages"])
            asked, used = set(re.findall(r"\d+", question)), set(re.findall(r"\d+", answer))
            assert asked <= used


def test_phrases_have_every_language():
    assert all(len(translations) == len(LANGUAGES) and all(translations) for translations in PHRASES.values())


# --- extraction, and Chinese -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("answer", ["json", "fields"])
def test_extraction_answers_stand_in_the_letter_and_can_be_scored(language, answer):
    rows = list(extraction(300, 1, language, answer))
    assert len({row["prompt"][0]["content"] for row in rows}) == 300
    for row in rows:
        text = row["prompt"][0]["content"]
        assert all(value in text for value in row["values"].values())
        assert set(row["values"]) == {"name", "email", "order"}
        assert row["completion"] == [{"role": "assistant", "content": row["expected"]}]
        assert row["metric"] == answer
        if answer == "json":
            assert json.loads(row["expected"]) == row["values"]
        else:
            spoken = [re.split(": |\uff1a", line)[1] for line in row["expected"].splitlines()]
            assert spoken == list(row["values"].values())
        assert not re.search(r"\{[a-z_]+\}|None", text.partition("\n\n")[2])
        assert parse_row(row, "auto", "w").first_trained == 1


def test_chinese_tickets_are_balanced_and_do_not_name_their_category():
    rows = list(tickets(1200, 1, "zh"))
    assert collections.Counter(row["category"] for row in rows) == dict.fromkeys(tickets_zh.CATEGORIES, 200)
    assert len({row["prompt"][0]["content"] for row in rows}) == 1200
    for row in rows:
        request = row["prompt"][0]["content"].removeprefix(tickets_zh.INSTRUCTION)
        assert not re.search(r"\{[a-z_]+\}|None", request)
        assert not any(category in request for category in tickets_zh.CATEGORIES), request
    for problems, asks in tickets_zh.REQUESTS.values():
        assert len(set(problems)) >= 6 and len(set(asks)) >= 5


@pytest.mark.parametrize("options", [{"language": "zh"}, {"language": "zh", "answer": "fields"}])
def test_same_seed_same_rows_of_every_language(options):
    task = "extraction" if "answer" in options else "tickets"
    assert list(task_rows(task, 50, 3, **options)) == list(task_rows(task, 50, 3, **options))
    assert list(task_rows(task, 50, 3, **options)) != list(task_rows(task, 50, 4, **options))


@pytest.mark.parametrize("task", ["tickets", "extraction", "mix"])
def test_a_folder_gets_8000_1000_and_1000_rows_of_which_none_is_twice(task, tmp_path):
    sizes = {"train": 8000, "validation": 1000, "test": 1000}
    paths = write_splits(task, 1, tmp_path / "rows", sizes)
    lines = [path.read_text(encoding="utf-8").splitlines() for path in paths]
    assert [(path.name, len(rows)) for path, rows in zip(paths, lines, strict=True)] == [
        (f"{name}.jsonl", size) for name, size in sizes.items()
    ]
    asked = [str(json.loads(line).get("prompt") or json.loads(line)["messages"]) for rows in lines for line in rows]
    assert len(set(asked)) == 10_000
    with pytest.raises(ConfigError, match=r"train\.jsonl already exists"):
        write_splits(task, 1, tmp_path / "rows", sizes)


def test_a_task_takes_its_own_options_only():
    with pytest.raises(ConfigError, match="the task mix knows no language zh"):
        task_rows("mix", 3, 1, language="zh")
