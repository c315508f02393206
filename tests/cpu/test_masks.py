"""What is trained: the assistant's words and the token that ends its turn, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config, DataConfig, LossOn, ModelConfig, SourceConfig
from sft_dist.data.encode import Encoder
from sft_dist.data.formats import Example, parse_row
from sft_dist.data.prepare import prepare
from sft_dist.data.template import choose_template, render_trained
from sft_dist.data.tokenize import IGNORED, TokenizedRow, tokenize
from sft_dist.errors import ConfigError, DataError
from sft_dist.train.tokenizer import RunTokenizer, load_tokenizer

HUGE = 10**9
END = "<|im_end|>"


def chat(*turns: str, system: str | None = None) -> Example:
    """A conversation whose turns alternate between user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
    return parse_row({"messages": messages}, "messages", "here", system)


def rows_of(tokens: RunTokenizer, *examples: Example, **options: Any) -> list[TokenizedRow]:
    return list(tokenize(examples, tokens.tokenizer, tokens.template, **{"max_length": HUGE, **options}))


def trained_texts(tokens: RunTokenizer, row: TokenizedRow) -> list[str]:
    """The runs of trained tokens, decoded one by one."""
    runs: list[list[int]] = []
    previous = IGNORED
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(token)
        previous = label
    return [tokens.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


# --- four kinds of template ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with Qwen2.5's chat template: a family for which TRL has a training template."""
    from transformers import AutoTokenizer
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = qwen2_5_chat_template
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=["chatml", "plain", "qwen", pytest.param("demo", marks=pytest.mark.demo_model)],
)
def tokens(request: pytest.FixtureRequest, tiny_model_dir: Path, qwen_dir: Path) -> RunTokenizer:
    """A tokenizer with its template, as a run loads it."""
    if request.param == "demo":
        return load_tokenizer(ModelConfig(name=str(request.getfixturevalue("demo_model_dir"))))
    if request.param == "qwen":
        return load_tokenizer(ModelConfig(name=str(qwen_dir)))
    template = "auto" if request.param == "chatml" else "plain"
    return load_tokenizer(ModelConfig(name=str(tiny_model_dir), chat_template=template))


def as_trained(tokens: RunTokenizer, words: str) -> str:
    """The words as the template puts them, with the end-of-turn token; `plain` separates them from the role."""
    return f"{' ' if 'plain' in tokens.template.origin else ''}{words}{END}"


def assert_trained(tokens: RunTokenizer, row: TokenizedRow, *answers: str) -> None:
    """Exactly these answers are trained. TRL's variants may put their markers around the line breaks beside them."""
    found, expected = trained_texts(tokens, row), [as_trained(tokens, words) for words in answers]
    if "TRL's" in tokens.template.origin and len(found) == len(expected):
        forms = [(f"\n{text}\n", f"{text}\n", text) for text in expected]
        expected = [text if text in known else known[-1] for text, known in zip(found, forms, strict=True)]
    assert found == expected


