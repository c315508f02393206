"""eval_loss is the mean over the trained tokens of all held-out rows, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from trl import SFTConfig

from sft_dist.train.rows import filled
from sft_dist.train.trainer import Trainer

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Tokens, and how many of the last ones are trained: short rows with many, long ones with few.
ROWS = ((4, 3), (9, 1), (30, 2), (5, 4), (12, 11))


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 101, (length,), generator=generator).tolist() for length, _ in ROWS]
    labels = [[-100] * (len(row) - trained) + row[-trained:] for row, (_, trained) in zip(ids, ROWS, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def wanted(model: PreTrainedModel) -> float:
    """The mean over all trained tokens, row by row."""
    losses = []
    for row in rows():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"])[1:]
        losses.append(-logits.log_softmax(-1)[torch.arange(len(labels)), labels.clamp(min=0)][labels != -100])
    return float(torch.cat(losses).mean().detach())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("one_pass", [True, False], ids=["our loss", "TRL's loss"])
def test_the_evaluation_loss_is_a_mean_over_tokens(
    tmp_path: Path, tiny_tokens: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, size: int, one_pass: bool
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # losses that differ from row to row
    if not one_pass:
        monkeypatch.setattr("sft_dist.train.loss.supports", lambda model: False)
    expected = wanted(model)
    settings = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, per_device_eval_batch_size=size,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=settings, train_dataset=rows(), eval_dataset=filled(rows(), size, 0),
        processing_class=tiny_tokens().tokenizer,
    )  # fmt: skip
    assert trainer.one_pass is one_pass
    for _ in range(2):  # nothing is left over from the evaluation before
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
