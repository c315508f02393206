"""The proof of a merge: each value may be right to a step of bfloat16, and all of them together have lost the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.config.schema import ModelConfig
from sft_dist.evaluate.merged import _difference
from sft_dist.train import merging
from sft_dist.train.merging import rounded

NAME = "model.layers.0.mlp.up_proj.weight"
DRAW = torch.Generator().manual_seed(1)
BASE = (torch.randn((1024, 1024), generator=DRAW) * 0.02).bfloat16()


class Changed:
    """An adapter that adds `change` to the one tensor there is."""

    def __init__(self, change: torch.Tensor) -> None:
        self.change = change

    def changes(self, name: str) -> bool:
        return True

    def apply(self, name: str, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return base.float() + self.change, self.change


@pytest.mark.parametrize(
    ("rounding", "said"),
    [
        (lambda exact: rounded(exact, NAME), None),
        (lambda exact: exact.bfloat16(), "of the change"),
        (lambda exact: exact.bfloat16() * 0 + BASE, "holds 0% of the change"),
    ],
    ids=["by chance", "to the nearest", "nothing merged"],
)
def test_small_changes_must_be_there(rounding: Callable[[torch.Tensor], torch.Tensor], said: str | None) -> None:
    # Far less than half of a step: no single value tells.
    change = (
        BASE.float().abs() * torch.finfo(torch.bfloat16).eps * 0.05 * torch.randn(BASE.shape, generator=DRAW).sign()
    )
    adapter: Any = Changed(change)
    shares: list[float] = []
    problem = _difference(NAME, rounding(BASE.float() + change), BASE, adapter, shares)
    assert (problem is None) if said is None else (problem is not None and said in problem)
    assert len(shares) == 1


def test_a_merge_computes_on_every_core_and_leaves_the_process_its_own_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside a GPU a process has one thread, and merging is all that there is to do."""
    seen: list[int] = []

    class Adapted:
        def merge_and_unload(self) -> str:
            seen.append(torch.get_num_threads())
            return "whole"

    monkeypatch.setattr(merging, "with_adapter", lambda base, folder: Adapted())
    monkeypatch.setattr(merging, "_merge_layers", lambda adapted: seen.append(torch.get_num_threads()))
    monkeypatch.setattr("sft_dist.train.model.load_model", lambda *_, **__: None)
    # As on a machine of seven cores, whatever this one has.
    monkeypatch.setattr(merging.os, "sched_getaffinity", lambda pid: set(range(7)))
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spec: Any = ModelConfig(name="embedded:tiny")
        assert merging.merged(spec, tokens=None, folder=tmp_path, dtype="bfloat16") == "whole"  # type: ignore[arg-type]
        assert seen == [7, 7]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(was)


def test_what_is_not_finite_stays_so() -> None:
    """A NaN whose bits are all set would become 0 by adding to them, and one of the lowest bit alone infinite."""
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7F800000, -0x800000], dtype=torch.int32).repeat(64)
    found = rounded(bits.view(torch.float32), NAME)
    wanted = torch.tensor([math.nan, math.nan, math.nan, math.inf, -math.inf]).repeat(64)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()].float(), wanted[~wanted.isnan()])
