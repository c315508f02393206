"""One row of a data file, checked and normalised: chat messages, or plain prompt and completion."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_dist.config.schema import DataFormat
from sft_dist.errors import DataError

RIGHT_ROWS = {
    "messages": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    "prompt_completion": '{"prompt": "2 + 2 =", "completion": " 4"}',
    "instruction": '{"instruction": "Translate to French", "input": "Good morning", "output": "Bonjour"}',
}
RIGHT_CHAT_PAIR = (
    '{"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello!"}]}'
)
ROLES = ("system", "user", "assistant", "tool")
# What other data sets call these roles; too far from ours for difflib to see.
OTHER_ROLES = {"human": "user", "customer": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# Keys that change what a message says or whether it is trained: dropping them in silence would train on something else.
REFUSED_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")

Failure = Callable[[str], DataError]
Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One row, normalised. Chat rows have `messages`; plain text rows have `prompt` and `completion`."""

    messages: tuple[Message, ...] = ()
    """{"role": system|user|assistant|tool, "content": text}, ending with the assistant."""
    prompt: str | None = None
    """Plain text before the completion; no chat template is applied to it."""
    completion: str | None = None
    """Plain text to train on."""
    first_trained: int = 0
    """Index of the first message that may be trained; prompt/completion chat rows train the completion only."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The row's other columns (category, expected, ...)."""
    where: str = ""
    """Origin for messages to the user: `rows.jsonl:17`, or `task tickets, row 17`."""


def detect_format(record: Any, where: str = "the first row") -> DataFormat:
    """The format that the keys of `record` speak for; DataError, naming the keys found, if there is none."""
    if not isinstance(record, Mapping):
        raise _not_an_object(record, where)
    if "messages" in record:
        return "messages"
    if "prompt" in record and "completion" in record:
        return "prompt_completion"
    if "instruction" in record:
        return "instruction"
    if "prompt" in record:
        return "prompt_completion"
    hint = "known formats:" + "".join(f"\n    {name:18} {row}" for name, row in RIGHT_ROWS.items())
    if "conversations" in record:
        hint = 'rename "conversations" to "messages", "from" to "role" and "value" to "content"\n  ' + hint
    raise DataError(f"{where}: the format cannot be told from its keys ({_keys(record)})", hint=hint)


def parse_row(record: Any, data_format: DataFormat, where: str, system: str | None) -> Example:
    """`record` as an Example; `system` is put before a conversation that has no system message.

    Raises DataError with `where`, what is wrong, and a right row as its hint.
    """
    if not isinstance(record, Mapping):
        raise _not_an_object(record, where)
    name = detect_format(record, where) if data_format == "auto" else data_format
    fail = functools.partial(_bad_row, where, RIGHT_ROWS[name])
    used: tuple[str, ...]
    prompt = completion = None
    messages: list[Message] = []
    first_trained = 0
    if name == "messages":
        used = ("messages",)
        messages = _conversation(_need(record, "messages", fail), fail)
    elif name == "instruction":
        messages, used = _instruction(record, fail)
    else:
        used = ("prompt", "completion")
        before, after = _need(record, "prompt", fail), _need(record, "completion", fail)
        if isinstance(before, str) and isinstance(after, str):
            prompt, completion = _filled(before, "prompt", fail), _filled(after, "completion", fail)
        else:
            fail = functools.partial(_bad_row, where, RIGHT_CHAT_PAIR)
            messages, first_trained = _prompt_completion_chat(before, after, fail)
    if messages and system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        first_trained += first_trained > 0
    return Example(
        messages=tuple(messages),
        prompt=prompt,
        completion=completion,
        first_trained=first_trained,
        fields={str(key): value for key, value in record.items() if key not in used},
        where=where,
    )


def prompt_messages(example: Example) -> tuple[Message, ...]:
    """The messages before the last assistant message: what a model is asked. () for a plain text row."""
    for index in range(len(example.messages) - 1, -1, -1):
        if example.messages[index]["role"] == "assistant":
            return example.messages[:index]
    return example.messages


def expected_answer(example: Example) -> str:
    """What a model should answer: the column `expected` if the row has it, else the last answer or the completion."""
    expected = example.fields.get("expected")
    if expected is not None:
        return str(expected)
    if example.completion is not None:
        return example.completion
    return next((m["content"] for m in reversed(example.messages) if m["role"] == "assistant"), "")


def _instruction(record: Mapping[str, Any], fail: Failure) -> tuple[list[Message], tuple[str, ...]]:
    """The user's and the assistant's message, and the keys that they came from."""
    question = _filled(_need(record, "instruction", fail), "instruction", fail)
    extra = record.get("input")
    if extra is not None and _text(extra, "input", fail).strip():
        question = f"{question}\n\n{extra}"
    key = "response" if record.get("output") is None else "output"
    if record.get(key) is None:
        raise fail(f'has no answer: neither "output" nor "response" holds one (its keys: {_keys(record)})')
    answer = _filled(record[key], key, fail)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages, ("instruction", "input", key)


