"""One row of a data source, checked and normalised: chat messages, prompt and completion, or text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from sft_dist.config.schema import DataFormat
from sft_dist.data.example import Example, RowFormat, expected_answer, prompt_messages
from sft_dist.data.messages import Failure, check_order, conversation, kind, parsed, shown_keys, text, without_nulls
from sft_dist.errors import DataError

__all__ = ["Example", "RowFormat", "expected_answer", "prompt_messages"]

RIGHT_ROWS = {
    "messages": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
    "prompt_completion": '{"prompt": "2 + 2 =", "completion": " 4"}',
    "instruction": '{"instruction": "Translate to French", "input": "Good morning", "output": "Bonjour"}',
    "question_answer": '{"question": "What is 2 + 2?", "answer": "4"}',
    "text": '{"text": "Once upon a time, ..."}',
}
RIGHT_CHAT_PAIR = (
    '{"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello!"}]}'
)
# Names in `fields` for keys inside a message, not for columns.
IN_MESSAGES = ("role", "content")
# Two names for one thing, of which a format takes the one that is there.
OTHER_NAME = {"messages": "conversations", "conversations": "messages", "output": "response", "response": "output"}
# Columns that hold objects of which a chat template, or a score, gets all.
NESTED = ("messages", "conversations", "prompt", "completion", "tools", "expected")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def detect_format(record: Any, where: str = "the first row", columns: Mapping[str, str] | None = None) -> DataFormat:
    """The format that the keys of `record` speak for; DataError, naming the keys found, if there is none."""
    if not isinstance(record, Mapping):
        raise _not_an_object(record, where)
    record = _renamed(record, columns or {})
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        turns = parsed(record["conversations"])
        first = turns[0] if isinstance(turns, (list, tuple)) and turns else None
        return "messages" if isinstance(first, Mapping) and "role" in first else "sharegpt"
    if "prompt" in record and "completion" in record:
        return "prompt_completion"
    if "instruction" in record:
        return "instruction"
    if "question" in record and "answer" in record:
        return "question_answer"
    if "prompt" in record:
        return "prompt_completion"
    if "text" in record:
        return "text"
    known = "".join(f"\n    {name:18} {row}" for name, row in RIGHT_ROWS.items())
    hint = f"known formats:{known}\n  other names of columns: fields={{prompt: YOUR_NAME, completion: YOUR_NAME}}"
    raise DataError(f"{where}: the format cannot be told from its keys ({shown_keys(record)})", hint=hint)


def parse_row(
    record: Any, data_format: DataFormat | RowFormat, where: str, system: str | None = None, *, table: bool = False
) -> Example:
    """`record` as an Example; a system message is put before a conversation that has none.

    In a row of a `table` null in messages and tools stands for what this row does not have; elsewhere it is what it says.
    Raises DataError with `where`, what is wrong, and a right row as its hint; its `reason` says which kind of wrong.
    """
    how = data_format if isinstance(data_format, RowFormat) else RowFormat(data_format, system=system)
    if not isinstance(record, Mapping):
        raise _not_an_object(record, where)
    row = _renamed(record, how.columns)
    if table:
        row = {key: without_nulls(value) if key in NESTED else value for key, value in row.items()}
    name = detect_format(record, where, how.columns) if how.name == "auto" else how.name
    fail = functools.partial(_bad_row, where, RIGHT_ROWS[name])
    made = _READERS[name](row, how, fail)
    used = {"tools", "system"} if made.messages else set()
    rest = {str(key): value for key, value in row.items() if key not in made.fields and key not in used}
    messages, first_trained = made.messages, made.first_trained
    own = row.get("system") if messages else None
    opening = text(own, "system", fail) if own not in (None, "") else how.system
    if messages and opening is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": opening}, *messages)
        first_trained += first_trained > 0
    return Example(
        messages=messages,
        prompt=made.prompt,
        completion=made.completion,
        first_trained=first_trained,
        tools=_tools(row.get("tools"), fail) if messages else (),
        fields=rest,
        where=where,
    )


# Each reads one format: an Example whose `fields` are the columns that it used.


def _messages(record: Mapping[str, Any], how: RowFormat, fail: Failure) -> Example:
    key = "messages" if "messages" in record else "conversations" if "conversations" in record else "messages"
    return _chat(_need(record, key, how, fail), key, fail, how.roles, how.columns)


def _sharegpt(record: Mapping[str, Any], how: RowFormat, fail: Failure) -> Example:
    key = "messages" if "messages" in record else "conversations"
    names = {"role": "from", "content": "value", **how.columns}
    return _chat(_need(record, key, how, fail), key, fail, {**SHAREGPT_ROLES, **how.roles}, names)


def _chat(value: Any, key: str, fail: Failure, roles: Mapping[str, str], names: Mapping[str, str]) -> Example:
    messages = conversation(value, key, fail, roles, names)
    check_order(messages, [f"{key}[{i}]" for i in range(len(messages))], fail)
    return Example(messages=tuple(messages), fields={key: None})


def _prompt_completion(record: Mapping[str, Any], how: RowFormat, fail: Failure) -> Example:
    used: dict[str, Any] = {"prompt": None, "completion": None}
    before, after = _need(record, "prompt", how, fail), _need(record, "completion", how, fail)
    if isinstance(before, str) and isinstance(after, str):
        prompt, completion = _filled(before, "prompt", fail), _filled(after, "completion", fail, "empty_answer")
        return Example(prompt=prompt, completion=completion, fields=used)
    fail = functools.partial(_bad_row, fail.args[0], RIGHT_CHAT_PAIR) if isinstance(fail, functools.partial) else fail
    if isinstance(before, str) or isinstance(after, str):
        raise fail(
            f"prompt is {kind(before)} and completion is {kind(after)}; both must be text, or both lists of messages"
        )
    asked = conversation(before, "prompt", fail, how.roles, how.columns)
    answered = conversation(after, "completion", fail, how.roles, how.columns)
    if answered[0]["role"] != "assistant":
        raise fail(
            f"completion[0] is from the {answered[0]['role']}; a completion starts with the assistant", "wrong_order"
        )
    labels = [f"prompt[{i}]" for i in range(len(asked))] + [f"completion[{i}]" for i in range(len(answered))]
    check_order(asked + answered, labels, fail)
    return Example(messages=(*asked, *answered), first_trained=len(asked), fields=used)


def _instruction(record: Mapping[str, Any], how: RowFormat, fail: Failure) -> Example:
    question = _filled(_need(record, "instruction", how, fail), "instruction", fail)
    extra = record.get("input")
    if extra is not None and text(extra, "input", fail).strip():
        question = f"{question}\n\n{extra}"
    key = "response" if record.get("output") is None else "output"
    if record.get(key) is None:
        raise fail(
            f'has no answer: neither "output" nor "response" holds one (its keys: {shown_keys(record)})', "no_answer"
        )
    answer = _filled(record[key], key, fail, "empty_answer")
    turns = [*_history(record.get("history"), fail), (question, answer)]
    return _turns(turns, ("instruction", "input", key, "history"))


def _history(value: Any, fail: Failure) -> list[tuple[str, str]]:
    """The earlier turns of an Alpaca row: pairs of question and answer."""
    turns = []
    pairs = parsed(value)
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, (list, tuple)):
        raise fail(f"history is {kind(pairs)}, not a list of pairs of question and answer")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise fail(f"history[{index}] is no pair of question and answer")
        question = _filled(pair[0], f"history[{index}][0]", fail)
        turns.append((question, _filled(pair[1], f"history[{index}][1]", fail, "empty_answer")))
    return turns


def _question_answer(record: Mapping[str, Any], how: RowFormat, fail: Failure) -> Example:
    question = _filled(_need(record, "question", how, fail), "question", fail)
    answer = _filled(_need(record, "answer", how, fail), "answer", fail, "empty_answer")
    return _turns([(question, answer)], ("question", "answer"))


def _text(record: Mapping[str, Any], how: RowFormat, fail: Failure) -> Example:
    whole = _filled(_need(record, "text", how, fail), "text", fail, "empty_answer")
    return Example(prompt="", completion=whole, fields={"text": None})


def _turns(turns: list[tuple[str, str]], used: tuple[str, ...]) -> Example:
    messages = [
        {"role": role, "content": words}
        for question, answer in turns
        for role, words in (("user", question), ("assistant", answer))
    ]
    return Example(messages=tuple(messages), fields=dict.fromkeys(used))


_READERS: dict[str, Callable[[Mapping[str, Any], RowFormat, Failure], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "question_answer": _question_answer,
    "text": _text,
}


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """`record` under the format's names of columns; what the row itself calls so is another thing, and left out."""
    mapped = {ours: theirs for ours, theirs in columns.items() if ours not in IN_MESSAGES}
    if not mapped:
        return record
    away = {*mapped, *mapped.values(), *(OTHER_NAME[key] for key in mapped if key in OTHER_NAME)}
    others = {key: value for key, value in record.items() if key not in away}
    return {**others, **{ours: record[theirs] for ours, theirs in mapped.items() if theirs in record}}


