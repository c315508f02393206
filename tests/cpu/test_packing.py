"""Packed rows hold every document once, waste hardly any room, and train as the documents alone would."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_dist.config.schema import Config
from sft_dist.data import packing
from sft_dist.data.packing import best_fit_decreasing, fewest_rows, fill, fullest_rows
from sft_dist.data.prepare import prepare
from sft_dist.files import read_json, read_jsonl, write_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train import loss
from sft_dist.train.attention import NAME, register
from sft_dist.train.tokenizer import RunTokenizer

SIZE = 96


def lognormal(count: int, median: int, longest: int, seed: int = 1) -> np.ndarray[Any, Any]:
    drawn = np.random.default_rng(seed).lognormal(np.log(median), 0.8, count)
    return np.clip(drawn, 4, longest).astype(np.int64)


@pytest.mark.parametrize(("count", "median", "size"), [(1, 5, 8), (50, 30, 100), (8000, 350, 4096), (20_000, 60, 512)])
def test_every_document_stands_in_one_row_that_has_room(count: int, median: int, size: int) -> None:
    lengths = lognormal(count, median, size)
    rows = best_fit_decreasing(lengths, size)
    assert sorted(np.concatenate(rows).tolist()) == list(range(count))
    assert max(int(lengths[row].sum()) for row in rows) <= size
    assert [row.tolist() for row in best_fit_decreasing(lengths, size)] == [row.tolist() for row in rows]
    assert count < 8000 or fill(lengths, rows, size) >= 0.995


def test_as_few_rows_as_trl_where_that_looks_at_all_documents() -> None:
    from datasets import Dataset
    from trl import pack_dataset

    for seed in range(5):
        lengths = lognormal(900, 200, 1024, seed)
        theirs = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths.tolist()]}), 1024, "bfd")
        assert len(best_fit_decreasing(lengths, 1024)) == len(theirs)


@pytest.mark.parametrize("pack", [best_fit_decreasing, fullest_rows])
def test_a_document_that_does_not_fit_is_an_error(pack: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="a document of 9 tokens in rows of 8"):
        pack([3, 9], 8)
    assert pack([], 8) == []


def of_chats(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Chats of one to three turns and about 500 tokens in all, as benchmarks/prepare.py writes them."""
    generator = np.random.default_rng(seed)
    sides = 2 * generator.integers(1, 4, count)
    spoken = [generator.lognormal(0, 0.5, side).sum() * 400 / side for side in sides]
    return np.array(spoken).astype(np.int64) * 6 // 5 + 8 * sides


def near(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Documents that are nearly of one length, of which eight leave room in a row and nine do not fit."""
    return np.random.default_rng(seed).normal(500, 50, count).astype(np.int64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("drawn", "count", "size"),
    [(of_chats, 8000, 4096), (of_chats, 4000, 2048), (of_chats, 25_000, 8192), (near, 8000, 4096)],
    ids=["chats", "short rows", "long rows", "near one length"],
)
def test_rows_are_full_where_lengths_allow_it(drawn: Callable[..., Any], count: int, size: int, seed: int) -> None:
    lengths = np.minimum(drawn(count, seed), size)
    rows = fullest_rows(lengths, size)
    assert sorted(np.concatenate(rows).tolist()) == list(range(count))
    assert max(int(lengths[row].sum()) for row in rows) <= size
    assert fill(lengths, rows, size) >= 0.995
    assert fewest_rows(lengths, size) <= len(rows) <= len(best_fit_decreasing(lengths, size))
    assert [row.tolist() for row in fullest_rows(lengths, size)] == [row.tolist() for row in rows]


def test_best_fit_alone_leaves_more_room_and_dealt_out_documents_hardly_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there is more than best fit decreasing; and that documents in hands of 1,000 are packed nearly as well."""
    lengths = of_chats(8000, 1)
    assert fill(lengths, best_fit_decreasing(lengths, 4096), 4096) < 0.995
    together = fullest_rows(lengths, 4096)
    monkeypatch.setattr(packing, "AT_ONCE", 1000)
    dealt = fullest_rows(lengths, 4096)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(8000))
    assert [row.tolist() for row in dealt] != [row.tolist() for row in together]
    assert len(together) <= len(dealt) <= len(together) + 8


