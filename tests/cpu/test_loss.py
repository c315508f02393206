"""The one-pass head gives the loss, the gradients and the counts of the plain float32 cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM
from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from trl import SFTConfig, SFTTrainer

from sft_dist.train import loss
from sft_dist.train.trainer import Trainer

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IGNORED = -100


def llama(*, tied: bool) -> LlamaForCausalLM:
    """A model as it comes from transformers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def with_our_loss(*, tied: bool) -> LlamaForCausalLM:
    """The same model, able to compute our loss inside of its forward pass."""
    model = llama(tied=tied)
    loss.install(model)
    return model


def batch(rows: int = 4, length: int = 23, share: float = 0.5) -> dict[str, torch.Tensor]:
    """A padded batch in which about `share` of the positions are trained."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 101, (rows, length), generator=generator)
    trained = torch.rand((rows, length), generator=generator) < share
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    labels = ids.masked_fill(~trained | (mask == 0), IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model: Any, inputs: dict[str, torch.Tensor], divisor: float | None) -> tuple[torch.Tensor, int, int]:
    """What a reader would write: all logits, shifted, float32, ignored positions left out."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()[:, :-1]
    labels = inputs["labels"][:, 1:]
    kept = labels != IGNORED
    total = F.cross_entropy(logits[kept], labels[kept], reduction="sum")
    right = int((logits[kept].argmax(-1) == labels[kept]).sum())
    return total / (int(kept.sum()) if divisor is None else divisor), int(kept.sum()), right


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [1, 7, 256], ids=lambda size: f"chunk-{size}")
@pytest.mark.parametrize("divisor", [None, 50], ids=["own-count", "accumulated-count"])
def test_loss_and_all_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, tied: bool, chunk: int, divisor: int | None
) -> None:
    monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
    model, inputs = with_our_loss(tied=tied), batch()
    expected, count, right = plain(model, inputs, divisor)
    assert count > 20, "too few trained positions to make several chunks"
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()

    given = None if divisor is None else torch.tensor(divisor)
    value, trained, correct = loss.trained_token_loss(model, inputs, given)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert (int(trained), int(correct)) == (count, right)
    value.backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient: a vain test"
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_the_gradient_is_scaled_by_what_comes_after_the_loss() -> None:
    model, inputs = with_our_loss(tied=True), batch()
    (plain(model, inputs, None)[0] * 3 + 1).backward()
    wanted = gradients(model)
    model.zero_grad()
    (loss.trained_token_loss(model, inputs, None)[0] * 3 + 1).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_without_a_trained_token_the_loss_and_the_gradient_are_zero() -> None:
    model, inputs = with_our_loss(tied=True), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    value, trained, correct = loss.trained_token_loss(model, inputs, None)
    assert (float(value.detach()), int(trained), int(correct)) == (0.0, 0, 0)
    value.backward()
    assert all(bool((gradient == 0).all()) for gradient in gradients(model).values())


def test_the_first_token_of_a_row_is_never_predicted() -> None:
    model, inputs = with_our_loss(tied=True), batch(rows=1)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    inputs["labels"][0, 0] = inputs["input_ids"][0, 0]
    assert int(loss.trained_token_loss(model, inputs, None)[1]) == 0