def test_the_four_ways_to_a_mask_are_the_ones_meant(tokens: RunTokenizer, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["tokens"]
    told = {
        "chatml": ("chatml template, since the tokenizer has none", True),
        "plain": ("plain template", True),
        "qwen": ("the tokenizer's own template, TRL's training variant of it", True),
        "demo": ("the tokenizer's own template, masks from rendered prefixes", False),
    }
    assert (tokens.template.origin, tokens.template.has_markers) == told[kind]
    assert tokens.tokenizer.eos_token == END
    assert tokens.tokenizer.pad_token is not None


WORDS = {
    "one word": "refund",
    "sentence": "Your money is on its way; expect it on 3 May.",
    "umlauts": "Die Straße heißt Übermut.",
    "emoji": "Done \U0001f389\U0001f44d\U0001f3fd \u2764\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "cjk": "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
    "line breaks": "First line\nsecond line\n\n- item\n\tindented",
    "template's own marks": "Assistant: system\nuser",
    "line separator": "a\u2028b",
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_one_turn_trains_the_words_and_the_end_of_turn(tokens: RunTokenizer, words: str) -> None:
    (row,) = rows_of(tokens, chat("Which category?", words))
    assert_trained(tokens, row, words)
    assert row.trained > 1
    assert row.cut == 0


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_many_turns_train_every_answer(tokens: RunTokenizer, words: str) -> None:
    (row,) = rows_of(tokens, chat("One?", "first", "Two?", words, "Three?", "third one"))
    assert_trained(tokens, row, "first", words, "third one")


SPACES = {"space": " yes", "spaces": "   yes", "newline": "\nyes", "blank line": "\n\nyes", "tab": "\tyes"}


@pytest.mark.parametrize("words", SPACES.values(), ids=SPACES.keys())
def test_white_space_before_the_words_is_trained(tokens: RunTokenizer, words: str) -> None:
    """A token may hold the template's own line break and the answer's first one: it is trained, as TRL does."""
    (row,) = rows_of(tokens, chat("Say yes", words, "And again", words))
    found = trained_texts(tokens, row)
    assert [text.strip() for text in found] == [f"yes{END}"] * 2
    for text in found:
        assert as_trained(tokens, words) in text, "some of the answer's own white space is not trained"


@pytest.mark.parametrize("words", ["yes ", "yes   ", "yes\n", "yes\n\n", "yes \n\t"])
def test_white_space_after_the_words_is_trained(tokens: RunTokenizer, words: str) -> None:
    (row,) = rows_of(tokens, chat("Say yes", words, "And again", words))
    assert_trained(tokens, row, words, words)


@pytest.mark.parametrize("system", ["Be brief.", "Be brief. \U0001f642"])
def test_a_system_message_is_read_but_not_trained(tokens: RunTokenizer, system: str) -> None:
    (row,) = rows_of(tokens, chat("Hi", "Hello!", system=system))
    assert system in tokens.tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False)
    assert_trained(tokens, row, "Hello!")


def test_the_same_words_from_the_user_are_not_trained(tokens: RunTokenizer) -> None:
    (row,) = rows_of(tokens, chat("refund", "refund", "refund", "no refund"))
    assert_trained(tokens, row, "refund", "no refund")


def test_of_prompt_and_completion_only_the_completion_is_trained(tokens: RunTokenizer) -> None:
    record = {
        "prompt": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "Two?"},
        ],
        "completion": [
            {"role": "assistant", "content": "second"},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "third"},
        ],
    }
    with_system = parse_row(record, "prompt_completion", "here", "Be brief.")
    for example in (parse_row(record, "prompt_completion", "here", None), with_system):
        (row,) = rows_of(tokens, example)
        assert_trained(tokens, row, "second", "third")


@pytest.mark.parametrize("completion", [" 4", "4", "\n4 \U0001f600", f" 4{END}"])
def test_plain_text_trains_the_completion_and_the_eos_token(tokens: RunTokenizer, completion: str) -> None:
    record = {"prompt": "2 + 2 =", "completion": completion}
    (row,) = rows_of(tokens, parse_row(record, "prompt_completion", "here", None))
    assert trained_texts(tokens, row) == [completion.removesuffix(END) + END]
    assert tokens.tokenizer.decode(row.input_ids) == f"2 + 2 ={completion.removesuffix(END)}{END}"


def test_chat_and_plain_rows_in_one_batch_keep_their_order(tokens: RunTokenizer) -> None:
    plain = parse_row({"prompt": "2 + 2 =", "completion": " 4"}, "prompt_completion", "here", None)
    examples = [chat("a?", "A"), plain, chat("b?", "B"), plain, chat("c?", "C")]
    rows = rows_of(tokens, *examples)
    for row, words in zip(rows[::2], "ABC", strict=True):
        assert_trained(tokens, row, words)
    assert [trained_texts(tokens, row) for row in rows[1::2]] == [[f" 4{END}"]] * 2


def test_all_tokens_are_trained_if_asked_for(tokens: RunTokenizer) -> None:
    (row,) = rows_of(tokens, chat("Hi", "Hello!"), assistant_only_loss=False)
    assert row.labels == row.input_ids
    assert row.answer < row.trained


def test_what_is_trained_follows_what_is_asked(tokens: RunTokenizer) -> None:
    """The tokens before the answer are the ones that the model reads when it is asked."""
    from sft_dist.evaluate.generate import prompt_ids

    example = chat("One?", "first", "Two?", "second", system="Be brief.")
    (row,) = rows_of(tokens, example)
    asked = prompt_ids(tokens.tokenizer, list(example.messages[:-1]))
    assert row.input_ids[: len(asked)] == asked
    assert row.labels[len(asked)] != IGNORED
    assert tokens.tokenizer.decode(row.input_ids[len(asked) :]).strip() == f"second{END}"


def test_a_tokenizer_that_trims_offsets_still_trains_white_space(tiny_tokens: Callable[..., RunTokenizer]) -> None:
    """With trim_offsets a token of white space only has an empty character range; it is trained all the same."""
    from tokenizers import processors

    tokens = tiny_tokens()
    tokens.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    words = "def f():\n        return    1"
    (row,) = rows_of(tokens, chat("Count", words, "Again", words))
    assert trained_texts(tokens, row) == [words + END] * 2