def test_the_least_number_of_rows_is_never_more_than_some_order_needs() -> None:
    generator = random.Random(2)
    for _ in range(300):
        size = generator.randrange(5, 40)
        lengths = [generator.randrange(1, size + 1) for _ in range(generator.randrange(1, 7))]
        needed = fewest_by_trying(lengths, size)
        assert -(-sum(lengths) // size) <= fewest_rows(lengths, size) <= needed <= len(fullest_rows(lengths, size))
    assert fewest_rows([6, 6, 6, 4, 4, 4, 5], 10) == 4
    assert fewest_rows([6] * 7, 10) == 7, "none has room for another"
    assert fewest_rows([7, 7, 7, 4, 4, 4, 4], 10) == 5, "no 4 fits beside a 7"
    assert fewest_rows([], 10) == 0


def fewest_by_trying(lengths: list[int], size: int) -> int:
    """The least number of rows, from all orders of putting documents into the first row that has room."""
    found = len(lengths)
    for order in set(itertools.permutations(lengths)):
        rooms: list[int] = []
        for length in order:
            place = next((at for at, room in enumerate(rooms) if room >= length), None)
            if place is None:
                rooms.append(size - length)
            else:
                rooms[place] -= length
        found = min(found, len(rooms))
    return found


# --- the same loss and gradients -------------------------------------------------------------------------------------

SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 97}


def built(family: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    register()
    torch.manual_seed(0)
    if family == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config: Any = GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=SIZE, vocab_size=97, **drop)
        model: Any = GPT2LMHeadModel
    else:
        more = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
        config = (LlamaConfig if family == "llama" else Qwen3Config)(**more)
        model = LlamaForCausalLM if family == "llama" else Qwen3ForCausalLM
    config._attn_implementation = NAME
    return model._from_config(config, attn_implementation=NAME)


def documents(seed: int = 0, count: int = 9) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, 40, (1,), generator=generator))
        ids = torch.randint(0, 97, (length,), generator=generator).tolist()
        untrained = int(torch.randint(0, length - 1, (1,), generator=generator))
        found.append({"input_ids": ids, "labels": [-100] * untrained + ids[untrained:]})
    return found


def joined(rows: list[list[dict[str, list[int]]]]) -> dict[str, Any]:
    """The batch that TRL's collator makes of packed rows."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = [
        {
            **{name: [token for document in row for token in document[name]] for name in ("input_ids", "labels")},
            "seq_lengths": [len(document["input_ids"]) for document in row],
        }
        for row in rows
    ]
    batch: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packed)
    return batch


def packed_rows(found: list[dict[str, list[int]]]) -> list[list[dict[str, list[int]]]]:
    rows = best_fit_decreasing([len(document["input_ids"]) for document in found], SIZE)
    return [[found[number] for number in row.tolist()] for row in rows]


def summed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_loss_and_gradients_are_those_of_the_documents_alone(family: str) -> None:
    model, found = built(family), documents()
    alone = sum(summed_loss(model, joined([[document]])) for document in found)
    expected = dict(zip(names(model), torch.autograd.grad(alone, list(model.parameters())), strict=True))
    rows = packed_rows(found)
    assert 1 < len(rows) < len(found)
    together = summed_loss(model, joined(rows))
    gradients = dict(zip(names(model), torch.autograd.grad(together, list(model.parameters())), strict=True))
    assert torch.allclose(together, alone, rtol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-5), name


def names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_another_document_changes_nothing_in_its_neighbours(family: str) -> None:
    model, found = built(family).eval(), documents()
    (row,) = packed_rows(found)[:1]
    changed = [dict(document) for document in row]
    middle = len(row) // 2
    changed[middle]["input_ids"] = [(token + 1) % 97 for token in changed[middle]["input_ids"]]
    with torch.inference_mode():
        before, after = (model(**without_labels(joined([it])), use_cache=False).logits for it in (row, changed))
    start = sum(len(document["input_ids"]) for document in row[:middle])
    end = start + len(row[middle]["input_ids"])
    assert len(row) >= 3
    assert torch.equal(before[0, :start], after[0, :start])
    assert torch.equal(before[0, end:], after[0, end:])
    assert not torch.equal(before[0, start:end], after[0, start:end])


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def test_the_loss_of_a_run_is_the_same_in_one_pass(tiny_model: Callable[..., Any]) -> None:
    """The trainer's own head, which scores trained positions only, skips the first token of every document, too."""
    model = tiny_model(attn_implementation=NAME)
    loss.install(model)
    found = documents()
    alone = sum(len([label for label in document["labels"][1:] if label != -100]) for document in found)
    batch = loss.with_targets(joined(packed_rows(found)))
    assert batch["targets"].numel() == alone


