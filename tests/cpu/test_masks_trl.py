"""Token ids and labels are those that TRL's own preparation makes, row for row, over its families of templates."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import LossOn, ModelConfig
from sft_dist.data.formats import parse_row
from sft_dist.data.tokenize import tokenize
from sft_dist.train.tokenizer import RunTokenizer, load_tokenizer

# Families for which TRL has a variant with markers, and some for which it has none.
MARKED = (
    "qwen2_5",
    "qwen3",
    "llama3",
    "gemma",
    "gemma3",
    "phi3",
    "phi3_5",
    "deepseekv3",
    "glm4moe",
    "lfm2",
    "cohere",
    "gptoss",
)
OWN_MARKERS = ("llama3_training", "qwen3_training")
UNMARKED = ("llama3_1", "llama3_2", "lfm2_2_5")
SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<\uff5c[^<>]+\uff5c>|</?(?:s|bos|eos|start_of_turn|end_of_turn|think|tool_call)>|\[gMASK\]|<sop>"
)
HUGE = 10**9

Load = Callable[[str], RunTokenizer]


@pytest.fixture(scope="module")
def family(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`family("llama3")` is the tiny tokenizer with that template of TRL and its special tokens, as a run loads it."""

    def load(name: str) -> RunTokenizer:
        from transformers import AutoTokenizer
        from trl import chat_template_utils

        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        text = getattr(chat_template_utils, f"{name}_chat_template")
        special = sorted(set(SPECIAL.findall(text)))
        bos = next(
            (token for token in special if re.search("bos|begin.of.(text|sentence)|BOS|startoftext", token)), "<bos>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": [token for token in special if token != bos]})
        tokenizer.add_special_tokens({"bos_token": bos})
        tokenizer.chat_template = text
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folder)
        return load_tokenizer(ModelConfig(name=str(folder)))

    return load


def says(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    messages = [{"role": ("user", "assistant")[index % 2], "content": words} for index, words in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CONVERSATIONS = [
    says("Hi", "Hello!"),
    says("One?", "first", "Two?", "second\n\nparagraph", "Three?", "third \U0001f389 \u6771\u4eac"),
    says("Long question? " * 12, "short"),
    says("Short?", "a long answer " * 12, "And?", "done."),
    says("Code?", "```python\nx = {'a': [1, 2]}\n```\n- item\n\tindented"),
]
PAIRS = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in CONVERSATIONS]


def theirs(tokens: RunTokenizer, records: list[dict[str, Any]], folder: Path, **arguments: Any) -> list[Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from sft_dist.train.pretrained import resolve_model

    settings = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", shuffle_dataset=False, **arguments
    )
    model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(records), processing_class=tokens.tokenizer
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def ours(tokens: RunTokenizer, records: list[dict[str, Any]], loss_on: LossOn, max_length: int = HUGE) -> list[Any]:
    examples = [parse_row(record, "auto", "here") for record in records]
    rows = tokenize(examples, tokens.tokenizer, tokens.template, max_length=max_length, loss_on=loss_on)
    return [(row.input_ids, row.labels) for row in rows if row.trained]


@pytest.mark.parametrize("name", MARKED + OWN_MARKERS)
def test_families_with_markers(family: Load, tmp_path: Path, name: str) -> None:
    tokens = family(name)
    assert tokens.template.has_markers
    chats = [{"messages": turns} for turns in CONVERSATIONS]
    for limit in (None, 60):
        assert ours(tokens, chats, "assistant", limit or HUGE) == theirs(
            tokens, chats, tmp_path, assistant_only_loss=True, max_length=limit
        )
    assert ours(tokens, PAIRS, "assistant") == theirs(
        tokens, PAIRS, tmp_path, assistant_only_loss=True, max_length=None
    )


@pytest.mark.parametrize("name", MARKED[:4] + UNMARKED)
def test_the_whole_completion_and_everything(family: Load, tmp_path: Path, name: str) -> None:
    tokens = family(name)
    chats = [{"messages": turns} for turns in CONVERSATIONS]
    whole = [(ids, ids) for ids, _ in theirs(tokens, chats, tmp_path, max_length=None)]
    assert whole == theirs(tokens, chats, tmp_path, max_length=None)
    assert ours(tokens, chats, "all") == whole
    assert ours(tokens, PAIRS, "completion") == theirs(tokens, PAIRS, tmp_path, max_length=None)
    assert ours(tokens, PAIRS, "all") == theirs(tokens, PAIRS, tmp_path, max_length=None, completion_only_loss=False)
    # Of a conversation the completion is the last answer and what follows it.
    assert ours(tokens, chats, "completion") == ours(tokens, PAIRS, "completion")


PLAIN = [
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "Answer: ", "completion": "refund"},
    {"prompt": "Answer:  ", "completion": " refund"},
    {"prompt": "Line\n", "completion": "\nbreak"},
    {"prompt": "Half a wor", "completion": "d goes on"},
    {"prompt": "Say it", "completion": "\n\n\U0001f389"},
]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3"])
def test_plain_rows_and_text(family: Load, tmp_path: Path, name: str) -> None:
    tokens = family(name)
    assert ours(tokens, PLAIN, "assistant") == theirs(tokens, PLAIN, tmp_path, max_length=None)
    texts = [{"text": pair["prompt"] + pair["completion"]} for pair in PLAIN]
    assert ours(tokens, texts, "assistant") == theirs(tokens, texts, tmp_path, max_length=None)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLS = [
    {
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
            },
            {"role": "tool", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        "tools": [WEATHER],
    }
]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "glm4moe", "gptoss"])
def test_tool_calls_and_tools(family: Load, tmp_path: Path, name: str) -> None:
    tokens = family(name)
    assert ours(tokens, CALLS, "assistant") == theirs(
        tokens, CALLS, tmp_path, assistant_only_loss=True, max_length=None
    )


@pytest.mark.parametrize("name", ["qwen3", "glm4moe"])
def test_reasoning(family: Load, tmp_path: Path, name: str) -> None:
    tokens = family(name)
    messages = says("2 + 2?", "4")
    messages[1]["reasoning_content"] = "Two and two are four."
    rows = [{"messages": messages}]
    found = ours(tokens, rows, "assistant")
    assert found == theirs(tokens, rows, tmp_path, assistant_only_loss=True, max_length=None)
    assert "Two and two" in tokens.tokenizer.decode([label for label in found[0][1] if label != -100])
