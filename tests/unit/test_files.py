"""Files are whole or not there, whatever is in them and whoever writes at the same time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from sft_dist.files import (
    append_jsonl,
    publish_dir,
    read_json,
    read_jsonl,
    told_by,
    utc_now,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_and_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "text", "gr\u00fc\u00dfe\r\n\U0001f389\u2028")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "gr\u00fc\u00dfe\r\n\U0001f389\u2028".encode()
    write_bytes(tmp_path / "bytes", b"\x00\xff\n")
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff\n"
    assert names(tmp_path) == ["a", "bytes"]


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old and longer")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_reader_that_has_the_file_open_sees_the_old_content(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with (tmp_path / "file").open() as reader:
        write_text(tmp_path / "file", "new")
        assert reader.read() == "old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_gets_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    previous = os.umask(umask)
    try:
        write_text(tmp_path / "file", "text")
        assert os.umask(umask) == umask, "the umask of the process was changed"
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_half_a_surrogate_pair_can_be_written_and_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"cut \ud83d": "emoji \ud83d"})
    assert read_json(tmp_path / "a.json") == {"cut \ud83d": "emoji \ud83d"}
    append_jsonl(tmp_path / "b.jsonl", {"text": "\ud83d"})
    assert read_jsonl(tmp_path / "b.jsonl") == [{"text": "\ud83d"}]


def test_json_has_no_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    value = {"nan": float("nan"), "deep": [{"inf": float("inf")}, (float("-inf"), 1.5)], "fine": 1e-5, 3: True}
    expected = {"nan": None, "deep": [{"inf": None}, [None, 1.5]], "fine": 1e-5, "3": True}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    write_json(tmp_path / "a.json", value)
    write_jsonl(tmp_path / "b.jsonl", [value])
    append_jsonl(tmp_path / "c.jsonl", value)
    for name in ("a.json", "b.jsonl", "c.jsonl"):
        assert json.loads((tmp_path / name).read_text(), parse_constant=refuse) == expected


def test_a_missing_file_is_nothing(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("times", [1, 4, 5])
def test_a_file_that_another_host_replaces_is_opened_again(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: the old file is gone on the server, and this host has it open."""
    path, read, stale = tmp_path / "x.json", Path.read_text, iter(range(times))
    write_json(path, {"step": 3})

    def read_text(self: Path, **how: Any) -> str:
        if next(stale, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, **how)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(OSError, match="Stale") if times == 5 else contextlib.nullcontext():
        assert read_json(path) == {"step": 3}


def test_json_text_stays_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Gr\u00fc\u00dfe"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "Gr\u00fc\u00dfe"\n}\n'


def test_lines_are_rows(tmp_path: Path) -> None:
    rows = [{"text": "one\nline"}, {"text": "U+2028 \u2028 U+0085 \x85 and \r"}, {}]
    write_jsonl(tmp_path / "rows.jsonl", rows[:1])
    for row in rows[1:]:
        append_jsonl(tmp_path / "rows.jsonl", row)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 3


def test_appending_starts_a_file_and_its_folder(tmp_path: Path) -> None:
    append_jsonl(tmp_path / "a" / "rows.jsonl", {"n": 1})
    assert read_jsonl(tmp_path / "a" / "rows.jsonl") == [{"n": 1}]


TORN = {
    "in the middle of a key": b'{"n": 1}\n{"ste',
    "before the line's end": b'{"n": 1}\n{"step": 2, "loss": 1.5',
    "inside a letter of several bytes": '{"n": 1}\n{"text": "gr\u00fc'.encode()[:-1],
    "inside an emoji": '{"n": 1}\n{"text": "\U0001f389'.encode()[:-2],
    "with zeros after a power cut": b'{"n": 1}\n\x00\x00\x00\x00',
}


@pytest.mark.parametrize("content", TORN.values(), ids=TORN.keys())
def test_a_torn_line_is_left_out_and_spoils_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert read_jsonl(path) == [{"n": 1}]
    append_jsonl(path, {"n": 3})
    append_jsonl(path, {"n": 4})
    assert read_jsonl(path) == [{"n": 1}, {"n": 3}, {"n": 4}]


