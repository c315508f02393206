"""Preparation ends in one valid folder or in none: killed anywhere, begun again, done twice at once, with many processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.data import prepare as preparing
from sft_dist.data import shards
from sft_dist.data.prepare import prepare
from sft_dist.errors import DataError
from sft_dist.files import read_json, write_jsonl
from sft_dist.train.tokenizer import RunTokenizer

ROWS = 3000


def records(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Number {n}?"},
                {"role": "assistant", "content": f"It is {n * 7}. " * (n % 9 + 1)},
            ]
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, records(ROWS))
    return path


def config_for(path: Path, **data: Any) -> Config:
    cut = {"max_answers_cut": 1, "min_end_of_turn_trained": 0}  # many rows are, on purpose
    return Config.model_validate({"data": {"train": {"path": str(path)}, "max_length": 64, "limits": cut, **data}})


def content(prepared: Any) -> tuple[Any, Any]:
    held_out = prepared.eval and prepared.eval.to_list()
    return prepared.train.to_list(), held_out


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 100 rows, so that there are many."""
    monkeypatch.setattr(preparing, "FEW", 100)
    monkeypatch.setattr(preparing, "MANY", 100)


@pytest.mark.parametrize("data", [{}, {"eval_size": 50}, {"packing": True}], ids=["plain", "held out", "packed"])
def test_many_processes_make_what_one_makes(
    tiny_tokens: Callable[..., RunTokenizer],
    tmp_path: Path,
    rows: Path,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any],
) -> None:
    tokens = tiny_tokens()
    many = prepare(config_for(rows, **data), tokens.tokenizer, tokens.template, tmp_path / "many")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(preparing, "made", lambda make, chunks, processes: map(make, chunks))
    one = prepare(config_for(rows, **data), tokens.tokenizer, tokens.template, tmp_path / "one")
    assert content(many) == content(one)
    assert many.ledger == one.ledger
    left = [path.name for path in (tmp_path / "many" / "data").iterdir() if path.name != "digests"]
    assert left == [many.ledger["key"]]


PROGRAM = """
import sys
from pathlib import Path
from sft_dist.config.schema import Config, ModelConfig
from sft_dist.data import prepare as preparing
from sft_dist.train.tokenizer import load_tokenizer
preparing.FEW = preparing.MANY = 100
tokens = load_tokenizer(ModelConfig(name=sys.argv[1]))
config = Config.model_validate_json(sys.argv[2])
print("begins", flush=True)
prepared = preparing.prepare(config, tokens.tokenizer, tokens.template, Path(sys.argv[3]))
print(prepared.ledger["key"], len(prepared.train), flush=True)
"""


def start(model: Path, config: Config, cache: Path, stderr: int | None = None) -> subprocess.Popen[str]:
    text = config.model_dump_json()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), text, str(cache)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def notes(cache: Path) -> int:
    return len(list((cache / "data").glob(".*.parts/*/*.json")))


@pytest.mark.parametrize("data", [{}, {"packing": True}], ids=["plain", "packed"])
def test_killed_at_random_points_it_goes_on_and_nothing_half_is_taken(
    tiny_tokens: Callable[..., RunTokenizer],
    tiny_model_dir: Path,
    tmp_path: Path,
    rows: Path,
    small_chunks: None,
    data: dict[str, Any],
) -> None:
    """Each process is killed after some more shards are whole, at a random moment after that."""
    tokens = tiny_tokens()
    config, cache = config_for(rows, **data), tmp_path / "cache"
    generator = random.Random(5)
    seen, kills = 0, 0
    while kills < 4:
        process = start(tiny_model_dir, config, cache)
        wanted = seen + generator.randrange(0, 6)
        while process.poll() is None and notes(cache) < wanted:
            time.sleep(0.001)
        time.sleep(generator.random() / 20)
        ended = process.poll() is not None
        kill(process)
        assert ended or notes(cache) >= seen, "a shard that was whole is gone"
        folders = [path for path in (cache / "data").glob("*") if not path.name.startswith((".", "digests"))]
        if folders:  # published before it was killed: then it is whole
            break
        seen, kills = notes(cache), kills + 1
    made = prepare(config, tokens.tokenizer, tokens.template, cache)
    expected = prepare(config, tokens.tokenizer, tokens.template, tmp_path / "undisturbed")
    assert content(made) == content(expected)
    assert made.ledger == expected.ledger


