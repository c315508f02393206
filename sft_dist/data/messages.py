"""The messages of a conversation, checked and normalised; every problem names the message that has it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft_dist.data.example import Message
from sft_dist.data.json_keys import ONCE
from sft_dist.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# What other data sets call these roles; too far from ours for difflib to see.
OTHER_ROLES = {
    "human": "user",
    "customer": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
# Passed on to the chat template, which must know them.
REASONING = ("reasoning_content", "thinking")
PASSED_ON = {"assistant": REASONING, "tool": ("name", "tool_call_id")}
# A message that counts more than so often is a slip: a weight is a share or a small factor.
MAX_WEIGHT = 1000

Failure = Callable[..., DataError]


def conversation(
    value: Any, key: str, fail: Failure, roles: Mapping[str, str], names: Mapping[str, str]
) -> list[Message]:
    """The messages in `value`. `roles` maps the row's own words for roles, `names` role and content to its own keys."""
    value = parsed(value)
    if not isinstance(value, (list, tuple)):
        raise fail(f"{key} is {kind(value)}, not a list of messages")
    if not value:
        raise fail(f"{key} is an empty list", "no_answer")
    return [_message(item, f"{key}[{index}]", fail, roles, names) for index, item in enumerate(value)]


def check_order(messages: Sequence[Message], labels: Sequence[str], fail: Failure) -> None:
    """Raises what `fail` makes if the messages, which `labels` name, are not a conversation with an answer at its end."""
    if all(message["role"] != "assistant" for message in messages):
        raise fail("has no assistant message, so there is no answer to train on", "no_answer")
    previous = None
    for label, message in zip(labels, messages, strict=True):
        role = message["role"]
        if role == "system" and label != labels[0]:
            raise fail(f"{label} is a system message; only the first message may be one", "wrong_order")
        if role == "assistant" and previous not in ("user", "tool"):
            article = "another" if previous == role else "a"
            follows = f"follows {article} {previous} message" if previous else "is the first message"
            raise fail(f"{label} (assistant) {follows}; an answer must follow a user or tool message", "wrong_order")
        if role == "tool" and previous not in ("assistant", "tool"):
            raise fail(f"{label} (tool) must follow an assistant message", "wrong_order")
        silent = not message["content"].strip() and not message.get("tool_calls")
        if role in ("user", "assistant") and silent:
            what = "answer of the assistant" if role == "assistant" else "user message"
            raise fail(f"{label} is an empty {what}", "empty_answer" if role == "assistant" else "empty_question")
        previous = role
    if previous != "assistant":
        raise fail(
            f"the last message ({labels[-1]}) is from the {previous}; a row ends with the assistant's answer",
            "wrong_order",
        )
    if not any(message.get("train", True) for message in messages if message["role"] == "assistant"):
        raise fail("every answer has train: false or weight 0, so there is nothing to train on", "no_answer")


def text(value: Any, label: str, fail: Failure) -> str:
    """`value`, which must be text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise fail(f"{label} is {kind(value)}, not text")
    # JSON can spell half of a surrogate pair ("\ud83d"), which no tokenizer or file takes.
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise fail(f"{label} holds half of a surrogate pair (a cut emoji), which is not valid text", "not_text")
    return value


def parsed(value: Any) -> Any:
    """The value of text that holds a JSON list or object, as tables store them; others unchanged. Raises KeyTwice."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return ONCE.decode(value)
        except (ValueError, RecursionError):
            return value
    return value


def without_nulls(value: Any) -> Any:
    """`value` without the keys that are null, at every depth. Items of lists stay: a table fills up objects, not lists."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def kind(value: Any) -> str:
    """What `value` is, in words."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a value of type {type(value).__name__}")


def shown_keys(record: Mapping[Any, Any]) -> str:
    """The keys of a row, on one short line."""
    return cut(", ".join(key if str(key).isprintable() else repr(key) for key in record), 120) or "none"


def cut(value: str, length: int = 40) -> str:
    """`value` in at most `length` characters."""
    return value if len(value) <= length else value[: length - 3] + "..."


