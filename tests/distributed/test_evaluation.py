"""eval_loss is the same whatever the plan, the number of processes and the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir

PLANS = ("ddp", "zero3", "fsdp2")
# Seven held-out rows of unequal lengths: no number of processes or rows of a batch divides them.
COMMON = (
    "data.train={task: mix, rows: 31, seed: 1}",
    "data.eval_size=7",
    "train.eval_strategy=steps",
    "train.eval_steps=1",
    "train.max_steps=2",
    "train.global_batch_size=8",
)


@pytest.fixture(scope="module")
def losses(
    tiny_run: Callable[..., RunDir], launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    """The evaluation losses of each run: `one-N` of one process, the others of two."""
    folder = tmp_path_factory.mktemp("evaluation")

    def make(name: str, *overrides: str) -> RunDir:
        return tiny_run(folder, name, *COMMON, *overrides)

    one = {f"one-{size}": make(f"one-{size}", f"train.per_device_eval_batch_size={size}") for size in (1, 7)}
    two = {plan: make(plan, f"parallel.plan={plan}", "train.per_device_eval_batch_size=3") for plan in PLANS}
    # Two processes share each row; in a world of its own, since DeepSpeed replaces the attention of all later models.
    size = ("train.per_device_eval_batch_size=3", "parallel.sequence_parallel_size=2", "model.attn_implementation=sdpa")
    shared = {"shared": make("shared", "parallel.plan=zero2", *size)}
    launch(
        {1: [run.path for run in one.values()], 2: [run.path for run in two.values()], "1x2": [shared["shared"].path]}
    )
    runs = {**one, **two, **shared}
    return {
        name: [row["eval_loss"] for row in read_jsonl(run.metrics) if "eval_loss" in row] for name, run in runs.items()
    }


@pytest.mark.parametrize("name", ["one-7", *PLANS, "shared"])
def test_the_evaluation_loss_is_that_of_one_process_row_by_row(losses: dict[str, list[float]], name: str) -> None:
    assert len(losses["one-1"]) >= 2
    assert losses[name] == pytest.approx(losses["one-1"], rel=2e-6)
