"""Runs on rows with weights, through packing, micro batches and the evaluation: slow, so it stands here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.files import read_json, read_jsonl, write_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here

SETTINGS = (
    "evaluate={before: false, after: false, labels: [], data: null}",
    "model.dtype=float32",
    "data={eval_size: 3, packing: true, max_length: 128}",
    "train={max_steps: 3, global_batch_size: 4, eval_strategy: steps, eval_steps: 3, logging_steps: 1}",
)


def trained(new_run: Callable[..., RunDir], name: str, pair: tuple[float, float], *overrides: str) -> RunDir:
    """A run on 15 conversations whose two answers have these weights."""
    rows = []
    for number in range(15):
        said = (("One?", None), (f"first {number}", pair[0]), ("Two?", None), (f"second {number * 'x'}", pair[1]))
        messages: list[dict[str, Any]] = [
            {"role": ("user", "assistant")[place % 2], "content": words, "weight": weight}
            for place, (words, weight) in enumerate(said)
        ]
        rows.append({"messages": messages})
    path = Path(f"{name}.jsonl").resolve()
    write_jsonl(path, rows)
    run = new_run(f"data.train={path}", *SETTINGS, *overrides, name=name)
    run_here(run)
    return run


def column(run: RunDir, name: str) -> list[float]:
    return [row[name] for row in read_jsonl(run.metrics) if name in row]


def test_runs_differ_by_weights_only_where_weights_differ(new_run: Callable[..., RunDir]) -> None:
    none = trained(new_run, "none", (1, 1))
    half = trained(new_run, "half", (0.5, 0.5), "train.per_device_train_batch_size=1")
    first = trained(new_run, "first", (1, 0.01))
    for name in ("loss", "eval_loss", "grad_norm"):
        wanted = column(none, name)
        assert len(wanted) == (1 if name == "eval_loss" else 3)
        assert column(half, name) == pytest.approx(wanted, rel=1e-5)
        assert column(first, name) != pytest.approx(wanted, rel=1e-3)
    one, other = (read_json(run.ledger)["train"] for run in (none, half))
    assert other["trained_weight"] == other["trained_tokens"] / 2 == one["trained_tokens"] / 2
    assert (one["weighted_rows"], other["weighted_rows"]) == (0, 15)