def test_a_last_line_without_its_line_break_counts(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"n": 1}\n{"n": 2}')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"n": 1}, {"n": 2}]
    append_jsonl(tmp_path / "rows.jsonl", {"n": 3})
    assert [row["n"] for row in read_jsonl(tmp_path / "rows.jsonl")] == [1, 2, 3]


def test_what_is_published_is_readable_to_whom_the_umask_says(tmp_path: Path) -> None:
    """safetensors 0.8 writes files of mode 0600: a model that nobody else on the cluster could load."""
    before = os.umask(0o027)
    try:
        with publish_dir(tmp_path / "model") as staged:
            for name, mode in (("weights", 0o600), ("script", 0o700)):
                (staged / name).touch(mode)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {"weights": 0o640, "script": 0o740}


def test_a_published_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "key"
    with publish_dir(target) as staged:
        (staged / "file").write_text("content")
        assert not target.exists()
        assert staged.parent.parent == target.parent, "a rename from elsewhere would not be atomic"
    assert (target / "file").read_text() == "content"
    assert names(target.parent) == ["key"]


def test_a_block_that_fails_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), publish_dir(tmp_path / "key") as staged:
        (staged / "file").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_whoever_publishes_first_wins(tmp_path: Path) -> None:
    target = tmp_path / "key"
    with publish_dir(target) as slow:
        (slow / "file").write_text("slow")
        with publish_dir(target) as fast:
            (fast / "file").write_text("fast")
    assert (target / "file").read_text() == "fast"
    assert names(tmp_path) == ["key"]


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a file")
    with pytest.raises(OSError), publish_dir(tmp_path / "key"):
        pass
    assert (tmp_path / "key").read_text() == "a file"


def test_others_may_read_a_published_folder_if_the_umask_allows(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        with publish_dir(tmp_path / "key"):
            pass
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o755


def test_the_time_is_utc_to_the_second() -> None:
    text = utc_now()
    assert text.endswith("+00:00")
    assert "." not in text


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ('loading\n{"checked": "now"}\n', {"checked": "now"}),
        ('{"checked": "now"}\nPolitely closing 3 workers\n', {"checked": "now"}),
        ("loading\n7\n", {}),
        ('{"checked": ', {}),
        ("", {}),
    ],
    ids=["after other lines", "before other lines", "killed after other lines", "torn", "nothing"],
)
def test_what_a_process_told_is_found_among_what_libraries_print(output: str, told: dict[str, str]) -> None:
    assert told_by(output) == told


def test_a_folder_is_on_the_disk_before_it_bears_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that fails later leaves a model that was proven, and no empty files under its name."""
    synced: set[str] = set()
    target, real = tmp_path / "model", os.fsync

    def sync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        assert target.is_dir() == (path == tmp_path), "files before, the name after"
        synced.add(path.name)
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    with publish_dir(target) as staged:
        (staged / "adapter").mkdir()
        (staged / "adapter" / "weights").write_bytes(b"1")
        (staged / "DONE").write_bytes(b"2")
    assert synced == {"weights", "adapter", "DONE", "staged", tmp_path.name}


def test_rows_that_cannot_be_written_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sft_dist import files

    real, full = files.append_jsonl, [False]

    def append(path: Path, row: dict[str, Any]) -> None:
        if full[0]:
            with path.open("a") as stream:  # a part of the line fits
                stream.write('{"n": ')
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, row)

    monkeypatch.setattr(files, "append_jsonl", append)
    rows = files.PatientJsonl(tmp_path / "rows.jsonl", keep=3)
    rows.append({"n": 1})
    full[0] = True
    for number in range(2, 7):
        rows.append({"n": number})
    assert rows.flush() == 5
    assert rows.lost == 2
    assert caplog.text.count("rows.jsonl cannot be written (No space left on device)") == 1
    full[0] = False
    rows.append({"n": 7})
    assert [row["n"] for row in files.read_jsonl(tmp_path / "rows.jsonl")] == [1, 4, 5, 6, 7]
    assert rows.flush() == 2
    # What was given up before takes no room from what waits next.
    full[0] = True
    for number in range(8, 13):
        rows.append({"n": number})
    assert (rows.flush(), rows.lost) == (7, 4)
    full[0] = False
    rows.append({"n": 13})
    assert [row["n"] for row in files.read_jsonl(tmp_path / "rows.jsonl")] == [1, 4, 5, 6, 7, 10, 11, 12, 13]
