"""A checkpoint is as large as the planner says, under every plan: nothing of frozen weights is in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sft_dist.config.loader import load_run_config
from sft_dist.parallel.architecture import find_architecture
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.shares import state_bytes
from sft_dist.parallel.storage import checkpoint_bytes
from sft_dist.parallel.weights import Weights, weights_of
from sft_dist.rundir import RunDir

pytest.importorskip("peft", reason="needs the package peft, not installed here (make setup)")

PLANNED = ("cpu", "ddp", "zero1", "zero2", "zero3", "fsdp2")
# The tiny model's adapter is larger than the model.
COMMON = (
    "model.lora={r: 256}",
    "model.dtype=bfloat16",
    "train.max_steps=1",
    "train.global_batch_size=2",
    "checkpoint.save_strategy=steps",
    "checkpoint.save_steps=1",
)
# Names, random states, the schedule and pickle's own bytes, of all files together, are up to so many.
BESIDE = 500_000


@pytest.fixture(scope="module")
def runs(
    tiny_run: Callable[..., RunDir], launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, RunDir]:
    folder = tmp_path_factory.mktemp("sizes")
    made = {plan: tiny_run(folder, plan, *COMMON, f"parallel.plan={plan}") for plan in PLANNED}
    launch({1: [made["cpu"].path], 2: [made[plan].path for plan in PLANNED[1:]]})
    return made


def counted(run: RunDir) -> tuple[Weights, Layout]:
    config = load_run_config(run.config)
    architecture, _ = find_architecture(config.model)
    layout = Layout(PLANS[run.name], processes_per_node=1 if run.name == "cpu" else 2, use_cpu=True)
    return weights_of(architecture, config.model.lora, "bfloat16"), layout


@pytest.mark.parametrize("plan", PLANNED)
def test_a_checkpoint_of_an_adapter_is_as_large_as_the_planner_says(runs: dict[str, RunDir], plan: str) -> None:
    run = runs[plan]
    weights, layout = counted(run)
    files = [path for path in run.checkpoints.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(run.checkpoints)): path.stat().st_size for path in files}
    said = checkpoint_bytes(weights, layout)
    assert said <= sum(sizes.values()) <= said + BESIDE, sizes
    assert 2 * weights.trained > 2 * BESIDE, "two bytes an element more or less would be seen"


def test_the_optimizer_of_an_adapter_holds_masters_and_moments_of_it_alone(runs: dict[str, RunDir]) -> None:
    run = runs["cpu"]
    weights, layout = counted(run)
    states = torch.load(run.checkpoints / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    held = sum(tensor.nbytes for state in states.values() for name, tensor in state.items() if name != "step")
    assert held == state_bytes(layout, weights)[2] * weights.trained
    assert {str(state["master"].dtype) for state in states.values()} == {"torch.float32"}