def _message(item: Any, label: str, fail: Failure, roles: Mapping[str, str], names: Mapping[str, str]) -> Message:
    role_key, content_key = names.get("role", "role"), names.get("content", "content")
    if not isinstance(item, Mapping):
        raise fail(f"{label} is {kind(item)}, not an object with {role_key} and {content_key}")
    said = item.get(role_key)
    if said is None:
        raise fail(f"{label} has no {role_key} (its keys: {shown_keys(item)})")
    role = _role(said, label, fail, roles)
    message: Message = {"role": role, "content": ""}
    content = item.get(content_key)
    calls = _calls(item.get("tool_calls"), label, fail)
    if said == "function_call" and role == "assistant":
        calls, content = _calls(content, label, fail), ""
    if content is None and not calls:
        raise fail(f"{label} ({role}) has no {content_key}")
    message["content"] = _content("" if content is None else content, f"{label} ({role}).{content_key}", fail)
    if item.get("function_call") not in (None, "", {}):
        raise fail(f"{label} has function_call, which no chat template reads; write it as tool_calls")
    if calls:
        if role != "assistant":
            raise fail(f"{label} ({role}) has tool_calls; only the assistant calls tools", "wrong_order")
        message["tool_calls"] = calls
    for key in PASSED_ON.get(role, ()):
        if item.get(key) not in (None, ""):
            message[key] = text(item[key], f"{label} ({role}).{key}", fail)
    weight = _weight(item, label, fail)
    if weight == 0:
        message["train"] = False
    elif weight != 1:
        message["weight"] = weight
    return message


def _role(said: Any, label: str, fail: Failure, roles: Mapping[str, str]) -> str:
    role = roles.get(str(said), said)
    if role in ROLES:
        return str(role)
    near = OTHER_ROLES.get(str(said).lower()) or next(
        iter(difflib.get_close_matches(str(said).lower(), [*ROLES, *roles])), None
    )
    guess = f'; did you mean "{near}"?' if near else ""
    known = ", ".join([*ROLES, *roles])
    raise fail(
        f"{label} has the unknown role {cut(repr(said))}{guess} (roles: {known}; `roles` of the source maps others)",
        "unknown_role",
    )


def _weight(item: Mapping[str, Any], label: str, fail: Failure) -> float:
    """How much each token of a message counts in the loss, as far as `train` and `weight` in it say; 0: not at all."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise fail(f"{label}.train is {kind(train)}, not true or false")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 <= weight <= MAX_WEIGHT):
        raise fail(f"{label}.weight is {cut(repr(weight))}; it is a number from 0 (not trained) to {MAX_WEIGHT}")
    return 0.0 if train is False else 1.0 if weight is None else float(weight)


def _content(value: Any, label: str, fail: Failure) -> str:
    """Content as text; parts that are text are joined."""
    if not isinstance(value, (list, tuple)):
        return text(value, label, fail)
    pieces = []
    for index, part in enumerate(value):
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and "text" in part:
            pieces.append(text(part["text"], f"{label}[{index}].text", fail))
        elif isinstance(part, str):
            pieces.append(text(part, f"{label}[{index}]", fail))
        else:
            what = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise fail(f"{label}[{index}] is a part of type {cut(repr(what))}; only parts of text are supported")
    return "".join(pieces)


def _calls(value: Any, label: str, fail: Failure) -> list[dict[str, Any]]:
    """Tool calls as chat templates read them, with arguments as an object; [] if there are none."""
    value = parsed(value)
    if value in (None, "", [], {}):
        return []
    calls = []
    for call in value if isinstance(value, (list, tuple)) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise fail(f"{label} has a tool call without the name of a function", "wrong_tool_call")
        arguments = parsed(function.get("arguments", {}))
        if not isinstance(arguments, Mapping):
            raise fail(f"{label} calls {cut(function['name'])} with arguments that are no object", "wrong_tool_call")
        identity = {"id": str(call["id"])} if call.get("id") else {}
        given = {str(name): item for name, item in arguments.items()}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": given}})
    return calls