def _conversation(value: Any, fail: Failure) -> list[Message]:
    messages = _messages(value, "messages", fail)
    _check_order(messages, [f"messages[{i}]" for i in range(len(messages))], fail)
    return messages


def _prompt_completion_chat(before: Any, after: Any, fail: Failure) -> tuple[list[Message], int]:
    if isinstance(before, str) or isinstance(after, str):
        raise fail(
            f"prompt is {_kind(before)} and completion is {_kind(after)}; both must be text, or both lists of messages"
        )
    prompt, completion = _messages(before, "prompt", fail), _messages(after, "completion", fail)
    if completion[0]["role"] != "assistant":
        raise fail(f"completion[0] is from the {completion[0]['role']}; a completion starts with the assistant")
    labels = [f"prompt[{i}]" for i in range(len(prompt))] + [f"completion[{i}]" for i in range(len(completion))]
    _check_order(prompt + completion, labels, fail)
    return prompt + completion, len(prompt)


def _messages(value: Any, key: str, fail: Failure) -> list[Message]:
    if not isinstance(value, (list, tuple)):
        raise fail(f"{key} is {_kind(value)}, not a list of messages")
    if not value:
        raise fail(f"{key} is an empty list")
    return [_message(item, f"{key}[{index}]", fail) for index, item in enumerate(value)]


def _message(item: Any, label: str, fail: Failure) -> Message:
    if not isinstance(item, Mapping):
        raise fail(f"{label} is {_kind(item)}, not an object with role and content")
    role, content = item.get("role"), item.get("content")
    if role is None:
        raise fail(f"{label} has no role (its keys: {_keys(item)})")
    if role not in ROLES:
        near = OTHER_ROLES.get(str(role).lower()) or next(
            iter(difflib.get_close_matches(str(role).lower(), ROLES)), None
        )
        guess = f'; did you mean "{near}"?' if near else ""
        raise fail(f"{label} has the unknown role {_cut(repr(role))}{guess} (roles: {', '.join(ROLES)})")
    for key in REFUSED_KEYS:
        if item.get(key) not in (None, [], "", 1):
            raise fail(f"{label} has {key}, which is not supported; write it into content, or take it out")
    if content is None:
        raise fail(f"{label} ({role}) has no content")
    if isinstance(content, (list, tuple)):
        raise fail(f"{label} ({role}) has a list of parts as content; only plain text is supported")
    return {"role": role, "content": _text(content, f"{label} ({role}).content", fail)}


def _check_order(messages: list[Message], labels: list[str], fail: Failure) -> None:
    if all(message["role"] != "assistant" for message in messages):
        raise fail("has no assistant message, so there is no answer to train on")
    previous = None
    for label, message in zip(labels, messages, strict=True):
        role = message["role"]
        if role == "system" and label != labels[0]:
            raise fail(f"{label} is a system message; only the first message may be one")
        if role == "assistant" and previous not in ("user", "tool"):
            article = "another" if previous == role else "a"
            follows = f"follows {article} {previous} message" if previous else "is the first message"
            raise fail(f"{label} (assistant) {follows}; an answer must follow a user or tool message")
        if role == "tool" and previous not in ("assistant", "tool"):
            raise fail(f"{label} (tool) must follow an assistant message")
        if role in ("user", "assistant") and not message["content"].strip():
            raise fail(f"{label} is an empty {'answer of the assistant' if role == 'assistant' else 'user message'}")
        previous = role
    if previous != "assistant":
        raise fail(f"the last message ({labels[-1]}) is from the {previous}; a row ends with the assistant's answer")


def _need(record: Mapping[str, Any], key: str, fail: Failure) -> Any:
    if key not in record:
        raise fail(f'has no "{key}" (its keys: {_keys(record)})')
    if record[key] is None:
        raise fail(f"{key} is null")
    return record[key]


def _filled(value: Any, key: str, fail: Failure) -> str:
    if not _text(value, key, fail).strip():
        raise fail(f"{key} is empty")
    return str(value)


def _text(value: Any, label: str, fail: Failure) -> str:
    if not isinstance(value, str):
        raise fail(f"{label} is {_kind(value)}, not text")
    # JSON can spell half of a surrogate pair ("\ud83d"), which no tokenizer or file takes.
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise fail(f"{label} holds half of a surrogate pair (a cut emoji), which is not valid text")
    return value


def _bad_row(where: str, right_row: str, what: str) -> DataError:
    return DataError(f"{where}: {what}", hint=f"a right row: {right_row}")


def _not_an_object(record: Any, where: str) -> DataError:
    return _bad_row(where, RIGHT_ROWS["messages"], f"the row is {_kind(record)}, not a JSON object")


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a value of type {type(value).__name__}")


def _keys(record: Mapping[Any, Any]) -> str:
    return _cut(", ".join(key if str(key).isprintable() else repr(key) for key in record), 120) or "none"


def _cut(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
