"""A few rows that the trained model is asked, and the published one after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sft_dist.parallel.resolve import Resolved
    from sft_dist.train.trainer import Trainer

# Rows that trained and published model are compared on, tokens of each at most, positions of each, words of the vocabulary.
ROWS, LONGEST, POSITIONS, COLUMNS = 4, 256, 8, 64


def trained_logits(trainer: Trainer, resolved: Resolved) -> dict[str, Any] | None:
    """What the model, as the plan holds it, predicts for a few rows; every process must call it.

    `rows` are token ids, each up to an answer's end-of-turn token; `logits` those of the last POSITIONS tokens before it
    for some `columns` of the vocabulary, `spread` their standard deviation over all of it, and `stops` whether the end-of-turn
    token is the likeliest where it belongs. None where it would not be
    the published model's: base weights in 4 bits, rows that several GPUs share.
    """
    import torch

    lora = resolved.config.model.lora
    if resolved.layout.sequence_parallel_size > 1 or (lora is not None and lora.quantization != "none"):
        return None
    tokenizer = trainer.processing_class
    data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    eos = int(tokenizer.eos_token_id)
    rows = _probes(data, eos)
    if not rows:
        return None
    engine = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    model = trainer.model_wrapped if engine else trainer.accelerator.unwrap_model(trainer.model)
    was = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for these few rows
        found = [last_logits(model, row, trainer.accelerator.device) for row in rows]
    model.train(was)
    words = min(len(found[0][0]), len(tokenizer))  # rows that only fill the vocabulary up mean nothing
    columns = sorted({*(words * step // COLUMNS for step in range(COLUMNS)), eos})
    return {
        "rows": rows,
        "columns": columns,
        "logits": [[[float(f"{value:.6g}") for value in line] for line in part[:, columns].tolist()] for part in found],
        "stops": [row[-1] == eos and int(part[-1].argmax()) == eos for row, part in zip(rows, found, strict=True)],
        "spread": max(float(part[:, :words].std()) for part in found),
    }


def last_logits(model: Any, row: Sequence[int], device: Any) -> torch.Tensor:
    """[positions, vocabulary] in float32 on the host: what follows each of the last tokens of `row` but its last one."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([row[:-1]], device=device)
        return model(input_ids=ids, use_cache=False).logits[0, -POSITIONS:].float().cpu()  # type: ignore[no-any-return]


def _probes(data: Any, eos: int) -> list[list[int]]:
    """Token ids of the first rows, each up to its first trained end-of-turn token, or LONGEST of them."""
    rows = []
    for row in data.select(range(min(len(data), 4 * ROWS))):
        ids, labels = row["input_ids"], row["labels"]
        ends = [place for place, label in enumerate(labels) if label == eos and place > 0]
        rows.append(ids[: ends[0] + 1 if ends else LONGEST][-LONGEST:])
    return [row for row in rows if len(row) > 1][:ROWS]
