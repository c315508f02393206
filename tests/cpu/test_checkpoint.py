"""A checkpoint counts only while every byte is the one that was written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from sft_dist.files import read_json
from sft_dist.rundir import RunDir
from sft_dist.train import checkpoint, manifest
from sft_dist.train.checkpoint import SET_ASIDE, list_checkpoints, newest_complete, rotate
from sft_dist.train.manifest import MANIFEST, damage, write_manifest
from sft_dist.train.ranks import Ranks

FILES = {
    "model.safetensors": bytes(range(256)) * 20,
    "optimizer.pt": b"\x80\x02states" * 50,
    "trainer_state.json": b'{"global_step": 5}',
    "nested/shard-0/part.bin": b"\x00" * 64,
    "empty.txt": b"",
}


def save(run: RunDir, step: int, *, manifest: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if manifest:
        write_manifest(folder, step, {"plan": "cpu", "world_size": 1, "data": "abc", "dtype": "float32"})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_a_whole_checkpoint_verifies(run: RunDir) -> None:
    folder = save(run, 5)
    assert damage(folder) is None
    manifest = read_json(folder / MANIFEST)
    assert manifest["step"] == 5
    assert manifest["data"] == "abc"
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {k: len(v) for k, v in FILES.items()}
    assert newest_complete(run) == (folder, [])


def test_a_manifest_written_again_holds_for_the_new_content(run: RunDir) -> None:
    folder = save(run, 5)
    (folder / "optimizer.pt").write_bytes(b"later")
    assert damage(folder) is not None
    write_manifest(folder, 5, {})
    assert damage(folder) is None
    assert MANIFEST not in read_json(folder / MANIFEST)["files"]


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x00")


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
@pytest.mark.parametrize("harm", [remove, truncate, empty, flip, grow], ids=lambda harm: harm.__name__)
def test_each_kind_of_damage_is_found_and_the_next_older_is_taken(run: RunDir, name: str, harm) -> None:
    older, newer = save(run, 5), save(run, 10)
    harm(newer / name)
    problem = damage(newer)
    assert problem is not None
    assert name in problem
    chosen, torn = newest_complete(run)
    assert chosen == older
    assert len(torn) == 1
    assert "checkpoint-10" in torn[0]
    assert name in torn[0]
    assert [step for step, _ in list_checkpoints(run)] == [5]
    aside = run.checkpoints / "torn-checkpoint-10"
    assert aside.is_dir(), "what is damaged is set aside, not deleted"
    assert newest_complete(run) == (older, []), "what is set aside is not reported again"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_a_checkpoint_that_nobody_could_look_at_is_not_set_aside(
    run: RunDir, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's files, or a file server that is away: the run began anew from an older checkpoint, or from step 0."""
    older, newer = save(run, 5), save(run, 10)

    def kept(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("sft_dist.train.manifest._digest", kept)
    with pytest.raises(OSError, match=os.strerror(number)):
        newest_complete(run)
    assert [path for _, path in list_checkpoints(run)] == [newer, older]


def test_what_the_disk_cannot_read_is_damage(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(run, 5)

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("sft_dist.train.manifest._digest", broken)
    assert "Input/output error" in str(damage(folder))


def test_the_files_of_a_checkpoint_are_readable_to_whom_the_umask_says(run: RunDir) -> None:
    folder = save(run, 5, manifest=False)
    (folder / "model.safetensors").chmod(0o600)  # as safetensors leaves it
    before = os.umask(0o027)
    try:
        write_manifest(folder, 5, {})
    finally:
        os.umask(before)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"step": 10, "files": {"model.safe', b"\xff\xfe", b"null"])
def test_a_checkpoint_without_a_whole_manifest_does_not_count(run: RunDir, content: bytes | None) -> None:
    older, newer = save(run, 5), save(run, 10, manifest=False)
    if content is not None:
        (newer / MANIFEST).write_bytes(content)
    problem = damage(newer)
    assert problem is not None
    assert MANIFEST in problem
    assert newest_complete(run)[0] == older


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"step": 10}', b'{"files": []}', b'{"files": {"a": {}}}'])
def test_a_manifest_of_another_shape_is_damage_and_no_crash(run: RunDir, content: bytes) -> None:
    older, newer = save(run, 5), save(run, 10)
    (newer / MANIFEST).write_bytes(content)
    assert damage(newer) is not None
    assert newest_complete(run)[0] == older


def test_no_flipped_bit_in_the_manifest_crashes_the_resume(run: RunDir) -> None:
    older, newer = save(run, 5), save(run, 10)
    whole = (newer / MANIFEST).read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1
        (newer / MANIFEST).write_bytes(content)
        damage(newer)
    chosen, _ = newest_complete(run)
    assert chosen in (older, newer)


def test_two_torn_ones_of_the_same_step_do_not_collide(run: RunDir) -> None:
    older = save(run, 5)
    for _ in range(2):
        save(run, 10, manifest=False)
        assert newest_complete(run)[0] == older


def test_without_any_whole_checkpoint_there_is_none(run: RunDir) -> None:
    assert newest_complete(run) == (None, [])
    empty(save(run, 5) / "model.safetensors")
    save(run, 10, manifest=False)
    chosen, torn = newest_complete(run)
    assert chosen is None
    assert [line.split(":")[0] for line in torn] == ["checkpoint-10", "checkpoint-5"]


def test_the_newest_is_told_by_number_not_by_name_or_time(run: RunDir) -> None:
    save(run, 100)
    save(run, 20)
    save(run, 9)
    assert [step for step, _ in list_checkpoints(run)] == [100, 20, 9]
    assert newest_complete(run)[0] == run.checkpoints / "checkpoint-100"


def test_only_folders_named_like_checkpoints_are_looked_at(run: RunDir) -> None:
    folder = save(run, 5)
    shutil.copytree(folder, run.checkpoints / "checkpoint-7-copy")
    shutil.copytree(folder, run.checkpoints / "tmp-checkpoint-9")
    (run.checkpoints / "checkpoint-11").write_text("a file")
    assert list_checkpoints(run) == [(5, folder)]


def test_rotation_keeps_the_newest_complete_ones(run: RunDir) -> None:
    for step in (5, 10, 15, 100):
        save(run, step)
    rotate(run, 2)
    assert [step for step, _ in list_checkpoints(run)] == [100, 15]
    rotate(run, 3)
    assert [step for step, _ in list_checkpoints(run)] == [100, 15]


def test_rotation_neither_counts_nor_removes_what_is_not_complete(run: RunDir) -> None:
    for step in (5, 10):
        save(run, step)
    save(run, 15, manifest=False)
    rotate(run, 2)
    assert [step for step, _ in list_checkpoints(run)] == [15, 10, 5]
    save(run, 20)
    rotate(run, 2)
    assert [step for step, _ in list_checkpoints(run)] == [20, 15, 10]


def test_the_manifest_of_a_save_is_readable_json(run: RunDir) -> None:
    text = (save(run, 5) / MANIFEST).read_text(encoding="utf-8")
    assert json.loads(text)["files"]["trainer_state.json"]["bytes"] == len(FILES["trainer_state.json"])


def test_rotation_never_goes_below_two_whatever_it_is_told(run: RunDir) -> None:
    for step in (5, 10, 15):
        save(run, step)
    rotate(run, 0)
    assert [step for step, _ in list_checkpoints(run)] == [15, 10]
    rotate(run, 1)
    assert [step for step, _ in list_checkpoints(run)] == [15, 10]


def test_milestones_stay_for_good_and_count_among_the_newest(run: RunDir) -> None:
    for step in (5, 10, 15, 20, 25, 30):
        save(run, step)
        rotate(run, 2, milestone_steps=10)
    assert [step for step, _ in list_checkpoints(run)] == [30, 25, 20, 10]
    assert all(damage(path) is None for _, path in list_checkpoints(run))


def test_half_a_removed_checkpoint_never_bears_its_name_and_goes_with_the_next_rotation(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10, 15):
        save(run, step)

    def killed(path: Path) -> None:
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            rotate(run, 2)
    assert [(step, damage(path)) for step, path in list_checkpoints(run)] == [(15, None), (10, None)]
    assert len(list(run.checkpoints.iterdir())) == 3
    rotate(run, 2)
    assert len(list(run.checkpoints.iterdir())) == 2


def test_every_file_and_folder_is_on_the_disk_before_the_manifest(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(run, 5, manifest=False)
    done: list[str] = []
    sync, write = manifest.sync_path, manifest.write_json

    def synced(path: Path) -> None:
        sync(path)
        done.append(str(path.relative_to(run.checkpoints)))

    def written(path: Path, value: object) -> None:
        write(path, value)
        done.append(path.name)

    monkeypatch.setattr(manifest, "sync_path", synced)
    monkeypatch.setattr(manifest, "write_json", written)
    write_manifest(folder, 5, {})
    name = folder.name
    before, after = done[: done.index(MANIFEST)], done[done.index(MANIFEST) + 1 :]
    folders = {name, f"{name}/nested", f"{name}/nested/shard-0", "."}
    assert set(before) == {f"{name}/{file}" for file in FILES} | folders
    assert after == [name], "the manifest's own name"


def test_what_is_set_aside_says_why(run: RunDir) -> None:
    save(run, 5)
    truncate(save(run, 10) / "optimizer.pt")
    _, (line,) = newest_complete(run)
    reason = (run.checkpoints / "torn-checkpoint-10" / SET_ASIDE).read_text()
    assert reason == "optimizer.pt has 399 bytes, not 400\n"
    assert line == "checkpoint-10: optimizer.pt has 399 bytes, not 400; set aside as torn-checkpoint-10"


def test_processes_share_the_files_and_each_learns_what_another_found(run: RunDir) -> None:
    folder = save(run, 5)
    flip(folder / "optimizer.pt")
    found = [manifest._damage(folder, Ranks(rank, 3)) for rank in range(3)]
    assert sorted(filter(None, found)) == ["optimizer.pt has changed since it was written"]
