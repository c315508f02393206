"""The chat template of a run: which one, and where in a rendered conversation the assistant speaks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]
# Parts of a message that say who did what, not what was said; many templates need none of them.
OPTIONAL = ("name", "tool_call_id")
# Parts that a template writes in its own way, must not write, or may leave out.
NOT_RENDERED = ("role", "content", "train", "weight", *OPTIONAL)
# transformers gives a message's reasoning to the template under each of these names.
REASONING = ("reasoning_content", "reasoning", "thinking")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_PROBE = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
)


@dataclass(frozen=True)
class ChatTemplate:
    """A template for asking, the same or an equivalent one for training, and what they need of the tokenizer."""

    origin: str
    """Where it comes from, in words."""
    text: str
    """For inference; saved with the model."""
    training_text: str
    """For training rows; the same, or TRL's variant of it with generation markers."""
    has_markers: bool
    """Whether `training_text` marks the assistant's words; otherwise they are found from rendered prefixes."""
    new_tokens: tuple[str, ...] = ()
    """Special tokens that the template needs and the vocabulary lacks."""


def choose_template(tokenizer: PreTrainedTokenizerBase, spec: str) -> ChatTemplate:
    """The template that `model.chat_template` names for this tokenizer.

    `auto`: the tokenizer's own, through TRL's training variant where TRL knows the family; ChatML if there is none.
    Raises ConfigError if a template file cannot be read.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    own: Any = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if spec in ("chatml", "plain") or (spec == "auto" and not own):
        name = "chatml" if spec == "auto" else spec
        text = resources.files("sft_dist").joinpath(f"resources/chat_templates/{name}.jinja").read_text("utf-8")
        origin = f"{name} template" + (", since the tokenizer has none" if spec == "auto" else "")
        known = tokenizer.get_vocab()
        new = tuple(token for token in CHATML_TOKENS if name == "chatml" and token not in known)
        return ChatTemplate(origin, text, text, True, new)
    if spec != "auto":
        try:
            text = Path(spec).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"model.chat_template {spec!r} cannot be read: {error}") from None
        return ChatTemplate(f"template file {spec}", text, text, has_generation_markers(text))
    if has_generation_markers(own):
        return ChatTemplate("the tokenizer's own template", own, own, True)
    try:
        training = get_training_chat_template(tokenizer) or own
    except ValueError:  # a family that TRL does not know
        return ChatTemplate("the tokenizer's own template, masks from rendered prefixes", own, own, False)
    return ChatTemplate("the tokenizer's own template, TRL's training variant of it", own, training, True)


def render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, **options: Any) -> str:
    """The conversation as text; `options` such as add_generation_prompt and enable_thinking go to the template.

    Raises ConfigError with the template's own complaint if it refuses the conversation.
    """
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **options)
    except (TemplateError, TypeError, KeyError) as error:
        raise _refusal(messages, error) from None
    return str(text)


def render_trained(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: Messages,
    first_trained: int = 0,
    tools: Sequence[Any] = (),
) -> tuple[str, list[Span]]:
    """The conversation as text, and the character spans of what the assistant says from `first_trained` on.

    A span holds the words and the end-of-turn token. Raises ConfigError if the template does not allow to tell, or has no
    place for something that the messages hold.
    """
    text, turns = render_turns(tokenizer, template, messages, tools)
    trained = [spans for turn, spans in turns.items() if turn >= first_trained and messages[turn].get("train", True)]
    return text, [span for spans in trained for span in spans]


def render_turns(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: Messages, tools: Sequence[Any] = ()
) -> tuple[str, dict[int, list[Span]]]:
    """The conversation as text, and where each message of the assistant stands in it. Raises ConfigError as above."""
    refuse_unseen(template.training_text, messages, tools)
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not template.has_markers:
        text, spans = _prefix_spans(tokenizer, template.training_text, messages, turns, options)
        return text, {turn: [span] for turn, span in zip(turns, spans, strict=True)}
    text, spans = _marked_spans(tokenizer, template.training_text, messages, options)
    if len(spans) == len(turns):
        return text, {turn: [span] for turn, span in zip(turns, spans, strict=True)}
    # Some templates mark an answer in several parts, or add one after the last: each is of the turn that it follows.
    found: dict[int, list[Span]] = {turn: [] for turn in turns}
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        begin = _shared(tokenizer, template, messages[:turn], options, text)
        end = len(text) if following is None else _shared(tokenizer, template, messages[:following], options, text)
        found[turn] = [span for span in spans if begin <= span[0] < end]
    if not all(found.values()) or sum(map(len, found.values())) != len(spans):
        raise ConfigError(
            f"the chat template marks {len(spans)} generation(s) in a conversation with {len(turns)} assistant messages",
            hint="put {% generation %} ... {% endgeneration %} around each assistant message, end-of-turn included",
        )
    return text, found


def _shared(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: Messages, options: dict[str, Any], text: str
) -> int:
    """How many characters `text` has in common with what the template makes of its first messages."""
    rendered = render(tokenizer, template.training_text, messages, **options)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(rendered, text, strict=False)))


def refuse_unseen(template: str, messages: Messages, tools: Sequence[Any]) -> None:
    """Raises ConfigError for what a template does not know: it would pass over it, and the row say something else."""
    held = {key for message in messages for key in message if key not in NOT_RENDERED}
    for key in sorted(held | ({"tools"} if tools else set())):
        if not any(name in template for name in (REASONING if key in REASONING else (key,))):
            raise ConfigError(
                f"the chat template has no place for {key}, which would be left out",
                hint=f"set model.chat_template to one that writes {key}, or take it out of the rows",
            )


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    """The token that ends each turn of the assistant, as text.

    Raises ConfigError if the trained part of a turn does not end with a token of its own: a model trained on that
    would never stop.
    """
    text, turns = render_turns(tokenizer, template, _PROBE)
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    by_length = sorted(special, key=len, reverse=True)
    endings = [text[spans[0][0] : spans[-1][1]].rstrip() for spans in turns.values()]
    # Some templates end the last answer with another token than those before it: generation stops at the last one's.
    tokens = [next((it for it in by_length if it and ending.endswith(it)), None) for ending in endings]
    if None not in tokens:
        return str(tokens[-1])
    raise ConfigError(
        f"{template.origin} trains a turn that ends in {endings[0][-30:]!r}, which is no end-of-turn token: the model "
        "would never learn to stop",
        hint="let the template end an assistant message with a special token inside its generation markers, or set "
        "model.chat_template=chatml",
    )


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, options: dict[str, Any]
) -> tuple[str, list[Span]]:
    # The function behind apply_chat_template; that method itself returns the marks only as a mask over tokens, which
    # it computes row by row.
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **options,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise _refusal(messages, error) from None
    return str(texts[0]), [(start, end) for start, end in spans[0]]


def _refusal(messages: Messages, error: Exception) -> ConfigError:
    from jinja2.exceptions import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):  # whatever the rows are
        return ConfigError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
            hint="mend it there, or set model.chat_template to another one, such as chatml",
        )
    roles = ", ".join(str(message.get("role")) for message in messages)
    return ConfigError(
        f"the chat template refuses a conversation with the roles {roles}: {error}",
        hint="change the rows, or set model.chat_template (chatml takes any roles)",
    )


def _prefix_spans(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Messages,
    turns: Sequence[int],
    options: dict[str, Any],
) -> tuple[str, list[Span]]:
    """Where each assistant turn stands, from what the template renders before it and up to its end."""
    text = render(tokenizer, template, messages, **options)
    spans = []
    for turn in turns:
        before = render(tokenizer, template, messages[:turn], add_generation_prompt=True, **options)
        upto = render(tokenizer, template, messages[: turn + 1], **options)
        if not upto.startswith(before) or not text.startswith(upto.rstrip()):
            raise ConfigError(
                "the tokenizer's chat template renders earlier turns differently once later ones follow, so the "
                "assistant's words cannot be told apart from the rest",
                hint="add {% generation %} markers to a copy of the template and set model.chat_template to that file, "
                "or set model.chat_template=chatml",
            )
        spans.append((len(before), len(upto.rstrip())))
    return text, spans
