"""Room for a checkpoint: bytes, inodes and quotas, and which errors are the disk's."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_dist.errors import DiskError, WorkersFailed
from sft_dist.jobs.failures import classify
from sft_dist.jobs.last_words import word_of
from sft_dist.jobs.words import Evidence
from sft_dist.rundir import RunDir
from sft_dist.train import disk
from sft_dist.train.disk import Need, agree_on_room, agree_on_writing, is_of_disk, quota_rows, shortage
from sft_dist.train.ranks import MainFailed, Ranks

GIB = 2**30


@pytest.fixture
def disk_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`disk_with(bytes, files, total)`: the file system of every folder."""

    def make(left: int, files: int, total: int = 10**6) -> None:
        found = SimpleNamespace(f_bavail=left // 4096, f_frsize=4096, f_files=total, f_favail=files)
        monkeypatch.setattr(disk.os, "statvfs", lambda folder: found)

    monkeypatch.setattr(disk.shutil, "which", lambda name: None)
    return make


def test_what_fits_is_no_shortage(disk_with: Any, tmp_path: Path) -> None:
    disk_with(2 * GIB, 100)
    assert shortage(tmp_path, Need(2 * GIB, 100, "")) is None
    disk_with(2 * GIB, 0, total=0)
    assert shortage(tmp_path, Need(2 * GIB, 100, "")) is None, "btrfs and others count no inodes"


def test_a_shortage_names_what_is_needed_what_is_left_and_where(disk_with: Any, tmp_path: Path) -> None:
    disk_with(GIB, 100)
    found = shortage(tmp_path / "not" / "there", Need(2 * GIB, 10, "as the last one"))
    assert found == f"takes 2 GiB ({2 * GIB} bytes) as the last one, but {tmp_path} has 1 GiB ({GIB} bytes) left"
    disk_with(GIB, 9)
    found = shortage(tmp_path, Need(GIB, 10, ""))
    assert found == f"takes 10 files and folders, but {tmp_path} has room for 9 more"


QUOTA = """Disk quotas for user jo (uid 1001):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
filer:/home/jo 1048576* 1000000  2097152   6days     900     0    1000
filer:/scratch 500 0 0 12 0 0
"""
LUSTRE = "/lustre/scratch 1048576 0 2097152 - 900 0 1000 -\n"


@pytest.mark.parametrize("text", [QUOTA, LUSTRE])
def test_quotas_of_both_commands_are_read(text: str) -> None:
    assert next(quota_rows(text)) == (GIB, 100)


def test_no_limit_and_no_quota_limit_nothing() -> None:
    assert list(quota_rows(QUOTA))[1] == (None, None)
    assert list(quota_rows("Disk quotas for user jo (uid 1001): none\n")) == []
    assert list(quota_rows("/x 3000* 1000 2000 none 5 0 0 -")) == [(0, None)]


def test_a_quota_is_a_shortage_where_the_command_answers(
    disk_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_with(100 * GIB, 10**6)
    command = tmp_path / "quota"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{QUOTA}END\nexit 1\n")  # quota exits with 1 where one is exceeded
    command.chmod(0o755)
    monkeypatch.setattr(disk.shutil, "which", lambda name: str(command) if name == "quota" else None)
    found = shortage(tmp_path, Need(2 * GIB, 10, "by the planner"))
    assert found is not None
    assert found.endswith(f"but the user's quota on {tmp_path} has 1 GiB ({GIB} bytes) left")
    assert shortage(tmp_path, Need(2 * GIB, 10, ""), quotas=False) is None
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(disk, "QUOTA_TIMEOUT_S", 0.05)
    assert shortage(tmp_path, Need(2 * GIB, 10, "")) is None, "a command that does not answer says nothing"


class Others(Ranks):
    """Process `rank` of several, whose words are given."""

    def __init__(self, rank: int, told: list[Any]) -> None:
        super().__init__(rank, len(told))
        object.__setattr__(self, "told", told)

    def everyones(self, value: Any) -> list[Any]:
        told: list[Any] = [*self.told]  # type: ignore[attr-defined]
        told[self.rank] = value
        return told


def test_one_host_without_room_is_enough(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (run.checkpoints / "torn-checkpoint-7").mkdir(parents=True)
    agree_on_room(run, "checkpoint-9", None, Others(0, [None, None]))
    with pytest.raises(DiskError, match="checkpoint-9 takes too much") as caught:
        agree_on_room(run, "checkpoint-9", None, Others(0, [None, "takes too much"]))
    assert "torn-checkpoint-7 in" in str(caught.value.hint)
    assert f"sft-dist resume {run.path}" in str(caught.value.hint)
    with pytest.raises(MainFailed):
        agree_on_room(run, "checkpoint-9", "takes too much", Others(1, [None, None]))


def half_written(run: RunDir) -> Path:
    folder = run.checkpoints / "checkpoint-9"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    return folder


def test_one_process_that_cannot_write_fails_all_and_nothing_half_written_stays(tmp_path: Path) -> None:
    run, full = RunDir(tmp_path), OSError(errno.ENOSPC, "No space left on device")
    folder = half_written(run)
    agree_on_writing(run, folder, None, Others(0, [None, None]))
    assert folder.is_dir()
    with pytest.raises(
        DiskError, match=r"does not count: rank 1 \(.*\): OSError: \[Errno 28\] No space left"
    ) as caught:
        agree_on_writing(run, folder, full, Others(1, [None, None]))
    assert (caught.value.kind, caught.value.exit_code, caught.value.__cause__) == ("disk", 5, full)
    assert folder.is_dir(), "the main process removes it"
    with pytest.raises(WorkersFailed, match=r"rank 1 \(n2\): OSError: full") as told:
        agree_on_writing(run, folder, None, Others(0, [None, ("OSError: full", "n2")]))
    assert told.value.exit_code == 5
    assert list(run.checkpoints.iterdir()) == []
    with pytest.raises(MainFailed):
        agree_on_writing(run, folder, None, Others(2, [None, ("OSError: full", "n2"), None]))
    words = [word_of(caught.value, 1), word_of(told.value, 0)]
    failure = classify(Evidence(words=words))
    assert (failure.kind, failure.rank) == ("disk", 1)


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    run, error = RunDir(tmp_path), RuntimeError("CUDA error: unspecified launch failure")
    with pytest.raises(RuntimeError) as caught:
        agree_on_writing(run, half_written(run), error, Ranks())
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *((OSError(number, os.strerror(number)), True) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)),
        (PermissionError(errno.EACCES, "x"), True),
        (ConnectionResetError(errno.ECONNRESET, "x"), False),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
    ],
)  # fmt: skip
def test_errors_of_disks_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_of_disk(error) is expected
