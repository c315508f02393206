"""Disks that fill up, lack room from the start, or turn read-only: small real file systems under a run's checkpoints."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_dist import stages
from sft_dist.errors import DiskError
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train import disk, saving
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import MANIFEST, damage, size_of
from sft_dist.train.progress import Progress

NewRun = Callable[..., RunDir]

STEPS = 6
OPTIONS = (
    "data.train.sample=24",
    "data.eval_size=0",
    "train.eval_strategy=no",
    f"train.max_steps={STEPS}",
    "model.dtype=float32",
    "checkpoint.save_strategy=steps",
    "checkpoint.save_steps=2",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.data=null",
    "evaluate.labels=[]",
)


def mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def disk_of(new_run: NewRun) -> Iterator[Callable[[str], RunDir]]:
    """`disk_of("size=1m")`: a new run whose checkpoints lie on a tmpfs with these options."""
    mounted: list[Path] = []

    def make(options: str) -> RunDir:
        run = new_run(*OPTIONS, name=f"run-{len(mounted)}")
        run.checkpoints.mkdir()
        mount("-t", "tmpfs", "-o", options, "tmpfs", run.checkpoints)
        mounted.append(run.checkpoints)
        return run

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, session_environment: dict[str, str], tiny_model_dir: Path
) -> tuple[RunDir, int]:
    """A run on a disk with room, and the bytes of one of its checkpoints, in pages as a tmpfs counts them."""
    from sft_dist.config.loader import load_config

    folder = tmp_path_factory.mktemp("whole")
    run = stages.new_run(load_config("smoke", [f"run.dir={folder}", "run.name=whole", *OPTIONS]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "report_here", lambda run: None)
        run_here(run)
    entries = read_json(run.checkpoints / "checkpoint-4" / MANIFEST)["files"].values()
    return run, sum(-(-entry["bytes"] // 4096) * 4096 for entry in entries)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "report_here", lambda run: None)


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_jsonl(run.metrics) if "loss" in row]


def refused(run: RunDir) -> DiskError:
    with pytest.raises(DiskError) as caught:
        run_here(run)
    line = read_jsonl(run.attempts)[-1]
    assert line["ended"] == "failed"
    assert line["failure"]["kind"] == "disk"
    assert f"sft-dist resume {run.path}" in str(caught.value.hint)
    return caught.value


def test_a_run_whose_first_checkpoint_does_not_fit_ends_before_the_first_step(
    disk_of: Callable[[str], RunDir], whole: tuple[RunDir, int]
) -> None:
    size = whole[1] // 2 // 4096 * 4096
    run = disk_of(f"size={size}")
    message = str(refused(run))
    assert "a checkpoint takes " in message
    assert "by the planner, but " in message
    assert f"{run.checkpoints} has " in message
    assert f"({size} bytes) left" in message
    assert losses(run) == []


def test_what_does_not_fit_is_refused_before_the_base_model_is_asked(
    disk_of: Callable[[str], RunDir], whole: tuple[RunDir, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions may take minutes, and what they cost is lost on a run that cannot train."""
    run = disk_of(f"size={whole[1] // 2 // 4096 * 4096}")
    text = run.config.read_text(encoding="utf-8").replace("before: false", "before: true")
    run.config.write_text(text, encoding="utf-8")
    asked: list[str] = []
    monkeypatch.setattr(stages, "_evaluate", lambda config, run, resolved, when: asked.append(when))
    assert "a checkpoint takes " in str(refused(run))
    assert asked == []


def test_a_disk_without_inodes_is_no_room_either(disk_of: Callable[[str], RunDir]) -> None:
    run = disk_of("size=512m,nr_inodes=5")
    assert "files and folders, but " in str(refused(run))
    assert losses(run) == []


def test_a_save_that_would_not_fit_is_not_begun_and_the_run_goes_on_when_there_is_room(
    disk_of: Callable[[str], RunDir], whole: tuple[RunDir, int]
) -> None:
    straight, size = whole
    run = disk_of(f"size={size * 9 // 4 + disk.MARGIN_BYTES}")
    message = str(refused(run))
    assert "checkpoint-6 takes " in message
    assert "as the last one, but " in message
    assert [(step, damage(path)) for step, path in list_checkpoints(run)] == [(4, None), (2, None)]
    assert losses(run) == losses(straight)[:STEPS]
    mount("-o", f"remount,size={size * 5}", run.checkpoints)
    run_here(run)
    assert read_jsonl(run.attempts)[-1]["first_step"] == 4
    assert losses(run) == losses(straight)
    assert [(step, damage(path)) for step, path in list_checkpoints(run)] == [(6, None), (4, None)]


