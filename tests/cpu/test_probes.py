"""Sums over bits and places: what tells a gathered tensor from another one, where every process has a share of it only."""

from __future__ import annotations

import pytest
import torch

from sft_dist.train import probes
from sft_dist.train.probes import sum_of_bits

DRAW = torch.Generator().manual_seed(1)
KINDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_sums_of_parts_add_up_to_that_of_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (torch.randn((7, 11), generator=DRAW) * 100).abs().to(dtype)
    wanted = sum_of_bits(whole, "cpu")
    monkeypatch.setattr(probes, "AT_ONCE", 4)  # several pieces of each part
    parts = torch.split(whole.reshape(-1), 30)
    assert sum(sum_of_bits(part, "cpu", 30 * number) for number, part in enumerate(parts)) % 2**64 == wanted
    assert sum_of_bits(whole.t(), "cpu") != wanted, "the same values elsewhere"


@pytest.mark.parametrize("place", [0, 35, 76])
def test_a_single_bit_and_two_values_that_changed_places_are_told(place: int) -> None:
    whole = torch.randn(77, generator=DRAW).bfloat16()
    off, moved = whole.clone(), whole.clone()
    off.view(torch.int16)[place] ^= 1
    moved[[place, (place + 1) % 77]] = whole[[(place + 1) % 77, place]]
    sums = {sum_of_bits(it, "cpu") for it in (whole, off, moved)}
    assert len(sums) == 3


def test_what_one_conversion_rounds_to_zero_and_another_does_not_is_the_same() -> None:
    near = torch.tensor([1.0, 1e-40, -1e-40, -0.0, 2.0]).bfloat16()
    assert sum_of_bits(near, "cpu") == sum_of_bits(torch.tensor([1.0, 0, 0, 0, 2]).bfloat16(), "cpu")
