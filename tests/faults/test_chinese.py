"""A GPT-2 with a BERT vocabulary for Chinese: ChatML and ASCII tokens added, trained on requests and extraction in Chinese."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.config.schema import ModelConfig
from sft_dist.data.sources import write_task
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train.tokenizer import load_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>"]
ASCII = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@._-{}:,\"", "user", "assistant", "name", "email", "order"]  # fmt: skip
LABELS = ["\u9000\u6b3e", "\u7269\u6d41", "\u6280\u672f", "\u8d26\u5355", "\u8d26\u6237", "\u53d6\u6d88"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model; its vocabulary has the tasks' characters and no letter, digit or sign of ASCII."""
    import torch
    from transformers import BertTokenizerFast, GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("chinese")
    rows = [write_task(task, 400, 1, path / f"{task}.jsonl", language="zh") for task in ("tickets", "extraction")]
    texts = [json.dumps(row, ensure_ascii=False) for file in rows for row in read_jsonl(file)]
    characters = sorted({letter for text in texts for letter in text if letter > "\x7f"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    tokenizer = BertTokenizerFast(vocab={word: place for place, word in enumerate(words)}, do_lower_case=True)
    assert len(tokenizer) == len(words)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(words), n_positions=384, n_embd=64, n_layer=2, n_head=4, **ends)
    ).save_pretrained(path)
    return path


def given(folder: Path) -> list[str]:
    return [
        f"model.name={folder}",
        "model.chat_template=chatml",
        f"model.new_special_tokens={json.dumps(SPECIAL)}",
        f"model.new_tokens={json.dumps(ASCII)}",
        "data.eval_size=0",
        "train.eval_strategy=no",
        "data.max_length=384",
        "model.dtype=float32",
        "train.learning_rate=3e-3",
        "train.global_batch_size=8",
    ]


def test_addresses_and_order_numbers_have_no_unknown_token(folder: Path) -> None:
    spec = ModelConfig(name=str(folder), chat_template="chatml", new_special_tokens=(*SPECIAL,), new_tokens=(*ASCII,))
    tokenizer = load_tokenizer(spec).tokenizer
    for text in ('{"name":"\u5f20\u96e8\u6b23","email":"Clark_19-377@mail.example","order":"D88803"}', *LABELS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, "and it comes back without spaces"


def test_requests_are_learned_and_scored(new_run: Callable[..., RunDir], folder: Path) -> None:
    """Eight rows by heart: an answer equals the expected one as text."""
    labels = json.dumps(LABELS)
    run = new_run(
        "data.train={task: tickets, rows: 8, seed: 1, language: zh}",
        "evaluate.data={task: tickets, rows: 8, seed: 1, language: zh}",
        f"evaluate.labels={labels}",
        "train.max_steps=100",
        *given(folder),
    )
    run_here(run)
    ledger = read_json(run.ledger)["train"]
    assert ledger["unknown_tokens"] == 0
    scores = read_json(run.scores)
    assert scores["before"]["exact_match"] == 0.0
    assert scores["after"]["exact_match"] == scores["after"]["label_accuracy"] == 1.0
    answers = {row["answer"] for row in read_jsonl(run.eval / "after.jsonl") if row["kind"] == "scored"}
    assert answers <= set(LABELS)


def test_extraction_is_learned(new_run: Callable[..., RunDir], folder: Path) -> None:
    run = new_run(
        "data.train={task: extraction, rows: 2, seed: 1, language: zh}",
        "evaluate.data={task: extraction, rows: 2, seed: 1, language: zh}",
        "evaluate.labels=[]",
        "evaluate.generation.max_new_tokens=70",
        "train.max_steps=150",
        *given(folder),
        "train.global_batch_size=2",
    )
    run_here(run)
    rows = [row for row in read_jsonl(run.eval / "after.jsonl") if row["kind"] == "scored"]
    assert [json.loads(row["answer"]) for row in rows] == [json.loads(row["expected"]) for row in rows]
