"""What the unit tests have beyond the others: no wait for the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """os.fsync that takes a file and returns: no unit test pulls the plug, and on a busy disk 1,600 waits are a third of their time.

    Tests that look at what is synced, and when, put their own in its place; those of processes have the real one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", taken)
        yield


def taken(file: int) -> None:
    os.fstat(file)  # refuses, as fsync does, what is no open file
