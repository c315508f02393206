"""Which checkpoints a run may go on from: decided from the manifest alone, before anything is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.errors import CheckpointError
from sft_dist.files import read_json
from sft_dist.rundir import RunDir
from sft_dist.train import universal
from sft_dist.train.resume import (
    ACCEPTED,
    accept_change,
    accepted_change,
    cut_anew,
    refuse_other_run,
    refuse_uncuttable,
)

FACTS: dict[str, Any] = {
    "plan": "zero2",
    "world_size": 2,
    "data": "abc",
    "dtype": "bfloat16",
    "offload": "none",
    "sequence_parallel_size": 1,
    "gradient_accumulation_steps": 4,
}


def facts(plan: str = "zero2", world: int = 2, **others: Any) -> dict[str, Any]:
    return {**FACTS, "plan": plan, "world_size": world, **others}


@pytest.mark.parametrize(
    ("was", "now", "anew"),
    [
        (facts(), facts(), False),
        (facts(), facts(world=4), True),
        (facts(), facts("zero1"), True),
        (facts("zero3", 8), facts("zero1", 1), True),
        (facts("fsdp2"), facts("fsdp2", 4), False),
        (facts("ddp"), facts("cpu", 1), False),
    ],
)
def test_only_shards_of_deepspeed_are_cut_anew(was: dict[str, Any], now: dict[str, Any], anew: bool) -> None:
    refuse_other_run("checkpoint-3", was, now)
    refuse_uncuttable("checkpoint-3", was, now)
    assert cut_anew(was, now) == anew


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        (facts("zero3"), facts("fsdp2"), r"other plan: \['zero3'\], now \['fsdp2'\]"),
        (facts("zero1", 1), facts("ddp", 1), "other plan"),
        (facts("fsdp2"), facts("zero3"), "other plan"),
        (facts(data="abc"), facts(world=4, data="xyz"), "other data"),
        (facts("cpu"), facts("ddp", dtype="float32"), "other dtype: "),
        ({"step": 3}, facts(), "other data and dtype and plan"),
    ],
)
def test_what_means_something_else_is_refused(was: dict[str, Any], now: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        refuse_other_run("checkpoint-3", was, now)
    assert "run.name=ANOTHER_NAME" in str(caught.value)


def shared(plan: str, world: int, accumulation: int = 4, size: int = 2) -> dict[str, Any]:
    return facts(plan, world, sequence_parallel_size=size, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize(
    ("was", "now", "message", "hint"),
    [
        (facts("zero3", offload="nvme"), facts("zero3", 4, offload="nvme"), "offload=nvme", "restore plan"),
        (facts("zero3", offload="nvme"), facts("zero3"), "on NVMe back only as the processes left them", "restore"),
        (facts("zero3"), facts("zero3", offload="nvme"), "now it is 2 process.* offload=nvme", "restore"),
        (shared("zero2", 2), shared("zero2", 4), "DeepSpeed's tool cuts only zero3 anew", "zero2, 2 process"),
        (shared("zero3", 2), shared("zero2", 2), "cuts only zero3 anew", "resume with plan zero3"),
        (shared("zero3", 4), facts("zero3", 2), "cannot change together with", "sequence_parallel_size=2"),
        (shared("zero3", 2), shared("zero3", 4, 1), "accumulation is a multiple of .*=2", "smaller train.per_device"),
    ],
)
def test_what_deepspeed_cannot_cut_anew_is_refused(
    was: dict[str, Any], now: dict[str, Any], message: str, hint: str
) -> None:
    refuse_other_run("checkpoint-3", was, now)
    with pytest.raises(CheckpointError, match=message) as caught:
        refuse_uncuttable("checkpoint-3", was, now)
    assert caught.value.hint is not None
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (shared("zero3", 2), shared("zero3", 4, 2)),
        (shared("zero2", 2, 1), shared("zero2", 2, 1)),
        (facts("zero3", offload="nvme"), facts("zero3", offload="nvme")),
        (facts("zero2", offload="cpu"), facts("zero3", 4)),
        ({"plan": "zero1", "world_size": 2}, facts("zero1", 4)),
    ],
)
def test_what_it_can_is_not(was: dict[str, Any], now: dict[str, Any]) -> None:
    refuse_uncuttable("checkpoint-3", was, now)


def test_a_process_without_any_part_of_a_group_is_refused() -> None:
    universal.refuse_empty_parts([10**6, 65_536], 64)
    universal.refuse_empty_parts([10**6, 13], 4)  # 4 + 4 + 4 + 1
    with pytest.raises(
        CheckpointError, match="parameters of 320 numbers in all leave nothing for some of 64 processes"
    ):
        universal.refuse_empty_parts([10**6, 320], 64)


def test_the_tool_is_told_where_by_relative_paths_and_its_last_line_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >arguments\npwd\necho "OSError: [Errno 28] No space left on device"\nexit 3\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CheckpointError, match=r"cut checkpoint-3 anew: OSError: .*left on device \(exit status 3\)"):
        universal.run_tool(checkpoint, "global_step3")
    told = (checkpoint / "arguments").read_text().split()
    assert told[-4:] == ["--input_folder", "global_step3", "--output_folder", "universal.partial/universal"]


# In place of DeepSpeed's: it says which processes it has, and each of them writes on and on.
TOOL = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

def write(number):
    Path(f"{number}.pid").write_text(str(os.getpid()))
    while True:
        Path(str(number)).write_text(str(time.monotonic_ns()))
        time.sleep(0.01)

def parse_arguments():
    return sys.argv

def main(arguments):
    with ProcessPoolExecutor(max_workers=2) as pool:
        found = [pool.submit(write, number) for number in range(2)]
        if "dies" in arguments:
            while len(list(Path().glob("*.pid"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    main(parse_arguments())
"""