@pytest.mark.parametrize("chunk", [5, 256])
def test_without_gradients_the_loss_is_the_same(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
    model, inputs = with_our_loss(tied=True), batch()
    with torch.no_grad():
        value, _, correct = loss.trained_token_loss(model, inputs, None)
        expected, _, right = plain(model, inputs, None)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert int(correct) == right


def test_a_frozen_head_still_passes_the_gradient_on() -> None:
    model, inputs = with_our_loss(tied=False), batch()
    model.lm_head.weight.requires_grad_(False)
    plain(model, inputs, None)[0].backward()
    wanted = gradients(model)
    model.zero_grad()
    loss.trained_token_loss(model, inputs, None)[0].backward()
    found = gradients(model)
    assert "lm_head.weight" not in found
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_bfloat16_is_as_near_to_float32_as_the_plain_way() -> None:
    exact, inputs = llama(tied=True), batch()
    reference = plain(exact, inputs, None)[0]
    reference.backward()
    wanted = gradients(exact)
    half = with_our_loss(tied=True).bfloat16()
    plain(half, inputs, None)[0].backward()
    common = gradients(half)
    half.zero_grad()
    value = loss.trained_token_loss(half, inputs, None)[0]
    value.backward()
    assert abs(float(value.detach()) - float(reference.detach())) < 0.02
    for name, gradient in gradients(half).items():
        ours = float((gradient.float() - wanted[name]).norm() / wanted[name].norm())
        theirs = float((common[name].float() - wanted[name]).norm() / wanted[name].norm())
        assert ours < max(1.2 * theirs, 0.02), f"{name}: off by {ours:.3f}, the plain way by {theirs:.3f}"


# --- models that it leaves alone -------------------------------------------------------------------------------------


def test_the_heads_gradient_is_as_near_in_many_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sum is kept in float32: rounded to bfloat16 after each of them it is ten times as far off."""
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(shape, generator=draw).bfloat16() for shape in ((1024, 16), (32, 16)))
    targets = torch.randint(0, 32, (1024,), generator=draw)
    exact = weight.float().requires_grad_()
    F.cross_entropy(hidden.float() @ exact.t(), targets).backward()

    def distance(chunk: int) -> float:
        monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
        ours = weight.clone().requires_grad_()
        loss._HeadLoss.apply(hidden, ours, targets, torch.tensor(1024))[0].backward()  # type: ignore[no-untyped-call]
        assert ours.grad is not None
        assert exact.grad is not None
        return float((ours.grad.float() - exact.grad).norm() / exact.grad.norm())

    assert distance(4) < 2 * distance(4096)


def softcapped() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "query_pre_attn_scalar": 8}
    config = Gemma2Config(**sizes, final_logit_softcapping=0.5, attn_logit_softcapping=None, sliding_window=64)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def biased() -> PhiForCausalLM:
    torch.manual_seed(0)
    return PhiForCausalLM(PhiConfig(**SIZES))


def test_it_says_which_models_it_knows() -> None:
    assert loss.supports(llama(tied=True))
    assert loss.supports(llama(tied=False))
    assert loss.supports(GemmaForCausalLM(GemmaConfig(**SIZES)))
    assert not loss.supports(softcapped()), "its logits are capped after the head"
    model = biased()
    assert model.lm_head.bias is not None
    assert not loss.supports(model), "its head has a bias"


@pytest.mark.parametrize("name", loss.LOGIT_SETTINGS)
def test_a_setting_that_changes_the_logits_is_left_to_trl(name: str) -> None:
    model = llama(tied=True)
    setattr(model.config, name, 2.0)
    assert not loss.supports(model)


@pytest.fixture
def trainer_of(tmp_path: Path, tiny_tokens: Callable[..., Any]) -> Callable[[Any], Trainer]:
    """A Trainer around a model, without a dataset of interest."""
    from datasets import Dataset

    def build(model: Any, **arguments: Any) -> Trainer:
        rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}])
        settings = SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}, **arguments,
        )  # fmt: skip
        return Trainer(model=model, args=settings, train_dataset=rows, processing_class=tiny_tokens().tokenizer)

    return build


def forbid(*_: Any) -> None:
    raise AssertionError("the one-pass loss was used")


@pytest.mark.parametrize("make", [softcapped, biased])
def test_the_trainer_leaves_such_a_model_to_trl(
    trainer_of: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    trainer, inputs = trainer_of(make()), batch()
    assert trainer.one_pass is False
    monkeypatch.setattr(loss, "trained_token_loss", forbid)
    expected = plain(trainer.model, inputs, None)[0]
    value = trainer.compute_loss(trainer.model, dict(inputs))
    torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=1e-5)


def test_the_trainer_uses_it_for_a_plain_model(
    trainer_of: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(llama(tied=True))
    monkeypatch.setattr(loss, "trained_token_loss", forbid)
    with pytest.raises(AssertionError, match="one-pass loss was used"):
        trainer.compute_loss(trainer.model, batch())


@pytest.mark.parametrize("arguments", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}], ids=str)
def test_another_loss_is_left_to_trl(
    trainer_of: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    trainer = trainer_of(llama(tied=True), **arguments)
    monkeypatch.setattr(loss, "trained_token_loss", forbid)
    inputs = batch()
    value = trainer.compute_loss(trainer.model, dict(inputs))
    assert abs(float(value.detach()) - float(plain(trainer.model, inputs, None)[0].detach())) > 1e-4


def test_loss_and_metrics_agree_with_trls_own(trainer_of: Callable[..., Trainer]) -> None:
    """Over two micro batches: the loss of each, then what is logged of both."""
    model, batches = llama(tied=True), (batch(), batch(rows=3, length=31, share=0.3))
    ours, theirs = trainer_of(model), trainer_of(model)
    model.train()
    divisor = torch.tensor(80)
    for inputs in batches:
        value = ours.compute_loss(model, dict(inputs), num_items_in_batch=divisor)
        expected = SFTTrainer.compute_loss(theirs, model, dict(inputs), num_items_in_batch=divisor)
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
    ours.log({"loss": 1.0})
    SFTTrainer.log(theirs, {"loss": 1.0})
    logged = ours.state.log_history[-1]
    assert logged["num_tokens"] == theirs.state.log_history[-1]["num_tokens"] > 0
    # TRL's accuracy is the mean of the batches' accuracies; ours weighs each token the same.
    parts = [plain(model, inputs, None)[1:] for inputs in batches]
    count, right = (sum(part[index] for part in parts) for index in (0, 1))
    assert logged["mean_token_accuracy"] == pytest.approx(right / count)
    means = sum(part[1] / part[0] for part in parts) / 2
    assert theirs.state.log_history[-1]["mean_token_accuracy"] == pytest.approx(means)


def test_what_was_logged_is_not_counted_again(trainer_of: Callable[..., Trainer]) -> None:
    model, inputs = llama(tied=True), batch()
    trainer = trainer_of(model)
    model.train()
    for _ in range(2):
        trainer.compute_loss(model, dict(inputs))
        trainer.log({"loss": 1.0})
    first, second = trainer.state.log_history
    assert second["num_tokens"] == 2 * first["num_tokens"] == 2 * int(inputs["attention_mask"].sum())
    assert second["mean_token_accuracy"] == first["mean_token_accuracy"]