def test_a_batch_is_ready_for_attention_of_variable_length() -> None:
    found = documents()
    rows = packed_rows(found)
    batch = joined(rows)
    lengths = [len(document["input_ids"]) for row in rows for document in row]
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]
    assert batch["max_length_q"] == max(lengths)


# --- through the preparation, and a run ------------------------------------------------------------------------------


def chats(path: Path, count: int) -> Path:
    generator = random.Random(1)
    answers = ["".join(generator.choices("abcdefgh .", k=generator.randrange(1, 120))) for _ in range(count)]
    rows = [
        {"messages": [{"role": "user", "content": f"Count {n}"}, {"role": "assistant", "content": f"{answer}!"}]}
        for n, answer in enumerate(answers)
    ]
    write_jsonl(path, rows)
    return path


def prepared(tokens: RunTokenizer, path: Path, cache: Path, **data: Any) -> Any:
    config = Config.model_validate({"data": {"train": {"path": str(path)}, **data}})
    return prepare(config, tokens.tokenizer, tokens.template, cache)


def cut(row: dict[str, list[int]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The documents of a packed row."""
    ends = np.cumsum(row["seq_lengths"]).tolist()
    assert ends[-1] == len(row["input_ids"]) == len(row["labels"])
    return [
        (tuple(row["input_ids"][start:end]), tuple(row["labels"][start:end]))
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


@pytest.mark.parametrize(("count", "size"), [(60, 100), (9000, 1000)])
def test_packed_rows_hold_the_documents_of_the_unpacked_ones(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, count: int, size: int
) -> None:
    tokens, path = tiny_tokens(), chats(tmp_path / "rows.jsonl", count)
    single = prepared(tokens, path, tmp_path / "cache", max_length=size, eval_size=7)
    packed = prepared(tokens, path, tmp_path / "cache", max_length=size, eval_size=7, packing=True)
    expected = sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in single.train)
    assert sorted(document for row in packed.train for document in cut(row)) == expected
    assert [row["input_ids"] for row in packed.eval] == [row["input_ids"] for row in single.eval]
    ledger = packed.ledger["train"]
    assert (ledger["documents"], ledger["rows"]) == (count - 7, len(packed.train))
    assert ledger["packing_fill"] == round(ledger["tokens"] / (size * ledger["rows"]), 4)
    assert count < 100 or ledger["packing_fill"] >= 0.995


def test_what_is_too_long_is_cut_off_or_becomes_more_documents(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path
) -> None:
    tokens, path = tiny_tokens(), tmp_path / "rows.jsonl"
    write_jsonl(path, [{"text": " ".join(map(str, range(200)))}, {"text": "short"}])
    whole = prepared(tokens, path, tmp_path / "cache", max_length=2000).train[0]["input_ids"]
    truncated = prepared(tokens, path, tmp_path / "cache", max_length=64, packing=True)
    split = prepared(tokens, path, tmp_path / "cache", max_length=64, packing=True, packing_overflow="split")
    assert truncated.ledger["train"]["truncated_tokens"] == len(whole) - 64
    assert split.ledger["train"]["truncated_tokens"] == 0
    longest = [list(ids) for row in split.train for ids, _ in cut(row) if len(ids) == 64]
    assert sorted(longest) == sorted(whole[at : at + 64] for at in range(0, len(whole) - 63, 64))
    assert split.ledger["train"]["tokens"] == truncated.ledger["train"]["tokens"] + len(whole) - 64


def test_a_run_trains_on_packed_rows(new_run: Callable[..., RunDir], tmp_path: Path) -> None:
    run = new_run(
        f"data.train={chats(tmp_path / 'rows.jsonl', 64)}",
        "data.packing=true",
        "data.max_length=128",
        "train.max_steps=6",
        "train.global_batch_size=4",
        "train.learning_rate=0.01",
        "evaluate={before: false, after: false}",
    )
    run_here(run)
    assert run.read_status()["state"] == "done"
    losses = [row["loss"] for row in read_jsonl(run.metrics) if "loss" in row]
    assert losses[-1] < losses[0] - 0.2
    assert read_json(run.ledger)["train"]["packing_fill"] > 0.8
    manifest = read_json(next(run.checkpoints.glob("checkpoint-*")) / "MANIFEST.json")
    assert '"packing": true' in str(manifest).replace("'", '"').replace("True", "true")
