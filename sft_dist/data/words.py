"""Whether a rendered conversation holds the words of its messages, and where those of others than the assistant stand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from sft_dist.data.example import Message
from sft_dist.data.template import REASONING, Span
from sft_dist.errors import ConfigError


def marked(messages: Sequence[Message]) -> list[int]:
    """The messages, none of them the assistant's, that say themselves how much their words count in the loss."""
    own = ("train", "weight")
    return [i for i, it in enumerate(messages) if it["role"] != "assistant" and any(key in it for key in own)]


def refuse_without_effect(messages: Sequence[Message], loss_on: str) -> None:
    """Raises ConfigError for a weight of a message that is masked whatever it says; left untrained it is anyway."""
    for index in marked(messages):
        if "weight" in messages[index]:
            role, weight = messages[index]["role"], messages[index]["weight"]
            raise ConfigError(
                f"message {index} ({role}) has the weight {weight:g}, which has no effect: data.loss_on={loss_on} does not "
                "train it; take the weight out, or set data.loss_on=all"
            )


def refuse_lost(render: Callable[[Sequence[Message]], str], messages: Sequence[Message], text: str) -> None:
    """Raises ConfigError for what stands in `messages` and not in `text`, which `render` makes of them.

    Of several answers' reasoning a template may leave out the earlier ones, as it does when it asks.
    """
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and message["content"].strip() not in text:
            _refuse_passed_over(render, messages, index, text)
        # A template may write anew what encloses reasoning inside of the words.
        words = message["content"].rpartition("</think>")[2].strip() if message.get("tool_calls") else ""
        if words not in text:
            raise ConfigError(
                f"the chat template leaves out the words beside the tool call in message {index}",
                hint="take them out of the rows, or set model.chat_template to one that writes both",
            )
    reasoning = [message[key].strip() for message in messages for key in REASONING if message.get(key)]
    if reasoning and not any(it in text for it in reasoning):
        raise ConfigError(
            "the chat template leaves out reasoning_content, although it knows the name",
            hint="take it out of the rows, or set model.chat_template to one that writes it",
        )


def reasoning_left_out(text: str, messages: Sequence[Message]) -> int:
    """Of how many answers the reasoning does not stand in `text`: that of a field of its own, or up to </think> in the words."""
    return sum(any(thought not in text for thought in _thoughts(it)) for it in messages if it["role"] == "assistant")


def _thoughts(message: Message) -> list[str]:
    inside, end, _ = message["content"].rpartition("</think>")
    found = [message[key] for key in REASONING if message.get(key)] + [inside.rpartition("<think>")[2]] * bool(end)
    return [thought.strip() for thought in found]  # templates write the white space around it anew


def _refuse_passed_over(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], index: int, text: str
) -> None:
    # A template may write words in its own way (as JSON, in capitals), but other words must make another text.
    role = messages[index]["role"]
    if render(_with_words(messages, index, "other words")) == text:
        raise ConfigError(
            f"the chat template leaves out the words of message {index} ({role}): set model.chat_template to one that writes "
            f"them (chatml does), or take them out of the rows{' and unset data.system' * (role == 'system')}"
        )


def _with_words(messages: Sequence[Message], index: int, words: str) -> list[Message]:
    return [*messages[:index], {**messages[index], "content": words}, *messages[index + 1 :]]


def spans_of_others(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], text: str, tokens: re.Pattern[str]
) -> dict[int, list[Span]]:
    """Where in `text`, which `render` makes of the messages, the `marked` ones stand.

    Each span holds the words and, as an answer's does, the one of `tokens` that follows at once and so ends the turn.
    """
    found = {}
    for index in marked(messages):
        if messages[index]["content"].strip():
            begin, end = _words(render, messages, index, text)
            ending = tokens.match(text, end)
            found[index] = [(begin, ending.end() if ending else end)]
    return found


def _words(render: Callable[[Sequence[Message]], str], messages: Sequence[Message], index: int, text: str) -> Span:
    # Rendered with other words in their place, the conversation is the same before and after them, unless the template
    # writes them twice, or more than them depends on them.
    other = next(word for n in itertools.count() if (word := f"WORDS{n}INPLACE") not in text)
    changed = render(_with_words(messages, index, other))
    before, found, after = changed.partition(other)
    end = len(text) - len(after)
    if found and len(before) <= end and text.startswith(before) and text.endswith(after) and other not in after:
        return (len(before), end)
    raise ConfigError(
        f"the chat template writes the words of message {index} ({messages[index]['role']}) so that they cannot be told from "
        "the rest, and its train or weight cannot be followed; take these out, or set model.chat_template=chatml"
    )
