"""Weights of messages: from the row through preparation, packing and batches to the loss and its gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sft_dist.config.schema import Config, LossOn
from sft_dist.data import prepare as preparation
from sft_dist.data.formats import parse_row
from sft_dist.data.prepare import prepare
from sft_dist.data.tokenize import IGNORED, tokenize
from sft_dist.errors import ConfigError
from sft_dist.files import write_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train import loss
from sft_dist.train.rows import Collator, filled
from sft_dist.train.tokenizer import RunTokenizer

Row = dict[str, list[Any]]


def chat(*turns: str, weights: Sequence[float | None] = ()) -> dict[str, Any]:
    """A row whose answers have these weights, where they are not None."""
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": words, "weight": None}
        for place, words in enumerate(turns)
    ]
    for place, weight in enumerate(weights):
        messages[2 * place + 1]["weight"] = weight
    return {"messages": messages}


# --- which tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["assistant", "last", "completion", "all"])
@pytest.mark.parametrize("template", ["auto", "plain"])
def test_the_tokens_of_an_answer_have_its_weight(
    tiny_tokens: Callable[..., RunTokenizer], loss_on: LossOn, template: str
) -> None:
    tokens = tiny_tokens(chat_template=template)
    turns = ("One?", "first", "Two?", "second", "Three?", "third")
    plain, example = (parse_row(chat(*turns, weights=it), "auto", "here") for it in ((), (0.25, 0, 3)))
    both = tokenize([plain, example], tokens.tokenizer, tokens.template, max_length=1000, loss_on=loss_on)
    without, row = both
    assert row.input_ids == without.input_ids and without.weights is None and row.weights is not None
    found: dict[float, list[int]] = {}
    for token, label, weight in zip(row.input_ids, row.labels, row.weights, strict=True):
        assert (label == IGNORED) == (weight == 0)
        found.setdefault(weight, []).append(token)
    said = {weight: tokens.tokenizer.decode(ids) for weight, ids in found.items()}
    end = tokens.tokenizer.eos_token
    assert said[3].strip() == f"third{end}"
    assert (0.25 in said) == (loss_on in ("assistant", "all"))
    assert "second" in said[0]
    if 0.25 in said:
        assert said[0.25].strip() == f"first{end}"
    assert "".join(said.get(1.0, "").split()).count("One?") == (loss_on == "all")


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_with_loss_on_all_the_words_of_a_user_have_their_weight(
    tiny_tokens: Callable[..., RunTokenizer], template: str
) -> None:
    tokens = tiny_tokens(chat_template=template)
    record = chat("One?", "One?", "Two?", "second", weights=(1, 3))
    record["messages"][0]["weight"] = 0.25
    example = parse_row(record, "auto", "here")
    (row,) = tokenize([example], tokens.tokenizer, tokens.template, max_length=1000, loss_on="all")
    assert row.weights is not None and row.labels == row.input_ids
    said = {
        weight: tokens.tokenizer.decode([t for t, w in zip(row.input_ids, row.weights, strict=True) if w == weight])
        for weight in set(row.weights)
    }
    end = tokens.tokenizer.eos_token
    assert said[0.25].strip() == ("One?" if template == "plain" else f"One?{end}")
    assert said[3.0].strip() == f"second{end}"
    assert said[1.0].count("One?") == 1 and "Two?" in said[1.0]


def test_weights_that_no_trained_token_has_are_none(tiny_tokens: Callable[..., RunTokenizer]) -> None:
    tokens = tiny_tokens()
    example = parse_row(chat("One?", "first", "Two?", "second", weights=(0.5, 1)), "auto", "here")
    (row,) = tokenize([example], tokens.tokenizer, tokens.template, max_length=1000, loss_on="last")
    assert row.weights is None


# --- what is prepared ------------------------------------------------------------------------------------------------


def prepared(tokens: RunTokenizer, folder: Path, *sources: Sequence[dict[str, Any]], **data: Any) -> Any:
    paths = [folder / f"{place}.jsonl" for place in range(len(sources))]
    for path, rows in zip(paths, sources, strict=True):
        write_jsonl(path, list(rows))
    train = {"sources": [{"path": str(path)} for path in paths]}
    config = Config.model_validate_json(json.dumps({"data": {"train": train, "max_length": 64, **data}}))
    return prepare(config, tokens.tokenizer, tokens.template, folder / "cache")


PLAIN = [chat(f"Number {n}?", f"It is {n}.") for n in range(30)]
WEIGHTED = [chat("One?", "first", "Two?", f"second {n}", weights=(0.5, n % 3)) for n in range(10)]


@pytest.mark.parametrize("packing", [False, True])
def test_there_is_a_column_only_where_there_are_weights(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, packing: bool
) -> None:
    tokens = tiny_tokens()
    none = [chat("One?", "first", "Two?", "second", weights=(0, 1))]
    found = prepared(tokens, tmp_path, PLAIN, none, packing=packing)
    assert found.train.column_names == ["input_ids", "labels", *(["seq_lengths"] if packing else [])]
    assert found.ledger["train"]["weighted_rows"] == 0 and "trained_weight" not in found.ledger["train"]


@pytest.mark.parametrize("data", [{}, {"packing": True}, {"eval_size": 6}], ids=str)
def test_rows_with_and_without_weights_stand_in_one_dataset(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    """The weighted rows are in chunks of their own, so that some shards hold no weights."""
    monkeypatch.setattr(preparation, "FEW", 7)
    tokens = tiny_tokens()
    found = prepared(tokens, tmp_path, PLAIN, WEIGHTED, **data)
    splits = [found.train, *([found.eval] if found.eval is not None else [])]
    assert all("loss_weights" in split.column_names for split in splits)
    wanted: dict[tuple[int, ...], list[float]] = {}
    examples = [parse_row(row, "auto", "here") for row in (*PLAIN, *WEIGHTED)]
    for one in tokenize(examples, tokens.tokenizer, tokens.template, max_length=64):
        weights = one.weights or [float(label != IGNORED) for label in one.labels]
        wanted[tuple(one.input_ids)] = weights
    seen = 0
    for row in (row for split in splits for row in split):
        at = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids = tuple(row["input_ids"][at : at + length])
            assert row["loss_weights"][at : at + length] == wanted[ids]
            at, seen = at + length, seen + 1
    assert seen == len(examples)
    ledger = found.ledger["train"]
    assert ledger["weighted_rows"] == 10
    assert [one["weighted_rows"] for one in ledger["sources"]] == [0, 10]
    total = sum(sum(weights) for weights in found.train["loss_weights"])
    assert ledger["trained_weight"] == total != ledger["trained_tokens"]


# --- batches ---------------------------------------------------------------------------------------------------------

VOCABULARY = 101


def rows_with_weights(count: int = 5, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in range(count):
        length = int(torch.randint(5, 24, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        start = int(torch.randint(0, length - 2, (1,), generator=generator))
        weights = [0.0] * start + [[0.5, 1.0, 2.25][(place + n) % 3] for n in range(length - start)]
        rows.append({"input_ids": ids, "labels": [IGNORED] * start + ids[start:], "loss_weights": weights})
    return rows


def packed(rows: list[Row]) -> list[Row]:
    """The rows two by two in one."""
    pairs = [rows[at : at + 2] for at in range(0, len(rows), 2)]
    joined = [{name: [it for row in pair for it in row[name]] for name in pair[0]} for pair in pairs]
    lengths = [[len(row["input_ids"]) for row in pair] for pair in pairs]
    return [{**row, "seq_lengths": sizes} for row, sizes in zip(joined, lengths, strict=True)]


def collator(*, padding_free: bool) -> Collator:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return Collator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free), cuts_rows=False)


@pytest.mark.parametrize("kind", ["padded", "joined", "packed", "one"])
def test_each_target_of_a_batch_has_its_weight(kind: str) -> None:
    rows = rows_with_weights(1 if kind == "one" else 5)
    batch = collator(padding_free=kind != "padded")(packed(rows) if kind == "packed" else rows)
    # The first token of a document is never predicted.
    wanted = [(token, weight) for row in rows for token, weight in zip(row["labels"][1:], row["loss_weights"][1:], strict=True) if token != IGNORED]  # fmt: skip
    weights = loss.from_bits(batch["weights"]).tolist()
    assert list(zip(batch["targets"].tolist(), weights, strict=True)) == wanted
    assert float(loss.amount(batch)) == sum(weight for _, weight in wanted)


def test_a_batch_without_weights_is_as_before() -> None:
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows_with_weights()]
    batch = collator(padding_free=True)(rows)
    assert "weights" not in batch and loss.amount(batch).dtype == torch.int64


# --- loss and gradients ----------------------------------------------------------------------------------------------


def model(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, tie_word_embeddings=tied))


def reference(rows: list[Row], *, tied: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Row by row in float64: each token's cross-entropy times its weight, over the sum of the weights."""
    exact = model(tied=tied).double()
    total, amount = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        logits = exact(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels, weights = torch.tensor(row["labels"][1:]), torch.tensor(row["loss_weights"][1:]).double()
        each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        total = total + (each * weights).sum()
        amount += float(weights[labels != IGNORED].sum())
    value = total / amount
    value.backward()
    return value.detach(), gradients(exact)


def gradients(of: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: it.grad.clone() for name, it in of.named_parameters() if it.grad is not None}


def assert_as_exact(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((found[name].double() - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [1, 7, 256], ids=lambda size: f"chunk-{size}")
def test_loss_and_gradients_are_those_of_float64(monkeypatch: pytest.MonkeyPatch, tied: bool, chunk: int) -> None:
    monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
    ours, rows = model(tied=tied), rows_with_weights()
    loss.install(ours)
    wanted, wanted_gradients = reference(rows, tied=tied)
    value, trained, _ = loss.trained_token_loss(ours, collator(padding_free=False)(rows), None)
    assert trained == sum(label != IGNORED for row in rows for label in row["labels"][1:])
    torch.testing.assert_close(value.detach().double(), wanted, rtol=1e-6, atol=0)
    value.backward()
    assert_as_exact(gradients(ours), wanted_gradients)


def test_micro_batches_add_up_to_the_batch_that_they_are_of() -> None:
    """Each divided by the whole step's weights, though one of them weighs next to nothing and one nothing."""
    ours, rows = model(), rows_with_weights()
    loss.install(ours)
    rows[3]["loss_weights"] = [0.001 * weight for weight in rows[3]["loss_weights"]]
    filling: Row = {"input_ids": [0], "labels": [IGNORED], "loss_weights": [0.0]}
    wanted, wanted_gradients = reference(rows, tied=True)
    batches = [collator(padding_free=False)(part) for part in (rows[:2], rows[2:3], rows[3:4], rows[4:], [filling])]
    whole = sum(loss.amount(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        value, *_ = loss.trained_token_loss(ours, batch, whole)  # type: ignore[arg-type]
        value.backward()
        total += float(value.detach())
    assert total == pytest.approx(float(wanted), rel=1e-6)
    assert_as_exact(gradients(ours), wanted_gradients)


def test_one_half_everywhere_is_one_everywhere() -> None:
    results = []
    for weight in (0.5, None):
        ours, rows = model(), rows_with_weights()
        loss.install(ours)
        for row in rows:
            row["loss_weights"] = [weight or 1.0] * len(row["input_ids"])
            if weight is None:
                del row["loss_weights"]
        value, *_ = loss.trained_token_loss(ours, collator(padding_free=False)(rows), None)
        value.backward()
        results.append((value.detach(), gradients(ours)))
    (half, half_gradients), (one, one_gradients) = results
    torch.testing.assert_close(half, one, rtol=1e-6, atol=0)
    assert_as_exact(half_gradients, {name: it.double() for name, it in one_gradients.items()})


def test_weights_are_the_same_in_bfloat16() -> None:
    """What travels beside a batch as floating point would be rounded on its way into such a model."""
    half, rows = model().bfloat16(), rows_with_weights()
    loss.install(half)
    seen: list[torch.Tensor] = []
    half.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(it for it in kwargs.values() if torch.is_tensor(it)), with_kwargs=True
    )
    value, *_ = loss.trained_token_loss(half, collator(padding_free=False)(rows), None)
    assert seen and not any(tensor.is_floating_point() for tensor in seen)
    assert float(value.detach()) == pytest.approx(float(reference(rows, tied=True)[0]), rel=1e-2)


# --- a run -----------------------------------------------------------------------------------------------------------

QUIET = ("evaluate={before: false, after: false, labels: [], data: null}", "model.dtype=float32", "train.max_steps=3")


def trained(new_run: Callable[..., RunDir], name: str, rows: list[dict[str, Any]], *overrides: str) -> RunDir:
    path = Path(f"{name}.jsonl").resolve()
    write_jsonl(path, rows)
    run = new_run(f"data.train={path}", "train.global_batch_size=4", *QUIET, *overrides, name=name)
    run_here(run)
    return run


def test_what_fills_the_last_step_has_no_weight(tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path) -> None:
    rows = filled(prepared(tiny_tokens(), tmp_path, WEIGHTED).train, 8, 0)
    assert len(rows) == 16 and rows[15]["loss_weights"] == [0.0]
    assert float(loss.amount(collator(padding_free=True)([rows[15]]))) == 0


def test_a_loss_that_knows_no_weights_is_refused(new_run: Callable[..., RunDir]) -> None:
    with pytest.raises(ConfigError, match="which TRL's own loss cannot take"):
        trained(
            new_run,
            "dft",
            [chat("Hi", "Hello!", weights=(0.5,))] * 8,
            "data.eval_size=0",
            "train.eval_strategy=no",
            "train.extra={loss_type: dft}",
        )
