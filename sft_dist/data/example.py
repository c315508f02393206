"""One row in the form that everything after the reading knows: chat messages, prompt and completion, or text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_dist.config.schema_data import DataFormat, SourcePart

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row, normalised. Chat rows have `messages`; plain text rows have `prompt` and `completion`."""

    messages: tuple[Message, ...] = ()
    """{"role": system|user|assistant|tool, "content": text, ...}, ending with the assistant. A message that is not to be
    trained has `train` False, one whose tokens count other than once a `weight`."""
    prompt: str | None = None
    """Plain text before the completion; no chat template is applied to it. "" if the row is nothing but text."""
    completion: str | None = None
    """Plain text to train on."""
    first_trained: int = 0
    """Index of the first message that may be trained; prompt/completion chat rows train the completion only."""
    tools: tuple[Any, ...] = ()
    """JSON schemas of the functions that the assistant may call, for the chat template."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The row's other columns (category, expected, ...)."""
    where: str = ""
    """Origin for messages to the user: `rows.jsonl:17`, or `task tickets, row 17`."""


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a source are read."""

    name: DataFormat = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    """The format's own names of columns -> those of the rows."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The rows' own words for roles -> system, user, assistant, tool."""
    system: str | None = None
    """System message for conversations that have none."""

    @classmethod
    def of(cls, source: SourcePart, system: str | None) -> RowFormat:
        return cls(source.format, source.fields, source.roles, system)


def prompt_messages(example: Example) -> tuple[Message, ...]:
    """The messages before the last assistant message: what a model is asked. () for a plain text row."""
    for index in range(len(example.messages) - 1, -1, -1):
        if example.messages[index]["role"] == "assistant":
            return example.messages[:index]
    return example.messages


def expected_answer(example: Example) -> str:
    """What a model should answer: the column `expected` if the row has it, else the last answer or the completion.

    A value that is no text stands for what JSON spells it as.
    """
    expected = example.fields.get("expected")
    if expected is not None:
        return expected if isinstance(expected, str) else json.dumps(expected, ensure_ascii=False, default=str)
    if example.completion is not None:
        return example.completion
    return next((str(m["content"]) for m in reversed(example.messages) if m["role"] == "assistant"), "")
