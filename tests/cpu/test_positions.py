"""A model with a table of positions is neither trained nor asked beyond its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sft_dist
from sft_dist import stages
from sft_dist.config.schema import ModelConfig
from sft_dist.errors import ConfigError
from sft_dist.evaluate.compare import Loaded
from sft_dist.evaluate.positions import _positions_of
from sft_dist.evaluate.room import positions, refuse_beyond

TABLE = 64


@pytest.fixture(scope="module")
def table_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with the tiny tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = GPT2Config(
        vocab_size=512, n_positions=TABLE, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LONG = "a, " * 100


def prove(tmp_path: Path, table_dir: Path, *fields: str, answer: str = "Hello!", asked: str = "Hi") -> list[int]:
    """Prove a config whose training row has this answer, beside a file asked.jsonl with a row of such a question.

    How many held-out rows each set has.
    """
    for name, words in (("rows", ("Hi", answer)), ("asked", (asked, "Hello!"))):
        turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant"), words, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    loaded = sft_dist.load_config(
        "smoke",
        [
            f"model.name={table_dir}",
            "data.train=rows.jsonl",
            "data.eval_size=0",
            "train.eval_strategy=no",
            "evaluate.data=null",
            "evaluate.labels=[]",
            *fields,
        ],
    )
    held_out = stages.prove_here(loaded.config, stages.RunDir(tmp_path / "runs" / "one"))
    return [len(rows) for rows in held_out.values()]


def test_rows_and_questions_that_fit_are_taken(tmp_path: Path, table_dir: Path) -> None:
    questions = "evaluate.questions=[Hello]"
    split = ("data.max_length=64", "data.packing=true", "data.packing_overflow=split")
    assert prove(tmp_path, table_dir, questions) == []
    assert prove(tmp_path, table_dir, questions, "data.max_length=64", answer=LONG) == []
    assert prove(tmp_path, table_dir, *split, answer=LONG) == []
    assert prove(tmp_path, table_dir, "evaluate.data=asked.jsonl") == [1]


def test_what_needs_more_positions_is_refused_before_there_is_a_run(tmp_path: Path, table_dir: Path) -> None:
    scored = "evaluate.sets=[{name: mine, data: asked.jsonl, metrics: [perplexity]}]"
    answer, asked = {"answer": LONG}, {"asked": LONG}
    for rows, fields, said in (
        (answer, [], rf"data.max_length is 512 and rows have up to \d+ tokens, .* table of {TABLE} positions"),
        (answer, ["data.packing=true"], "data.max_length is 512"),
        ({}, [f"evaluate.questions=[{LONG!r}]"], "evaluate.questions: a prompt has"),
        ({}, ["evaluate.questions=[Hi]", "evaluate.generation.max_new_tokens=60"], "max_new_tokens is 60"),
        (asked, ["evaluate.data=asked.jsonl"], r"asked.jsonl:1: a prompt has .* max_new_tokens is 8"),
        (asked, [scored], r"asked.jsonl:1: a prompt has \d+ tokens with its answer"),
    ):
        with pytest.raises(ConfigError, match=said):
            prove(tmp_path, table_dir, *fields, **rows)


def test_the_whole_table_is_used(table_dir: Path) -> None:
    base = sft_dist.load(table_dir)
    assert positions(base.model) == _positions_of(ModelConfig(name=str(table_dir))) == TABLE
    refuse_beyond(TABLE, 60, 5, "it")
    with torch.inference_mode():
        base.model.generate(torch.ones((1, 60), dtype=torch.long), min_new_tokens=5, max_new_tokens=5)
    for tokens, more in ((60, 6), (65, 0)):
        with pytest.raises(ConfigError, match="takes no more"):
            refuse_beyond(TABLE, tokens, more, "it")
    with pytest.raises(ConfigError, match="takes no more"):
        sft_dist.ask(base, "a, " * 100)


def test_computed_positions_have_no_end(tiny_model_dir: Path) -> None:
    base = sft_dist.load(tiny_model_dir)
    assert positions(base.model) is None
    assert _positions_of(ModelConfig(name=str(tiny_model_dir))) is None


def test_chat_forgets_what_cannot_be_asked_and_goes_on(table_dir: Path) -> None:
    from sft_dist.evaluate.chat import HELP, chat

    base = sft_dist.load(table_dir)
    options = base.config.evaluate.generation.model_copy(update={"max_new_tokens": 2})
    config = base.config.model_copy(
        update={"evaluate": base.config.evaluate.model_copy(update={"generation": options})}
    )
    asked: list[str] = []
    real = base.model.generate
    base.model.generate = lambda **words: (
        asked.append(base.tokenizer.decode(words["input_ids"][0])) or real(**{**words, "streamer": None})
    )
    lines, notes = iter(["a, " * 100, "Hi", "/exit"]), []
    chat(config, Loaded(base.model, base.tokenizer), lambda: next(lines), None, notes.append)
    assert [note for note in notes if note != HELP and "takes no more" in note and "/reset" in note]
    assert len(asked) == 1 and "a, a" not in asked[0]
