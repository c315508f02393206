"""The order of the rows, also in an epoch that a resume begins in its middle."""

from __future__ import annotations

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from sft_dist.train.rows import EpochOrder, _skip_first_batches


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_what_is_left_of_an_epoch_keeps_its_order(processes: int, epoch: int) -> None:
    """accelerate alone gives several processes the order of the first epoch."""
    for rank in range(processes):
        loader = prepare_data_loader(
            DataLoader(range(24), batch_size=2, sampler=EpochOrder(24, 0, seed=5)),
            num_processes=processes,
            process_index=rank,
            put_on_device=False,
        )
        loader.set_epoch(epoch)
        whole = [batch.tolist() for batch in loader]
        loader.set_epoch(0)
        rest = _skip_first_batches(loader, 2)
        rest.set_epoch(epoch)
        assert [batch.tolist() for batch in rest] == whole[2:]