@pytest.fixture
def tool_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, with TOOL as the tool that cuts it anew."""
    package = tmp_path / "packages" / "deepspeed" / "checkpoint"
    package.mkdir(parents=True)
    for name, text in {"../__init__": "", "__init__": "", "ds_to_universal": TOOL}.items():
        (package / f"{name}.py").write_text(text)
    root = Path(universal.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}:{root}")
    (tmp_path / "checkpoint-3").mkdir()
    return tmp_path / "checkpoint-3"


def writers(checkpoint: Path) -> list[int]:
    """The processes of the tool that are at work."""
    found = [int(path.read_text() or 0) for path in checkpoint.glob("*.pid")]
    return [pid for pid in found if pid and is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Not if nobody has taken note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_writes_into_a_checkpoint_once_its_process_is_killed(tool_beside: Path) -> None:
    """What is left of it would go on beside the next attempt, which begins by removing the half copy."""
    code = "import sys; from pathlib import Path; from sft_dist.train import universal; "
    code += "universal.run_tool(Path(sys.argv[1]), 'global_step3')"
    worker = subprocess.Popen([sys.executable, "-c", code, str(tool_beside)])
    try:
        until(lambda: len(writers(tool_beside)) == 2)
        worker.kill()
        until(lambda: not writers(tool_beside))
    finally:
        worker.kill()
        worker.wait()
        for pid in writers(tool_beside):
            os.kill(pid, signal.SIGKILL)


def test_a_tool_that_is_killed_is_not_waited_for_for_ever(tool_beside: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(exit status -9\)"):
        universal.run_tool(tool_beside, "dies")
    until(lambda: not writers(tool_beside))


def test_what_an_attempt_left_half_made_is_removed(tmp_path: Path) -> None:
    (tmp_path / "universal.partial" / "universal").mkdir(parents=True)
    (tmp_path / "universal" / "zero").mkdir(parents=True)
    (tmp_path / "latest_universal").write_text("universal")
    (tmp_path / "latest").write_text("global_step3")
    universal.discard(tmp_path)
    universal.discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


OF_RUN: dict[str, Any] = {"template": "t1", "packing": False, "global_batch_size": 8}


@pytest.mark.parametrize(
    "changed", [{"data": "xyz"}, {"template": "t2"}, {"packing": True}, {"global_batch_size": 16}], ids=str
)
def test_another_run_is_refused_unless_it_was_accepted(tmp_path: Path, changed: dict[str, Any]) -> None:
    run, was, now = RunDir(tmp_path), facts(**OF_RUN), facts(**{**OF_RUN, **changed})
    (name,) = changed
    with pytest.raises(CheckpointError, match=f"trained with other {name}: ") as caught:
        refuse_other_run("checkpoint-3", was, now)
    assert str(caught.value).endswith("or resume with --accept-change")
    assert accepted_change(run, was, now) is None, "nobody has said so"
    accept_change(run)
    assert accepted_change(run, was, now) == {name: [was[name], now[name]]}
    assert accepted_change(run, was, now) is not None, "a requeued attempt starts from the same checkpoint again"
    other = facts(**{**OF_RUN, **changed, "data": "another"})
    assert accepted_change(run, was, other) is None, "what was accepted was something else"
    assert read_json(run.path / ACCEPTED)["changed"] == {name: [was[name], now[name]]}


def test_what_nothing_could_load_stays_refused(tmp_path: Path) -> None:
    was, now = facts(**OF_RUN), facts("fsdp2", data="xyz", **OF_RUN)
    with pytest.raises(CheckpointError, match="other data and plan: ") as caught:
        refuse_other_run("checkpoint-3", was, now)
    assert "--accept-change" not in str(caught.value)


def test_a_checkpoint_of_an_older_version_that_says_less_is_not_refused_for_it() -> None:
    refuse_other_run("checkpoint-3", facts(), facts(**OF_RUN))