def test_a_second_preparation_takes_up_what_the_first_has_done(
    tiny_tokens: Callable[..., RunTokenizer],
    tmp_path: Path,
    rows: Path,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, made = tiny_tokens(), []
    monkeypatch.setattr(preparing, "made", lambda make, chunks, processes: map(make, chunks))
    write = shards.ShardMaker._write

    def stop_after_12(self: Any, path: Path, chunk: Any) -> None:
        if len(made) == 12:
            raise KeyboardInterrupt
        made.append(chunk.number)
        write(self, path, chunk)

    monkeypatch.setattr(shards.ShardMaker, "_write", stop_after_12)
    with pytest.raises(KeyboardInterrupt):
        prepare(config_for(rows), tokens.tokenizer, tokens.template, tmp_path / "cache")
    again: list[int] = []
    monkeypatch.setattr(
        shards.ShardMaker, "_write", lambda self, path, chunk: (again.append(chunk.number), write(self, path, chunk))[1]
    )
    whole = prepare(config_for(rows), tokens.tokenizer, tokens.template, tmp_path / "cache")
    assert (made, again) == (list(range(12)), list(range(12, 30)))
    assert len(whole.train) == ROWS


def test_a_shard_without_its_notes_or_with_torn_ones_is_made_again(
    tiny_tokens: Callable[..., RunTokenizer],
    tmp_path: Path,
    rows: Path,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = tiny_tokens()
    monkeypatch.setattr(preparing, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(config_for(rows), tokens.tokenizer, tokens.template, tmp_path / "cache")
    monkeypatch.undo()
    (folder,) = (tmp_path / "cache" / "data").glob(".*.parts/train")
    shards.shard_path(folder, 3).with_suffix(".json").unlink()
    shards.shard_path(folder, 4).with_suffix(".json").write_text('{"rows_in": 1')
    shards.shard_path(folder, 5).with_suffix(".npz").write_bytes(b"PK torn")
    monkeypatch.setattr(preparing, "FEW", 100)
    monkeypatch.setattr(preparing, "MANY", 100)
    whole = prepare(config_for(rows), tokens.tokenizer, tokens.template, tmp_path / "cache")
    assert (
        whole.train.to_list()
        == prepare(config_for(rows), tokens.tokenizer, tokens.template, tmp_path / "other").train.to_list()
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one process does all on one core")
@pytest.mark.parametrize("whom", ["a worker", "the first process"])
def test_a_killed_process_ends_it_and_the_next_try_goes_on(
    tiny_tokens: Callable[..., RunTokenizer], tiny_model_dir: Path, tmp_path: Path, whom: str
) -> None:
    """As the kernel does where the memory is used up. None of the others is left, and no shard is lost."""
    path, cache, tokens = tmp_path / "rows.jsonl", tmp_path / "cache", tiny_tokens()
    write_jsonl(path, records(6000))
    process = start(tiny_model_dir, config_for(path), cache, stderr=subprocess.PIPE)
    while notes(cache) < 3 or not children(process.pid):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.001)
    workers = children(process.pid)
    os.kill(workers[0] if whom == "a worker" else process.pid, signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    done = notes(cache)
    assert process.returncode != 0 and 3 <= done < 60
    if whom == "a worker":
        assert "a process that tokenises rows was killed (SIGKILL), as happens where the memory is used up" in said
        assert "slurm.mem" in said and "taskset" in said
    until = time.monotonic() + 20
    while any(map(lives, workers)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not [worker for worker in workers if lives(worker)], "a process is left"
    again = start(tiny_model_dir, config_for(path), cache)
    assert notes(cache) >= done
    assert again.communicate()[0].split()[1] == "6000"
    made = prepare(config_for(path), tokens.tokenizer, tokens.template, cache)
    assert made.train[5999] == prepare(config_for(path), tokens.tokenizer, tokens.template, tmp_path / "b").train[-1]


def test_a_chunk_of_long_rows_has_fewer_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what the processes hold does not grow with the rows' length."""
    monkeypatch.setattr(preparing, "MOST_CHARACTERS", 1000)
    write_jsonl(tmp_path / "lines.jsonl", [{"text": "x" * 300}] * 10)
    (tmp_path / "array.json").write_text(json.dumps([{"messages": [{"content": "x" * 300}]}] * 10))
    for name, form in (("lines.jsonl", "text"), ("array.json", "messages")):
        config = Config.model_validate({"data": {"train": {"path": str(tmp_path / name), "format": form}}})
        sizes = [len(chunk.rows) for chunk in preparing._chunks(config, config.data.train)]
        assert sizes == [4, 4, 2]


@pytest.mark.parametrize("lost", ["all", "the end", "a page"])
def test_a_shard_that_a_failing_machine_did_not_write_is_made_again(
    tiny_tokens: Callable[..., RunTokenizer],
    tmp_path: Path,
    rows: Path,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    """Nothing waits for the disk while shards are made: whole notes may stand beside documents that never got there."""
    tokens = tiny_tokens()
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config_for(rows), tokens.tokenizer, tokens.template, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "data").glob(".*.parts/train")
    path = shards.shard_path(folder, 3)
    stored = bytearray(path.read_bytes())
    if lost == "all":
        stored = bytearray()
    elif lost == "the end":
        stored[len(stored) // 2 :] = bytes(len(stored) - len(stored) // 2)
    else:
        stored[len(stored) // 2 : len(stored) // 2 + 64] = bytes(64)
    path.write_bytes(stored)
    monkeypatch.setattr(preparing, "made", lambda make, chunks, processes: map(make, chunks))
    again, write = [], shards.ShardMaker._write
    monkeypatch.setattr(
        shards.ShardMaker, "_write", lambda self, path, chunk: (again.append(chunk.number), write(self, path, chunk))[1]
    )
    whole = prepare(config_for(rows), tokens.tokenizer, tokens.template, tmp_path / "cache")
    assert again == [3], "the others were whole, and taken up"
    other = prepare(config_for(rows), tokens.tokenizer, tokens.template, tmp_path / "other")
    assert content(whole) == content(other)


@pytest.mark.parametrize("data", [{}, {"packing": True}], ids=["plain", "packed"])
def test_two_at_once_end_in_one_valid_result(
    tiny_tokens: Callable[..., RunTokenizer], tiny_model_dir: Path, tmp_path: Path, rows: Path, data: dict[str, Any]
) -> None:
    tokens, config, cache = tiny_tokens(), config_for(rows, **data), tmp_path / "cache"
    both = [start(tiny_model_dir, config, cache) for _ in range(2)]
    said = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    expected = prepare(config, tokens.tokenizer, tokens.template, tmp_path / "alone")
    made = prepare(config, tokens.tokenizer, tokens.template, cache)
    assert content(made) == content(expected)
    assert made.ledger == expected.ledger
    left = [path.name for path in (cache / "data").iterdir() if path.name != "digests"]
    assert left == [made.ledger["key"]]


def test_two_at_once_over_bad_rows_both_say_so(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that ends first takes away the folder in which the other one still works."""
    tokens, path = tiny_tokens(), tmp_path / "rows.jsonl"
    write_jsonl(path, [*records(300), {"messages": []}])
    monkeypatch.setattr(preparing, "FEW", 100)
    write, others = shards.ShardMaker._write, []

    def while_another_ends(self: Any, path_of_shard: Path, chunk: Any) -> None:
        if chunk.number == 2 and not others:
            others.append(chunk.number)
            with pytest.raises(DataError, match="1 of 301 rows cannot be used"):
                prepare(config_for(path), tokens.tokenizer, tokens.template, tmp_path / "cache")
        write(self, path_of_shard, chunk)

    monkeypatch.setattr(shards.ShardMaker, "_write", while_another_ends)
    monkeypatch.setattr(preparing, "made", lambda make, chunks, processes: map(make, chunks))
    with pytest.raises(DataError, match="1 of 301 rows cannot be used"):
        prepare(config_for(path), tokens.tokenizer, tokens.template, tmp_path / "cache")
    assert others == [2] and not list((tmp_path / "cache" / "data").glob(".*"))


@pytest.mark.parametrize("moment", ["documents", "notes"])
def test_processes_of_two_hosts_with_one_number_do_not_meet(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """On a shared file system two may write the same shard at once: here one begins and ends inside of the other."""
    import numpy as np

    from sft_dist.data import documents

    monkeypatch.setattr(os, "getpid", lambda: 7)
    tokens, config, inside = tiny_tokens(), config_for(rows), []
    maker = shards.ShardMaker(config.data, tokens.tokenizer, tokens.template, tmp_path)
    chunk = next(preparing._chunks(config, config.data.train))
    module: Any = documents if moment == "documents" else np
    name = "_lists" if moment == "documents" else "savez"
    original = getattr(module, name)

    def with_another_inside(*arguments: Any, **more: Any) -> Any:
        if not inside:
            inside.append(name)
            maker._write(shards.shard_path(tmp_path, 0), chunk)
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, with_another_inside)
    assert maker.make(chunk) == 1000 and inside
    found = shards.read_shard(shards.shard_path(tmp_path, 0))
    assert found is not None and shards._holds_what_it_says(found)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".arrow", ".json", ".npz"]


def test_bad_rows_of_all_chunks_are_one_error_and_leave_nothing(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, small_chunks: None
) -> None:
    tokens, path = tiny_tokens(), tmp_path / "rows.jsonl"
    bad = records(500)
    for number in (3, 150, 151, 480):
        bad[number]["messages"][1]["content"] = " "
    bad[499]["messages"][0]["role"] = "boss"
    write_jsonl(path, bad)
    with pytest.raises(
        DataError,
        match=r"5 of 500 rows cannot be used:\n.*rows\.jsonl:4: .*\n.*:151: .*\n.*:152: .*\n.*:481: .*\n.*:500: ",
    ):
        prepare(config_for(path), tokens.tokenizer, tokens.template, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "data").glob(".*"))
    dropped = prepare(config_for(path, on_bad_row="drop"), tokens.tokenizer, tokens.template, tmp_path / "cache")
    assert len(dropped.train) == 495


def test_a_file_that_was_read_before_is_known_by_its_size_and_time(
    tiny_tokens: Callable[..., RunTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    tokens, path = tiny_tokens(), tmp_path / "rows.jsonl"
    write_jsonl(path, records(20))
    os.utime(path, (1_000_000_000, 1_000_000_000))

    def key() -> str:
        return str(prepare(config_for(path), tokens.tokenizer, tokens.template, tmp_path / "cache").ledger["key"])

    first, digest = key(), hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read again"))
    assert key() == first
    monkeypatch.setattr(hashlib, "file_digest", digest)
    write_jsonl(path, records(21))
    assert key() != first


def test_what_the_worker_of_a_launcher_finds_missing_a_process_beside_it_prepares(
    new_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Path
) -> None:
    from sft_dist.stages import run_here

    run = new_run(f"data.train={rows}", "train.max_steps=1", "evaluate={before: false, after: false}", proved=False)
    monkeypatch.setattr(preparing, "prepare", lambda *_: pytest.fail("the worker prepares rows itself"))
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "own"))
    run_here(run)
    assert read_json(run.ledger)["train"]["rows"] + read_json(run.ledger)["eval"]["rows"] == ROWS
    assert json.loads((tmp_path / "own" / "data" / read_json(run.ledger)["key"] / "ledger.json").read_text())
