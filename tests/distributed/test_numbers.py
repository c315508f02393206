"""A loss that is not a number on one process: every plan notices on all of them, and saves nothing that it has spoilt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import damage

TinyRun = Callable[..., RunDir]
Launch = Callable[..., str]

COMMON = (
    "train.max_steps=6",
    "train.global_batch_size=4",
    "train.per_device_train_batch_size=2",
    "train.logging_steps=1",
    "data.train={task: mix, rows: 24, seed: 1}",
)
SAVING = ("checkpoint.save_strategy=steps", "checkpoint.save_steps=2")
# name -> what the run adds; in each the second process's loss is not a number in step 3.
RUNS: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "zero1": ("parallel.plan=zero1",),
    "ddp-saving": SAVING,
    "ddp-skip": (*SAVING, "train.nonfinite=skip"),
    "fsdp2-skip": ("parallel.plan=fsdp2", "train.nonfinite=skip"),
}


@pytest.fixture(scope="module")
def launched(tiny_run: TinyRun, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the runs, and what their processes said."""
    folder = tmp_path_factory.mktemp("numbers")
    runs = [tiny_run(folder, name, *COMMON, *extra) for name, extra in RUNS.items()]
    return folder, launch({2: [f"{run.path}%3:1" for run in runs]})


def losses(run: RunDir) -> list[float | None]:
    return [row["loss"] for row in read_jsonl(run.metrics) if "loss" in row]


def test_the_run_fails_after_three_such_steps_and_publishes_nothing(launched: tuple[Path, str]) -> None:
    run = RunDir(launched[0] / "ddp")
    status = run.read_status()
    assert status["state"] == "failed"
    # From the first such step on the weights are not numbers, so that no process's loss is.
    expected = (
        "the gradient is not finite, nor is the loss on ranks 0, 1 of 2, steps 3 to 5: train.max_nonfinite_steps is 3"
    )
    assert status["reason"] == expected
    assert [loss is None for loss in losses(run)] == [False, False, True, True]
    assert not run.model.exists()


def test_who_began_it_is_named(launched: tuple[Path, str]) -> None:
    assert launched[1].count("step 3: the gradient is not finite, nor is the loss on rank 1 of 2\n") == 2
    assert launched[1].count("step 3: the gradient is not finite, nor is the loss on rank 1 of 2; skipped\n") == 3


def test_a_good_checkpoint_is_not_followed_by_a_bad_one(launched: tuple[Path, str]) -> None:
    run = RunDir(launched[0] / "ddp-saving")
    assert [(step, damage(path)) for step, path in list_checkpoints(run)] == [(2, None)]
    reason = run.read_status()["reason"]
    expected = (
        "the weights are not finite since step 3 and were not saved at step 4; checkpoint-2 is the last good checkpoint"
    )
    assert reason == expected


@pytest.mark.parametrize("name", ["ddp-skip", "fsdp2-skip", "zero1"])
def test_a_step_that_is_skipped_spoils_nothing(launched: tuple[Path, str], name: str) -> None:
    """DeepSpeed does so by itself in float32."""
    run = RunDir(launched[0] / name)
    assert run.read_status()["state"] == "done"
    assert [loss is None for loss in losses(run)] == [False, False, True, False, False, False]
    rows = [row for row in read_jsonl(run.metrics) if "loss" in row]
    assert [row.get("nonfinite_steps", 0) for row in rows] == [0, 0, 1, 0, 0, 0]
    assert all(row["slowest_rank"] in (0, 1) and row["slowest_over_median"] >= 1 for row in rows)
    if name == "ddp-skip":
        assert [step for step, _ in list_checkpoints(run)] == [6, 4]


def test_both_plans_skip_to_the_same_losses(launched: tuple[Path, str]) -> None:
    """They leave the same weights alone, and no process goes a way of its own."""
    ddp, fsdp2 = (losses(RunDir(launched[0] / name)) for name in ("ddp-skip", "fsdp2-skip"))
    for one, other in zip(ddp[3:], fsdp2[3:], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
