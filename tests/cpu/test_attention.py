"""Documents that were joined into one row see themselves only, in the forward and in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_dist.errors import ConfigError
from sft_dist.train import loss
from sft_dist.train.attention import NAME, register

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-without-gqa": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 6}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
LENGTHS = (7, 1, 19, 2, 12)


def model_of(family: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    register()
    config_class, model_class, changes = FAMILIES[family]
    config = config_class(**{**SIZES, **changes})
    config._attn_implementation = attention
    torch.manual_seed(0)
    return model_class(config).to(dtype)


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows as our dataset holds them; every token but a document's first is trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 97, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def joined(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The batch that TRL's own collator makes of them, as in a padding-free training."""
    batch: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    return batch


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output: torch.Tensor = model(**inputs, use_cache=False).logits[0]
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_documents_have_the_logits_of_each_alone(family: str) -> None:
    rows = documents()
    ours, stock = model_of(family, NAME).eval(), model_of(family, "sdpa").eval()
    with torch.no_grad():
        found = logits_of(ours, joined(rows)).split(LENGTHS)
        for row, logits in zip(rows, found, strict=True):
            alone = stock(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_documents_have_the_gradients_of_all_alone(family: str) -> None:
    rows = documents()
    ours, stock = model_of(family, NAME).train(), model_of(family, "sdpa").train()
    loss.install(ours)
    count = sum(length - 1 for length in LENGTHS)
    value, trained, _ = loss.trained_token_loss(ours, joined(rows), count)
    assert int(trained) == count, "the first token of a later document is predicted from the one before"
    value.backward()
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = stock(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    (total / count).backward()
    torch.testing.assert_close(value, (total / count), rtol=1e-5, atol=1e-6)
    wanted = dict(stock.named_parameters())
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param.grad, wanted[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_changed_document_changes_nothing_in_another(dtype: torch.dtype, changed: int) -> None:
    model = model_of("llama", NAME, dtype).eval()
    rows = documents()
    other = [*rows[:changed], documents(seed=99)[changed], *rows[changed + 1 :]]
    assert other[changed] != rows[changed]
    with torch.no_grad():
        before, after = (logits_of(model, joined(version)).split(LENGTHS) for version in (rows, other))
    for index, (first, second) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(first, second) is (index != changed), f"document {index}"


def test_a_documents_gradient_knows_nothing_of_the_others() -> None:
    model = model_of("llama", NAME).eval()
    batch = joined(documents())
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "input_ids")}
    logits = model(inputs_embeds=embedded, **inputs, use_cache=False).logits[0].split(LENGTHS)
    logits[2].sum().backward()
    shares = embedded.grad[0].split(LENGTHS)
    assert [bool((share != 0).any()) for share in shares] == [False, False, True, False, False]


def test_attention_is_causal_inside_a_document() -> None:
    model = model_of("qwen3", NAME).eval()
    rows = documents()
    later = [dict(row) for row in rows]
    later[2] = {**rows[2], "input_ids": [*rows[2]["input_ids"][:-1], (rows[2]["input_ids"][-1] + 1) % 97]}
    with torch.no_grad():
        before, after = (logits_of(model, joined(version)).split(LENGTHS)[2] for version in (rows, later))
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_one_document_needs_no_boundaries() -> None:
    ours, stock = model_of("llama", NAME).eval(), model_of("llama", "sdpa").eval()
    ids = torch.tensor([documents()[2]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_padded_batch_is_refused() -> None:
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(documents())
    model = model_of("llama", NAME)
    with pytest.raises(RuntimeError, match="load the model with sdpa for padded batches"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def test_a_sliding_window_shorter_than_the_row_is_refused() -> None:
    register()
    config = MistralConfig(**SIZES, sliding_window=8)
    config._attn_implementation = NAME
    model = MistralForCausalLM(config)
    with pytest.raises(ConfigError, match="attn_implementation=sdpa"):
        logits_of(model, joined(documents()))


def test_a_window_that_every_document_fits_in_is_no_reason_to_refuse() -> None:
    register()
    config = MistralConfig(**SIZES, sliding_window=max(LENGTHS) + 1)
    config._attn_implementation = NAME
    torch.manual_seed(0)
    windowed = MistralForCausalLM(config).eval()
    with torch.no_grad():
        found = logits_of(windowed, joined(documents()))
        expected = logits_of(model_of("mistral", NAME).eval(), joined(documents()))
    assert torch.equal(found, expected)


def test_dropout_and_scaling_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    real: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs)
        return real(*args, **kwargs)

    register()
    config = LlamaConfig(**{**SIZES, "attention_dropout": 0.25})
    config._attn_implementation = NAME
    model = LlamaForCausalLM(config)
    monkeypatch.setattr("sft_dist.train.attention.F.scaled_dot_product_attention", spy)
    logits_of(model.train(), joined(documents()))
    assert len(seen) == len(LENGTHS) * SIZES["num_hidden_layers"]
    assert all(kwargs["dropout_p"] == 0.25 and kwargs["scale"] == pytest.approx(8**-0.5) for kwargs in seen)
    seen.clear()
    logits_of(model.eval(), joined(documents()))
    assert all(kwargs["dropout_p"] == 0.0 for kwargs in seen)
