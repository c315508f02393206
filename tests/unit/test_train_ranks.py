"""A process that is alone needs no torch to agree with itself; several processes are in tests/distributed."""

from __future__ import annotations

import sys

import pytest

from sft_dist.errors import DataError
from sft_dist.parallel.world import World
from sft_dist.train.ranks import Ranks, join, leave


def test_alone_every_answer_is_ones_own() -> None:
    alone = Ranks()
    assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)
    alone.barrier()
    assert alone.largest(15) == 15
    assert alone.by_main(lambda: {"a": 1}) == {"a": 1}
    assert alone.everyones("x") == ["x"]


def test_alone_an_error_is_itself() -> None:
    def fail() -> None:
        raise DataError("rows.jsonl:3: no messages")

    with pytest.raises(DataError, match=r"rows\.jsonl:3"):
        Ranks().by_main(fail)


def test_a_process_that_nobody_launched_joins_nobody() -> None:
    assert join(World(), use_cpu=True) == Ranks()
    leave()


def test_only_rank_0_is_the_main_one() -> None:
    assert [Ranks(rank, 4).is_main for rank in range(4)] == [True, False, False, False]


def test_none_of_it_imports_torch() -> None:
    import subprocess

    code = "import sys\nfrom sft_dist.parallel.world import World\nfrom sft_dist.train.ranks import *\n"
    code += "join(World(), use_cpu=True).by_main(int); leave(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
