"""The manifest of a checkpoint that several hosts have written, of which each sees the folder in its own way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sft_dist.files import read_json
from sft_dist.train import manifest as module
from sft_dist.train.manifest import MANIFEST, damage, write_manifest
from sft_dist.train.ranks import Ranks

SIZE = 3


class InThreads(Ranks):
    """Process `rank` of SIZE, each of them a thread."""

    def __init__(self, rank: int, board: list[Any], meet: threading.Barrier) -> None:
        super().__init__(rank, SIZE)
        object.__setattr__(self, "board", board)
        object.__setattr__(self, "meet", meet)

    def barrier(self) -> None:
        self.meet.wait(60)  # type: ignore[attr-defined]

    def everyones(self, value: Any) -> list[Any]:
        self.board[self.rank] = value  # type: ignore[attr-defined]
        self.barrier()
        told = [*self.board]  # type: ignore[attr-defined]
        self.barrier()
        return told


def in_processes(work: Callable[[Ranks], Any]) -> list[Any]:
    """What each process returns, or the OSError that it raises."""
    board, meet = [None] * SIZE, threading.Barrier(SIZE)

    def one(rank: int) -> Any:
        threading.current_thread().name = f"rank-{rank}"
        try:
            return work(InThreads(rank, board, meet))
        except OSError as error:
            return error

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(one, range(SIZE)))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with two files of each process, of which no other process sees the second one."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for rank in range(SIZE):
        for name in (f"shard-{rank}.bin", f"late-{rank}.bin"):
            (folder / name).write_text(name)
    whole = module._listed

    def listed(checkpoint: Path) -> tuple[list[Path], list[Path]]:
        files, folders = whole(checkpoint)
        own = f"late-{threading.current_thread().name.removeprefix('rank-')}.bin"
        return [path for path in files if "late" not in path.name or path.name == own], folders

    monkeypatch.setattr(module, "_listed", listed)
    return folder


def test_a_file_that_only_its_writer_sees_is_in_the_manifest(written: Path) -> None:
    in_processes(lambda ranks: write_manifest(written, 3, {}, ranks))
    assert sorted(read_json(written / MANIFEST)["files"]) == sorted(
        path.name for path in written.iterdir() if path.name != MANIFEST
    )
    assert damage(written) is None
    (written / "late-1.bin").write_text("other words")
    assert damage(written) is not None


def test_what_only_its_writer_sees_and_cannot_read_fails_all(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = module._digest

    def broken(path: Path) -> str:
        if path.name == "late-2.bin":
            raise OSError(5, "Input/output error", str(path))
        return digest(path)

    shares = in_processes(lambda ranks: module.settled(written, ranks))
    monkeypatch.setattr(module, "_digest", broken)
    found = in_processes(lambda ranks: module.gathered(written, shares[ranks.rank], ranks))
    assert all(isinstance(it, OSError) and "Input/output error" in str(it) for it in found), found