def test_a_tokenizer_without_offsets_gives_the_same_rows(
    tokens: RunTokenizer, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    examples = [chat("One?", words, "Two?", "second \U0001f389", system="Be brief.") for words in WORDS.values()]
    examples.append(parse_row({"prompt": "2 + 2 =", "completion": " 4"}, "auto", "here"))
    expected = rows_of(tokens, *examples)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    assert rows_of(tokens, *examples) == expected
    assert load_tokenizer(ModelConfig(name=str(tiny_model_dir))).tokenizer.eos_token == END


def test_places_from_bytes_are_those_of_the_library(tokens: RunTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of tokens' bytes and the library's own offsets lead to the same masks, whatever the text."""
    encoder = Encoder(tokens.tokenizer)
    assert encoder._bytes is not None, "the tokenizer is a byte-level one"
    generator = random.Random(1)
    alphabet = [
        "a",
        "B",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "1",
        "'s",
        "\u00e9",
        "e\u0301",
        "\u6771",
        "\U0001f389",
        "<|im_end|>",
        "\xa0",
    ]
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(16))) for _ in range(60)]
    monkeypatch.setattr(encoder, "_bytes", None)
    real = encoder.encode(texts, add_special_tokens=False)
    monkeypatch.undo()
    ours = encoder.encode(texts, add_special_tokens=False)
    for text, one, other in zip(texts, ours, real, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        for first in range(len(text)):
            for last in range(first + 1, len(text) + 1):
                assert one.between(first, last) == other.between(first, last), (text, first, last)


# --- what is trained, by choice -------------------------------------------------------------------------------------


def test_only_the_last_answer_is_trained(tokens: RunTokenizer) -> None:
    (row,) = rows_of(tokens, chat("One?", "first", "Two?", "second"), loss_on="last")
    assert_trained(tokens, row, "second")


def test_a_message_may_be_left_untrained(tokens: RunTokenizer) -> None:
    turns = [dict(message) for message in chat("One?", "first", "Two?", "second", "Three?", "third").messages]
    for mark in ({"train": False}, {"weight": 0}):
        turns[3] |= mark
        example = parse_row({"messages": turns}, "messages", "here")
        (row,) = rows_of(tokens, example)
        assert_trained(tokens, row, "first", "third")
        (whole,) = rows_of(tokens, example, loss_on="all")
        left_out = [token for token, label in zip(whole.input_ids, whole.labels, strict=True) if label == IGNORED]
        assert tokens.tokenizer.decode(left_out).strip() == as_trained(tokens, "second").strip()
        turns[3] = {key: value for key, value in turns[3].items() if key not in mark}


def with_marks(**marks: dict[str, Any]) -> Example:
    """A conversation of four kinds of messages, of which some hold more: `{"train": False}` for example."""
    messages = [
        {"role": "system", "content": "SECRET one, and  two \u6771\u4eac."},
        {"role": "user", "content": "Ask SECRET one?\nAsk."},
        {"role": "assistant", "content": "Calling."},
        {"role": "tool", "content": '{"ask": "Ask SECRET one?"}'},
        {"role": "assistant", "content": "Ask SECRET one?\nAsk."},
    ]
    for role, mark in marks.items():
        next(it for it in messages if it["role"] == role).update(mark)
    return parse_row({"messages": messages}, "messages", "here")


def untrained_texts(tokens: RunTokenizer, row: TokenizedRow) -> list[str]:
    """The runs of tokens that are not trained, decoded one by one."""
    marks = [IGNORED if label != IGNORED else token for token, label in zip(row.input_ids, row.labels, strict=True)]
    return trained_texts(tokens, dataclasses.replace(row, labels=marks))


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_words_that_are_not_the_assistants_may_be_left_untrained(tokens: RunTokenizer, mark: dict[str, Any]) -> None:
    """With loss_on=all each is left out with the token that ends its turn; the same words elsewhere are trained."""
    plain = with_marks()
    for role in ("system", "user", "tool"):
        words = next(str(it["content"]) for it in plain.messages if it["role"] == role)
        # The plain template ends only answers with the token, and Qwen's frames what a tool says.
        framed = "plain" in tokens.template.origin or (role == "tool" and "TRL's" in tokens.template.origin)
        without, row = rows_of(tokens, plain, with_marks(**{role: mark}), loss_on="all")
        assert row.input_ids == without.input_ids
        assert without.labels == without.input_ids
        assert [text.strip() for text in untrained_texts(tokens, row)] == [words if framed else f"{words}{END}"]
    (row,) = rows_of(tokens, with_marks(system=mark, user=mark, tool=mark, assistant=mark), loss_on="all")
    assert len(untrained_texts(tokens, row)) == 4
    (row,) = rows_of(tokens, with_marks(system=mark, user=mark, tool=mark), loss_on="assistant")
    assert row == rows_of(tokens, plain, loss_on="assistant")[0], "they are masked as they are without the mark"


def test_words_of_a_completion_that_are_not_the_assistants_may_be_left_untrained(tokens: RunTokenizer) -> None:
    messages = [dict(message) for message in with_marks(tool={"train": False}).messages]
    example = parse_row({"prompt": messages[:2], "completion": messages[2:]}, "auto", "here")
    assert example.first_trained == 2
    (row,) = rows_of(tokens, example, loss_on="completion")
    trained = "".join(trained_texts(tokens, row))
    assert '{"ask"' not in trained
    assert trained.count("Ask SECRET one?") == 1


def test_words_inside_of_what_a_template_adds_are_left_out_alone(qwen_dir: Path) -> None:
    """Qwen's template frames what a tool says, and writes the tools behind the system message's words."""
    tokens = load_tokenizer(ModelConfig(name=str(qwen_dir)))
    marked = with_marks(system={"train": False}, tool={"train": False})
    schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    (row,) = rows_of(tokens, dataclasses.replace(marked, tools=(schema,)), loss_on="all")
    system, said = untrained_texts(tokens, row)
    assert system.strip() == marked.messages[0]["content"]
    assert said.strip() == marked.messages[3]["content"]


@pytest.mark.parametrize("loss_on", ["assistant", "last", "completion"])
def test_a_weight_without_effect_is_refused(tokens: RunTokenizer, loss_on: LossOn) -> None:
    row, right = rows_of(tokens, with_marks(user={"weight": 0.5}), with_marks(user={"weight": 1}), loss_on=loss_on)
    assert row.problem is not None and right.problem is None
    assert row.problem.startswith(f"message 1 (user) has the weight 0.5, which has no effect: data.loss_on={loss_on} ")


def test_words_that_a_template_writes_twice_cannot_be_left_untrained(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    tokens = tiny_tokens(chat_template=template_file(tmp_path, "{{ messages[0].content }}\n" + MARKED))
    row, right = rows_of(tokens, with_marks(system={"train": False}), with_marks(user={"train": False}), loss_on="all")
    assert row.problem is not None and "words of message 0 (system) so that they cannot be told" in row.problem
    assert right.problem is None and right.trained < len(right.input_ids)


@pytest.mark.parametrize("loss_on", ["assistant", "last", "completion", "all"])
def test_the_end_of_the_last_turn_is_trained_and_nothing_is_doubled(tokens: RunTokenizer, loss_on: LossOn) -> None:
    (row,) = rows_of(tokens, chat("One?", "first", "Two?", "second"), loss_on=loss_on)
    end = tokens.tokenizer.eos_token_id
    last = max(index for index, token in enumerate(row.input_ids) if token == end)
    assert row.labels[last] == end
    assert (
        all(label == IGNORED for label in row.labels[last + 1 :])
        or loss_on != "assistant"
        or "TRL's" in tokens.template.origin
    )


def test_a_beginning_that_is_written_twice_is_taken_out_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    """By a template that writes it before a text that holds it, and by a tokenizer that adds it to such a text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + MARKED
    tokenizer.save_pretrained(tmp_path / "bos")
    tokens = load_tokenizer(ModelConfig(name=str(tmp_path / "bos")))
    plain = parse_row({"prompt": "<bos>2 + 2 =", "completion": " 4"}, "auto", "here")
    for row, words in zip(rows_of(tokens, chat("Hi", "Hello!"), plain), ("Hello!", " 4"), strict=True):
        assert (row.input_ids[0], row.input_ids.count(bos)) == (bos, 1)
        assert trained_texts(tokens, row) == [f"{words}{END}"]


def test_what_a_template_has_no_place_for_is_refused(tiny_tokens: Callable[..., RunTokenizer]) -> None:
    tokens = tiny_tokens()
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    turns = [
        {"role": "user", "content": "Hi"},
        call,
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": "Hello!"},
    ]
    thought = {"role": "assistant", "content": "Hello!", "reasoning_content": "Greet."}
    for record, missing in (
        ({"messages": turns}, "tool_calls"),
        ({"messages": [turns[0], thought]}, "reasoning_content"),
        ({"messages": [turns[0], turns[3]], "tools": [{"type": "function"}]}, "tools"),
    ):
        for loss_on in ("assistant", "all"):
            (row,) = rows_of(tokens, parse_row(record, "auto", "here"), loss_on=loss_on)
            assert f"no place for {missing}" in str(row.problem)


def test_what_a_template_knows_by_name_and_leaves_out_is_refused(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    # As Llama 3.1's: of a message with a tool call nothing but the call; and reasoning of the last answer only.
    said = "{{ m.reasoning_content if loop.last }}{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}"
    template = MARKED.replace("{% generation %}{{ m.content }}", "{% generation %}" + said)
    (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
    tokens = tiny_tokens(chat_template=str(tmp_path / "own.jinja"))
    asked = {"role": "user", "content": "Hi"}
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"name": "f", "arguments": {}}]}
    thought, answer = [{"role": "assistant", "content": "Hello!", **one} for one in ({"reasoning_content": "Hm."}, {})]
    for messages, problem in (
        ([asked, call], "leaves out the words beside the tool call in message 1"),
        ([asked, {**call, "content": ""}], None),
        ([asked, thought, asked, answer], "leaves out reasoning_content"),
        ([asked, thought, asked, thought], None),
    ):
        for loss_on in ("assistant", "all"):
            (row,) = rows_of(tokens, parse_row({"messages": messages}, "auto", "here"), loss_on=loss_on)
            assert (problem or "None") in str(row.problem)


def test_a_message_that_the_template_passes_over_is_refused(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    def problem(template: str, role: str, loss_on: str) -> str:
        (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
        tokens = tiny_tokens(chat_template=str(tmp_path / "own.jinja"))
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        if role == "system":
            turns.insert(0, {"role": role, "content": 'Say "yes".'})
        else:
            turns += [{"role": role, "content": 'A "number".'}, turns[1]]
        (row,) = rows_of(tokens, parse_row({"messages": turns}, "auto", "here"), loss_on=loss_on)
        return str(row.problem)

    for passing, role, place in ((UNMARKED, "system", 0), (MARKED, "system", 0), (UNMARKED, "tool", 2)):
        without = passing.replace("for m in messages", f"for m in messages if m.role != '{role}'")
        in_its_own_way = passing.replace("{{ m.content }}", "{{ m.content | tojson }}")
        for loss_on in ("assistant", "all"):
            assert f"leaves out the words of message {place} ({role})" in problem(without, role, loss_on)
            assert problem(in_its_own_way, role, loss_on) == "None"


# --- the choice of a template ----------------------------------------------------------------------------------------

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FORGETFUL = UNMARKED.replace("{{ m.content }}<|im_end|>", "{{ m.content if loop.last else '...' }}<|im_end|>", 1)
ENDLESS = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}")
HALF_MARKED = MARKED.replace("m.role == 'assistant' %}{% gen", "m.role == 'assistant' and loop.last %}{% gen")


def template_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_template_by_name_wins_over_the_tokenizers_own(tiny_tokens: Callable[..., RunTokenizer], name: str) -> None:
    tokenizer = tiny_tokens().tokenizer
    tokenizer.chat_template = UNMARKED
    chosen = choose_template(tokenizer, name)
    assert chosen.origin == f"{name} template"
    assert chosen.has_markers
    assert chosen.text == chosen.training_text != UNMARKED


def test_a_tokenizer_without_a_template_gets_chatml_and_its_tokens(tiny_tokens: Callable[..., RunTokenizer]) -> None:
    tokenizer = tiny_tokens().tokenizer
    tokenizer.chat_template = None
    assert choose_template(tokenizer, "auto").origin == "chatml template, since the tokenizer has none"
    assert choose_template(tokenizer, "auto").new_tokens == ()


def test_a_template_from_a_file(tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path) -> None:
    for text, marked in ((MARKED, True), (UNMARKED, False)):
        path = template_file(tmp_path, text)
        chosen = choose_template(tiny_tokens().tokenizer, path)
        assert (chosen.origin, chosen.text, chosen.has_markers) == (f"template file {path}", text, marked)


def test_an_unreadable_template_file_is_a_config_error(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"model\.chat_template .* cannot be read"):
        choose_template(tiny_tokens().tokenizer, str(tmp_path / "none.jinja"))
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"model\.chat_template .* cannot be read"):
        choose_template(tiny_tokens().tokenizer, str(tmp_path / "binary.jinja"))


@pytest.mark.parametrize("text", [MARKED + "\n{% if", UNMARKED + "\n{% if"], ids=["marked", "unmarked"])
def test_a_template_that_is_not_jinja_is_named_as_such(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, text: str
) -> None:
    with pytest.raises(ConfigError, match=r"is not valid Jinja: line \d+: "):
        tiny_tokens(chat_template=template_file(tmp_path, text))


def test_the_tokenizers_own_template_with_and_without_markers(tiny_tokens: Callable[..., RunTokenizer]) -> None:
    tokenizer = tiny_tokens().tokenizer
    tokenizer.chat_template = MARKED
    assert choose_template(tokenizer, "auto").origin == "the tokenizer's own template"
    tokenizer.chat_template = UNMARKED
    chosen = choose_template(tokenizer, "auto")
    assert (chosen.origin, chosen.has_markers) == (
        "the tokenizer's own template, masks from rendered prefixes",
        False,
    )
    tokenizer.chat_template = {"default": MARKED, "tool_use": UNMARKED}
    assert choose_template(tokenizer, "auto").text == MARKED


def test_trls_variant_trains_but_the_models_own_is_kept_for_asking(qwen_dir: Path) -> None:
    from trl.chat_template_utils import qwen2_5_chat_template, qwen2_5_training_chat_template

    tokens = load_tokenizer(ModelConfig(name=str(qwen_dir)))
    assert tokens.template.training_text == qwen2_5_training_chat_template
    assert tokens.template.text == qwen2_5_chat_template == tokens.tokenizer.chat_template


@pytest.mark.parametrize("text", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_markers_and_prefixes_find_the_same(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, text: str
) -> None:
    tokens = tiny_tokens(chat_template=template_file(tmp_path, text))
    example = chat("One?", " first\n", "Two?", "second \U0001f389", system="Be brief.")
    (row,) = rows_of(tokens, example)
    (expected,) = rows_of(tiny_tokens(), example)
    assert (row.input_ids, row.labels) == (expected.input_ids, expected.labels)


def test_a_vocabulary_without_chatmls_tokens_gets_them(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A base model's tokenizer: the two tokens are added, each is one token, and one of them ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>").save_pretrained(tmp_path / "base")
    tokens = load_tokenizer(ModelConfig(name=str(tiny_model_dir), tokenizer=str(tmp_path / "base")))
    assert tokens.template.new_tokens == ("<|im_start|>", END)
    assert len(tokens.tokenizer) == 259
    assert tokens.tokenizer.eos_token == END
    (row,) = rows_of(tokens, chat("Hi", "Hello!"))
    assert trained_texts(tokens, row) == [f"Hello!{END}"]
    assert row.input_ids.count(tokens.tokenizer.convert_tokens_to_ids(END)) == 2


def test_a_template_that_rewrites_history_is_refused(tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path) -> None:
    path = template_file(tmp_path, FORGETFUL)
    with pytest.raises(ConfigError, match="renders earlier turns differently"):
        tiny_tokens(chat_template=path)
    tokens = tiny_tokens()
    chosen = choose_template(tokens.tokenizer, path)
    messages = chat("One?", "first", "Two?", "second").messages
    with pytest.raises(ConfigError, match="renders earlier turns differently"):
        render_trained(tokens.tokenizer, chosen, messages)


def test_a_template_whose_turn_does_not_end_in_a_token_is_refused(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="would never learn to stop") as refused:
        tiny_tokens(chat_template=template_file(tmp_path, ENDLESS))
    assert "'answer'" in refused.value.message
    assert "chat_template=chatml" in (refused.value.hint or "")


def test_a_template_that_marks_only_some_answers_is_refused(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"marks 1 generation\(s\) in a conversation with 2 assistant messages"):
        tiny_tokens(chat_template=template_file(tmp_path, HALF_MARKED))


def test_a_row_that_the_template_refuses_is_named_or_dropped(tiny_model_dir: Path, tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    rows = [message_row("Hi", "Hello!"), message_row("Bye", "Goodbye!")]
    rows[1]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    for body in (UNMARKED, MARKED):
        model = ModelConfig(name=str(tiny_model_dir), chat_template=template_file(tmp_path, refusing + body))
        tokens = load_tokenizer(model)
        strict = Config(model=model, data=DataConfig(train=SourceConfig(path=str(file))))
        with pytest.raises(DataError, match=r"rows\.jsonl:2: the chat template refuses .*no system here"):
            prepare(strict, tokens.tokenizer, tokens.template, tmp_path / "cache")
        loose = strict.model_copy(update={"data": strict.data.model_copy(update={"on_bad_row": "drop"})})
        counts = prepare(loose, tokens.tokenizer, tokens.template, tmp_path / "cache").ledger["train"]
        assert (counts["rows_in"], counts["rows"], counts["dropped_refused_by_template"]) == (2, 1, 1)


# --- the same as TRL -------------------------------------------------------------------------------------------------


def trl_rows(tokens: RunTokenizer, records: list[dict[str, Any]], folder: Path, **arguments: Any) -> list[Any]:
    """(input_ids, labels) of each row as TRL's own SFTTrainer prepares them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from sft_dist.train.pretrained import resolve_model

    settings = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", shuffle_dataset=False, **arguments
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny")),
        args=settings,
        train_dataset=Dataset.from_list(records),
        processing_class=tokens.tokenizer,
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


CONVERSATIONS = [
    ["Hi", "Hello!"],
    ["One?", "first", "Two?", "second", "Three?", "third"],
    ["Emoji?", "\U0001f389 \U0001f468\u200d\U0001f469\u200d\U0001f467 caf\u00e9"],
    ["Spaces?", "  yes \n"],
    ["Blank line?", "\n\nyes\n\n"],
    ["A long question " * 20, "short"],
    ["Short question", "a long answer " * 20],
]


@pytest.mark.parametrize("max_length", [None, 40])
def test_chat_rows_are_the_ones_of_trl(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, max_length: int | None
) -> None:
    tokens = tiny_tokens()
    records = [{"messages": list(chat(*turns).messages)} for turns in CONVERSATIONS]
    theirs = trl_rows(tokens, records, tmp_path, assistant_only_loss=True, max_length=max_length)
    ours = rows_of(tokens, *(chat(*turns) for turns in CONVERSATIONS), max_length=max_length or HUGE)
    assert [(row.input_ids, row.labels) for row in ours if row.trained] == theirs
    assert len(theirs) == len(CONVERSATIONS) - (max_length is not None)


@pytest.mark.parametrize("max_length", [None, 20])
def test_plain_rows_are_the_ones_of_trl(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, max_length: int | None
) -> None:
    tokens = tiny_tokens()
    pairs = [
        ("2 + 2 =", " 4"),
        ("Answer: ", "refund"),
        ("Say it", "\n\n\U0001f389"),
        ("Already ended", f" yes{END}"),
        ("A long prompt " * 10, " yes"),
        ("Short", " a long answer" * 10),
    ]
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    theirs = trl_rows(tokens, records, tmp_path, max_length=max_length)
    examples = [parse_row(record, "prompt_completion", "here", None) for record in records]
    ours = rows_of(tokens, *examples, max_length=max_length or HUGE)
    assert [(row.input_ids, row.labels) for row in ours if row.trained] == theirs
    assert len(theirs) == len(pairs) - (max_length is not None)


# --- prepared once ---------------------------------------------------------------------------------------------------


def write_rows(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config_for(path: Path, **data: Any) -> Config:
    return Config.model_validate({"data": {"train": {"path": str(path)}, "max_length": 64, **data}})


def prepared(config: Config, tokens: RunTokenizer, tmp_path: Path) -> Any:
    return prepare(config, tokens.tokenizer, tokens.template, tmp_path / "cache")


def message_row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": list(chat(question, answer).messages)}


def test_the_ledger_counts_what_is_cut_and_dropped(tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path) -> None:
    tokens = tiny_tokens()
    limit = 64
    short, long_answer, long_question = ("Hi", "Hello!"), ("Count", "one two three " * 30), ("why " * 90, "because")
    file = write_rows(tmp_path / "rows.jsonl", *(message_row(*turns) for turns in (short, long_answer, long_question)))
    result = prepared(config_for(file, max_length=limit), tokens, tmp_path)

    def count(text: str) -> int:
        return len(tokens.tokenizer(text)["input_ids"])

    def whole(question: str, answer: str) -> int:
        return count(f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n{answer}{END}\n")

    opening = count(f"<|im_start|>user\n{long_answer[0]}{END}\n<|im_start|>assistant\n")
    assert whole(*short) < limit < whole(*long_answer), "the rows are not of the lengths that the test is about"
    assert count(f"<|im_start|>user\n{long_question[0]}") > limit
    ledger = result.ledger["train"]
    counted = {
        "rows_in": 3,
        "rows": 2,
        "dropped_bad_rows": 0,
        "dropped_refused_by_template": 0,
        "dropped_answer_empty": 0,
        "dropped_answer_cut_off": 1,
        "truncated_rows": 2,
        "truncated_tokens": whole(*long_answer) + whole(*long_question) - 2 * limit,
        "longest_row": limit,
        "tokens": whole(*short) + limit,
        "trained_tokens": count("Hello!") + 1 + limit - opening,
        # The standard deviation of two lengths is half of what lies between them.
        "spread": (limit - whole(*short)) / 2,
    }
    assert {name: ledger[name] for name in counted} == counted
    assert [len(row["input_ids"]) for row in result.train] == [whole(*short), limit]
    assert result.eval is None


def test_rows_that_are_all_cut_off_are_a_data_error(tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", message_row("why " * 90, "because"))
    with pytest.raises(DataError, match=r"none of the 1 rows has an answer within data\.max_length 64 tokens"):
        prepared(config_for(file), tiny_tokens(), tmp_path)
    # The digest of a file that is older than some seconds is kept, and may be.
    left = [path for path in (tmp_path / "cache" / "data").iterdir() if path.name != "digests"]
    assert not left, "a failed preparation left something behind"


def test_an_answer_that_tokenises_to_nothing_is_refused_or_dropped(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    from tokenizers import normalizers

    tokens = tiny_tokens()
    tokens.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    file = write_rows(tmp_path / "rows.jsonl", message_row("Hi", "Hello!"), message_row("Hi", "\u200b"))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer tokenises to nothing"):
        prepared(config_for(file), tokens, tmp_path)
    ledger = prepared(config_for(file, on_bad_row="drop"), tokens, tmp_path).ledger["train"]
    assert (ledger["rows"], ledger["dropped_answer_empty"]) == (1, 1)


def test_a_row_whose_trained_answer_says_train_false_is_told_from_an_empty_one(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    turns = [*message_row("Hi", "Hello!")["messages"], *message_row("Yes?", "No.")["messages"]]
    row = {"messages": [*turns[:-1], {**turns[-1], "train": False}]}
    file = write_rows(tmp_path / "rows.jsonl", message_row("Hi", "Hello!"), row)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: none of its answers is trained, as data\.loss_on"):
        prepared(config_for(file, loss_on="last"), tiny_tokens(), tmp_path)


def test_a_second_preparation_reads_the_first(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny_tokens()
    file = write_rows(tmp_path / "rows.jsonl", *(message_row(f"Question {n}", f"Answer {n}") for n in range(10)))
    config = config_for(file, eval_size=3)
    first = prepared(config, tokens, tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the tokenizer was called again")

    monkeypatch.setattr(type(tokens.tokenizer), "__call__", refuse)
    again = prepared(config, tokens, tmp_path)
    assert again.ledger == first.ledger
    assert (again.train.to_list(), again.eval.to_list()) == (first.train.to_list(), first.eval.to_list())
    assert (len(first.train), len(first.eval)) == (7, 3)
    with pytest.raises(AssertionError, match="called again"):
        prepared(config_for(file, eval_size=3, max_length=63), tokens, tmp_path)


def test_whatever_changes_the_tokens_changes_the_key(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, qwen_dir: Path
) -> None:
    base = [message_row("Hi", "Hello!"), message_row("Bye", "Goodbye!")]
    file = write_rows(tmp_path / "rows.jsonl", *base)
    tokens = tiny_tokens()

    def key(path: Path = file, with_tokens: RunTokenizer = tokens, **data: Any) -> str:
        config = config_for(path, **{"max_length": 200, **data})
        return str(prepared(config, with_tokens, tmp_path).ledger["key"])

    keys = {
        "as it was": key(),
        "a row": key(write_rows(tmp_path / "changed.jsonl", base[0], message_row("Bye", "Goodbye."))),
        "the order": key(write_rows(tmp_path / "order.jsonl", *reversed(base))),
        "one row less": key(write_rows(tmp_path / "less.jsonl", base[0])),
        "max_length": key(max_length=199),
        "assistant_only_loss": key(assistant_only_loss=False),
        "system": key(system="Be brief."),
        "eval_size": key(eval_size=1),
        "template": key(with_tokens=tiny_tokens(chat_template="plain")),
        "family": key(with_tokens=load_tokenizer(ModelConfig(name=str(qwen_dir)))),
    }
    assert len(set(keys.values())) == len(keys), keys
    copy = write_rows(tmp_path / "copy.jsonl", *base)
    assert key(copy) == keys["as it was"], "the same rows in another file are tokenised again"


def test_of_prompt_and_completion_the_split_changes_the_key(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    """The same conversation, trained in part or in whole: other labels, so another key."""
    turns = list(chat("One?", "first", "Two?", "second").messages)
    whole = write_rows(tmp_path / "whole.jsonl", {"messages": turns})
    part = write_rows(tmp_path / "part.jsonl", {"prompt": turns[:3], "completion": turns[3:]})
    tokens = tiny_tokens()
    first, second = (prepared(config_for(path), tokens, tmp_path) for path in (whole, part))
    assert first.ledger["key"] != second.ledger["key"]
    assert first.ledger["train"]["trained_tokens"] > second.ledger["train"]["trained_tokens"]


def test_the_ledger_counts_bad_rows_of_this_run_not_of_an_earlier_one(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    tokens = tiny_tokens()
    good = [message_row("Hi", "Hello!"), message_row("Bye", "Goodbye!")]
    dirty = write_rows(tmp_path / "dirty.jsonl", *good, "not json", {"messages": []})
    clean = write_rows(tmp_path / "clean.jsonl", *good)
    first = prepared(config_for(dirty, on_bad_row="drop"), tokens, tmp_path).ledger["train"]
    assert (first["rows_in"], first["rows"], first["dropped_bad_rows"]) == (4, 2, 2)
    second = prepared(config_for(clean), tokens, tmp_path).ledger["train"]
    assert (second["rows_in"], second["rows"], second["dropped_bad_rows"]) == (2, 2, 0)
    third = prepared(config_for(dirty, on_bad_row="drop"), tokens, tmp_path).ledger["train"]
    assert (third["rows_in"], third["dropped_bad_rows"]) == (4, 2)
