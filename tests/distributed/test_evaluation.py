"""eval_loss is the same whatever the plan, the number of processes and the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir

SHARDED = ("zero3", "fsdp2")
PLANS = ("ddp", *SHARDED)
# Seven held-out rows of unequal lengths: no number of processes or rows of a batch divides them.
COMMON = (
    "data.train={task: mix, rows: 31, seed: 1}",
    "data.eval_size=7",
    "train.eval_strategy=steps",
    "train.eval_steps=1",
    "train.max_steps=2",
    "train.global_batch_size=8",
)
# The main process asks between the steps, and the other one waits.
ASKED = (
    "evaluate.data={task: tickets, rows: 6}",
    "evaluate.during={steps: 1, rows: 3}",
    "evaluate.generation.max_new_tokens=4",
)


@pytest.fixture(scope="module")
def runs(
    tiny_run: Callable[..., RunDir], launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, RunDir]:
    """`one-N` of one process with N rows a batch, the others of two processes."""
    folder = tmp_path_factory.mktemp("evaluation")

    def make(name: str, *overrides: str) -> RunDir:
        return tiny_run(folder, name, *COMMON, *overrides)

    one = {f"one-{size}": make(f"one-{size}", f"train.per_device_eval_batch_size={size}") for size in (1, 7)}
    common, full = "train.per_device_eval_batch_size=3", ("checkpoint.verify_export=full",)
    two = {f"asked-{plan}": make(f"asked-{plan}", f"parallel.plan={plan}", common, *ASKED) for plan in ("ddp", "zero2")}
    two |= {plan: make(plan, f"parallel.plan={plan}", common, *(full if plan in SHARDED else ())) for plan in PLANS}
    # Two processes share each row; in a world of its own, since DeepSpeed replaces the attention of all later models.
    size = ("train.per_device_eval_batch_size=3", "parallel.sequence_parallel_size=2", "model.attn_implementation=sdpa")
    shared = {"shared": make("shared", "parallel.plan=zero2", *size)}
    launch(
        {1: [run.path for run in one.values()], 2: [run.path for run in two.values()], "1x2": [shared["shared"].path]}
    )
    return {**one, **two, **shared}


@pytest.fixture(scope="module")
def losses(runs: dict[str, RunDir]) -> dict[str, list[float]]:
    """The evaluation losses of each run."""
    return {
        name: [row["eval_loss"] for row in read_jsonl(run.metrics) if "eval_loss" in row] for name, run in runs.items()
    }


@pytest.mark.parametrize("name", ["one-7", *PLANS, "shared", "asked-ddp", "asked-zero2"])
def test_the_evaluation_loss_is_that_of_one_process_row_by_row(losses: dict[str, list[float]], name: str) -> None:
    assert len(losses["one-1"]) >= 2
    assert losses[name] == pytest.approx(losses["one-1"], rel=2e-6)


@pytest.mark.parametrize("plan", SHARDED)
def test_the_published_model_predicts_what_the_plan_did_with_its_shards(runs: dict[str, RunDir], plan: str) -> None:
    """The logits are those of all processes together; a fresh process compared them before DONE."""
    proof = read_json(runs[plan].model / "PROOF.json")
    assert (runs[plan].model / "DONE").is_file()
    assert len(proof["logits"]["rows"]) == 4
    assert proof["logits_apart"] < 1e-4


@pytest.mark.parametrize("plan", ["ddp", "zero2"])
def test_the_model_is_asked_between_steps(runs: dict[str, RunDir], plan: str) -> None:
    rows = [row for row in read_jsonl(runs[f"asked-{plan}"].metrics) if "eval_data/n" in row]
    assert [(row["step"], row["eval_data/n"]) for row in rows] == [(1, 3)]
    assert 0 <= rows[0]["eval_data/exact"] <= 1