def _tools(value: Any, fail: Failure) -> tuple[Any, ...]:
    tools = parsed(value)
    if tools in (None, "", [], ()):
        return ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise fail(f"tools is {kind(tools)}, not a list of JSON schemas")
    return tuple(dict(tool) for tool in tools)


def _need(record: Mapping[str, Any], key: str, how: RowFormat, fail: Failure) -> Any:
    theirs = how.columns.get(key, key)
    called = key if theirs == key else f"{theirs} (fields.{key})"
    if key not in record:
        mapped = "" if theirs == key else f", which fields gives as {key}"
        raise fail(f'has no "{theirs}"{mapped} (its keys: {shown_keys(record)})')
    if record[key] is None:
        raise fail(f"{called} is null", "no_answer" if key in ("completion", "answer") else "wrong_format")
    return record[key]


def _filled(value: Any, key: str, fail: Failure, reason: str = "empty_question") -> str:
    if not text(value, key, fail).strip():
        raise fail(f"{key} is empty", reason)
    return str(value)


def _bad_row(where: str, right_row: str, what: str, reason: str = "wrong_format") -> DataError:
    error = DataError(f"{where}: {what}", hint=f"a right row: {right_row}")
    error.reason = reason
    return error


def _not_an_object(record: Any, where: str) -> DataError:
    return _bad_row(where, RIGHT_ROWS["messages"], f"the row is {kind(record)}, not a JSON object")