def test_a_disk_that_fills_up_in_the_middle_of_a_save_keeps_the_ones_before(
    disk_of: Callable[[str], RunDir], whole: tuple[RunDir, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, size = whole
    run = disk_of(f"size={size * 5 // 2}")
    with monkeypatch.context() as patch:
        for module in (disk, saving):  # as if another user had filled it after the look
            patch.setattr(module, "shortage", lambda *args, **kwargs: None)
        message = str(refused(run))
    assert "checkpoint-6 could not be written and does not count: " in message
    left = sorted(path.name for path in run.checkpoints.iterdir())
    assert left == ["checkpoint-2", "checkpoint-4"], "half of checkpoint-6 takes the room that it lacked"
    assert all(damage(path) is None for _, path in list_checkpoints(run))
    mount("-o", f"remount,size={size * 5}", run.checkpoints)
    run_here(run)
    assert losses(run) == losses(straight)


def test_a_disk_that_turns_read_only_keeps_what_is_on_it(
    disk_of: Callable[[str], RunDir], whole: tuple[RunDir, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, size = whole
    run = disk_of(f"size={size * 8}")
    shown = Progress.metrics

    def metrics(self: Progress, row: dict[str, Any]) -> None:
        shown(self, row)
        if row["step"] == 5:
            mount("-o", "remount,ro", run.checkpoints)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "metrics", metrics)
        message = str(refused(run))
    assert "Read-only file system" in message
    assert [(step, damage(path)) for step, path in list_checkpoints(run)] == [(4, None), (2, None)]
    mount("-o", "remount,rw", run.checkpoints)
    run_here(run)
    assert losses(run) == losses(straight)


def test_an_error_of_the_background_ends_the_run_at_a_later_step(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(*OPTIONS)
    settled = saving.settled

    def broken(folder: Path, *rest: Any) -> Any:
        if folder.name == "checkpoint-4":
            raise OSError(errno.EIO, "Input/output error")
        return settled(folder, *rest)

    monkeypatch.setattr(saving, "settled", broken)
    assert "checkpoint-4 could not be written and does not count: OSError" in str(refused(run))
    assert [(step, damage(path)) for step, path in list_checkpoints(run)] == [(2, None)]


def test_a_failed_training_finishes_the_checkpoint_that_is_written(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    run, release = new_run(*OPTIONS), threading.Event()
    settled, shown = saving.settled, Progress.metrics

    def slow(folder: Path, *rest: Any) -> Any:
        if folder.name == "checkpoint-4":
            assert release.wait(300)
        return settled(folder, *rest)

    def metrics(self: Progress, row: dict[str, Any]) -> None:
        shown(self, row)
        if row["step"] == 5:
            assert list_checkpoints(run)[0][0] == 4
            assert not (list_checkpoints(run)[0][1] / MANIFEST).exists(), "it counts before it is on the disk"
            release.set()
            raise RuntimeError("something else")

    monkeypatch.setattr(saving, "settled", slow)
    monkeypatch.setattr(Progress, "metrics", metrics)
    with pytest.raises(RuntimeError, match="something else"):
        run_here(run)
    assert [(step, damage(path)) for step, path in list_checkpoints(run)] == [(4, None), (2, None)]


def test_the_stall_of_each_save_is_on_record(whole: tuple[RunDir, int]) -> None:
    run, _ = whole
    stalls = [(row["step"], row["save_stall_s"]) for row in read_jsonl(run.metrics) if "save_stall_s" in row]
    assert [step for step, _ in stalls] == [2, 4, 6]
    assert all(seconds > 0 for _, seconds in stalls)
    manifest = read_json(run.checkpoints / "checkpoint-6" / MANIFEST)
    assert manifest["timed"].keys() == {"written_s", "settled_s"}
    assert size_of(manifest)[1] >= 8
    assert read_json(run.plan / "pace.json")["save_s"] >= round(sum(manifest["timed"].values()), 2) - 0.01


NAMES = (
    *("config.json", "generation_config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trainer_state.json", "training_args.bin"),
)


@pytest.mark.parametrize("name", [*NAMES, MANIFEST])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut"])
def test_a_harmed_file_of_a_real_checkpoint_is_found(whole: tuple[RunDir, int], name: str, harm: str) -> None:
    folder = whole[0].checkpoints / "checkpoint-6"
    path = folder / name
    content = path.read_bytes()
    try:
        path.unlink()
        if harm != "missing":
            path.write_bytes(b"" if harm == "empty" else content[: len(content) // 2])
        problem = damage(folder)
    finally:
        path.write_bytes(content)
    assert problem is not None
    assert problem.startswith(name)
    assert damage(folder) is None


def test_no_kind_of_file_was_left_out(whole: tuple[RunDir, int]) -> None:
    files = read_json(whole[0].checkpoints / "checkpoint-6" / MANIFEST)["files"]
    assert sorted(files) == sorted(NAMES)
