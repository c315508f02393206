"""Rows of every format become Examples; rows that cannot be used say what is wrong with them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sft_dist.config.schema_data import COLUMNS
from sft_dist.data.formats import (
    RIGHT_CHAT_PAIR,
    RIGHT_ROWS,
    RowFormat,
    detect_format,
    expected_answer,
    parse_row,
    prompt_messages,
)
from sft_dist.errors import DataError


def says(role, content):
    return {"role": role, "content": content}


USER, ANSWER = says("user", "Hi"), says("assistant", "Hello!")


def test_messages_row_keeps_turns_and_other_columns():
    row = {
        "messages": [says("system", "Be kind."), USER, ANSWER, says("user", "Bye"), says("assistant", "Bye!")],
        "id": 7,
    }
    example = parse_row(row, "auto", "rows.jsonl:3", None)
    assert example.messages == tuple(row["messages"])
    assert (example.first_trained, example.fields, example.where) == (0, {"id": 7}, "rows.jsonl:3")
    assert prompt_messages(example) == tuple(row["messages"][:4])
    assert expected_answer(example) == "Bye!"


def test_extra_keys_of_messages_are_left_out_but_text_is_untouched():
    row = {"messages": [{**USER, "name": "Ann", "tool_calls": None}, {**ANSWER, "content": " a\n", "weight": 1}]}
    assert parse_row(row, "messages", "w", None).messages == (USER, says("assistant", " a\n"))


def test_the_weight_of_a_message_is_kept_where_it_says_more_than_whether_it_is_trained():
    answers = [{**ANSWER, "weight": 0.25}, {**ANSWER, "weight": 1.0}, {**ANSWER, "weight": 0, "train": True}]
    asked = {**USER, "weight": 0.5}
    row = {"messages": [message for answer in answers for message in (asked, answer)]}
    kept = parse_row(row, "messages", "w", None).messages
    assert kept[0] == asked
    assert kept[1::2] == ({**ANSWER, "weight": 0.25}, ANSWER, {**ANSWER, "train": False})


def test_tool_messages_stand_between_answers():
    messages = [
        USER,
        says("assistant", "look up"),
        says("tool", ""),
        says("tool", "42"),
        says("assistant", "It is 42."),
    ]
    assert parse_row({"messages": messages}, "auto", "w", None).messages == tuple(messages)


def test_plain_prompt_completion_has_no_messages_and_takes_no_system():
    example = parse_row({"prompt": "2 + 2 =", "completion": " 4"}, "auto", "w", "Be kind.")
    assert (example.prompt, example.completion, example.messages) == ("2 + 2 =", " 4", ())
    assert prompt_messages(example) == ()
    assert expected_answer(example) == " 4"


def test_chat_prompt_completion_trains_the_completion_only():
    row = {"prompt": [USER, ANSWER, says("user", "More")], "completion": [says("assistant", "Yes")], "expected": "Yes."}
    example = parse_row(row, "auto", "w", None)
    assert [m["content"] for m in example.messages] == ["Hi", "Hello!", "More", "Yes"]
    assert example.first_trained == 3
    assert expected_answer(example) == "Yes."
    with_system = parse_row(row, "auto", "w", "Be kind.")
    assert with_system.messages[0] == says("system", "Be kind.")
    assert with_system.first_trained == 4
    assert prompt_messages(with_system) == with_system.messages[:4]


def test_system_is_not_put_before_another_and_does_not_change_the_row():
    row = {"messages": [USER, ANSWER]}
    assert [m["role"] for m in parse_row(row, "auto", "w", "S").messages] == ["system", "user", "assistant"]
    assert len(row["messages"]) == 2
    own = {"messages": [says("system", ""), USER, ANSWER]}
    assert parse_row(own, "auto", "w", "S").messages[0] == says("system", "")


@pytest.mark.parametrize(
    ("row", "question", "answer", "fields"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2", "3", {}),
        ({"instruction": "Add", "input": "", "output": "3", "id": 1}, "Add", "3", {"id": 1}),
        ({"instruction": "Add", "input": None, "output": None, "response": "3"}, "Add", "3", {"output": None}),
        ({"instruction": "Add", "response": "3"}, "Add", "3", {}),
    ],
)
def test_instruction_rows(row, question, answer, fields):
    example = parse_row(row, "auto", "w", None)
    assert example.messages == (says("user", question), says("assistant", answer))
    assert example.fields == fields


def test_expected_column_may_be_a_number_and_null_is_no_answer():
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    assert expected_answer(parse_row({**row, "expected": 4}, "auto", "w", None)) == "4"
    spelled = {"x": "x", '{"a": "\u00e9"}': {"a": "\u00e9"}, "[1, 2]": [1, 2], "true": True, "4.5": 4.5}
    for text, value in spelled.items():
        assert expected_answer(parse_row({**row, "expected": value}, "auto", "w", None)) == text
    in_a_table = parse_row({**row, "expected": {"a": 1, "of_other_rows": None}}, "auto", "w", None, table=True)
    assert expected_answer(in_a_table) == '{"a": 1}'
    assert expected_answer(parse_row({**row, "expected": None}, "auto", "w", None)) == " 4"


@pytest.mark.parametrize("name", RIGHT_ROWS)
def test_right_rows_shown_to_users_are_right(name):
    row = json.loads(RIGHT_ROWS[name])
    assert detect_format(row) == name
    assert parse_row(row, name, "w", None).where == "w"
    assert parse_row(json.loads(RIGHT_CHAT_PAIR), "auto", "w", None).first_trained == 1


def test_detection_error_names_keys_and_formats():
    with pytest.raises(DataError) as caught:
        detect_format({"frage": "?", "antwort": "!"})
    assert "frage, antwort" in caught.value.message
    assert all(name in str(caught.value) for name in RIGHT_ROWS)
    assert "fields={prompt: YOUR_NAME" in str(caught.value)


MESSAGES_ERRORS = [
    ("text", "messages is text, not a list"),
    (None, "messages is null"),
    ([], "messages is an empty list"),
    (["Hi"], r"messages\[0\] is text, not an object"),
    ([{"from": "human", "value": "Hi"}], r"messages\[0\] has no role \(its keys: from, value\)"),
    ([USER, says("asistant", "x")], r"""messages\[1\] has the unknown role 'asistant'; did you mean "assistant"\?"""),
    ([USER, says("agent", "x")], r"unknown role 'agent'.* \(roles: system, .*; `roles` of the source maps others\)"),
    ([says("human", "x"), ANSWER], 'did you mean "user"'),
    ([says(3, "x"), ANSWER], "unknown role 3 "),
    ([USER, {"role": "assistant"}], r"messages\[1\] \(assistant\) has no content"),
    ([USER, says("assistant", None)], r"messages\[1\] \(assistant\) has no content"),
    ([USER, says("assistant", 4)], r"content is a number, not text"),
    (
        [USER, says("assistant", [{"type": "image", "url": "x"}])],
        r"content\[0\] is a part of type 'image'; only parts of text",
    ),
    ([USER, says("assistant", [{"type": "text", "text": 4}])], r"content\[0\]\.text is a number, not text"),
    ([USER, says("assistant", "cut \ud83d")], "half of a surrogate pair"),
    ([USER, {**ANSWER, "tool_calls": [{}]}], r"messages\[1\] has a tool call without the name of a function"),
    ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "x"}]}], "calls f with arguments that are no object"),
    ([{**USER, "tool_calls": [{"name": "f"}]}, ANSWER], r"messages\[0\] \(user\) has tool_calls"),
    ([USER, {**ANSWER, "function_call": {"name": "f"}}], "has function_call, which no chat template reads"),
    ([USER, {**ANSWER, "weight": 0}], "every answer has train: false or weight 0"),
    ([USER, {**ANSWER, "weight": -0.5}], r"weight is -0.5; it is a number from 0 \(not trained\) to 1000"),
    ([USER, {**ANSWER, "weight": float("nan")}], r"weight is nan; it is a number from 0"),
    ([USER, {**ANSWER, "weight": "0.5"}], r"weight is '0.5'; it is a number"),
    ([USER, {**ANSWER, "weight": True}], r"weight is True; it is a number"),
    ([USER, {**ANSWER, "train": "no"}], "train is text, not true or false"),
    ([USER], "has no assistant message, so there is no answer"),
    ([USER, says("assistant", " \n")], r"messages\[1\] is an empty answer of the assistant"),
    ([says("user", ""), ANSWER], r"messages\[0\] is an empty user message"),
    ([ANSWER], r"messages\[0\] \(assistant\) is the first message"),
    ([USER, ANSWER, ANSWER], r"messages\[2\] \(assistant\) follows another assistant"),
    ([says("system", "S"), ANSWER], "follows a system message"),
    ([USER, says("system", "S"), ANSWER], r"messages\[1\] is a system message; only the first"),
    ([USER, says("tool", "x"), ANSWER], r"messages\[1\] \(tool\) must follow an assistant"),
    ([USER, ANSWER, USER], r"the last message \(messages\[2\]\) is from the user"),
]
OTHER_ERRORS = [
    (["a"], "the row is a list, not a JSON object"),
    ("a", "the row is text, not a JSON object"),
    (None, "the row is null, not a JSON object"),
    (7, "the row is a number"),
    (True, "the row is true or false"),
    ({}, r"cannot be told from its keys \(none\)"),
    ({"prompt": "a"}, r'has no "completion" \(its keys: prompt\)'),
    ({"prompt": "a", "response": "b"}, r'has no "completion" \(its keys: prompt, response\)'),
    ({"prompt": "a", "completion": None}, "completion is null"),
    ({"prompt": "a", "completion": " "}, "completion is empty"),
    ({"prompt": "", "completion": "b"}, "prompt is empty"),
    ({"prompt": "a", "completion": 3}, "prompt is text and completion is a number; both must be text"),
    ({"prompt": "a", "completion": [ANSWER]}, "both must be text, or both lists of messages"),
    ({"prompt": [USER], "completion": []}, "completion is an empty list"),
    ({"prompt": [], "completion": [ANSWER]}, "prompt is an empty list"),
    ({"prompt": [USER], "completion": [USER]}, r"completion\[0\] is from the user"),
    ({"prompt": [USER, ANSWER], "completion": [ANSWER]}, r"completion\[0\] \(assistant\) follows another assistant"),
    ({"instruction": "a"}, "has no answer: neither"),
    ({"instruction": "a", "output": ""}, "output is empty"),
    ({"instruction": "a", "output": ["b"]}, "output is a list, not text"),
    ({"instruction": "", "output": "b"}, "instruction is empty"),
    ({"instruction": "a", "output": "b", "history": 5}, "history is a number, not a list of pairs"),
    ({"instruction": "a", "output": "b", "history": True}, "history is true or false, not a list of pairs"),
    ({"instruction": "a", "output": "b", "history": {"q": "a"}}, "history is an object, not a list of pairs"),
    ({"instruction": "a", "output": "b", "history": "q"}, "history is text, not a list of pairs"),
    ({"instruction": "a", "output": "b", "history": [5]}, r"history\[0\] is no pair"),
    ({"messages": "[" * 100_000}, "messages is text, not a list of messages"),
    ({"instruction": "a", "input": 3, "output": "b"}, "input is a number, not text"),
]


@pytest.mark.parametrize(("row", "message"), [({"messages": m}, e) for m, e in MESSAGES_ERRORS] + OTHER_ERRORS)
def test_every_bad_row_has_its_message(row, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_row(row, "auto", "rows.jsonl:17", None)
    assert caught.value.message.startswith("rows.jsonl:17: ")
    assert caught.value.hint and '"' in caught.value.hint
    assert caught.value.exit_code == 4


def test_named_format_is_not_guessed():
    with pytest.raises(DataError, match=r'has no "messages" \(its keys: prompt, completion\)'):
        parse_row({"prompt": "a", "completion": "b"}, "messages", "w", None)


def test_long_and_hostile_keys_stay_on_one_short_line():
    row = {"\x1b[2Jevil\n": 1, **{f"column_{i}": i for i in range(500)}}
    with pytest.raises(DataError) as caught:
        parse_row(row, "messages", "w", None)
    assert "\x1b" not in caught.value.message and "\n" not in caught.value.message
    assert len(caught.value.message) < 250


# --- the other formats -----------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def turns(example):
    return [(message["role"], message["content"]) for message in example.messages]


def test_sharegpt_rows_with_calls_and_observations():
    row = {
        "system": "Be kind.",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Weather in Rome?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Rome"}})},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "id": 3,
    }
    example = parse_row(row, "auto", "w")
    assert turns(example) == [
        ("system", "Be kind."),
        ("user", "Weather in Rome?"),
        ("assistant", ""),
        ("tool", "sunny"),
        ("assistant", "It is sunny."),
    ]
    assert example.messages[2]["tool_calls"] == [CALL]
    assert (example.tools, example.fields) == ((TOOL,), {"id": 3})
    own = [{"from": "system", "value": "Own."}, *row["conversations"]]
    assert turns(parse_row({"conversations": own}, "auto", "w", "S"))[0] == ("system", "Own.")


def test_conversations_with_roles_and_content_are_messages():
    assert detect_format({"conversations": [USER, ANSWER]}) == "messages"
    assert parse_row({"conversations": [USER, ANSWER]}, "auto", "w").messages == (USER, ANSWER)
    assert detect_format({"conversations": json.dumps([{"from": "human", "value": "Hi"}])}) == "sharegpt"


def test_renamed_roles_and_columns():
    row = {"dialog": [{"who": "client", "said": "Hi"}, {"who": "agent", "said": "Hello!"}], "note": "x"}
    how = RowFormat(
        columns={"messages": "dialog", "role": "who", "content": "said"}, roles={"client": "user", "agent": "assistant"}
    )
    example = parse_row(row, how, "w")
    assert (example.messages, example.fields) == ((USER, ANSWER), {"note": "x"})
    plain = RowFormat(columns={"prompt": "frage", "completion": "antwort"})
    example = parse_row({"frage": "2 + 2 =", "antwort": " 4"}, plain, "w")
    assert (example.prompt, example.completion, example.fields) == ("2 + 2 =", " 4", {})
    with pytest.raises(
        DataError,
        match=r"unknown role 'boss' \(roles: system, user, assistant, tool, client, agent; `roles` of the source maps others\)",
    ):
        parse_row({"dialog": [{"who": "boss", "said": "Hi"}]}, how, "w")


@pytest.mark.parametrize(
    ("fields", "row", "question", "answer"),
    [
        ({"completion": "good"}, {"prompt": "q", "good": "GOOD", "completion": "BAD"}, "q", "GOOD"),
        ({"prompt": "completion", "completion": "prompt"}, {"prompt": "a", "completion": "q"}, "q", "a"),
        ({"prompt": "x", "completion": "x"}, {"x": "both"}, "both", "both"),
        ({"completion": "completion"}, {"prompt": "q", "completion": "a"}, "q", "a"),
    ],
)
def test_a_column_that_is_mapped_wins_over_the_rows_own_of_that_name(fields, row, question, answer):
    example = parse_row(row, RowFormat("auto", fields), "w")
    assert (example.prompt, example.completion) == (question, answer)
    assert example.fields == {}


def test_a_mapped_column_wins_over_the_other_name_of_the_same_thing():
    row = {"instruction": "q", "output": "BAD", "gut": "GOOD"}
    assert turns(parse_row(row, RowFormat("instruction", {"response": "gut"}), "w"))[-1] == ("assistant", "GOOD")
    talk = {"messages": [USER, says("assistant", "BAD")], "dialog": [USER, says("assistant", "GOOD")]}
    for name in ("messages", "conversations"):
        assert turns(parse_row(talk, RowFormat("auto", {name: "dialog"}), "w"))[-1] == ("assistant", "GOOD")


def test_a_mapped_column_that_the_row_lacks_is_not_replaced_by_its_own():
    row = {"prompt": "q", "completion": "BAD"}
    with pytest.raises(DataError, match=r'has no "good", which fields gives as completion \(its keys: prompt\)'):
        parse_row(row, RowFormat("prompt_completion", {"completion": "good"}), "w")
    with pytest.raises(DataError, match=r"good \(fields.completion\) is null"):
        parse_row({**row, "good": None}, RowFormat("auto", {"completion": "good"}), "w")


def test_every_column_that_a_format_reads_may_be_mapped():
    for name, right in RIGHT_ROWS.items():
        row = json.loads(right)
        assert set(row) <= set(COLUMNS[name])
        other = {f"my_{key}": value for key, value in row.items()}
        mapped = parse_row(other, RowFormat(name, {key: f"my_{key}" for key in row}), "w")
        assert dataclasses.replace(mapped, where="") == dataclasses.replace(parse_row(row, "auto", ""), where="")


def test_alpaca_history_and_system():
    row = {
        "instruction": "And 3 + 3?",
        "input": "",
        "output": "6",
        "system": "Count.",
        "history": [["1 + 1?", "2"], ["2 + 2?", "4"]],
    }
    example = parse_row(row, "auto", "w", "other")
    asked = ["1 + 1?", "2", "2 + 2?", "4", "And 3 + 3?", "6"]
    assert turns(example) == [("system", "Count."), *zip(["user", "assistant"] * 3, asked, strict=True)]
    assert example.fields == {}
    with pytest.raises(DataError, match=r"history\[1\] is no pair"):
        parse_row({**row, "history": [["a", "b"], ["c"]]}, "auto", "w")


def test_questions_answers_and_plain_text():
    example = parse_row({"question": "2 + 2?", "answer": "4", "id": 1}, "auto", "w", "S")
    assert (turns(example), example.fields) == ([("system", "S"), ("user", "2 + 2?"), ("assistant", "4")], {"id": 1})
    example = parse_row({"text": "Once upon a time", "id": 1}, "auto", "w", "S")
    assert (example.messages, example.prompt, example.completion) == ((), "", "Once upon a time")
    assert example.fields == {"id": 1}


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "Hello"}, {"text": ", "}, "world"]
    assert (
        parse_row({"messages": [USER, says("assistant", parts)]}, "auto", "w").messages[1]["content"] == "Hello, world"
    )


def test_calls_reasoning_and_training_marks_are_kept():
    calling = {
        "role": "assistant",
        "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
    }
    answer = {**ANSWER, "reasoning_content": "Thinking.", "train": False}
    row = {
        "messages": [USER, calling, {"role": "tool", "name": "weather", "content": "sunny"}, answer],
        "tools": [TOOL],
    }
    example = parse_row(row, "auto", "w")
    assert example.messages == (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {**ANSWER, "reasoning_content": "Thinking.", "train": False},
    )
    assert example.tools == (TOOL,)


def test_null_in_arguments_is_what_a_table_filled_up_or_what_the_row_says():
    def arguments(given, table):
        row = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": given}]}]}
        example = parse_row(row, "auto", "w", table=table)
        return example.messages[1]["tool_calls"][0]["function"]["arguments"]

    given = {"a": 1, "b": None, "c": {"d": [{"e": None, "f": 0}, None]}}
    assert arguments(given, table=True) == {"a": 1, "c": {"d": [{"f": 0}, None]}}
    assert arguments(given, table=False) == given
    assert arguments('{"a": 1, "b": null}', table=True) == {"a": 1, "b": None}, "spelled out as text"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [says("asistant", "x")]}, "unknown_role"),
        ({"messages": [USER, USER]}, "no_answer"),
        ({"messages": [ANSWER, USER]}, "wrong_order"),
        ({"messages": [USER, says("assistant", " ")]}, "empty_answer"),
        ({"messages": [says("user", " "), ANSWER]}, "empty_question"),
        ({"prompt": "a", "completion": ""}, "empty_answer"),
        ({"question": "a", "answer": None}, "no_answer"),
        ({"instruction": "a", "output": ""}, "empty_answer"),
        ({"messages": 3}, "wrong_format"),
        ([], "wrong_format"),
    ],
)
def test_a_bad_row_says_what_kind_of_bad(row, reason):
    with pytest.raises(DataError) as caught:
        parse_row(row, "auto", "w")
    assert caught.value.reason == reason
